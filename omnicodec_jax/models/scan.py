"""Layers of one shape as one program that runs once for each: less to compile, and memory for one layer at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def scan_layers(
    layer: nn.Module, params: Sequence[Any], x: Float[Array, "B T C"], *inputs: Array
) -> Float[Array, "L B T C"]:
    """What leaves each layer, as if `layer` were applied with one set of parameters after the other.

    inputs: the same for all layers. The gradient keeps only what goes into each layer, and computes the rest anew.
    """

    @partial(jax.checkpoint, prevent_cse=False)  # a loop prevents it
    def step(x: Float[Array, "B T C"], params: Any) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
        out: Any = layer.apply({"params": params}, x, *inputs)
        return out, out

    return jax.lax.scan(step, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *params))[1]
