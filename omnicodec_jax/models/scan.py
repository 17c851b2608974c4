"""Applies layers of one shape as a loop, which compiles faster and holds the activations of one layer at a time."""

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
    """Applies a layer with one set of parameters after the other. Only the inputs of layers are kept for the gradient.

    Args:
        layer: The layer.
        params: The layer's parameters, one set for each time that it is applied.
        x: Input of the first layer, [B, T, C].
        inputs: Further inputs, the same for all layers.

    Returns:
        The output of each layer, [L, B, T, C].
    """

    @partial(jax.checkpoint, prevent_cse=False)  # a loop already keeps XLA from merging both computations
    def step(x: Float[Array, "B T C"], params: Any) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
        out: Any = layer.apply({"params": params}, x, *inputs)
        return out, out

    return jax.lax.scan(step, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *params))[1]
