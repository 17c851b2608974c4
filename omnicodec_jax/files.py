"""Files that are whole or not there at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from omnicodec_jax.names import NAME_BYTES

LFS = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a temporary name to write to; it is renamed to `path` when the block ends, removed when it fails.

    The suffix is kept, for writers that choose the format by it. Who may read the file, the umask says, whatever the
    writer does: safetensors keeps others out. folder: where the temporary lies, on the same file system; default:
    beside `path`.
    """
    folder = folder or path.parent
    for directory in (path.parent, folder):
        directory.mkdir(parents=True, exist_ok=True)
    end = f".{uuid.uuid4().hex}.partial{path.suffix}"
    room = NAME_BYTES - len(os.fsencode(f".{end}"))
    stem = os.fsencode(path.stem)
    start = path.stem if len(stem) <= room else stem[:room].decode(errors="ignore")
    temporary = folder / f".{start}{end}"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of a large one that was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(LFS)) == LFS
