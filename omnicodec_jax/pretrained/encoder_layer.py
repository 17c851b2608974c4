"""The parts that the frozen encoders of log-mel frames share: transformer layer, positions, and checks of sizes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config.checks import require, require_positive
from omnicodec_jax.models.conv import Lengths
from omnicodec_jax.models.transformer import LayerNorm

Tokens = Float[Array, "B S D"]


def require_sizes(config: Any) -> None:
    """Raises ConfigError for an encoder's config with a size that is not positive, or a width that cannot be."""
    require_positive(config, *(field.name for field in dataclasses.fields(config)))
    width, heads = config.d_model, config.num_heads
    require(width % heads == 0, config, "d_model", f"a multiple of num_heads={heads}")
    require(width % 2 == 0 and width > 2, config, "d_model", "even, and more than 2 (sinusoids)")


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Computes the position embedding, float32 [length, channels]: first the sines, then the cosines."""
    half = channels // 2
    angles = np.outer(np.arange(length), 10_000.0 ** (-np.arange(half) / (half - 1)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class WindowedAttention(nn.Module):
    """Multi-head self-attention of the valid tokens of each window among themselves."""

    num_heads: int
    window: int
    """Number of tokens of a window."""
    key_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Tokens, lengths: Lengths) -> Tokens:
        """Applies attention to x [B, S, D]; `lengths` are the valid tokens of each row."""
        batch, steps, width = x.shape
        size = min(self.window, steps)
        count = -(-steps // size)

        def windows(name: str, use_bias: bool = True) -> Float[Array, "B W L H E"]:
            y = nn.Dense(width, use_bias=use_bias, dtype=self.dtype, name=name)(x)
            y = jnp.pad(y, ((0, 0), (0, count * size - steps), (0, 0)))
            return y.reshape(batch, count, size, self.num_heads, -1)

        q, k, v = windows("query"), windows("key", self.key_bias), windows("value")
        valid = (jnp.arange(count * size)[None] < lengths[:, None]).reshape(batch, count, 1, 1, size)
        # Logits and softmax are float32 whatever the compute type; finite, as a window may hold no valid token.
        logits = jnp.einsum("bwqhe,bwkhe->bwhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min)).astype(v.dtype)
        mixed = jnp.einsum("bwhqk,bwkhe->bwqhe", weights, v).reshape(batch, -1, width)[:, :steps]
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with a float32 residual stream."""

    num_heads: int
    dim_feedforward: int
    window: int
    """Number of tokens of an attention window."""
    dtype: DTypeLike
    key_bias: bool = True

    @nn.compact
    def __call__(self, x: Tokens, lengths: Lengths) -> tuple[Tokens, None]:
        """Applies the layer; `lengths` are the valid tokens of each row. `nn.scan` needs the None."""
        attention = WindowedAttention(self.num_heads, self.window, self.key_bias, self.dtype, name="attention")
        y = attention(LayerNorm(name="norm_1")(x), lengths)
        x = x + y.astype(jnp.float32)
        y = nn.Dense(self.dim_feedforward, dtype=self.dtype, name="linear_1")(LayerNorm(name="norm_2")(x))
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="linear_2")(jax.nn.gelu(y, approximate=False))
        return x + y.astype(jnp.float32), None
