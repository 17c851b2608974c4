"""Work in units that many processes share without talking: who does what, what is left to do, and what was refused.

A unit is a slice of a manifest, and becomes one shard. A job over units has three steps:

    plan      the manifests are read once; of the units, this process does its share (`Share`)
    settle    what earlier runs have finished is found by the JSON file that each finished unit has left (`Plan`)
    collect   when a process has done its share, the JSON files of all finished units are joined into one index

Between settling and collecting, a unit that is left is done by whoever computes it, who keeps its `Outcomes`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TextIO, TypeVar

from tqdm import tqdm

from omnicodec_jax import buckets, names
from omnicodec_jax.buckets import BucketPath, as_path, in_threads
from omnicodec_jax.data.attempts import Seen
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.members import Member, is_in_bucket
from omnicodec_jax.errors import AudioError, DataError
from omnicodec_jax.files import rewriting

T = TypeVar("T")

ASSUMED_SECONDS = 10.0
"""Length that a clip is taken to have when its manifest does not say it. Only the size of units depends on it."""
UNIT_ENTRIES = 4096
"""Largest number of entries in a unit."""
UNITS_AT_ONCE = 64
"""Number of units in a bucket of which is asked at a time what is left to do."""


# -- Plan


class Share(NamedTuple):
    """The share of one process: every `count`-th unit, from number `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads a share that is written as "i/n": "2/8" is the third of eight. Raises DataError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise DataError(f"--task {text!r}: must be i/n with 0 ≤ i < n")
        return cls(int(index), int(count))


@dataclasses.dataclass(frozen=True)
class Unit:
    """A slice of a manifest, and the shard that it becomes."""

    name: str
    """Name of the shard's file, without its suffix."""
    domain: str
    folder: Path
    """Directory that the relative paths of the entries begin in."""
    entries: tuple[Entry, ...]


U = TypeVar("U", bound=Unit)


def entries_digest(entries: Sequence[Entry], size: int) -> str:
    """Returns 2 · `size` hex digits that identify entries of a manifest."""
    return hashlib.blake2b(json.dumps([entry.identity for entry in entries]).encode(), digest_size=size).hexdigest()


class Slice:
    """Entries that are gathered, one after the other, until they fill a unit."""

    def __init__(self, hours: float):
        """Begins an empty slice.

        Args:
            hours: About how many hours of audio a full slice has.
        """
        self.number = 0
        """The number of slices that have been taken before."""
        self._hours = hours
        self._entries: list[Entry] = []
        self._seconds = 0.0

    def add(self, entry: Entry) -> bool:
        """Adds an entry; returns whether the slice is full."""
        self._entries.append(entry)
        self._seconds += ASSUMED_SECONDS if entry.seconds is None else entry.seconds
        return self._seconds >= 3600 * self._hours or len(self._entries) == UNIT_ENTRIES

    def __bool__(self) -> bool:
        return bool(self._entries)

    def take(self) -> tuple[Entry, ...]:
        """Returns the entries, and begins the next slice."""
        entries = tuple(self._entries)
        self._entries, self._seconds, self.number = [], 0.0, self.number + 1
        return entries


class Plan(Generic[U]):
    """The units of one share of a job, and how much of them is left to do."""

    def __init__(
        self,
        units: Callable[[], Iterable[U]],
        share: Share,
        finished: Callable[[U], dict[str, Any] | None],
        retry_rejected: bool,
        is_in_bucket: bool = False,
    ):
        """Looks at what earlier runs have left of each unit.

        Args:
            units: Gives all units of the job, of all shares; called again, the same ones.
            share: Which of them belong to this process.
            finished: Returns what the JSON file of a finished unit holds, and None for any other unit.
            retry_rejected: Whether entries that were refused are tried once more.
            is_in_bucket: Whether what earlier runs have left is in a bucket. Then many units are looked at at once.
        """
        self._units, self._share = units, share
        self.names: list[str] = []
        """Names of the units of this share."""
        self.listed = 0
        """Number of entries in these units."""
        self.left: dict[str, int] = {}
        """The number of entries that are left to do, by unit; units of which nothing is left are absent."""

        def left(unit: U) -> int:
            return len(to_do(finished(unit), unit, retry_rejected))

        own = self._own()
        while some := list(itertools.islice(own, UNITS_AT_ONCE if is_in_bucket else 1)):
            many = in_threads if is_in_bucket else itertools.starmap
            for unit, number in zip(some, many(left, ((unit,) for unit in some)), strict=True):
                self.names.append(unit.name)
                self.listed += len(unit.entries)
                if number:
                    self.left[unit.name] = number

    def _own(self) -> Iterator[U]:
        return itertools.islice(self._units(), self._share.index, None, self._share.count)

    @property
    def files(self) -> int:
        """Number of entries that are left to do."""
        return sum(self.left.values())

    def unfinished(self) -> Iterator[U]:
        """Yields the units of which something is left to do."""
        return (unit for unit in self._own() if unit.name in self.left)


class Progress:
    """Progress bar of a job, with files, hours of audio, and the speed as a multiple of real time."""

    def __init__(self, what: str, total: int):
        pause = 1.0 if sys.stderr.isatty() else 60.0  # a log keeps every line
        self.bar = tqdm(total=total, desc=what, unit="file", mininterval=pause, disable=not total)
        self.units, self.rejected, self.seconds, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, seconds: float, note: str = "") -> None:
        """Counts one more file, of so many seconds of audio; 0 seconds stand for a file that was refused."""
        self.seconds += seconds
        self.rejected += seconds == 0
        speed = self.seconds / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{self.seconds / 3600:.2f} h, {speed:.0f} x real time{note}", refresh=False)
        self.bar.update()


# -- What earlier runs have left


def read_settings(path: Path) -> dict[str, Any]:
    """Reads what a directory was made with. Raises DataError for a file that is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}; use another directory to write to") from None


def read_marker(path: Path) -> dict[str, Any] | None:
    """Reads the JSON file that a finished unit has left; None if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


# -- What became of the entries of a unit


def listed(finished: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what rejects.jsonl lists of a finished unit."""
    return [{name: value for name, value in row.items() if name != "entry"} for row in finished["rejects"]]


def to_do(finished: dict[str, Any] | None, unit: Unit, retry_rejected: bool) -> list[int]:
    """Returns the numbers of a unit's entries that are left to do.

    These are all entries of a unit that is not finished. Of a finished one, they are the entries that the operating
    system did not give, those whose file has been replaced, and with `retry_rejected` all that were refused.

    Args:
        finished: What the unit's JSON file holds, {"rejects": rows of `refusal`, "clips": [[entry, *Seen], …],
            "folder": where its paths begin}, and "skipped" like "clips" where entries were left out; None if the unit
            is not finished. Files of version 0.1 have no "clips" and no "folder".
        unit: The unit.
        retry_rejected: Whether entries that were refused are tried once more.
    """
    everything = list(range(len(unit.entries)))
    if finished is None:
        return everything
    again = [row for row in finished["rejects"] if retry_rejected or row.get("again")]
    if again and "clips" not in finished:
        return everything
    clips = [*finished.get("clips", []), *finished.get("skipped", [])]
    files = [(unit.entries[number].file(unit.folder), seen) for number, *seen in clips]
    many = in_threads if any(is_in_bucket(path) for path, _ in files) else itertools.starmap
    replaced = [number for (number, *_), is_other in zip(clips, many(_replaced, files), strict=True) if is_other]
    return sorted({*(row["entry"] for row in again), *replaced})


def _replaced(path: Path | Member, seen: Sequence[int]) -> bool:
    """Returns whether another file has taken the place of the one that was seen; False if that cannot be found out."""
    try:
        return Seen.of(path) != tuple(seen)
    except (OSError, AudioError):
        return False


class Outcomes(Generic[T]):
    """The state of each entry of a unit: a clip, a refusal, or nothing yet.

    Clips that earlier runs have made are kept, when the unit is done once more for the sake of other entries.
    """

    def __init__(self, unit: Unit, finished: dict[str, Any] | None, clips: Sequence[T] | None, retry_rejected: bool):
        """Takes over what an earlier run has left.

        Args:
            unit: The unit.
            finished: What the unit's JSON file holds; None if it is not finished.
            clips: What the unit's shard holds, in the order of the entries; None if it cannot be used.
            retry_rejected: Whether entries that were refused are tried once more.
        """
        self._unit = unit
        self.clips: dict[int, T] = {}
        self.to_do = to_do(finished, unit, retry_rejected)
        """Numbers of the entries that this run does."""
        self.is_resumed = False
        """Whether the clips of an earlier run have been taken over."""
        self._folder: Path | None = None
        """The folder that the paths of those clips begin in; None where version 0.1 has written them."""
        self._seen: dict[int, Seen] = {}
        self._skipped: dict[int, Seen] = {}
        self._rejects: dict[int, dict[str, Any]] = {}
        if finished is not None:
            self._resume(finished, clips)
        self._open = set(self.to_do)

    def _resume(self, finished: dict[str, Any], clips: Sequence[T] | None) -> None:
        numbers = [number for number, *_ in finished.get("clips", [])]
        # The file is of version 0.1, or a run was killed after it had replaced the shard and before it wrote this file.
        if "clips" not in finished or clips is None or len(numbers) != len(clips):
            self.to_do = list(range(len(self._unit.entries)))
            return
        self.is_resumed, self.clips = True, dict(zip(numbers, clips, strict=True))
        self._seen = {number: Seen(*seen) for number, *seen in finished["clips"]}
        self._skipped = {number: Seen(*seen) for number, *seen in finished.get("skipped", [])}
        self._rejects = {row["entry"]: row for row in finished["rejects"]}
        self._folder = as_path(finished["folder"]) if "folder" in finished else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open

    @property
    def num_rejects(self) -> int:
        """Number of entries that are refused."""
        return len(self._rejects)

    def add(self, number: int, clip: T, seen: Seen) -> None:
        """Keeps the clip that an entry has become."""
        self._forget(number)
        self.clips[number], self._seen[number] = clip, seen

    def keep(self, number: int, seen: Seen) -> None:
        """Keeps the clip that an entry had become before: its file is another one, but holds the same bytes."""
        self._open.discard(number)
        self._seen[number] = seen

    def refuse(self, number: int, row: dict[str, Any]) -> None:
        """Refuses an entry with a row of `refusal`. If this is no verdict, a clip that it had become before is kept.

        Raises DataError as `check_place`.
        """
        if row.get("again") and number in self.clips:
            self._open.discard(number)
            return
        self.check_place(number)
        self._forget(number)
        self._rejects[number] = row

    def leave_out(self, number: int, seen: Seen) -> None:
        """Leaves an entry out without refusing it, for as long as its file is the one that was seen."""
        self._forget(number)
        self._skipped[number] = seen

    def check_place(self, number: int) -> None:
        """Raises DataError where an entry is about to lose its clip to a file of another folder.

        The lines of two corpora may be the same, as their files may be called alike. A corpus that has moved holds the
        same, and loses nothing.
        """
        if number not in self.clips or self._folder is None:
            return
        folders = self._folder, as_path(_text_of(self._unit.folder))
        held, other = (names.text(str(self._unit.entries[number].file(folder))) for folder in folders)
        if held != other:
            raise DataError(
                f"the clip of {held} is there already, and would be lost to that of {other}; use another --out"
            )

    def _forget(self, number: int) -> None:
        """Forgets whatever was known of an entry, of which nothing is left to do."""
        self._open.discard(number)
        self.clips.pop(number, None)
        for known in (self._seen, self._skipped, self._rejects):
            known.pop(number, None)

    def to_json(self, shard: dict[str, Any], **more: Any) -> str:
        """Returns the text of the JSON file that marks the unit as finished. `shard` is its line of the index."""
        rejects = [self._rejects[number] for number in sorted(self._rejects)]
        clips, skipped = ([[number, *seen[number]] for number in sorted(seen)] for seen in (self._seen, self._skipped))
        left_out = {"skipped": skipped} if skipped else {}
        folder = {"folder": _text_of(self._unit.folder)}
        return json.dumps({"shard": shard, "rejects": rejects, "clips": clips, **left_out, **folder, **more}) + "\n"


def _text_of(folder: Path) -> str:
    """Returns the name of a folder from wherever it is seen, as valid UTF-8."""
    return names.text(str(folder.resolve()))


# -- Collect


def collect(folder: Path, index: Path, rejects: Path) -> None:
    """Joins the JSON files that finished units have left in `folder` into the two lists of a job.

    When several processes end at once, the last one to write sees the files of all: a process that finds more units
    after it has written than before writes again.
    """
    written = None
    while (found := _units(folder)) != written:
        with _lines_of(index) as shard_lines, _lines_of(rejects) as reject_lines:
            for text in read_texts([folder / name for name, _ in found]):
                try:
                    unit = json.loads(text)
                except ValueError:  # damaged: the unit is not finished
                    continue
                shard_lines.write(json.dumps(unit["shard"]) + "\n")
                reject_lines.writelines(json.dumps(row) + "\n" for row in listed(unit))
        written = found


@contextlib.contextmanager
def _lines_of(path: Path) -> Iterator[TextIO]:
    """Opens a text file that takes the place of `path` when it is written."""
    with rewriting(path) as temporary, open(temporary, "w") as file:
        yield file


def _units(folder: Path) -> list[tuple[str, Seen]]:
    """Returns names and states of the JSON files of finished units."""
    if isinstance(folder, BucketPath):
        found = sorted((path, Seen(*buckets.state_in(info))) for path, info in folder.find().items())
        return [(path.name, seen) for path, seen in found if path.parent == folder and path.suffix == ".json"]
    return [(path.name, Seen.of(path)) for path in sorted(folder.glob("[!.]*.json"))]


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Reads files in their order; those in a bucket many at a time."""
    if any(isinstance(path, BucketPath) for path in paths):
        return in_threads(lambda path: path.read_text(), ((path,) for path in paths))
    return (path.read_text() for path in paths)
