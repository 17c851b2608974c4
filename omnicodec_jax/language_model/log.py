"""The log of a language model's training: lines of progress."""

import logging

import numpy as np

from omnicodec_jax.errors import TrainingError
from omnicodec_jax.training.step_window import StepWindow

LOG = logging.getLogger(__name__)

LOSS = "cross-entropy"


class LanguageModelLog:
    """Writes lines with the mean loss and the speed over the steps since the last line."""

    def __init__(self, total_steps: int):
        self._total, self._window = total_steps, StepWindow()

    def add(self, step: int, loss: np.ndarray | float) -> None:
        """Adds the loss of a step. Raises TrainingError if it is not finite."""
        if not np.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is not finite; a lower optimizer.learning_rate may help")
        self._window.add({LOSS: np.asarray(loss)})

    def write(self, step: int) -> None:
        """Writes a line about the steps that were added since the last one."""
        means, steps, seconds = self._window.means()
        LOG.info("step %d/%d  %s %.4f nats  %.3g steps/s", step, self._total, LOSS, means[LOSS], steps / seconds)
