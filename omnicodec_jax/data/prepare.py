"""`omnicodec prepare`: turns raw corpora into shards of segments, by many independent processes. A child process does
each unit (prepare_unit.py). When it dies, another goes on with the unit, from the file at which it died.
A file at which two processes have died is refused."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.child_processes import Child, Children, Died, Finished, Tell
from omnicodec_jax.data import attempts, manifest, records, units
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.manifest import Manifest
from omnicodec_jax.data.prepare_unit import (
    PrepareConfig,
    SplitUnit,
    finished,
    marker_path,
    plan,
    prepare_unit,
    read_settings,
    split_position,
)
from omnicodec_jax.data.sndfile import drop_remarks
from omnicodec_jax.data.units import Plan, Progress, Share
from omnicodec_jax.errors import AudioError, DataError
from omnicodec_jax.files import remove_leftovers, rewriting

LOG = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """The results of a run of `omnicodec prepare`."""

    units: int
    """Units that this run has finished."""
    files: int
    """Files that this run has tried."""
    rejected: int
    """Files that this run has refused."""
    seconds: float
    """Audio that this run has prepared."""
    elapsed: float
    """Seconds that this run has taken."""
    low_rate_seconds: float
    """Audio that this and earlier runs have refused because its sample rate is too low."""
    listed: int
    """Files in all units of this share, those that were finished earlier, too."""
    clips: int
    """Clips in the shards of these units."""


def nothing_held_out(manifests: dict[str, Manifest], config: PrepareConfig) -> Iterator[str]:
    """Yields a warning for each domain of which no file is held out; it says which --validation would hold out one."""
    if config.validation == 0:  # as asked for
        return
    for domain, listed in manifests.items():
        positions: dict[str, float] = {}
        for entry in listed:
            positions[entry.path] = split_position(entry.path)
            if positions[entry.path] < config.validation:
                break
        else:
            lowest = sorted(positions.values())[:2]
            advice = "it takes two files or more"
            if len(lowest) == 2:
                advice = f"--validation {sum(lowest) / 2:.4g} and another --out hold out one file"
            yield (
                f"of the {len(positions)} file(s) of {domain}, none is held out with --validation "
                f"{config.validation:g}: training will have no validation of {domain}; {advice}"
            )


def run(
    sources: dict[str, Path],
    out: Path,
    config: PrepareConfig,
    num_workers: int,
    share: Share,
    retry_rejected: bool = False,
) -> Prepared:
    """Prepares the units of a share that are not finished.

    Args:
        sources: A manifest or a directory for each domain. They are read once, at the beginning.
        out: Directory of the prepared audio.
        config: How audio is prepared.
        num_workers: Number of child processes.
        share: Which units this process does.
        retry_rejected: Whether entries that were refused are tried once more.

    Raises:
        DataError: If the arguments do not fit each other, or what `out` holds.
        OSError: If `out` cannot be written.
    """
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")
    _check(out, config)
    manifests = manifest.read_all(sources)
    for note in nothing_held_out(manifests, config):
        LOG.warning("prepare: %s", note)
    with claim(out, share, "prepared audio"):
        _check(out, config)  # again, since another run may have come and gone while the manifests were read
        _keep(out, config)
        planned = Plan(
            functools.partial(plan, manifests, config),
            share,
            lambda unit: finished(unit, out),
            retry_rejected,
            isinstance(out, BucketPath),
        )
        start, progress = time.perf_counter(), Progress("prepare", planned.files)
        with progress.bar:
            _work(planned.unfinished(), out, config, num_workers, progress, retry_rejected)
        collect(out)
        markers = units.read_texts([marker_path(out, name) for name in planned.names])
        clips = [len(json.loads(text)["shard"]["clips"]) for text in markers]
        return Prepared(
            units=progress.units,
            files=planned.files,
            rejected=progress.rejected,
            seconds=progress.seconds,
            elapsed=time.perf_counter() - start,
            low_rate_seconds=_low_rate_seconds(out),
            listed=planned.listed,
            clips=sum(clips),
        )


def _check(out: Path, config: PrepareConfig) -> None:
    """Raises DataError if `out` was prepared with other settings."""
    if not (out / records.SETTINGS).is_file():
        return
    before, now = (dataclasses.asdict(each) for each in (read_settings(out), config))
    if before != now:
        changed = ", ".join(f"{name} = {before[name]}, now {now[name]}" for name in now if before[name] != now[name])
        raise DataError(f"{out}: was prepared with other settings ({changed}); use those, or another --out")


def _keep(out: Path, config: PrepareConfig) -> None:
    """Writes the settings to the directory of the data."""
    with rewriting(out / records.SETTINGS) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


@dataclasses.dataclass
class _Attempt:
    """A unit, and what is known from the processes that have died while they worked on it."""

    unit: SplitUnit
    refused: dict[int, AudioError] = dataclasses.field(default_factory=dict)
    """The reasons why entries are refused without being tried, by their numbers."""
    current: int = -1
    """Number of the entry that the process is at; -1 before the first one."""
    suspect: int | None = None
    """Number of the entry that the last process was at when it died; None if none has died."""
    counted: int = 0
    """The number of entries that the progress bar has counted."""

    def died(self, exit_code: int | None) -> None:
        """Notes a death. A second death at the same entry refuses it; the first time, someone may have killed it.

        Raises OSError for a second death at no entry that could be refused.
        """
        if self.current == self.suspect:
            if self.current < 0 or self.current in self.refused:
                raise OSError(
                    f"{self.unit.name}: its process died with exit code {exit_code} twice, at no file of its own"
                )
            self.refused[self.current] = attempts.death(exit_code)
        self.suspect, self.current = self.current, -1


def _work(
    unfinished: Iterable[SplitUnit],
    out: Path,
    config: PrepareConfig,
    num_workers: int,
    progress: Progress,
    retry_rejected: bool = False,
) -> None:
    """Prepares units in child processes. Raises OSError if `out` cannot be written."""
    work = functools.partial(_prepare, out=out, config=config, retry_rejected=retry_rejected)
    preload = ["__main__", __name__]
    children = Children(Child(work, "forkserver", preload, drop_remarks) for _ in range(num_workers))
    try:
        with children:
            for attempt, event in children.run(map(_Attempt, unfinished)):
                if isinstance(event, Died):
                    attempt.died(event.exit_code)
                    children.again(attempt)
                elif isinstance(event, Finished):
                    progress.units += 1
                else:
                    attempt.current, seconds = event.value
                    if seconds is not None and attempt.current >= attempt.counted:
                        attempt.counted = attempt.current + 1
                        progress.add(seconds)
    finally:
        for attempt in children.at_hand:
            remove_leftovers(records.shard_path(out, attempt.unit.name))


def _prepare(attempt: _Attempt, report: Tell, *, out: Path, config: PrepareConfig, retry_rejected: bool) -> None:
    prepare_unit(attempt.unit, out, config, retry_rejected, attempt.refused, report)


def collect(out: Path) -> None:
    """Joins the JSON files of finished units into index.jsonl and rejects.jsonl."""
    units.collect(out / records.SHARDS, out / records.INDEX, out / records.REJECTS)


def _low_rate_seconds(out: Path) -> float:
    """Returns how many seconds of audio have been refused because of their sample rate."""
    with (out / records.REJECTS).open() as lines:
        return float(sum(json.loads(line).get("seconds", 0) for line in lines))
