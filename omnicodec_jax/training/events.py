"""Writes TensorBoard's event files, in a way that can neither block a run nor end it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

LOG = logging.getLogger(__name__)


class EventWriter:
    """Writes scalars, audio and images for TensorBoard; each start of a run has an event file of its own."""

    def __init__(self, directory: Path, step: int):
        # Imported here, since tensorboardX imports PyTorch where that is installed.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary, self._messages = summary, cast(Any, event_pb2)
        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter is not used, since it hangs for ever once its thread has met a full disk.
        self._writer: EventsWriter | None = EventsWriter(str(directory / "events"))
        # This event makes TensorBoard hide what an earlier start wrote for later steps.
        session = self._messages.SessionLog(status=self._messages.SessionLog.START)
        self._write(self._messages.Event(step=step, session_log=session))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers by their tags."""
        for tag, value in values.items():
            self._add(step, self._summary.scalar(tag, float(value)))

    def clip(self, step: int, tag: str, samples: np.ndarray, sample_rate: int, image: np.ndarray) -> None:
        """Writes audio, samples [T] from -1 to 1, and an image [1, H, W] uint8 of it."""
        self._add(step, self._summary.audio(tag, samples, sample_rate))
        self._add(step, self._summary.image(tag, image))

    def _add(self, step: int, value: Any) -> None:
        self._write(self._messages.Event(step=step, wall_time=time.time(), summary=value))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:  # a run is worth more than its curves
            LOG.warning("TensorBoard: %s; going on without", error)
            self._writer = None
