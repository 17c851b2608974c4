"""Starting and stopping: many processes as one, and runs that are asked to go away."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from omnicodec_jax.errors import ConfigError

LOG = logging.getLogger(__name__)

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

STEPS_BETWEEN_QUESTIONS = 10
"""Of processes among each other, where JAX's own service is off."""


def initialize() -> None:
    """Joins the processes of a TPU pod or of a Slurm, Open MPI or Kubernetes job; elsewhere, this process is all.

    Clusters that JAX does not know set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    One process logs its progress, the others only what goes wrong.
    """
    _join()
    if jax.distributed.is_initialized():
        # On CPUs programs that run side by side could meet their collectives in another order on every process.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not is_main():
        logging.getLogger("omnicodec_jax").setLevel(logging.WARNING)


def share_of_work() -> tuple[int, int]:
    """Learns this process's rank and how many there are, for work that they share without talking.

    They are done at different times, and whoever stayed in JAX's distributed service would wait for the others when it
    ends, and be aborted after five minutes: so all leave it here, while they are in step. (0, 1) without a cluster, and
    where JAX has begun already.
    """
    try:
        _join()
    except RuntimeError as error:
        if "must be called before" not in str(error):  # JAX has begun: not as a command, but in a program
            raise
        return jax.process_index(), jax.process_count()
    share = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return share


def _join() -> None:
    given = [os.environ.get(name) for name in EXPLICIT]
    address, count, process = given
    if address is not None and count is not None and process is not None:
        jax.distributed.initialize(address, int(count), int(process))
        return
    if any(given):
        raise ConfigError(f"{', '.join(EXPLICIT)}: set all of them, or none")
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # what it says where there is no cluster
            raise


def is_main() -> bool:
    """Whether this is the process that writes the log."""
    return jax.process_index() == 0


class Interrupted(BaseException):
    """A signal came while there was nothing yet to save."""


class Interruption:
    """Notices SIGTERM, which is also what a preempted machine gets, and Ctrl-C; a second Ctrl-C ends at once.

    With several processes JAX agrees on the step to stop at, after any of them had either; it takes care of SIGTERM
    itself, and Ctrl-C is passed on to it as one. Where its service for that is off, the processes ask each other.
    """

    def __init__(self):
        self.signal: int | None = None
        """That all processes stop for."""
        self._asked: int | None = None
        self._handlers: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> "Interruption":
        noticed = (signal.SIGTERM, signal.SIGINT) if not _has_service() else (signal.SIGINT,)
        self._handlers = {number: signal.signal(number, self._notice) for number in noticed}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _has_service():
            signal.raise_signal(signal.SIGTERM)
            return
        self._asked = number
        if jax.process_count() == 1:
            self.signal = number
            if self._raises:
                raise Interrupted

    def noticed(self, step: int) -> bool:
        """Whether to save and stop before this step; to be asked before every step."""
        if _has_service():
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
        elif jax.process_count() > 1:
            # Seldom, since devices finish what they are at before they answer.
            if step % STEPS_BETWEEN_QUESTIONS:
                return False
            asked = multihost_utils.process_allgather(np.int32(self._asked or 0))
            self.signal = int(np.max(asked)) or None
        return self.signal is not None

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within it a signal raises Interrupted, unless there are several processes, which stop at a step alone."""
        self._raises = jax.process_count() == 1
        try:
            yield
        finally:
            self._raises = False

    @contextlib.contextmanager
    def ending_the_process(self) -> Iterator[None]:
        """Within it a signal ends this process, even while XLA compiles for minutes and lets no handler run.

        For work that leaves nothing half-written. With several processes it does nothing.
        """
        if jax.process_count() > 1:
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:
            while number := os.read(reader, 1):
                if number[0] in self._handlers:
                    LOG.info("interrupted: the last checkpoint is whole, and the same command goes on from there")
                    for child in multiprocessing.active_children():
                        child.kill()
                    os._exit(128 + number[0])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        before = signal.set_wakeup_fd(writer)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            watcher.join()
            os.close(reader)


def _has_service() -> bool:
    """Whether JAX watches for SIGTERM, and finds the step at which all processes stop."""
    config: Any = jax.config
    return jax.process_count() > 1 and config.jax_enable_preemption_service
