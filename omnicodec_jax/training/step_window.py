"""Collects the metrics of steps between two lines of a log, for the logs of the codec and of the language model."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class WindowMeans(NamedTuple):
    """The means of metrics over the steps since the last line of a log."""

    metrics: dict[str, np.ndarray]
    """The mean of each metric over the steps that have it."""
    steps: int
    seconds: float
    """The wall time of the steps, without the seconds that `StepWindow.leave_out` was given."""


class StepWindow:
    """Collects metrics of steps, and returns their means since the last call of `means`."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self._metrics: list[Mapping[str, np.ndarray]] = []
        self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds the metrics of one step."""
        self._metrics.append(metrics)

    def leave_out(self, seconds: float) -> None:
        """Leaves some seconds out of the wall time of the steps, for work that was done between them."""
        self._since += seconds

    def means(self) -> WindowMeans:
        """Returns the means over the steps that were added since the last call, and begins anew."""
        seconds = time.perf_counter() - self._since
        names = dict.fromkeys(name for metrics in self._metrics for name in metrics)  # not every step has all
        means = {name: np.mean([m[name] for m in self._metrics if name in m], axis=0) for name in names}
        found = WindowMeans(means, len(self._metrics), seconds)
        self._begin()
        return found
