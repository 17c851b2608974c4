"""The interface of a metric: a function that scores one clip, after it has loaded what it needs."""

from collections.abc import Callable
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
