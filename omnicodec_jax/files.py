"""Writes files as a whole or not at all, and says what to do where they cannot be written."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from omnicodec_jax import buckets
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.names import NAME_BYTES

LFS = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a pointer of Git LFS."""
LFS_POINTER = "a pointer of Git LFS, not the file itself; run: git lfs pull"
"""The message about a file that is such a pointer."""
ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a place that takes files of this size",
    errno.EROFS: "choose another place",
    errno.EACCES: "get the right to write there, or choose another place",
    errno.EPERM: "get the right to write there, or choose another place",
    errno.ENOTDIR: "a file stands where a directory is needed; choose another place",
    errno.EISDIR: "a directory stands where the file goes; choose another place",
    errno.EEXIST: "a file stands where a directory is needed; choose another place",
}
"""Advice for errors with which the operating system refuses to write a file."""
NO_FILE = "a directory, a pipe or a device; only files are read"
"""The message about a device or a pipe in place of a file: it may have no end, or never a beginning."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""The errors of a disk to which nothing more can be written."""
PROBE = bytes(1 << 20)
"""The bytes that are written to a disk to find out whether it takes more."""
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]+\.partial.*")
"""Names of temporary files."""


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes arrays as safetensors. Each is laid out row by row first: safetensors 0.8 writes its memory as it lies."""
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path, metadata)


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a temporary name to write to; it is renamed to `path` when the block ends, removed when it fails.

    The suffix is kept, for writers that choose the format by it. Who may read the file, the umask says, whatever the
    writer does: safetensors keeps others out. folder: where the temporary lies, on the same file system; default:
    beside `path`. A path in a bucket is written to a file of this machine, which is put there when the block ends.
    Raises OSError that names `path` and says what to do where it cannot be written.
    """
    if isinstance(path, BucketPath):
        temporary = _temporary(path, buckets.copies())
        try:
            yield temporary
            path.put(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        return
    folder = folder or path.parent
    temporary = _temporary(path, folder)
    with writing(path, temporary):
        for directory in (path.parent, folder):
            directory.mkdir(parents=True, exist_ok=True)
        while (held := lock(temporary)) is None:  # another run holds it for a moment, to see whether it is a leftover
            pass
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
        except OmniCodecError:
            raise
        except Exception as error:
            if not (isinstance(error, OSError) and error.errno) and (trouble := _trouble(error, temporary)):
                raise trouble from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
            os.close(held)


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[Path]:
    """Works as `replacing`, and first removes what killed runs have left; for files that every run writes anew."""
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary


def remove_leftovers(*paths: Path, folder: Path | None = None) -> None:
    """Removes half-written files of processes that were killed while they wrote one of the paths.

    What a living process is writing is locked, and stays; where the file system has no locks, all of it stays. In a
    bucket there is nothing half-written.

    Args:
        paths: The files that were to be written. Each folder is read once, however many of them belong to it.
        folder: Where their temporaries lie; None: beside them.
    """
    stems = defaultdict[Path, set[str]](set)
    for path in paths:
        if isinstance(path, BucketPath):
            continue
        stems[folder or path.parent].add(_stem(path))
    for place, wanted in stems.items():
        _remove_unlocked(path for path, stem in _temporaries(place) if stem in wanted)


def sweep(directory: Path) -> None:
    """Removes all half-written files below a directory that killed processes have left, as `remove_leftovers` does."""
    if isinstance(directory, BucketPath):
        return
    for folder, _, _ in os.walk(directory):
        _remove_unlocked(path for path, _ in _temporaries(Path(folder)))


def _temporaries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yields the temporaries in a folder, each with the stem of the file that it was to become."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name := TEMPORARY.fullmatch(entry.name):
                yield folder / entry.name, name["stem"]


def _remove_unlocked(temporaries: Iterable[Path]) -> None:
    for path in temporaries:
        # A file that is gone, in use or not ours stays, and so does every file where there are no locks.
        with contextlib.suppress(OSError), open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _temporary(path: Path, folder: Path) -> Path:
    return folder / f".{_stem(path)}.{uuid.uuid4().hex}.partial{path.suffix}"


def _stem(path: Path) -> str:
    """Returns as much of a file's name as fits into its temporary name."""
    room = NAME_BYTES - len(os.fsencode(f"..{uuid.UUID(int=0).hex}.partial{path.suffix}"))
    stem = os.fsencode(path.stem)
    return path.stem if len(stem) <= room else stem[:room].decode(errors="ignore")


def lock(path: Path) -> int | None:
    """Locks a file, which is made if it is not there. Returns a descriptor, or None if another process holds the lock.

    The operating system gives it back when the process ends, however it ends. Where the file system has no locks,
    nothing is held.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its last owner has just removed it


@contextlib.contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A context in which errors of the operating system name the file that is written, and say what to do."""
    try:
        yield
    except OSError as error:
        known = {str(place) for made in (path, temporary or path) for place in (made, *made.parents)}
        advice = ADVICE.get(error.errno or 0)
        named = error.filename2 or error.filename  # of a copy that fails, the second one is what is written
        if advice is None or (named is not None and str(named) not in known):
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)}; {advice}", str(path)) from error


def check_place(path: Path) -> None:
    """Raises OSError now where a file could not be written after hours of work, and BucketError for a URL to read."""
    if isinstance(path, BucketPath):
        path.check_writable()
        return
    probe = _temporary(path, path.parent)
    with writing(path, probe):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def disk_error(error: BaseException, folder: Path) -> OSError | None:
    """Returns the error of a full or read-only disk that is behind an error, with advice; None if there is none.

    Args:
        error: What was raised. After one that is no OSError, this function writes to the folder to find out.
        folder: A folder on the disk. In a bucket, nothing is written to find out.
    """
    refused = error if isinstance(error, OSError) else _asked(error, folder)
    if refused is None or refused.errno not in FULL:
        return None
    advice = ADVICE[refused.errno]
    if advice in str(refused):  # `writing` has said it
        return refused
    return OSError(refused.errno, f"{os.strerror(refused.errno)}; {advice}", str(refused.filename or folder))


def _asked(error: BaseException, folder: Path) -> OSError | None:
    """Returns the error with which the operating system refuses to write into a folder; None if it does not."""
    if isinstance(folder, BucketPath) or not folder.is_dir():
        return None
    probe = _temporary(folder / "probe", folder)
    try:
        return _trouble(error, probe)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _trouble(error: BaseException, path: Path) -> OSError | None:
    """Returns the operating system's error behind an error of a library; None if there is none.

    The text of safetensors' errors has its number. After errors of other libraries, the file is written to.
    """
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    try:
        with open(path, "ab") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as trouble:
        return trouble
    return None


def digest(path: Path) -> str:
    """Returns 16 hex digits that identify what a file holds.

    Raises OSError, and OmniCodecError for a pipe or a device, which may have no end.
    """
    if path.exists() and not path.is_file():
        raise OmniCodecError(f"{path}: {NO_FILE}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a pointer, which Git LFS leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def refuse_lfs_pointer(path: Path, error: type[OmniCodecError]) -> None:
    """Raises an error of a type if a file is there and is a pointer of Git LFS."""
    if path.is_file() and is_lfs_pointer(path):
        raise error(f"{path}: {LFS_POINTER}")
