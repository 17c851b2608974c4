"""The TPU chips that a program can be planned for: their speeds, and devices of topologies that are not there."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from omnicodec_jax.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """The speed and memory of one TPU chip. Of a v4 chip it is one core, since its two cores are separate devices."""

    flops: float
    """Operations per second in bfloat16."""
    bandwidth: float
    """Bytes per second between the chip and its memory."""
    memory: float
    """Bytes that a program can use."""


CHIPS = {
    "v4": Chip(137.5e12, 614e9, 15.25 * GIB),
    "v5e": Chip(197e12, 819e9, 15.75 * GIB),
    "v5p": Chip(459e12, 2765e9, 95.74 * GIB),
    "v6e": Chip(918e12, 1640e9, 31.25 * GIB),
}
"""The chips by name. Source of the speeds: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The memory is what
libtpu 0.0.42 reports as available when a program does not fit."""


class Topology(NamedTuple):
    """A number of equal chips and the network between them."""

    chip: Chip
    devices: list[Any]
    """The devices, none of which has to exist."""

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Returns the topology of a name such as v5e:4x4. Raises ConfigError for names that libtpu does not know."""
        from jax.experimental import topologies

        kind = name.partition(":")[0]
        if kind not in CHIPS:
            raise ConfigError(f"--topology {name}: must be one of {', '.join(CHIPS)}, and chips, such as v5e:4x4")
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError("libtpu is not installed; in the checkout, pip install -e '.[tpu]'")
        # Without these, libtpu asks the network which machine this is, and lets no second process compile.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        try:
            return cls(CHIPS[kind], list(topologies.get_topology_desc(name, "tpu").devices))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise ConfigError(f"--topology {name}: {error}") from None
