"""Starting and stopping: many processes as one, and runs that are asked to go away."""

import logging
import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from omnicodec_jax.errors import ConfigError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


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


class Interruption:
    """Notices SIGTERM, which is also what a preempted machine gets, and Ctrl-C; a second Ctrl-C ends at once.

    With several processes JAX agrees on the step to stop at, after any of them had either; it takes care of SIGTERM
    itself, and Ctrl-C is passed on to it as one.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        noticed = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        self._handlers = {number: signal.signal(number, self._notice) for number in noticed}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            self.signal = number
        else:
            signal.raise_signal(signal.SIGTERM)

    def noticed(self, step: int) -> bool:
        """Whether to save and stop before this step; to be asked before every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
