"""`omnicodec prepare`: raw corpora → shards of segments, by many processes that do not talk to each other.

Each unit (prepare_unit.py) runs in a process of its own: a decoder that crashes costs one file. One that is killed
costs none: only a file at which two processes have died is refused.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax.data import manifest, records, units
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.decoders import drop_remarks
from omnicodec_jax.data.prepare_unit import PrepareConfig, Unit, finished, plan, prepare_unit, share
from omnicodec_jax.data.units import Progress, Task
from omnicodec_jax.errors import AudioError, DataError, told
from omnicodec_jax.files import remove_leftovers, rewriting


def nothing_held_out(sources: dict[str, Path], config: PrepareConfig) -> Iterator[str]:
    """Says of which domains no file is held out, and which share would hold out one. Reads no audio."""
    if config.validation == 0:  # as asked for
        return
    for domain, path in sources.items():
        shares: dict[str, float] = {}
        for entry in manifest.read(path):
            if entry.domain in (None, domain):
                shares[entry.path] = share(entry.path)
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


class Summary(NamedTuple):
    """What a run did."""

    units: int
    files: int
    rejected: int
    seconds: float
    elapsed: float
    low_rate_seconds: float
    """Of all that was ever refused in `out` for a sample rate that is too low."""
    listed: int
    """Files of this task's units, those finished earlier too,"""
    clips: int
    """and what they have become."""


def run(
    sources: dict[str, Path],
    out: Path,
    config: PrepareConfig,
    num_workers: int,
    task: Task,
    retry_rejected: bool = False,
) -> Summary:
    """Prepares this task's units that are not finished. Raises DataError, and OSError where `out` cannot be written.

    retry_rejected: tries once more what was refused.
    """
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")
    _check(out, config)
    with claim(out, task):
        return _run(sources, out, config, num_workers, task, retry_rejected)


def _run(
    sources: dict[str, Path], out: Path, config: PrepareConfig, num_workers: int, task: Task, retry_rejected: bool
) -> Summary:
    _keep(out, config)

    def mine() -> Iterator[Unit]:
        return (unit for number, unit in enumerate(plan(sources, config)) if number % task.count == task.index)

    def to_do(unit: Unit) -> list[int]:
        return units.to_do(finished(unit, out), unit.folder, unit.entries, retry_rejected)

    left = {unit.name: len(numbers) for unit in mine() if (numbers := to_do(unit))}
    unfinished, total = (unit for unit in mine() if unit.name in left), sum(left.values())
    start, done = time.perf_counter(), Progress("prepare", total)
    with done.bar:
        _work(unfinished, out, config, num_workers, done, retry_rejected)
    collect(out)
    listed = clips = 0
    for unit in mine():
        listed += len(unit.entries)
        clips += len((finished(unit, out) or {"shard": {"clips": ()}})["shard"]["clips"])
    elapsed = time.perf_counter() - start
    return Summary(done.units, total, done.rejected, done.seconds, elapsed, _low_rate_seconds(out), listed, clips)


def _check(out: Path, config: PrepareConfig) -> None:
    """Raises DataError where other settings were used."""
    path, now = out / records.SETTINGS, dataclasses.asdict(config)
    if path.is_file() and (before := json.loads(path.read_text())) != now:
        changed = ", ".join(
            f"{name} = {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
        )
        raise DataError(f"{out}: was prepared with other settings ({changed}); use those, or another --out")


def _keep(out: Path, config: PrepareConfig) -> None:
    """Keeps the settings with the data."""
    with rewriting(out / records.SETTINGS) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


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
        retry_rejected: bool,
        refused: dict[int, AudioError],
        suspect: int | None = None,
        reported: int = 0,
    ):
        arguments = unit, out, config, retry_rejected, refused
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self.unit, self.refused, self.suspect, self.reported = unit, refused, suspect, reported
        self.current = -1
        """Number of the entry at hand."""
        self.connection, end = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(*arguments, end), daemon=True)
        self.process.start()
        end.close()


def _work(
    units: Iterator[Unit],
    out: Path,
    config: PrepareConfig,
    num_workers: int,
    done: Progress,
    retry_rejected: bool = False,
) -> None:
    """Keeps `num_workers` processes busy with one unit each."""
    workers: list[Worker] = []
    try:
        while True:
            while len(workers) < num_workers and (unit := next(units, None)) is not None:
                workers.append(Worker(unit, out, config, retry_rejected, {}))
            if not workers:
                return
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv()
                except EOFError:
                    workers.remove(worker)
                    if again := _finish(worker, out, config, retry_rejected, done):
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


def _finish(worker: Worker, out: Path, config: PrepareConfig, retry_rejected: bool, done: Progress) -> Worker | None:
    """None for a unit that is done; another process for one whose process has died."""
    worker.process.join()
    if worker.process.exitcode == 0:
        done.units += 1
        return None
    refused, died = worker.refused, f"died with exit code {worker.process.exitcode}"
    if worker.current == worker.suspect:  # the first time, it may have been killed by someone
        if worker.current < 0 or worker.current in refused:
            raise OSError(f"{worker.unit.name}: its process {died} twice, at no file of its own")
        refused = {**refused, worker.current: units.death(worker.process.exitcode)}
    return Worker(worker.unit, out, config, retry_rejected, refused, worker.current, worker.reported)


def _child(
    unit: Unit,
    out: Path,
    config: PrepareConfig,
    retry_rejected: bool,
    refused: dict[int, AudioError],
    connection: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches every process; the parent decides
    drop_remarks()
    try:
        prepare_unit(unit, out, config, retry_rejected, refused, lambda *message: connection.send(message))
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    except OSError as error:
        connection.send(told(error))


def collect(out: Path) -> None:
    """Joins what the units left into index.jsonl and rejects.jsonl."""
    rows = {out / records.INDEX: lambda unit: [unit["shard"]], out / records.REJECTS: units.listed}
    units.join(out / records.SHARDS, rows)


def _low_rate_seconds(out: Path) -> float:
    with open(out / records.REJECTS) as lines:
        return float(sum(json.loads(line).get("seconds", 0) for line in lines))
