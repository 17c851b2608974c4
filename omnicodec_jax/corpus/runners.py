"""Who computes the units of a corpus: this process, some processes of this machine, or a Ray cluster.

All of them run `Worker.run` on units that nobody has finished, and leave the same files.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq

from omnicodec_jax.command import use_compilation_cache
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.tokenize import Job, Unit, Worker, collect, plan
from omnicodec_jax.data.units import Progress, Task
from omnicodec_jax.errors import DataError
from omnicodec_jax.lanes import Use

Runner = Literal["here", "processes", "ray"]
Existing = frozenset[str]
AHEAD = 2
"""Units that wait for each worker."""
PATIENCE = 3
"""How often processes may die without a unit that gets done in between."""


class Done(NamedTuple):
    """Files of a unit, in seconds of audio each, and what a worker's devices have done so far."""

    files: list[float]
    worker: int
    use: Use


class Summary(NamedTuple):
    """Of all units of this task, those finished earlier too: listed = clips + rejected + skipped."""

    listed: int
    clips: int
    rejected: int
    skipped: int
    shards: int
    seconds: float
    computed: float
    """Seconds of audio that this call has tokenized,"""
    elapsed: float
    """in these."""
    use: Use


def run(job: Job, runner: Runner, num_workers: int, task: Task) -> Summary:
    """Tokenizes this task's units that are not finished. Raises DataError, ModelError, OSError."""
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")

    def mine() -> Iterator[Unit]:
        return (unit for number, unit in enumerate(plan(job)) if number % task.count == task.index)

    def unfinished() -> Iterator[Unit]:
        return (unit for unit in mine() if not _is_done(job, unit))

    existing = _existing(job)
    total = sum(len(unit.entries) for unit in unfinished())
    start, progress, uses = time.perf_counter(), Progress("tokenize", total), {}
    if total:
        with progress.bar:
            for done in RUNNERS[runner](job, unfinished(), existing, num_workers):
                uses[done.worker] = done.use
                for seconds in done.files:
                    progress.add(seconds, f", {done.use}")
    collect(job.out)
    rows = [_finished(job, unit) for unit in mine()]
    counted = {name: sum(row[name] for row in rows) for name in ("listed", "clips", "rejected", "skipped", "seconds")}
    return Summary(
        **counted,
        shards=len(rows),
        computed=progress.seconds,
        elapsed=time.perf_counter() - start,
        use=sum(uses.values(), start=Use()),
    )


def _marker(job: Job, unit: Unit) -> Any:
    return shards.shard_path(job.out, unit.name).with_suffix(".json")


def _is_done(job: Job, unit: Unit) -> bool:
    """Whether its shard and its marker are there; the shard comes first."""
    return _marker(job, unit).is_file() and shards.shard_path(job.out, unit.name).is_file()


def _finished(job: Job, unit: Unit) -> dict[str, Any]:
    return json.loads(_marker(job, unit).read_text())["shard"]


def _existing(job: Job) -> Existing:
    """Hashes of what shards of other manifests hold. Raises DataError if there are such shards and nobody said so."""
    own = {unit.name for unit in plan(job)}
    folder = job.out / shards.SHARDS
    others = [path for path in sorted(folder.glob("[!.]*.json")) if path.stem not in own]
    if others and not job.skip_existing:
        raise DataError(
            f"{job.out}: holds shards of another manifest, such as {others[0].stem}; give --skip-existing to add what "
            "they do not hold, or another --out"
        )
    tables = (pq.read_table(path.with_suffix(shards.SUFFIX), columns=["source"]) for path in others)
    return frozenset(source for table in tables for source in table["source"].to_pylist())


# -- Runners


def here(job: Job, units: Iterator[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """This process, on all of its devices."""
    worker = Worker(job)
    for seconds in worker.run(units, existing):
        yield Done([seconds], 0, worker.use)


def processes(job: Job, units: Iterator[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """Processes of this machine; when one dies, the units at hand begin anew."""
    waiting: list[Unit] = []
    deaths = 0
    while True:
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
            running: dict[Any, Unit] = {}
            try:
                while True:
                    while len(running) < AHEAD * num_workers:
                        unit = waiting.pop() if waiting else next(units, None)
                        if unit is None:
                            break
                        running[pool.submit(_run_unit, job, unit, existing)] = unit
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        done = future.result()
                        del running[future]
                        deaths = 0
                        yield done
            except BrokenProcessPool:
                deaths += 1
                waiting += [unit for unit in running.values() if not _is_done(job, unit)]
                if deaths == PATIENCE:
                    names = ", ".join(unit.name for unit in waiting)
                    raise DataError(f"processes have died {deaths} times over {names}: out of memory?") from None


def on_ray(job: Job, units: Iterator[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """Tasks of a Ray cluster, or of Ray on this machine; each has an accelerator, if the cluster has any."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError("--runner ray: Ray is not installed; in the checkout, pip install -e '.[ray]'") from None
    if ray.is_initialized():
        yield from _tasks(ray, job, units, existing, num_workers)
        return
    ray.init(log_to_driver=False)
    try:
        yield from _tasks(ray, job, units, existing, num_workers)
    finally:
        ray.shutdown()


def _tasks(ray: Any, job: Job, units: Iterator[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    needs: dict[str, Any] = {"num_cpus": 1}
    resources = ray.cluster_resources()
    if resources.get("GPU"):
        needs["num_gpus"] = 1
    elif resources.get("TPU"):
        needs["resources"] = {"TPU": 1}
    task = ray.remote(max_retries=PATIENCE, **needs)(_run_unit)
    shared = ray.put(existing)
    running: list[Any] = []
    while True:
        while len(running) < AHEAD * num_workers and (unit := next(units, None)) is not None:
            running.append(task.remote(job, unit, shared))
        if not running:
            return
        (ready,), running = ray.wait(running)
        yield ray.get(ready)


def _run_unit(job: Job, unit: Unit, existing: Existing) -> Done:
    """In a worker's process."""
    worker = _worker(job)
    return Done(list(worker.run([unit], existing)), os.getpid(), worker.use)


_LOADED: list[Worker] = []
"""This process's worker: a model is loaded once."""


def _worker(job: Job) -> Worker:
    if not _LOADED or _LOADED[0].job != job:
        use_compilation_cache()
        _LOADED[:] = [Worker(job)]
    return _LOADED[0]


RUNNERS: dict[str, Callable[[Job, Iterator[Unit], Existing, int], Iterator[Done]]] = {
    "here": here,
    "processes": processes,
    "ray": on_ray,
}
