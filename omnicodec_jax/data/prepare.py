"""`omnicodec prepare`: raw corpora → shards of segments, by many processes that do not talk to each other.

A work unit is a slice of a manifest and becomes one shard. Which entries it holds and what its file looks like depends
on the manifest and the settings alone, so that whoever is killed and whoever comes after writes the same bytes. Each
unit runs in a process of its own: a decoder that crashes costs one file. One that is killed costs none: only a file at
which two processes have died is refused.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.data import audio, decoders, manifest, records, units
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.data.units import ASSUMED_SECONDS, UNIT_ENTRIES, Progress, Task, refusal, remove_leftovers
from omnicodec_jax.errors import AudioError, DataError
from omnicodec_jax.files import replacing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What becomes of a corpus; kept as prepared.json, and the same for all that is added to a directory."""

    validation: float = 0.005
    """Share of the files that are held out, chosen by their names."""
    segment_seconds: int = 30
    """Longer clips are cut into equal segments."""
    shard_hours: float = 1.0
    """Audio of a shard, about."""
    min_sample_rate: int = 16_000
    """Files below are refused: they have nothing to teach of the upper half of the spectrum."""
    max_sample_rate: int = 96_000
    """Files above are refused: such rates are measurements, or a header that lies."""
    max_channels: int = 2
    """Files with more are refused: the sum of a microphone array or of stems is not what anyone heard."""

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise DataError(f"--validation {self.validation}: must be a share in [0, 1)")
        if self.segment_seconds < 10 or self.shard_hours <= 0:
            raise DataError("--segment-seconds must be 10 or more, --shard-hours above 0")

    def check(self, source: audio.Source) -> None:
        """Raises AudioError for a format that is refused."""
        if not self.min_sample_rate <= source.sample_rate <= self.max_sample_rate:
            rates = f"{self.min_sample_rate} to {self.max_sample_rate} Hz"
            kind = LowRateError if source.sample_rate < self.min_sample_rate else AudioError
            raise kind(f"{source.sample_rate} Hz: only {rates} are taken (--min-sample-rate, --max-sample-rate)")
        if source.channels > self.max_channels:
            raise AudioError(f"{source.channels} channels: at most {self.max_channels} are taken (--max-channels)")


class LowRateError(AudioError):
    """A sample rate below the least that is taken."""


class Unit(NamedTuple):
    """A slice of a manifest, and the shard that it becomes."""

    name: str
    domain: str
    split: records.Split
    folder: Path
    """Where the entries' relative paths begin."""
    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """Of all that decides what the shard holds."""
        return hashlib.blake2b(json.dumps(self.entries).encode(), digest_size=8).hexdigest()


def plan(sources: dict[str, Path], config: PrepareConfig) -> Iterator[Unit]:
    """The work units of all manifests, one after the other; only the open ones are held."""
    for domain, path in sources.items():
        batches: dict[records.Split, list[Entry]] = {"train": [], "validation": []}
        seconds, numbers = dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0)

        def close(
            split: records.Split, domain=domain, path=path, batches=batches, seconds=seconds, numbers=numbers
        ) -> Unit:
            name = f"{domain}-{split}-{numbers[split]:06d}"
            unit = Unit(name, domain, split, manifest.folder(path), tuple(batches[split]))
            batches[split], seconds[split], numbers[split] = [], 0.0, numbers[split] + 1
            return unit

        for entry in manifest.read(path):
            if not manifest.is_of(entry, domain):
                continue
            split = "validation" if _share(entry.path) < config.validation else "train"
            batches[split].append(entry)
            seconds[split] += ASSUMED_SECONDS if entry.seconds is None else entry.seconds
            if seconds[split] >= 3600 * config.shard_hours or len(batches[split]) == UNIT_ENTRIES:
                yield close(split)
        for split in batches:
            if batches[split]:
                yield close(split)


def _share(path: str) -> float:
    """A number in [0, 1) that depends on the file alone: it stays on its side whatever is added, with all its clips."""
    name = path.encode(errors="surrogatepass")  # names on disk need not be UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) / 2**64


