"""Records where a run's wall time goes: which share of it was learning, and what the rest was lost to.

Every start of a run appends lines of JSON to one file of its directory:

    {"began": 1700000000.0, "at": 1700000031.5, "step": 0, "seconds": {"start": 31.5}, "host_gib": 0.9}

`began` is when the process was started and tells the starts apart. `step` is the number of steps that were done when
the line was written (null before the first). `seconds` is what this start has spent until then, by cause. If a process
was killed, the time after its last line counts as lost to the restart.
"""

import contextlib
import itertools
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.errors import TrainingError
from omnicodec_jax.training import host_memory

LOG = logging.getLogger(__name__)

FILE = "time.jsonl"
"""The name of the record in a run's directory."""
Cause = Literal["learning", "start", "compilation", "first batch", "waiting for data", "saving", "validation"]
"""A cause that a process of a run spends its time on."""
RESTARTS = "restarts"
"""The cause of the time from the last line of a process to the beginning of the next."""
DONE_AGAIN = "steps done again"
"""The cause of the time of steps after the checkpoint from which a later process went on."""
CAUSES = (*get_args(Cause), RESTARTS, DONE_AGAIN)
"""All causes that the time of a whole run is spent on: learning first, then those of loss."""


class Line(NamedTuple):
    """A line of the record."""

    began: float
    """The time at which the process was started, in seconds since 1970."""
    at: float
    """The time at which the line was written, in seconds since 1970."""
    step: int | None
    """The number of steps of the run that were done; None: the process had not come to the steps yet."""
    seconds: Mapping[str, float]
    """The seconds that the process had spent until then, by cause."""
    host_gib: float
    """The memory of the process on its host, in GiB."""


class RunClock:
    """Measures how long this process spends on each cause. One cause is current at a time; the first is `start`."""

    def __init__(self, began: float | None = None):
        """Begins to count.

        Args:
            began: When the process was started, in seconds since 1970; None: now.
        """
        self._began = time.time() if began is None else began
        self._cause: Cause = "start"
        self._since = time.perf_counter() - (time.time() - self._began)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._path: Path | None = None
        self._lines: list[Line] = []
        """The lines of earlier starts, then the first line of this start that has a step, then its last line."""
        self.step: int | None = None
        """The number of steps of the run that are done; None: the process has not come to the steps yet."""

    def record_in(self, workdir: Path | None) -> None:
        """Appends all lines from now on to the record in a run's directory. None: there is no record."""
        if workdir is not None:
            self._path, self._lines = workdir / FILE, read(workdir)
        self.record()

    def turn_to(self, cause: Cause) -> Cause:
        """Counts the time from now on as spent on another cause. Returns the previous cause."""
        now, before = time.perf_counter(), self._cause
        self._seconds[before] += now - self._since
        self._since, self._cause = now, cause
        return before

    @contextlib.contextmanager
    def spending(self, cause: Cause) -> Iterator[None]:
        """A context whose time is spent on a cause; afterwards the cause is again what it was before."""
        before = self.turn_to(cause)
        try:
            yield
        finally:
            self.turn_to(before)

    def record(self) -> None:
        """Appends a line to the record."""
        self.turn_to(self._cause)
        line = Line(self._began, time.time(), self.step, dict(self._seconds), host_memory.of_process())
        own = [each for each in self._lines[-2:] if each.began == self._began]
        if own and (len(own) == 2 or own[0].step is None):
            self._lines.pop()
        self._lines.append(line)
        if self._path is None:
            return
        try:
            _append(self._path, line)
        except OSError as error:  # a record that cannot be written must not end the run
            LOG.warning("%s: %s; going on without", self._path, error.strerror)
            self._path = None

    def spent(self) -> "Spent":
        """Returns what the run has spent its time on, over all its starts, until the last line of the record."""
        return Spent.of(self._lines)

    def close(self) -> None:
        """Appends the last line to the record, and logs in one line what the time of the run was spent on."""
        self.record()
        LOG.info("time: %s", self.spent())


