"""Who holds what: the mesh, and one table from names of parameters to the axes that share them out.

    data      groups of devices with different clips; each group holds the whole state
    fsdp      devices of a group, with different clips too; each holds its part of every large kernel and of its moments
    tensor    devices with the same clips; each computes its part of the transformers' channels

A step begins by gathering what fsdp shares out, and shares out the gradients: kernels are small beside activations, and
XLA, left to choose where the two want the same axis, shares out channels and has every device compute all clips. It
derives all other collectives. Sums over the batch are sums over the global batch.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omnicodec_jax.config import MeshConfig
from omnicodec_jax.errors import ConfigError

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""Of whatever has clips as its first axis."""

TABLE = (
    (r"codebooks", P()),
    (r"(attention\.out|linear_2)\.kernel$", P("tensor", "fsdp")),
    (r"(qkv|query|key|value|linear_1)\.kernel$", P("fsdp", "tensor")),
    (r"kernel$", P("fsdp", None)),
    (r"", P()),
)
"""The first pattern that is found in a name decides about the last axes of the array; the others are not shared."""
SMALLEST = 2**14
"""Arrays of fewer elements are not shared out: gathering them would cost more than keeping them."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices, all by default, in the order that suits their network. Raises ConfigError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    group = config.fsdp * config.tensor
    data = config.data or max(1, len(devices) // group)
    if data * group != len(devices):
        raise ConfigError(
            f"run.mesh: data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = {data * group}, but there "
            f"are {len(devices)} devices; choose a mesh of as many"
        )
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, (AxisType.Auto,) * 3, devices=devices)


def spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """How an array is shared out: the table's row, less the axes that do not divide it."""
    if np.prod(shape) < SMALLEST:
        return P()
    axes = next(row for pattern, row in TABLE if re.search(pattern, name))
    padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(padded, shape, strict=True))
    return P(*fits)


def shardings(mesh: Mesh, tree: T, gathered: bool = False) -> T:
    """The same tree with the sharding of each array, or of what has its shape; gathered: as `gather` returns it."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        axes = spec(mesh, jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        return NamedSharding(mesh, P(*(None if gathered and axis == "fsdp" else axis for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gather(mesh: Mesh | None, tree: T) -> T:
    """To compute with, inside jit: kernels whole, but for their parts of `tensor`. mesh None: there is one device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree, gathered=True))


def share_out(mesh: Mesh | None, tree: T) -> T:
    """The inverse of `gather`; gradients are summed whole, lest XLA share out the channels that they come from, too."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(gather(mesh, tree), shardings(mesh, tree))


def template(mesh: Mesh, make: Callable[[], T]) -> T:
    """What `make` would return, as shapes with their shardings: nothing is computed."""
    shapes = jax.eval_shape(make)

    def shared_out(leaf: Any, held: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=held)

    return jax.tree.map(shared_out, shapes, shardings(mesh, shapes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: its rows over all devices but those that compute the same."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds."""
    return NamedSharding(mesh, P())


def bytes_per_device(tree: Any) -> dict[Any, int]:
    """What each device of this process holds of a tree of arrays."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held
