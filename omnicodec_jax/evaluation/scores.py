"""Scores clips by metrics, in processes of their own."""

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
from omnicodec_jax.evaluation.learned_metrics import LEARNED_METRICS
from omnicodec_jax.evaluation.metrics import Pair, Scorer, Unavailable
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS

METRICS = SIGNAL_METRICS | LEARNED_METRICS
"""All metrics by name."""
AHEAD = 2
"""How many clips are given to each process before the first of them is finished."""


class ScoreRequest(NamedTuple):
    """One clip of one system that is to be scored."""

    key: tuple[str, str, str]
    """The names of the system, the domain and the clip."""
    reference: Path
    """The file of the original."""
    degraded: Path
    """The file of the reconstruction."""
    transcript: str | None
    metrics: tuple[str, ...]
    """The names of the metrics."""


class Scores(NamedTuple):
    """The scores of a clip by metric. Every metric is in one of the two dicts."""

    values: dict[str, float]
    why: dict[str, str]
    """Why the other metrics have no value."""


def choose_metrics(names: str) -> list[str]:
    """Returns the names of metrics in a comma-separated list, which may hold "core" and "all", too.

    "core" stands for all metrics without weights. Raises ConfigError for a name that does not exist.
    """
    chosen: dict[str, None] = {}
    for name in names.split(","):
        if name not in METRICS and name not in ("core", "all"):
            raise ConfigError(f"--metrics {name}: must be of core, all, {', '.join(METRICS)}")
        chosen |= dict.fromkeys({"core": SIGNAL_METRICS, "all": METRICS}.get(name, [name]))
    return list(chosen)


def score_all(tasks: Iterable[ScoreRequest], num_workers: int) -> Iterator[tuple[ScoreRequest, Scores]]:
    """As they get ready. A clip whose process dies costs that clip its scores, and no other clip."""
    tasks = iter(tasks)
    while True:
        running: dict[Any, ScoreRequest] = {}
        unsent: list[ScoreRequest] = []
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


def _finished(running: dict[Any, ScoreRequest]) -> Iterator[tuple[ScoreRequest, Scores]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        result = future.result()
        yield running.pop(future), result


def _alone(task: ScoreRequest) -> Scores:
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


def score(task: ScoreRequest) -> Scores:
    """Returns the scores of a clip. It runs in a worker process."""
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
        except Exception as error:  # packages raise anything, and the other metrics must not be lost by it
            why[name] = f"{type(error).__name__}: {error}"
    return Scores(values, why)


def _scorer(name: str) -> Scorer:
    """Returns the scorer of a metric. Raises Unavailable."""
    loaded = _load(name)
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


@cache
def _load(name: str) -> Scorer | Unavailable:
    """Loads a metric once in this process, or remembers why it cannot be loaded."""
    try:
        return METRICS[name].load()
    except Unavailable as error:
        return error
