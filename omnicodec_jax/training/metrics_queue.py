"""Reads the metrics of steps that the devices may not have finished yet, and checks that steps were finite."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.distributed import multihost
from omnicodec_jax.errors import TrainingError

LOG = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""The largest number of steps whose metrics have not been read yet. After more, the host waits for the devices."""
MAX_NOT_FINITE = 10
"""The number of steps in a row that are not finite after which the run stops."""


class MetricsQueue:
    """Reads the metrics of every step a few steps late, so that the devices need not wait for the host."""

    def __init__(self, receive: Callable[[int, Any], None]):
        """Makes an empty queue.

        Args:
            receive: Called for each step, in order, with its number and its metrics, which are then on the host.
        """
        self._receive = receive
        self._started: deque[tuple[int, Any]] = deque()

    def add(self, number: int, metrics: Any) -> None:
        """Adds a step that has been started, with a tree of its metrics. Raises what `receive` raises."""
        self._started.append((number, metrics))
        self._read(STEPS_AHEAD)

    def flush(self) -> None:
        """Reads the metrics of all steps. Raises what `receive` raises."""
        self._read(0)

    def _read(self, ahead: int) -> None:
        """Reads the metrics of all steps except the last `ahead`."""
        while len(self._started) > ahead:
            number, metrics = self._started.popleft()
            self._receive(number, jax.device_get(metrics))


class FiniteCheck:
    """Reports steps that were not finite with the names of their samples, and stops a run of too many of them."""

    def __init__(self, samples: Samples, batch_size: int):
        self._samples, self._batch_size = samples, batch_size

    def __call__(self, number: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Checks a step. Raises TrainingError if too many steps in a row were not finite."""
        in_a_row = int(metrics["skipped"])
        if not in_a_row:
            return
        first = number * self._batch_size
        if multihost.is_main():
            ids = ", ".join(self._samples.id(index) for index in range(first, first + self._batch_size))
            LOG.warning("step %d is not finite and changes nothing (%d in a row); samples: %s", number, in_a_row, ids)
        if in_a_row >= MAX_NOT_FINITE:
            raise TrainingError(
                f"step {number}: {MAX_NOT_FINITE} steps in a row were not finite; the log names their samples. "
                "The last checkpoint is from before; a lower optimizer.learning_rate in a new --workdir with "
                "run.start_from, or train.compute_dtype=float32, may help"
            )
