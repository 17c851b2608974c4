"""Runs the units of a corpus in this process, in several processes of this machine, or in a Ray cluster.

All of them run `Worker.run` on units that nobody has finished, and leave the same files.
"""

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from omnicodec_jax import compilation_cache, machine
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.child_processes import Child, Children, Died, Tell
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.tokenize import Existing, Job, Worker, check, collect, described, finished, plan
from omnicodec_jax.data import manifest, units
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.manifest import Manifest
from omnicodec_jax.data.units import Plan, Progress, Share, Unit
from omnicodec_jax.errors import DataError
from omnicodec_jax.lanes import Use
from omnicodec_jax.version import with_extra

Runner = Literal["here", "processes", "ray"]
AHEAD = 2
"""Number of units that are given to Ray for each worker, so that none waits for the next one."""
PATIENCE = 3
"""The number of processes that may die over a unit before the job is given up."""


class Done(NamedTuple):
    """Files that a worker has done."""

    files: list[float]
    """Seconds of audio of each file; 0 for a file that is refused or skipped."""
    worker: int
    """Number that tells the worker from others."""
    use: Use
    """The work of the worker's devices since it began."""


class Tokenized(NamedTuple):
    """The results of a run of `omnicodec tokenize`.

    The first six fields count all units of this share, those that were finished earlier, too; listed is the sum of
    clips, rejected and skipped.
    """

    listed: int
    """Files in the manifests."""
    clips: int
    """Clips in the shards."""
    rejected: int
    """Files that are refused."""
    skipped: int
    """Files whose tokens are in shards of another manifest."""
    shards: int
    """Number of shards."""
    seconds: float
    """Audio of the clips."""
    computed: float
    """Audio that this run has tokenized, in seconds."""
    elapsed: float
    """Seconds that this run has taken."""
    tried: int
    """Files that this run has tried."""
    use: Use
    """The work of the devices in this run."""


def run(job: Job, runner: Runner, num_workers: int, share: Share) -> Tokenized:
    """Tokenizes the units of a share that are not finished. Raises DataError, ModelError, OSError."""
    if num_workers < 1:
        raise DataError(f"--num-workers {num_workers}: must be 1 or more")
    manifests = manifest.read_all(job.sources)
    check(job, described(job))
    with claim(job.out, share, "tokens"):
        shards.move_old(job.out)
        return _run(job, manifests, runner, num_workers, share)


def _run(job: Job, manifests: dict[str, Manifest], runner: Runner, num_workers: int, share: Share) -> Tokenized:
    all_units = functools.partial(plan, manifests, job.shard_hours)
    existing = _existing(job, {unit.name for unit in all_units()})
    is_in_bucket = isinstance(job.out, BucketPath)
    planned = Plan(
        all_units, share, lambda unit: finished(job.out, unit.name, existing), job.retry_rejected, is_in_bucket
    )
    start, progress, uses = time.perf_counter(), Progress("tokenize", planned.files), {}
    if planned.files:
        with progress.bar:
            for done in RUNNERS[runner](job, planned.unfinished(), existing, num_workers):
                uses[done.worker] = done.use
                for seconds in done.files:
                    progress.add(seconds, f", {done.use}")
    collect(job.out)
    markers = units.read_texts([shards.marker_path(job.out, name) for name in planned.names])
    rows = [json.loads(text)["shard"] for text in markers]
    counted: dict[str, Any] = {
        name: sum(row[name] for row in rows) for name in ("listed", "clips", "rejected", "skipped", "seconds")
    }
    return Tokenized(
        **counted,
        shards=len(rows),
        computed=progress.seconds,
        elapsed=time.perf_counter() - start,
        tried=planned.files,
        use=sum(uses.values(), start=Use()),
    )