class Start(NamedTuple):
    """One start of a run, from the beginning of its process to the last line that the process has recorded."""

    first: Line
    last: Line
    steps: tuple[int, int] | None
    """The step that this start began with, and the step that it came to; None: it came to none."""
    seconds: Mapping[str, float]
    """The seconds that this start has spent, by cause. Steps that a later start did again do not count as learning."""

    @classmethod
    def of(cls, lines: list[Line], limit: float) -> "Start":
        """Sums up the lines of a start. A later start has done the steps from `limit` on again."""
        counted = [line for line in lines if line.step is not None]
        steps = [line.step for line in counted if line.step is not None]
        seconds = dict(lines[-1].seconds)
        if steps and limit < steps[-1]:
            whole, kept = seconds.get("learning", 0.0), _learning_until(counted, limit)
            seconds |= {"learning": kept, DONE_AGAIN: whole - kept}
        return cls(lines[0], lines[-1], (steps[0], steps[-1]) if steps else None, seconds)


class Spent(NamedTuple):
    """The wall time that a run has spent on each cause, over all its starts."""

    seconds: Mapping[str, float]
    """The seconds of each of `CAUSES`."""
    starts: list[Start]

    @classmethod
    def of(cls, lines: list[Line]) -> "Spent":
        """Sums up a record."""
        starts: list[Start] = []
        limit = float("inf")
        for own in reversed([list(group) for _, group in itertools.groupby(lines, lambda line: line.began)]):
            starts.insert(0, start := Start.of(own, limit))
            limit = limit if start.steps is None else min(limit, float(start.steps[0]))
        seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        for start in starts:
            seconds |= {cause: seconds.get(cause, 0.0) + value for cause, value in start.seconds.items()}
        for before, after in itertools.pairwise(starts):
            seconds[RESTARTS] += max(0.0, after.first.began - before.last.at)
        return cls(seconds, starts)

    @property
    def total(self) -> float:
        """The wall time in seconds, from the first start to the last line of the record."""
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of the wall time that each cause has."""
        return {cause: value / max(self.total, 1e-9) for cause, value in self.seconds.items()}

    def __str__(self) -> str:
        """Returns a line that says which share of the time was learning, and what the rest was lost to."""
        learning, *lost = self.shares.items()
        losses = ", ".join(f"{cause} {100 * share:.1f} %" for cause, share in lost if share >= 0.0005)
        return f"{100 * learning[1]:.1f} % of {span(self.total)} was learning; lost: {losses or 'nothing'}"


def _learning_until(lines: list[Line], limit: float) -> float:
    """Returns the seconds of learning until a step. All steps between two lines count as equally long."""
    kept = 0.0
    for before, after in itertools.pairwise(lines):
        assert before.step is not None
        assert after.step is not None
        learnt = after.seconds.get("learning", 0.0) - before.seconds.get("learning", 0.0)
        steps = after.step - before.step
        share = (limit - before.step) / steps if steps else float(limit >= after.step)
        kept += learnt * min(1.0, max(0.0, share))
    return kept


def read(workdir: Path) -> list[Line]:
    """Reads the record of a run, if there is one. Lines that a killed process has cut off are skipped."""
    path, lines = workdir / FILE, list[Line]()
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            fields = json.loads(text)
            lines.append(Line(*(fields[name] for name in Line._fields)))
    return lines


def of_run(workdir: Path) -> Spent:
    """Returns what a run has spent its time on. Raises TrainingError if it has no record of that."""
    if lines := read(workdir):
        return Spent.of(lines)
    raise TrainingError(f"{workdir}: no record of a run's time ({FILE}); `omnicodec train` writes it")


def _append(path: Path, line: Line) -> None:
    if isinstance(path, BucketPath):  # objects cannot be appended to; only one process of a run writes this one
        text = json.dumps(line._asdict()) + "\n"
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text() + text
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        text = json.dumps(line._asdict()).encode() + b"\n"
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a process was killed while it wrote a line, which ends here
                text = b"\n" + text
        file.write(text)


def span(seconds: float) -> str:
    """Returns the text of a length of time, in the unit that suits it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def process_start() -> float:
    """Returns when this process was started, in seconds since 1970; now, where the operating system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.time() - max(0.0, age)
