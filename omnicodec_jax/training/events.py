"""Writes TensorBoard's event files. A disk that cannot be written neither blocks a run nor ends it."""

import contextlib
import logging
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from omnicodec_jax.buckets import BucketPath, copies
from omnicodec_jax.errors import told

LOG = logging.getLogger(__name__)

LARGE = 1 << 22
"""The size in bytes from which on an event file in a bucket is complete, and the next one is begun."""


class EventWriter:
    """Writes scalars, audio and images for TensorBoard; each start of a run has an event file of its own.

    In a bucket, events can be read after the next call of `scalars`.
    """

    def __init__(self, directory: Path, step: int):
        with without("torch"):  # tensorboardX imports it for its type annotations alone
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

        self._summary, self._messages, self._open = summary, cast(Any, event_pb2), EventsWriter
        self._directory, self._step = directory, step
        self._writer: Any = None
        with self._going_on_without():
            self._begin()

    def _begin(self) -> None:
        """Begins a file. Objects in a bucket cannot grow, so a file of this machine is put there again and again."""
        folder = self._directory
        if isinstance(folder, BucketPath):
            folder = copies() / f"events-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter is not used, since it hangs for ever once its thread has found the disk full.
        suffix = f".{uuid.uuid4().hex[:8]}" if folder != self._directory else ""  # several may begin in one second
        self._writer = self._open(str(folder / "events"), suffix)
        self._folder = folder
        # This event makes TensorBoard hide what an earlier start wrote for later steps.
        session = self._messages.SessionLog(status=self._messages.SessionLog.START)
        self._write(self._messages.Event(step=self._step, session_log=session))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers by their tags."""
        for tag, value in values.items():
            self._add(step, self._summary.scalar(tag, float(value)))
        self._step = step
        if isinstance(self._directory, BucketPath) and self._writer is not None:
            self._put(self._directory)

    def clip(self, step: int, tag: str, samples: np.ndarray, sample_rate: int, image: np.ndarray) -> None:
        """Writes audio, samples [T] from -1 to 1, and an image [1, H, W] uint8 of it."""
        self._add(step, self._summary.audio(tag, samples, sample_rate))
        self._add(step, self._summary.image(tag, image))

    def _add(self, step: int, value: Any) -> None:
        self._write(self._messages.Event(step=step, wall_time=time.time(), summary=value))

    def _put(self, directory: BucketPath) -> None:
        """Puts the file into the bucket, and begins another when it has become large."""
        (file,) = self._folder.iterdir()
        with self._going_on_without():
            (directory / file.name).put(file)
            if file.stat().st_size > LARGE:
                shutil.rmtree(self._folder)
                self._begin()

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        with self._going_on_without():
            self._writer.write_event(event)
            self._writer.flush()

    @contextlib.contextmanager
    def _going_on_without(self) -> Iterator[None]:
        """A context in which an error of the disk ends the writing of events, and not the run."""
        try:
            yield
        except OSError as error:
            what = told(error) if error.filename else f"{self._directory}: {error.strerror or error}"
            LOG.warning("TensorBoard's events: %s; going on without", what)
            self._writer = None


@contextlib.contextmanager
def without(module: str) -> Iterator[None]:
    """A context in which a module cannot be imported, as if it were not installed, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[module] = None
    try:
        yield
    finally:
        del modules[module]