def _existing(job: Job, own: set[str]) -> Existing:
    """Returns what shards of other manifests hold; own: names of the units of this job.

    Raises DataError if there are such shards, and the job does not say that it adds to them.
    """
    names = sorted(path.stem for path in (job.out / shards.UNITS).glob(f"[!.]*{shards.MARKER}"))
    others = [name for name in names if name not in own]
    if others and not job.skip_existing:
        raise DataError(
            f"{job.out}: holds shards of another manifest (or of another --shard-hours), such as {others[0]}; give "
            "--skip-existing to add what they do not hold, or another --out"
        )
    sources, older = set(), False
    for name in others:
        if (done := shards.finished(job.out, name)) is not None:
            older |= "clips" not in done
            sources.update(source for _, _, source in shards.read_ids(shards.shard_path(job.out, name)))
    return Existing(frozenset(sources), older)


# -- Runners


def here(job: Job, units: Iterable[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """Computes units in this process, on all of its devices."""
    worker = Worker(job)
    for seconds in worker.run(units, existing):
        yield Done([seconds], 0, worker.use)


def processes(job: Job, units: Iterable[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """Computes units in processes of this machine. When one dies, its unit begins anew."""
    work = functools.partial(_work, job=job, existing=existing)
    deaths: Counter[str] = Counter()
    with Children(Child(work, "spawn", daemon=False) for _ in range(num_workers)) as children:
        for unit, event in children.run(units):
            if not isinstance(event, Died):
                yield event.value
                continue
            deaths[unit.name] += 1
            if deaths[unit.name] == PATIENCE:
                raise DataError(
                    f"processes have died {PATIENCE} times over {unit.name}, the last with exit code "
                    f"{event.exit_code}: out of memory?"
                )
            children.again(unit)


def _work(unit: Unit, _report: Tell, *, job: Job, existing: Existing) -> Done:
    return _run_unit(job, unit, existing)


def on_ray(job: Job, units: Iterable[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    """Computes units in a Ray cluster, or in Ray on this machine; each worker has an accelerator, if there are any."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"--runner ray: Ray is not installed; {with_extra('ray')}") from None
    if ray.is_initialized():
        yield from _tasks(ray, job, units, existing, num_workers)
        return
    ray.init(log_to_driver=False)
    try:
        yield from _tasks(ray, job, units, existing, num_workers)
    finally:
        ray.shutdown()


def _tasks(ray: Any, job: Job, units: Iterable[Unit], existing: Existing, num_workers: int) -> Iterator[Done]:
    needs: dict[str, Any] = {"num_cpus": 1}
    resources = ray.cluster_resources()
    if resources.get("GPU"):
        needs["num_gpus"] = 1
    elif resources.get("TPU"):
        needs["resources"] = {"TPU": 1}
    task = ray.remote(max_retries=PATIENCE, **needs)(_run_unit)
    shared = ray.put(existing)
    running: list[Any] = []
    for unit in units:
        if len(running) == AHEAD * num_workers:
            (ready,), running = ray.wait(running)
            yield ray.get(ready)
        running.append(task.remote(job, unit, shared))
    while running:
        (ready,), running = ray.wait(running)
        yield ray.get(ready)


def _run_unit(job: Job, unit: Unit, existing: Existing) -> Done:
    """Computes a unit in a process that others have started for it."""
    worker = _worker(job)
    return Done(list(worker.run([unit], existing)), os.getpid(), worker.use)


_LOADED: list[Worker] = []
"""The worker of this process, which is kept so that its model is loaded once."""


def _worker(job: Job) -> Worker:
    """Returns the worker of this process."""
    if not _LOADED or _LOADED[0].job != job:
        machine.keep_freed_memory()
        machine.collect_garbage_less_often()
        compilation_cache.use()
        _LOADED[:] = [Worker(job)]
    return _LOADED[0]


RUNNERS: dict[str, Callable[[Job, Iterable[Unit], Existing, int], Iterator[Done]]] = {
    "here": here,
    "processes": processes,
    "ray": on_ray,
}
