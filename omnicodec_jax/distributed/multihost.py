"""Starting and stopping of runs: joining the processes of a cluster, and noticing signals."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from omnicodec_jax.errors import ConfigError

LOG = logging.getLogger(__name__)

CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that describe a cluster which JAX does not find by itself."""
STEPS_BETWEEN_AGREEMENTS = 10
"""How often processes tell each other whether they got a signal, where JAX's own service for that is off."""


def initialize() -> None:
    """Joins the processes of a TPU pod or of a Slurm, Open MPI or Kubernetes job; elsewhere this process runs alone.

    For clusters that JAX does not find by itself, set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. The main process logs its progress, the others only warnings and errors.
    """
    _join()
    if jax.distributed.is_initialized():
        # On CPUs two programs may run side by side, and then each process could reach their collectives in another
        # order.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not is_main():
        logging.getLogger("omnicodec_jax").setLevel(logging.WARNING)


def share_of_work() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, for work that they share without communication.

    All processes leave JAX's distributed service here, while they are in step. They finish at different times, and a
    process that ends while it is in the service waits for the others and is aborted after five minutes. Without a
    cluster the result is (0, 1).
    """
    try:
        # JAX's preemption service would go on to swallow SIGTERM after this process has left.
        jax.config.update("jax_enable_preemption_service", False)
        _join()
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        # This is no command of ours but a program that has used JAX already.
        return jax.process_index(), jax.process_count()
    share = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return share


def _join() -> None:
    given = [os.environ.get(name) for name in CLUSTER_VARIABLES]
    address, count, process = given
    if address is not None and count is not None and process is not None:
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(f"{CLUSTER_VARIABLES[0]} is {address!r}: must be host:port")
        if not (count.isdecimal() and process.isdecimal() and int(process) < int(count)):
            names = " and ".join(CLUSTER_VARIABLES[1:])
            raise ConfigError(f"{names} are {count!r} and {process!r}: a number, and one from 0 to below it")
        jax.distributed.initialize(address, int(count), int(process))
        return
    if any(given):
        raise ConfigError(f"{', '.join(CLUSTER_VARIABLES)}: set all of them, or none")
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # JAX's message where there is no cluster
            raise


def of_all_processes(value: float) -> np.ndarray:
    """Returns a number of each process of a run, float32 [processes], or [] if there is one. All processes call it."""
    if jax.process_count() == 1:
        return np.asarray(value, np.float32)
    return np.asarray(multihost_utils.process_allgather(np.float32(value)))


def is_main() -> bool:
    """Returns whether this is the main process, which writes the log and TensorBoard's events."""
    return jax.process_index() == 0


class Interrupted(BaseException):
    """Raised by a signal that comes while there is nothing to save yet."""


class Interruption:
    """Notices SIGTERM (which a preempted machine gets, too) and Ctrl-C, as a context; a second Ctrl-C ends at once.

    With several processes, a signal to any of them stops all of them before the same step. JAX's preemption service
    finds that step; it handles SIGTERM itself, and Ctrl-C is passed on to it as SIGTERM. Where the service is off, the
    processes exchange their signals every few steps.
    """

    def __init__(self):
        self.signal: int | None = None
        """The signal that all processes stop for; None: none came."""
        self._own_signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._raises = False
        self._has_service = False

    def __enter__(self) -> "Interruption":
        self._has_service = _has_service()
        handled = (signal.SIGINT,) if self._has_service else (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._has_service:
            signal.raise_signal(signal.SIGTERM)
            return
        self._own_signal = number
        if jax.process_count() == 1:
            self.signal = number
            if self._raises:
                raise Interrupted

    def stops_before(self, step: int) -> bool:
        """Returns whether to save and stop before a step. All processes call it before every step."""
        if self._has_service:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
        elif jax.process_count() > 1:
            # Not at every step, since the exchange waits until the devices have finished what they are computing.
            if step % STEPS_BETWEEN_AGREEMENTS:
                return False
            own = 0 if self._own_signal is None else self._own_signal
            latest = int(np.max(multihost_utils.process_allgather(np.int32(own))))
            self.signal = None if latest == 0 else latest
        return self.signal is not None

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which a signal raises Interrupted; one that came before raises it at the beginning.

        With several processes nothing is raised, since these can only stop together, at a step.
        """
        self._raises = jax.process_count() == 1
        try:
            if self._raises and self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._raises = False

    @contextlib.contextmanager
    def ending_the_process(self, at_last: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A context in which a signal ends this process at once, even while XLA compiles and no Python handler runs.

        It is for work that leaves nothing half-written. With several processes it has no effect. `at_last` is called
        before the end, in another thread.
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
                    try:
                        at_last()
                    finally:
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
    """Returns whether JAX's preemption service handles SIGTERM and finds the step at which all processes stop.

    JAX starts the service when a process joins a cluster, if `jax_enable_preemption_service` is set at that moment, and
    ends it when the process leaves. If the service is off, asking it for the step would raise an error.
    """
    helpers: Any = multihost_utils  # JAX does not publish all of its names
    state = helpers.distributed.global_state
    return jax.process_count() > 1 and state.preemption_sync_manager is not None
