"""TensorBoard's files, written so that they can neither hold a run up nor end it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

LOG = logging.getLogger(__name__)


class Events:
    """Events of a run, in a file of its own for every start."""

    def __init__(self, directory: Path, step: int):
        # Here, since it imports PyTorch if that is installed.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary, self._messages = summary, cast(Any, event_pb2)
        directory.mkdir(parents=True, exist_ok=True)
        # Not its SummaryWriter: that hangs for ever once its thread has met a full disk.
        self._writer: EventsWriter | None = EventsWriter(str(directory / "events"))
        # Of an earlier start, what came after this step is no longer shown.
        session = self._messages.SessionLog(status=self._messages.SessionLog.START)
        self._write(self._messages.Event(step=step, session_log=session))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by their tags."""
        for tag, value in values.items():
            self._add(step, self._summary.scalar(tag, float(value)))

    def clip(self, step: int, tag: str, samples: np.ndarray, sample_rate: int, image: np.ndarray) -> None:
        """Samples [T] from -1 to 1 to hear, and an image [1, H, W] uint8 of them."""
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
