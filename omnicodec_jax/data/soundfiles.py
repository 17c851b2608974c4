"""The module `soundfile`, which has been used once, by one thread, when it is imported from here.

cffi makes the types of a library's functions when these are first called. If two threads make the same one at the same
time, it aborts the process (cffi 2.1.1, an assertion in realize_c_type.c). The threads that read data for training all
begin with the same call.
"""

import contextlib
import io
import os

import numpy as np
import soundfile

__all__ = ["soundfile"]


def _use_once() -> None:
    """Calls what this package calls of soundfile."""
    held = io.BytesIO()
    with soundfile.SoundFile(held, "w", 8000, 1, format="FLAC", subtype="PCM_16") as file:
        file.comment = "-"
        for kind in (np.int16, np.float32):
            file.write(np.zeros(8, kind))
    held.seek(0)
    with soundfile.SoundFile(held, closefd=False) as file:
        for kind in ("int16", "float32"):
            file.seek(0)
            file.read(8, dtype=kind)
        file.comment  # noqa: B018
    with contextlib.suppress(soundfile.LibsndfileError), open(os.devnull, "rb") as nothing:
        soundfile.SoundFile(nothing.fileno(), closefd=False)


_use_once()
