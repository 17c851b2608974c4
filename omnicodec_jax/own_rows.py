"""Computes something of each device's own rows of a batch, where XLA by itself would bring all rows to every device.

XLA's partitioner knows no way to split an FFT, nor a grouped convolution, whose rows are spread over devices. It
gathers the rows of all devices on each of them, and each computes all (jax issue 15680, xla issue 24). But both treat
rows one by one, so nothing has to be gathered.
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

    The devices are those of the mesh that is in force where this is traced (`distributed.sharding.in_force`). Without
    one, or where it does not divide the rows, the function is simply applied.

    Args:
        function: Maps rows and whole arrays to rows.
        rows: An array whose first axis is that of the batch.
        whole: Further arguments, which every device has whole, such as kernels.
        checked: Whether JAX follows which arrays are the same on several devices. A Pallas kernel does not say it.

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
