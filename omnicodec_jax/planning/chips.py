"""Describes chips that are not there, and the network between them, by names such as v5e:4x4 and h100:4x8."""

import contextlib
import importlib.util
import logging
import math
import operator
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from omnicodec_jax.errors import ConfigError
from omnicodec_jax.planning.speeds import GPUS, JAX_TAKES, TPUS, Chip
from omnicodec_jax.version import with_extra

GPUS_PER_HOST = 8
"""The largest number of GPUs that share a host and its links."""


class Topology(NamedTuple):
    """A number of equal chips and the network between them."""

    chip: Chip
    devices: list[Any]
    """The devices, none of which has to exist."""
    per_host: int
    """The number of chips that reach each other without the network between hosts of GPUs or slices of TPUs."""

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Returns the topology of a name.

        Names are such as v5e:4x4 (a slice of TPUs), 2xv5e:16x16 (two slices), a100:8 (GPUs of a host) and h100:4x8
        (hosts x GPUs).

        Raises:
            ConfigError: For an unknown name, for a number of chips that does not exist, and if the compiler for the
                chips is not installed.
        """
        found = re.fullmatch(r"(?:(?P<slices>[1-9]\d*)x)?(?P<kind>[^:]+):(?P<shape>[1-9]\d*(x[1-9]\d*)*)", name)
        if found is None or found["kind"] not in (TPUS if found["slices"] else TPUS | GPUS):
            raise ConfigError(
                f"--topology {name}: must be a chip and a number of them, such as v5e:4x4, 2xv5e:16x16 (slices of "
                f"TPUs), a100:8 or h100:4x8 (hosts x GPUs of a host); there are {', '.join([*TPUS, *GPUS])}"
            )
        kind, sizes = found["kind"], [int(size) for size in found["shape"].split("x")]
        if kind in GPUS:
            return _gpus(name, GPUS[kind], sizes)
        return _tpus(name.removeprefix(f"{found['slices']}x"), TPUS[kind], sizes, int(found["slices"] or 1))


def _tpus(name: str, chip: Chip, sizes: list[int], slices: int) -> Topology:
    """Returns slices of TPUs, as libtpu describes them."""
    _require("libtpu")
    if slices > 1 and chip.network is None:
        raise ConfigError(f"--topology {slices}x{name}: nothing is published on the network between slices of these")
    # libtpu describes larger slices, too, and then aborts while it compiles for some of them.
    if len(sizes) > len(chip.largest) or any(map(operator.gt, sorted(sizes)[::-1], chip.largest[::-1])):
        raise ConfigError(f"--topology {name}: the largest slice of these chips is {'x'.join(map(str, chip.largest))}")
    # Without these variables, libtpu asks the network which machine this is, and only one process at a time can
    # compile.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    # By default, the smallest host of libtpu has four chips. It must be told that there is one chip alone.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    several = {"num_slices": slices} if slices > 1 else {}
    with _ended_as_before_by(signal.SIGTERM):
        devices = _devices(name, name, "tpu", chip_config_name=chip.configuration, **alone, **several)
    return Topology(chip, devices, len(devices) // slices)


@contextlib.contextmanager
def _ended_as_before_by(number: int) -> Iterator[None]:
    """A context after which a signal does what it did before: libtpu would print a trace of its stack."""
    before = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(number, before)


def _gpus(name: str, chip: Chip, sizes: list[int]) -> Topology:
    """Returns GPUs of one or more hosts."""
    if len(sizes) > 2 or sizes[-1] > GPUS_PER_HOST:
        raise ConfigError(
            f"--topology {name}: a host has 1 to {GPUS_PER_HOST} GPUs; several hosts are hosts x GPUs, such as 4x8"
        )
    _require("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
    hosts, gpus = [1, *sizes][-2:]
    # Without both options, the plugin would look for a GPU and CUDA on this machine.
    devices = _devices(name, "", "cuda", topology=f"1x{hosts}x{gpus}", target_config=chip.target)
    fraction = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    taken = float(fraction or JAX_TAKES)  # it is a number, since the plugin refuses anything else
    return Topology(chip._replace(memory=chip.memory / JAX_TAKES * taken), devices, gpus)


def _require(*modules: str) -> None:
    """Raises ConfigError if a module that the compiler consists of is not installed."""
    for module in modules:
        root = module.partition(".")[0]
        if importlib.util.find_spec(root) is None or importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed; {with_extra('plan')}")


def _devices(name: str, known: str, platform: str, **options: Any) -> list[Any]:
    """Returns the devices that a compiler describes.

    Raises:
        ConfigError: If the compiler does not know the name, or JAX could not set the compiler up.
    """
    from jax.experimental import topologies

    with _failures_of_plugins() as failures:
        try:
            return list(topologies.get_topology_desc(known, platform, **options).devices)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            reason = "; ".join([str(error), *map(str, failures)])
            raise ConfigError(f"--topology {name}: {reason}") from None


@contextlib.contextmanager
def _failures_of_plugins() -> Iterator[list[BaseException]]:
    """A context that collects the errors with which JAX's plugins stop while JAX sets them up.

    JAX would log these errors with their tracebacks, and go on without the plugin and its chips.
    """
    failures: list[BaseException] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.exc_info is None or record.exc_info[1] is None:
            return True
        failures.append(record.exc_info[1])
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(collect)
    try:
        yield failures
    finally:
        logger.removeFilter(collect)
