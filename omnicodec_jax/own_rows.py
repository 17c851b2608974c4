"""Applies a function to a batch whose rows are spread over devices, on each device to its own rows.

XLA's partitioner cannot split an FFT or a grouped convolution over the rows of a batch. It gathers all rows on every
device, and each device computes all of them (jax issue 15680, xla issue 24). But both operations treat rows one by one,
so that nothing has to be gathered.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
"""Axes of the mesh over which the rows of a batch are spread."""


def on_own_rows(function: Callable[..., Array], rows: Array, *whole: Array, checked: bool = True) -> Array:
    """Applies a function that treats rows one by one, on every device to the rows that it holds.

    The devices are those of the mesh that is in force while this is traced (`distributed.sharding.in_force`). Without a
    mesh, or with one that does not divide the number of rows, the function is simply called.

    Args:
        function: Maps rows and whole arrays to rows.
        rows: An array whose first axis is that of the batch.
        whole: Further arguments, of which every device has all, such as kernels.
        checked: Whether JAX checks which arrays are equal on all devices. It cannot do so for a Pallas kernel.

    Examples:
        >>> import jax.numpy as jnp
        >>> on_own_rows(jnp.fft.rfft, jnp.ones((2, 4))).real.tolist()
        [[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return function(rows, *whole)
    if rows.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return function(rows, *whole)
    specs = (P(BATCH_AXES), *(P() for _ in whole))
    return jax.shard_map(function, in_specs=specs, out_specs=P(BATCH_AXES), check_vma=checked)(rows, *whole)
