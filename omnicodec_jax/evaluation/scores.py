"""Pairs of files through metrics, in processes of their own."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from omnicodec_jax.errors import ConfigError
from omnicodec_jax.evaluation.judges import JUDGES
from omnicodec_jax.evaluation.metric import Pair, Scorer, Unavailable
from omnicodec_jax.evaluation.metrics import METRICS

COLUMNS = METRICS | JUDGES
AHEAD = 2
"""Clips that wait for each process."""


class Task(NamedTuple):
    """One clip of one system."""

    key: tuple[str, str, str]
    """System, domain, clip."""
    reference: Path
    degraded: Path
    transcript: str | None
    metrics: tuple[str, ...]


class Scores(NamedTuple):
    """What metrics say of a clip; each is in one of the two."""

    values: dict[str, float]
    why: dict[str, str]
    """Why others have no value."""


def columns(names: str) -> list[str]:
    """Metrics of a comma-separated list, "core" for those without weights, "all". Raises ConfigError."""
    chosen: dict[str, None] = {}
    for name in names.split(","):
        if name not in COLUMNS and name not in ("core", "all"):
            raise ConfigError(f"--metrics {name}: must be of core, all, {', '.join(COLUMNS)}")
        chosen |= dict.fromkeys({"core": METRICS, "all": COLUMNS}.get(name, [name]))
    return list(chosen)


def score_all(tasks: Iterable[Task], num_workers: int) -> Iterator[tuple[Task, Scores]]:
    """As they get ready. A clip whose process dies costs that clip its scores, and no other clip."""
    tasks = iter(tasks)
    while True:
        running: dict[Any, Task] = {}
        unsent: list[Task] = []
        try:
            with _pool(num_workers) as pool:
                for task in tasks:
                    unsent = [task]
                    running[pool.submit(score, task)] = unsent.pop()
                    while len(running) >= AHEAD * num_workers:
                        yield from _finished(running)
                while running:
                    yield from _finished(running)
            return
        except BrokenProcessPool:
            yield from ((task, _alone(task)) for task in (*running.values(), *unsent))


@contextmanager
def _pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _prepare)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, what waits is not begun


def _prepare() -> None:
    """Of a process: Ctrl-C is the parent's to handle, and processes are what runs side by side, not threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"


def _finished(running: dict[Any, Task]) -> Iterator[tuple[Task, Scores]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        result = future.result()
        yield running.pop(future), result


def _alone(task: Task) -> Scores:
    """Of a clip that may have killed its process: metric by metric, to know which one does."""
    values: dict[str, float] = {}
    why: dict[str, str] = {}
    for name in task.metrics:
        try:
            with _pool(1) as pool:
                one = pool.submit(score, task._replace(metrics=(name,))).result()
            values, why = values | one.values, why | one.why
        except BrokenProcessPool:
            why[name] = "its process died: out of memory, or a fault of the package"
    return Scores(values, why)


def score(task: Task) -> Scores:
    """In a worker's process."""
    (reference, sample_rate), (degraded, _) = (
        soundfile.read(p, dtype="float32") for p in (task.reference, task.degraded)
    )
    pair = Pair(reference, degraded, sample_rate, task.key[1], task.transcript)
    values: dict[str, float] = {}
    why: dict[str, str] = {}
    for name in task.metrics:
        try:
            values[name] = _scorer(name)(pair)
        except Unavailable as error:
            why[name] = str(error)
        except Exception as error:  # packages raise what they like; the other metrics need not suffer
            why[name] = f"{type(error).__name__}: {error}"
    return Scores(values, why)


def _scorer(name: str) -> Scorer:
    loaded = _load(name)
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


@cache
def _load(name: str) -> Scorer | Unavailable:
    try:
        return COLUMNS[name].load()
    except Unavailable as error:
        return error
