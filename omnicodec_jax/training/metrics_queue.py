"""Metrics of steps that the devices may not have finished yet, and the check that steps are finite."""

import logging
from collections import deque
from typing import NamedTuple

import jax

from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.distributed import multihost
from omnicodec_jax.errors import TrainingError
from omnicodec_jax.training.gan import Metrics
from omnicodec_jax.training.log import TrainingLog

LOG = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""How many steps may be under way on the devices before the metrics of the first of them are waited for."""
MAX_NOT_FINITE = 10
"""How many steps in a row may be not finite before the run stops."""


class _Started(NamedTuple):
    """A step that has been started on the devices."""

    number: int
    metrics: Metrics
    waited: float


class MetricsQueue:
    """Reads the metrics of every step a few steps late, so that the devices need not wait for the host.

    Each step's metrics go to the training log. A step that is not finite is reported with the names of its samples.
    """

    def __init__(self, log: TrainingLog, samples: Samples, batch_size: int):
        self._log, self._samples, self._batch_size = log, samples, batch_size
        self._started: deque[_Started] = deque()

    def add(self, number: int, metrics: Metrics, waited: float) -> None:
        """Adds a step that has been started, and the seconds that it waited for its batch.

        Raises TrainingError if too many steps in a row were not finite.
        """
        self._started.append(_Started(number, metrics, waited))
        self._read(STEPS_AHEAD)

    def flush(self) -> None:
        """Reads the metrics of all steps. Raises TrainingError if too many steps in a row were not finite."""
        self._read(0)

    def _read(self, ahead: int) -> None:
        """Reads the metrics of all steps but the last `ahead`."""
        while len(self._started) > ahead:
            step = self._started.popleft()
            metrics = jax.device_get(step.metrics)
            self._log.add(metrics, step.waited)
            if metrics["skipped"]:
                self._report_not_finite(step.number, int(metrics["skipped"]))

    def _report_not_finite(self, number: int, in_a_row: int) -> None:
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
