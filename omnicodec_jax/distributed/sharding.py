"""The mesh of devices, and one table of rules that says over which of its axes each array is sharded.

    data      groups of devices with different clips; each group holds the whole state. Where the devices are in several
              slices, with a slower network between them, every group is in one of them
    fsdp      devices of a group, with different clips too; each holds a shard of every large kernel and of its moments
    tensor    devices with the same clips; each computes a part of the transformers' channels

A step begins by gathering the kernels that are sharded over fsdp, and ends by sharding their gradients. Both are stated
explicitly, since kernels are small beside activations: where a kernel and the clips want the same axis, XLA by itself
would shard channels and let every device compute all clips. XLA derives all other collectives. Sums over the batch are
sums over the global batch.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omnicodec_jax.config import MeshConfig
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.own_rows import BATCH_AXES

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)
"""The partition of every array that has clips as its first axis."""

RULES = (
    (r"codebooks", P()),
    (r"(attention\.out|linear_2)\.kernel$", P("tensor", "fsdp")),
    (r"(qkv|query|key|value|linear_1)\.kernel$", P("fsdp", "tensor")),
    (r"kernel$", P("fsdp", None)),
    (r"", P()),
)
"""Pattern of a name, and partition of the last axes of the arrays with such names. The first pattern found decides.

Other axes are not sharded."""
MIN_SHARDED_SIZE = 2**14
"""Arrays of fewer elements are not sharded, since gathering them would cost more than keeping them."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices (by default all) in a mesh, in an order that suits the networks between them.

    Raises ConfigError if the mesh is not one of as many devices, or does not fit their slices.
    """
    devices = jax.devices() if devices is None else devices
    group = config.fsdp * config.tensor
    data = max(1, len(devices) // group) if config.data is None else config.data
    if data * group != len(devices):
        raise ConfigError(
            f"run.mesh: data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = {data * group}, but there "
            f"are {len(devices)} devices; choose a mesh of as many"
        )
    shape, sizes = (data, config.fsdp, config.tensor), Counter(map(_slice_of, devices))
    if config.slices not in (None, 1, len(sizes)):
        raise ConfigError(f"run.mesh.slices = {config.slices}: the {len(devices)} devices are in {len(sizes)} slice(s)")
    if len(sizes) > 1 and config.slices == 1:
        ordered = sorted(devices, key=lambda device: (_slice_of(device), device.id))
        arranged = np.array(ordered).reshape(shape)
    else:
        arranged = _arranged(shape, sizes, devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def _slice_of(device: Any) -> int:
    """Returns the number of the slice that a device is in; 0 for devices that know no slices."""
    return getattr(device, "slice_index", 0)


def _arranged(shape: tuple[int, int, int], sizes: Mapping[int, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices of one or more slices: the groups of the first axis are spread over the slices.

    Raises ConfigError if the slices are not equally large, or a group does not fit into one.
    """
    (data, fsdp, tensor), count, held = shape, len(sizes), set(sizes.values())
    if len(held) > 1:
        raise ConfigError(f"run.mesh: the {count} slices have {sorted(held)} devices; all must have as many")
    if data % count:
        raise ConfigError(
            f"run.mesh: fsdp x tensor = {fsdp} x {tensor} devices share a state, and must divide the {held.pop()} of "
            f"each of the {count} slices; with run.mesh.slices = 1 they may reach over the slower network between these"
        )
    # jax.make_mesh takes one slice alone, and on all TPUs but v5e refuses an axis of 2 in a slice of 4 x 8 chips. Here
    # an axis takes a part of a side where it cannot have whole ones.
    within, split = (data // count, fsdp, tensor), {"allow_split_physical_axes": True}
    if count == 1:
        return mesh_utils.create_device_mesh(within, devices, **split)
    return mesh_utils.create_hybrid_device_mesh(within, (count, 1, 1), devices, **split)


def in_force(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which `own_rows.on_own_rows` finds the mesh while a step is traced. None: one device."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def partition_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """Returns the partition of an array by its name, from `RULES`, without mesh axes that do not divide its shape."""
    if np.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    axes = next(row for pattern, row in RULES if re.search(pattern, name))
    padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(padded, shape, strict=True))
    return P(*fits)


def shardings(mesh: Mesh, tree: T, gathered: bool = False) -> T:
    """Returns the sharding of each array in a tree of arrays or of shapes; if `gathered`, that after `gather`."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        axes = partition_spec(mesh, jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        return NamedSharding(mesh, P(*(None if gathered and axis == "fsdp" else axis for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gather(mesh: Mesh | None, tree: T) -> T:
    """Gathers the shards over fsdp, inside jit, so that a step can compute with whole kernels.

    Kernels stay sharded over tensor. With mesh None there is one device, and nothing to do.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree, gathered=True))


def shard(mesh: Mesh | None, tree: T) -> T:
    """Shards gathered arrays again, inside jit: the inverse of `gather`.

    Gradients are summed before they are sharded. Otherwise XLA would also shard the channels that they are computed
    from.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(gather(mesh, tree), shardings(mesh, tree))


def template(mesh: Mesh, make: Callable[[], T]) -> T:
    """Returns the shapes and shardings of the arrays that `make` would return. Nothing is computed."""
    shapes = jax.eval_shape(make)

    def with_sharding(leaf: Any, held: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=held)

    return jax.tree.map(with_sharding, shapes, shardings(mesh, shapes))


def to_global(tree: T, mesh: Mesh) -> T:
    """Makes global arrays, sharded over the mesh, of host arrays that every host has whole and alike."""

    def put(leaf: Any, held: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, held, lambda part: leaf[part])

    return jax.tree.map(put, tree, shardings(mesh, tree))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, whose rows are spread over the axes data and fsdp."""
    return NamedSharding(mesh, BATCH)


def require_whole_rows(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises ConfigError, with the option's name, for a batch that the mesh does not divide."""
    if batch_size % (rows := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(f"{name} = {batch_size}: must be a multiple of data x fsdp = {rows}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds all."""
    return NamedSharding(mesh, P())


def bytes_per_device(tree: Any) -> dict[Any, int]:
    """Returns how many bytes of a tree of arrays each device of this process holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held
