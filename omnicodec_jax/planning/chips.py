"""Chips that are not there, with the network between them, by names such as v5e:4x4 and h100:4x8."""

import importlib.util
import math
import os
import re
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
    """How many chips reach each other without the network between hosts of GPUs, or between slices of TPUs."""

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Returns the topology of a name.

        It is v5e:4x4 (a slice of TPUs), 2xv5e:16x16 (two slices), a100:8 (GPUs of a host), or h100:4x8 (hosts x GPUs).

        Raises:
            ConfigError: For an unknown name, for a number in which the chips do not come, and if the compiler for the
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
    """Returns slices of TPUs, as libtpu knows them."""
    _require("libtpu")
    if slices > 1 and chip.network is None:
        raise ConfigError(f"--topology {slices}x{name}: nothing is published on the network between slices of these")
    # Without these variables, libtpu asks the network which machine this is, and only one process at a time can
    # compile.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    # libtpu takes four chips for the smallest host, unless told that there is one chip alone.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    several = {"num_slices": slices} if slices > 1 else {}
    devices = _devices(name, name, "tpu", **alone, **several)
    return Topology(chip, devices, len(devices) // slices)


def _gpus(name: str, chip: Chip, sizes: list[int]) -> Topology:
    """Returns GPUs of one or more hosts."""
    if len(sizes) > 2 or sizes[-1] > GPUS_PER_HOST:
        raise ConfigError(
            f"--topology {name}: a host has 1 to {GPUS_PER_HOST} GPUs; several hosts are hosts x GPUs, such as 4x8"
        )
    _require("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
    hosts, gpus = [1, *sizes][-2:]
    # Both are needed: without either, the plugin would look for a GPU and CUDA here.
    devices = _devices(name, "", "cuda", topology=f"1x{hosts}x{gpus}", target_config=chip.target)
    taken = float(
        os.environ.get("XLA_CLIENT_MEM_FRACTION", os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", JAX_TAKES))
    )
    return Topology(chip._replace(memory=chip.memory / JAX_TAKES * taken), devices, gpus)


def _require(*modules: str) -> None:
    """Raises ConfigError where a module that the compiler consists of is not installed."""
    for module in modules:
        root = module.partition(".")[0]
        if importlib.util.find_spec(root) is None or importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed; {with_extra('plan')}")


def _devices(name: str, known: str, platform: str, **options: Any) -> list[Any]:
    """Returns the devices that a compiler describes. Raises ConfigError where it does not know them by that name."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(known, platform, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {name}: {error}") from None
