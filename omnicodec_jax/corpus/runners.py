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

from omnicodec_jax import compilation_cache
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.tokenize import Existing, Job, Unit, Worker, check, collect, described, plan, to_do
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.units import Progress, Task
from omnicodec_jax.errors import DataError
from omnicodec_jax.lanes import Use

Runner = Literal["here", "processes", "ray"]
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
    tried: int
    """Files that this call has tried."""
    use: Use


def run(job: Job, runner: Runner, num_workers: int, task: Task) -> Summary:
    """Tokenizes this task's units that are not finished. Raises DataError, ModelError, OSError."""
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")
    check(job, described(job))
    with claim(job.out, task):
        shards.move_old(job.out)
        return _run(job, runner, num_workers, task)


def _run(job: Job, runner: Runner, num_workers: int, task: Task) -> Summary:
    def mine() -> Iterator[Unit]:
        return (unit for number, unit in enumerate(plan(job)) if number % task.count == task.index)

    existing = _existing(job)
    left = {unit.name: len(numbers) for unit in mine() if (numbers := to_do(job, unit))}
    unfinished, total = (unit for unit in mine() if unit.name in left), sum(left.values())
    start, progress, uses = time.perf_counter(), Progress("tokenize", total), {}
    if total:
        with progress.bar:
            for done in RUNNERS[runner](job, unfinished, existing, num_workers):
                uses[done.worker] = done.use
                for seconds in done.files:
                    progress.add(seconds, f", {done.use}")
    collect(job.out)
    counted: dict[str, Any] = dict.fromkeys(("listed", "clips", "rejected", "skipped", "seconds", "shards"), 0)
    for unit in mine():
        row = json.loads(shards.marker_path(job.out, unit.name).read_text())["shard"] | {"shards": 1}
        counted = {name: number + row[name] for name, number in counted.items()}
    return Summary(
        **counted,
        computed=progress.seconds,
        elapsed=time.perf_counter() - start,
        tried=total,
        use=sum(uses.values(), start=Use()),
    )


def _existing(job: Job) -> Existing:
    """What shards of other manifests hold. Raises DataError if there are such shards and nobody said so."""
    own = {unit.name for unit in plan(job)}
    names = sorted(path.stem for path in (job.out / shards.UNITS).glob(f"[!.]*{shards.MARKER}"))
    others = [name for name in names if name not in own]
    if others and not job.skip_existing:
        raise DataError(
            f"{job.out}: holds shards of another manifest (or of another --shard-hours), such as {others[0]}; give "
            "--skip-existing to add what they do not hold, or another --out"
        )
    sources, older = set(), False
    for name in others:
        if (finished := shards.finished(job.out, name)) is not None:
            older |= "clips" not in finished
            sources.update(pq.read_table(shards.shard_path(job.out, name), columns=["source"])["source"].to_pylist())
    return Existing(frozenset(sources), older)


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
                waiting += [unit for unit in running.values() if to_do(job, unit)]
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
        compilation_cache.use()
        _LOADED[:] = [Worker(job)]
    return _LOADED[0]


RUNNERS: dict[str, Callable[[Job, Iterator[Unit], Existing, int], Iterator[Done]]] = {
    "here": here,
    "processes": processes,
    "ray": on_ray,
}