def nothing_held_out(sources: dict[str, Path], config: PrepareConfig) -> Iterator[str]:
    """Says of which domains no file is held out, and which share would hold out one. Reads no audio."""
    if config.validation == 0:  # as asked for
        return
    for domain, path in sources.items():
        shares: dict[str, float] = {}
        for entry in manifest.read(path):
            if entry.domain in (None, domain):
                shares[entry.path] = _share(entry.path)
                if shares[entry.path] < config.validation:
                    break
        else:
            lowest = sorted(shares.values())[:2]
            advice = "it takes two files or more"
            if len(lowest) == 2:
                advice = f"--validation {sum(lowest) / 2:.4g} and another --out hold out one file"
            yield (
                f"of the {len(shares)} file(s) of {domain}, none is held out with --validation {config.validation:g}: "
                f"training will have no validation of {domain}; {advice}"
            )


def prepare_unit(unit: Unit, out: Path, config: PrepareConfig, refused: dict[int, str], report: Any) -> None:
    """Writes the shard of a unit and the JSON file that marks it as finished.

    refused: entries not to try, with the reason. report(number, seconds) is called before an entry (seconds None)
    and after it.
    """
    path = records.shard_path(out, unit.name)
    remove_leftovers(path)
    clips, rejects = [], []

    def encoded() -> Iterator[bytes]:
        for number, entry in enumerate(unit.entries):
            report(number, None)
            try:
                clip = _load(unit.folder / entry.path, entry, config, refused.get(number))
            except Exception as error:  # whatever is wrong with one file, the others are done
                rejects.append(_refusal(unit.folder, entry, error))
                report(number, 0.0)
                continue
            samples = np.rint(clip.samples * 32768).astype(np.int16)  # below full scale: its peak is 0.95
            clips.append(samples.size)
            for start, size in records.segments(samples.size, config.segment_seconds):
                header = records.Header(
                    entry.id, unit.domain, start, samples.size, clip.gain, clip.sample_rate, clip.num_samples
                )
                yield records.encode(header, samples[start : start + size])
            report(number, samples.size / records.SAMPLE_RATE)

    size = records.write_shard(path, encoded())
    shard = records.Shard(
        name=unit.name, domain=unit.domain, split=unit.split, digest=unit.digest, clips=tuple(clips), bytes=size
    )
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"shard": dataclasses.asdict(shard), "rejects": rejects}) + "\n")


