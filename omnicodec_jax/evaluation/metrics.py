"""The interface of metrics. A metric loads what it needs, and then scores clips one by one."""

import os
from collections.abc import Callable
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from omnicodec_jax.data.audio import resample


class Unavailable(Exception):
    """The error of a metric that cannot score a clip, or no clip at all. No number replaces such a score."""


class Pair(NamedTuple):
    """A clip and its reconstruction by a system, both of the same length."""

    reference: np.ndarray
    """The original: float32 [T]."""
    degraded: np.ndarray
    """The reconstruction: float32 [T]."""
    sample_rate: int
    domain: str
    transcript: str | None = None
    """The words that are said in the clip; None: not known."""

    def at(self, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns reference and degraded at a sample rate."""
        return (
            resample(self.reference, self.sample_rate, sample_rate),
            resample(self.degraded, self.sample_rate, sample_rate),
        )


Scorer = Callable[[Pair], float]
"""A function that returns the score of a pair, or raises Unavailable."""


class Metric(NamedTuple):
    """A metric, which is a column of the tables."""

    name: str
    title: str
    better: Literal["higher", "lower"]
    about: str
    """One sentence that says what the metric is and which range it has."""
    load: Callable[[], Scorer]
    """The function that loads what the metric needs and returns its scorer. It is called once in a process, and may
    raise Unavailable."""
    range: tuple[float | None, float | None] = (None, None)
    """The lowest and the highest score that are possible; None: there is no bound."""
    setting: str | None = None
    """The environment variable that names the weights; None: there is none. Scores by other weights differ."""
    version: int = 1
    """The number of ways so far in which the metric was computed. Scores of earlier versions are computed again."""

    def set_to(self) -> str | None:
        """Returns the value of the variable `setting`; None: it is not set, and the default weights are used."""
        return os.environ.get(self.setting) if self.setting else None


class SharedComputation:
    """A computation of several scores at once, which is loaded once, and runs once for each pair."""

    def __init__(self, load: Callable[[], Callable[[Pair], dict[str, float]]]):
        """Prepares a computation without loading it.

        Args:
            load: Returns the function that computes all scores of a pair, by name.
        """
        self._load = load
        self._last: tuple[Pair, dict[str, float]] | None = None

    @cached_property
    def _compute(self) -> Callable[[Pair], dict[str, float]] | Exception:
        try:
            return self._load()
        except Exception as error:  # kept, so that not every score waits again for a hub that does not answer
            return error

    def scorer(self, key: str) -> Scorer:
        """Returns the scorer of one of the scores. Raises whatever `load` raises."""
        compute = self._compute
        if isinstance(compute, Exception):
            raise compute

        def score(pair: Pair) -> float:
            if self._last is None or self._last[0] is not pair:
                self._last = pair, compute(pair)
            return self._last[1][key]

        return score


def require_speech(pair: Pair) -> None:
    """Raises Unavailable for a clip that is no speech."""
    if pair.domain != "speech":
        raise Unavailable(f"scores speech, not {pair.domain}")
