"""Work in units that many processes share without talking: who does what, what is done, what was refused.

A unit is a slice of a manifest. It leaves a JSON file beside its result when it is finished; whoever comes last joins
those into one index.
"""

import contextlib
import errno
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from tqdm import tqdm

from omnicodec_jax import names
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.errors import AudioError, DataError, OmniCodecError, UnreadableError, told
from omnicodec_jax.files import rewriting

T = TypeVar("T")

ASSUMED_SECONDS = 10.0
"""Length of a clip of which the manifest does not say it, to size the units."""
UNIT_ENTRIES = 4096
"""Most clips of a unit."""


class Task(NamedTuple):
    """This process's share of the units: every `count`-th, beginning with `index`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Task":
        """From "2/8": the third of eight. Raises DataError."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise DataError(f"--task {text!r}: must be i/n with 0 ≤ i < n")
        return cls(int(index), int(count))


class Progress:
    """The bar: files, audio-hours, times real time; tqdm adds the time left."""

    def __init__(self, what: str, total: int):
        pause = 1.0 if sys.stderr.isatty() else 60.0  # a log keeps every line
        self.bar = tqdm(total=total, desc=what, unit="file", mininterval=pause, disable=not total)
        self.units, self.rejected, self.seconds, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, seconds: float, note: str = "") -> None:
        """One more file; of 0 seconds if it was refused."""
        self.seconds += seconds
        self.rejected += seconds == 0
        speed = self.seconds / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{self.seconds / 3600:.2f} h, {speed:.0f} x real time{note}", refresh=False)
        self.bar.update()


# -- What became of the entries of a unit


class Seen(NamedTuple):
    """What tells a file from another that was put in its place."""

    size: int
    modified: int
    """Nanoseconds."""

    @classmethod
    def of(cls, path: Any) -> "Seen":
        """Raises OSError, and AudioError for a name that no file can have."""
        try:
            status = os.stat(path)
        except ValueError:
            raise AudioError(f"{path}: no such file") from None
        return cls(status.st_size, status.st_mtime_ns)


def attempt(path: Any, read: Callable[[], T]) -> T:
    """Returns what `read` makes of a file. Raises UnreadableError where it failed because of the operating system.

    An unmounted disk, missing rights, a lost connection, no memory: none of it says anything about the file. Decoders
    report such errors in words of their own, so that of a file that they refuse it is asked whether it can be read.
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
    """Why the operating system does not give the bytes of a file."""
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
    """What a process that died of a file says of it: of a crash, a verdict; of being killed, that it may try again."""
    kind = UnreadableError if exit_code in (-signal.SIGKILL, -signal.SIGTERM) else AudioError
    return kind(f"its decoder died with exit code {exit_code}")


def reason(path: Any, error: Exception) -> str:
    """Why a file is refused, without its name."""
    text = told(error) if isinstance(error, (OmniCodecError, OSError)) else f"{type(error).__name__}: {error}"
    return text.removeprefix(f"{path}: ")


def refusal(number: int, folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """A unit's line about an entry that it is without; all of it is UTF-8.

    folder: where the paths of the list begin. "again": the next run tries it, since this was no verdict.
    """
    why = reason(folder / entry.path, error)
    row = {"entry": number, "id": names.text(entry.id), "path": names.text(entry.path), "reason": names.text(why)}
    return row | {"again": True} if isinstance(error, (UnreadableError, OSError)) else row


def listed(finished: dict[str, Any]) -> list[dict[str, Any]]:
    """A finished unit's lines of rejects.jsonl."""
    return [{name: value for name, value in row.items() if name != "entry"} for row in finished["rejects"]]


def to_do(finished: dict[str, Any] | None, folder: Path, entries: Sequence[Entry], retry_rejected: bool) -> list[int]:
    """Numbers of the entries that are left to do: all of a unit that is not finished; of one that is, those that the
    operating system did not give, those whose file has been replaced, and, if asked for, all that were refused.

    finished: {"rejects": rows of `refusal`, "clips": [[entry, *Seen], …]}.
    """
    if finished is None:
        return list(range(len(entries)))
    again = [row for row in finished["rejects"] if retry_rejected or row.get("again")]
    if again and "clips" not in finished:  # written before this was kept
        return list(range(len(entries)))
    replaced = [number for number, *seen in finished.get("clips", []) if _replaced(folder / entries[number].path, seen)]
    return sorted({*(row["entry"] for row in again), *replaced})


def _replaced(path: Path, seen: Sequence[int]) -> bool:
    """Whether another file is there now; what cannot be looked at is not."""
    try:
        return Seen.of(path) != tuple(seen)
    except OSError:
        return False


def join(folder: Path, rows: dict[Path, Callable[[Any], Iterable[Any]]]) -> None:
    """Joins what finished units have left in `folder` into JSON-lines files: for each, what to take of every unit.

    Of several processes that end at once, the last one to write sees everything: whoever finds more afterwards than
    it has written writes again.
    """
    written = None
    while (seen := _units(folder)) != written:
        with contextlib.ExitStack() as stack:
            files = [(stack.enter_context(_rewriting(path)), take) for path, take in rows.items()]
            for name, _ in seen:
                unit = json.loads((folder / name).read_text())
                for file, take in files:
                    file.writelines(json.dumps(row) + "\n" for row in take(unit))
        written = seen


@contextlib.contextmanager
def _rewriting(path: Path) -> Iterator[TextIO]:
    with rewriting(path) as temporary, open(temporary, "w") as file:
        yield file


def _units(folder: Path) -> list[tuple[str, Seen]]:
    return [(path.name, Seen.of(path)) for path in sorted(folder.glob("[!.]*.json"))]
