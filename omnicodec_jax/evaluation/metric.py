"""What a metric is: something that scores one clip, once what it needs has been loaded."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from omnicodec_jax.data.audio import resample


class Unavailable(Exception):
    """A metric cannot score this clip, or cannot score at all; the message says why. It never becomes a number."""


class Pair(NamedTuple):
    """One clip and what a system has made of it, equally long."""

    reference: np.ndarray
    """float32 [T]"""
    degraded: np.ndarray
    """float32 [T]"""
    sample_rate: int
    domain: str
    transcript: str | None = None
    """What is said, where it is known."""

    def at(self, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Reference and degraded, resampled if need be."""
        first, second = (
            resample(samples, self.sample_rate, sample_rate) for samples in (self.reference, self.degraded)
        )
        return first, second


Scorer = Callable[[Pair], float]


class Metric(NamedTuple):
    """A column of the tables."""

    name: str
    title: str
    better: Literal["higher", "lower"]
    about: str
    """One sentence: what it is, its range."""
    load: Callable[[], Scorer]
    """Called once a process. It, and what it returns, raise Unavailable."""
