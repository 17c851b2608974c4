"""Reads one file of a corpus: tells it from another that takes its place, and says why a file is refused."""

import errno
import os
import signal
import stat
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from omnicodec_jax import buckets, names
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.members import Member
from omnicodec_jax.errors import AudioError, OmniCodecError, UnreadableError, told
from omnicodec_jax.files import NO_FILE

T = TypeVar("T")


class Seen(NamedTuple):
    """Size and time of a file when it was read, which tell it from another that is put in its place."""

    size: int
    """Bytes."""
    modified: int
    """Time of the last change, in nanoseconds; in a bucket, a number that stands for the object's tag."""

    @classmethod
    def of(cls, path: Any) -> "Seen":
        """Looks at a file. Raises OSError, and AudioError for what is no file, and for a name that none can have."""
        if isinstance(path, BucketPath):
            return cls(*buckets.state_of(str(path)))
        if isinstance(path, Member):
            return cls(*path.state())
        try:
            status = os.stat(path)
        except ValueError:
            raise AudioError(f"{path}: no such file") from None
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{path}: {NO_FILE}")
        return cls(status.st_size, status.st_mtime_ns)


def attempt(path: Any, read: Callable[[], T]) -> T:
    """Returns what `read` makes of a file. Raises UnreadableError where it failed because of the operating system.

    An unmounted disk, missing rights, a lost connection or too little memory say nothing about the file itself.
    Decoders report such errors in words of their own; so when they refuse a file, it is read once to see whether the
    operating system gives its bytes.
    """
    try:
        return read()
    except MemoryError:
        raise UnreadableError(f"{path}: out of memory") from None
    except Exception as error:
        if trouble := error if isinstance(error, OSError) else _trouble(path):
            why = "no such file" if trouble.errno == errno.ENOENT else trouble.strerror or trouble
            raise UnreadableError(f"{path}: {why}") from None
        raise


def _trouble(path: Any) -> OSError | None:
    """Returns the error with which the operating system refuses to give the bytes of a file; None if it gives them."""
    if isinstance(path, (BucketPath, Member)):  # all bytes were read before they were decoded
        return None
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    except OSError as error:
        return error
    except ValueError:  # a name that no file can have
        return None
    return None


def death(exit_code: int | None) -> AudioError:
    """Returns the error that a file is refused with because its decoder's process died.

    A crash is a verdict on the file. A process that was killed says nothing about the file: the error is then an
    UnreadableError, so that the next run tries the file again.
    """
    kind = UnreadableError if exit_code in (-signal.SIGKILL, -signal.SIGTERM) else AudioError
    return kind(f"its decoder died with exit code {exit_code}")


def reason(path: Any, error: Exception) -> str:
    """Returns why a file is refused, in words, without the name of the file."""
    text = told(error) if isinstance(error, (OmniCodecError, OSError)) else f"{type(error).__name__}: {error}"
    return text.removeprefix(f"{path}: ")


def refusal(number: int, folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """Returns the line that a unit keeps about an entry that is refused. All of its text is valid UTF-8.

    With "again", the line says that the next run tries the entry once more, because the error was no verdict on it.

    Args:
        number: Number of the entry in its unit.
        folder: Directory that the relative paths of the entries begin in.
        entry: The entry.
        error: Why it is refused.
    """
    why = reason(entry.file(folder), error)
    row = {"entry": number, "id": names.text(entry.id), "path": names.text(entry.path), "reason": names.text(why)}
    return row | {"again": True} if isinstance(error, (UnreadableError, OSError)) else row
