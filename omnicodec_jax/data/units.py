"""Work in units that many processes share without talking: who does what, what is done, what was refused.

A unit is a slice of a manifest. It leaves a JSON file beside its result when it is finished; whoever comes last joins
those into one index.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from omnicodec_jax import names
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.errors import DataError, OmniCodecError
from omnicodec_jax.files import replacing

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


def remove_leftovers(path: Path) -> None:
    """Half-written files of a process that was killed while it wrote `path`."""
    for leftover in path.parent.glob(f".{path.stem}.*.partial*"):
        leftover.unlink()


def reason(path: Any, error: Exception) -> str:
    """Why a file is refused, without its name."""
    text = str(error) if isinstance(error, (OmniCodecError, OSError)) else f"{type(error).__name__}: {error}"
    return text.removeprefix(f"{path}: ")


def refusal(folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """The line of rejects.jsonl for an entry of a list whose paths begin in `folder`; all of it is UTF-8."""
    why = reason(folder / entry.path, error)
    return {"id": names.text(entry.id), "path": names.text(entry.path), "reason": names.text(why)}


def join(folder: Path, rows: dict[Path, Callable[[Any], Iterable[Any]]]) -> None:
    """Joins what finished units have left in `folder` into JSON-lines files: for each, what to take of every unit.

    Of several processes that end at once, the last one to write sees everything: whoever finds more afterwards than
    it has written writes again.
    """
    written = None
    while (names := sorted(path.name for path in folder.glob("[!.]*.json"))) != written:
        done = [json.loads((folder / name).read_text()) for name in names]
        for path, take in rows.items():
            with replacing(path) as temporary, open(temporary, "w") as file:
                file.writelines(json.dumps(row) + "\n" for unit in done for row in take(unit))
        written = names