def _refusal(folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """A line of rejects.jsonl; with the seconds of what a lower --min-sample-rate would take."""
    row = refusal(folder, entry, error)
    if isinstance(error, LowRateError):
        row["seconds"] = entry.duration or max(0.0, decoders.seconds(folder / entry.path) - entry.offset)
    return row


def _load(path: Path, entry: Entry, config: PrepareConfig, refused: str | None) -> audio.Clip:
    if problem := entry.problem or refused:
        raise DataError(problem)
    return audio.load(path, records.SAMPLE_RATE, records.PEAK, entry.offset, entry.duration, check=config.check)


class Summary(NamedTuple):
    """What a run did."""

    units: int
    files: int
    rejected: int
    seconds: float
    elapsed: float
    low_rate_seconds: float
    """Of all that was ever refused in `out` for a sample rate that is too low."""


def run(sources: dict[str, Path], out: Path, config: PrepareConfig, num_workers: int, task: Task) -> Summary:
    """Prepares this task's units that are not finished. Raises DataError, and OSError where `out` cannot be written."""
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")
    _settle(out, config)

    def unfinished() -> Iterator[Unit]:
        for number, unit in enumerate(plan(sources, config)):
            if number % task.count == task.index and not _is_finished(unit, out):
                yield unit

    total = sum(len(unit.entries) for unit in unfinished())
    start, done = time.perf_counter(), Progress("prepare", total)
    with done.bar:
        _work(unfinished(), out, config, num_workers, done)
    collect(out)
    elapsed = time.perf_counter() - start
    return Summary(done.units, total, done.rejected, done.seconds, elapsed, _low_rate_seconds(out))


def _settle(out: Path, config: PrepareConfig) -> None:
    """Keeps the settings with the data, and refuses others."""
    path, text = out / records.SETTINGS, json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    if path.is_file() and (kept := path.read_text()) != text:
        before, now = json.loads(kept), dataclasses.asdict(config)
        changed = ", ".join(
            f"{name} = {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
        )
        raise DataError(f"{out}: was prepared with other settings ({changed}); use those, or another --out")
    with replacing(path) as temporary:
        temporary.write_text(text)


def _is_finished(unit: Unit, out: Path) -> bool:
    path = records.shard_path(out, unit.name).with_suffix(".json")
    if not path.is_file():
        return False
    if json.loads(path.read_text())["shard"]["digest"] != unit.digest:
        raise DataError(f"{path}: was made of other lines of the manifest than {unit.name} has now; use another --out")
    return True


class Worker:
    """A process that prepares one unit.

    refused: entries not to try, with the reason. suspect: the entry at which the process before it has died, -1 if at
    none. reported: how many entries the bar has counted already.
    """

    def __init__(
        self,
        unit: Unit,
        out: Path,
        config: PrepareConfig,
        refused: dict[int, str],
        suspect: int | None = None,
        reported: int = 0,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self.unit, self.refused, self.suspect, self.reported = unit, refused, suspect, reported
        self.current = -1
        """Number of the entry at hand."""
        self.connection, end = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(unit, out, config, refused, end), daemon=True)
        self.process.start()
        end.close()


def _work(units: Iterator[Unit], out: Path, config: PrepareConfig, num_workers: int, done: Progress) -> None:
    """Keeps `num_workers` processes busy with one unit each."""
    workers: list[Worker] = []
    try:
        while True:
            while len(workers) < num_workers and (unit := next(units, None)) is not None:
                workers.append(Worker(unit, out, config, {}))
            if not workers:
                return
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv()
                except EOFError:
                    workers.remove(worker)
                    if again := _finish(worker, out, config, done):
                        workers.append(again)
                    continue
                if isinstance(message, str):
                    raise OSError(message)
                worker.current, seconds = message
                if seconds is not None and worker.current >= worker.reported:
                    worker.reported = worker.current + 1
                    done.add(seconds)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            remove_leftovers(records.shard_path(out, worker.unit.name))


def _finish(worker: Worker, out: Path, config: PrepareConfig, done: Progress) -> Worker | None:
    """None for a unit that is done; another process for one whose process has died."""
    worker.process.join()
    if worker.process.exitcode == 0:
        done.units += 1
        return None
    refused, died = worker.refused, f"died with exit code {worker.process.exitcode}"
    if worker.current == worker.suspect:  # the first time, it may have been killed by someone
        if worker.current < 0 or worker.current in refused:
            raise OSError(f"{worker.unit.name}: its process {died} twice, at no file of its own")
        refused = {**refused, worker.current: f"its decoder {died}"}
    return Worker(worker.unit, out, config, refused, worker.current, worker.reported)


def _child(unit: Unit, out: Path, config: PrepareConfig, refused: dict[int, str], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches every process; the parent decides
    # What decoders written in C remark on their files is not for the terminal; Python's tracebacks are.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        prepare_unit(unit, out, config, refused, lambda *message: connection.send(message))
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    except OSError as error:
        connection.send(str(error))


def collect(out: Path) -> None:
    """Joins what the units left into index.jsonl and rejects.jsonl."""
    rows = {out / records.INDEX: lambda unit: [unit["shard"]], out / records.REJECTS: lambda unit: unit["rejects"]}
    units.join(out / records.SHARDS, rows)


def _low_rate_seconds(out: Path) -> float:
    with open(out / records.REJECTS) as lines:
        return float(sum(json.loads(line).get("seconds", 0) for line in lines))
