"""Decodes files block by block, by libsndfile if it can be told whether the file is whole, or else by FFmpeg."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import av
from av.error import FFmpegError

from omnicodec_jax.data import containers, ffmpeg, sndfile
from omnicodec_jax.data.audio_source import Source
from omnicodec_jax.data.members import Member, on_disk
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import AudioError
from omnicodec_jax.files import LFS_POINTER, NO_FILE, is_lfs_pointer

SAMPLE_RATES = range(1000, 3_000_001)
"""Sample rates that a file may have. A header with any other rate is wrong."""


@contextlib.contextmanager
def reading(path: Path | Member, offset: float = 0.0, duration: float | None = None) -> Iterator[Source]:
    """Opens a file to be read block by block, or a part of it.

    Opening raises AudioError for a file that is no audio. Reading the blocks raises AudioError for a file that is
    damaged or ends too early.

    Args:
        path: The file.
        offset: Where the part begins, in seconds.
        duration: How long the part is, in seconds; None: it reaches to the end of the file.
    """
    try:
        with contextlib.ExitStack() as stack:
            here = _file(path, stack)
            if containers.is_padded(here):
                raise AudioError(
                    "samples of 24 bits in 4 bytes each, which decoders read in several ways; save it anew"
                )
            file = sndfile.open_file(here, stack)
            if file is None:
                source = ffmpeg.source_of(here, stack, offset, duration)
            else:
                source = sndfile.source_of(here, file, offset, duration)
            if source.sample_rate not in SAMPLE_RATES:
                raise AudioError(f"its header says {source.sample_rate} Hz: no audio has such a rate")
            yield source
    except AudioError as error:
        text = str(error)
        raise type(error)(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except FFmpegError as error:
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode: {error.strerror}") from None
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: damaged or truncated: {error.error_string}") from None


def _file(path: Path | Member, stack: contextlib.ExitStack) -> Path:
    """Returns the file of this machine that holds what a path names. Raises AudioError if there is none to read."""
    here = stack.enter_context(on_disk(path))
    if not here.exists():
        raise AudioError("no such file")
    if not here.is_file():
        raise AudioError(NO_FILE)
    if here.stat().st_size == 0:
        raise AudioError("empty file")
    if is_lfs_pointer(here):
        raise AudioError(LFS_POINTER)
    return here


def seconds(path: Path | Member) -> float:
    """Returns how many seconds a file has by its header, without decoding it; 0 if the header does not say."""
    try:
        with contextlib.ExitStack() as stack:
            here = _file(path, stack)
            if file := sndfile.open_file(here, stack):
                return file.frames / file.samplerate
            return (ffmpeg.open_file(here, stack).duration or 0) / av.time_base
    except (AudioError, OSError, ZeroDivisionError):
        return 0.0
