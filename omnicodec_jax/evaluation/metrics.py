"""The interface of a metric: a function that scores one clip, after it has loaded what it needs."""

import os
from collections.abc import Callable
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from omnicodec_jax.data.audio import resample


class Unavailable(Exception):
    """Says why a metric cannot score this clip, or cannot score at all. No number takes the place of such a score."""


class Pair(NamedTuple):
    """A clip and its reconstruction by a system, which have the same length."""

    reference: np.ndarray
    """The original: float32 [T]."""
    degraded: np.ndarray
    """The reconstruction: float32 [T]."""
    sample_rate: int
    domain: str
    transcript: str | None = None
    """What is said in the clip; None: unknown."""

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
    """Loads what the metric needs and returns its scorer. It is called once a process, and may raise Unavailable."""
    range: tuple[float | None, float | None] = (None, None)
    """The lowest and the highest score there can be; None: there is no bound."""
    setting: str | None = None
    """The environment variable that names its weights; None: there is none. Scores by other weights do not compare."""

    def set_to(self) -> str | None:
        """Returns what names the weights; None: nothing does, and the default ones are taken."""
        return os.environ.get(self.setting) if self.setting else None


class SharedComputation:
    """A computation that gives several scores at once. It is loaded once, and runs once for each pair."""

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
        except Exception as error:  # is kept, so that not every score waits for a hub that does not answer
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
