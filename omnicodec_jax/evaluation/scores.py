"""Scores clips by metrics, in processes of their own."""

import math
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax.child_processes import Child, Children, Died, Tell
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.evaluation.fidelity_metrics import FIDELITY_METRICS
from omnicodec_jax.evaluation.frechet import FRECHET
from omnicodec_jax.evaluation.learned_metrics import LEARNED_METRICS
from omnicodec_jax.evaluation.metrics import Pair, Scorer, Unavailable
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS

METRICS = SIGNAL_METRICS | FIDELITY_METRICS | LEARNED_METRICS | {FRECHET.name: FRECHET}
"""All metrics by name."""
DEATH = "its process died: out of memory, or a fault of the package"
"""The reason that is given for a missing score if the metric's process has died."""


class ScoreRequest(NamedTuple):
    """A request for the scores of one clip of one system."""

    key: tuple[str, str, str]
    """The names of the system, the domain and the clip."""
    reference: Path
    """The file of the original."""
    degraded: Path
    """The file of the reconstruction."""
    transcript: str | None
    """The words that are said in the clip; None if they are not known."""
    metrics: tuple[str, ...]
    """The names of the metrics."""


class Scores(NamedTuple):
    """The scores of a clip by metric. Every metric is in one of the two dicts."""

    values: dict[str, float]
    """The scores by metric."""
    why: dict[str, str]
    """The reasons why other metrics have no score, by metric."""


def choose_metrics(names: str) -> list[str]:
    """Returns the names of metrics in a comma-separated list, which may also hold "core" and "all".

    "core" stands for the metrics of the paper's Table 1, which need no weights. Raises ConfigError for a name that does
    not exist.
    """
    chosen: dict[str, None] = {}
    for name in names.split(","):
        if name not in METRICS and name not in ("core", "all"):
            raise ConfigError(f"--metrics {name}: must be of core, all, {', '.join(METRICS)}")
        chosen |= dict.fromkeys({"core": SIGNAL_METRICS, "all": METRICS}.get(name, [name]))
    return list(chosen)


def score_all(requests: Iterable[ScoreRequest], num_workers: int) -> Iterator[tuple[ScoreRequest, Scores]]:
    """Computes scores in child processes, and yields them in the order in which they are ready.

    If a process dies, its clip is scored again, metric by metric, so that only the score of the metric that kills its
    process is lost.
    """
    apart: dict[tuple[str, str, str], tuple[ScoreRequest, Scores]] = {}
    with Children(Child(_score, "spawn", set_up=_one_thread, daemon=False) for _ in range(num_workers)) as children:
        for request, event in children.run(requests):
            key = request.key
            if isinstance(event, Died) and key not in apart:
                apart[key] = request, Scores({}, {})
                for name in request.metrics:
                    children.again(request._replace(metrics=(name,)))
                continue
            scores = Scores({}, dict.fromkeys(request.metrics, DEATH)) if isinstance(event, Died) else event.value
            if key not in apart:
                yield request, scores
                continue
            whole, so_far = apart[key]
            so_far.values.update(scores.values)
            so_far.why.update(scores.why)
            if len(so_far.values) + len(so_far.why) == len(whole.metrics):
                del apart[key]
                yield whole, so_far


def _one_thread() -> None:
    """Limits a process to one thread, since several processes run side by side."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _score(request: ScoreRequest, _report: Tell) -> Scores:
    return score(request)


def score(request: ScoreRequest) -> Scores:
    """Computes the scores of a clip in this process."""
    reference, sample_rate = soundfile.read(request.reference, dtype="float32")
    degraded, _ = soundfile.read(request.degraded, dtype="float32")
    pair = Pair(reference, degraded, sample_rate, request.key[1], request.transcript)
    values: dict[str, float] = {}
    why: dict[str, str] = {}
    for name in request.metrics:
        try:
            value = float(_scorer(name)(pair))
            if not math.isfinite(value):
                raise Unavailable(f"{METRICS[name].title}: the score is {value}")
            values[name] = value
        except Unavailable as error:
            why[name] = str(error)
        except Exception as error:  # packages raise errors of any type, which must not cost the other metrics
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
