"""A causal transformer with windowed attention, interleaved RoPE and LayerScale (spec §1.4), for clips and streams.

Matrix products compute in `dtype`; the residual stream, norms, rotations and softmax are float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from omnicodec_jax.config import TransformerConfig
from omnicodec_jax.models.conv import STREAM, Activations, Dense, is_streaming
from omnicodec_jax.models.scan import scan_layers

Heads = Float[Array, "B H T D"]
Positions = Int[Array, "B T"]


def rotary(x: Heads, positions: Positions, max_period: float) -> Heads:
    """Rotates the channel pairs (2i, 2i + 1) by position · max_period^(-2i / D), in float32.

    It is as precise on the second day of a stream as in its first second, since angles are integer multiples of 2^-32
    turns: an integer that overflows has made whole turns. In float32, angles would be wrong by 0.1 after a day of 25
    steps a second.
    """
    half = x.shape[-1] // 2
    turns = max_period ** (-np.arange(half) / half) / (2 * np.pi)
    steps = np.rint(turns * 2**32).astype(np.uint64).astype(np.uint32)
    whole = positions[..., None].astype(jnp.uint32) * steps[None, None]
    angles = jax.lax.bitcast_convert_type(whole, jnp.int32).astype(jnp.float32) * (2 * np.pi / 2**32)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2), -1, 0)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class CausalAttention(nn.Module):
    """Multi-head self-attention of each step to the last `context` steps, the step itself included.

    A stream carries the last `context` keys and values.
    """

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations, positions: Positions) -> Activations:
        """Applies attention to x [B, T, C]. `positions` are those of the steps in their clips or streams."""
        batch, steps, width = x.shape
        config = self.config
        packed = Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = packed.reshape(batch, steps, 3, config.num_heads, -1).transpose(2, 0, 3, 1, 4)
        q = rotary(q, positions, config.max_period)
        k = rotary(k, positions, config.max_period)
        k, v, key_positions = self._with_past(k, v, positions)

        distance = positions[:, :, None] - key_positions[:, None, :]
        visible = (distance >= 0) & (distance < config.context) & (key_positions >= 0)[:, None, :]
        # Logits and softmax are float32 whatever the compute type.
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf)).astype(v.dtype)
        mixed = jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)
        return Dense(width, use_bias=False, dtype=self.dtype, name="out")(mixed.reshape(batch, steps, width))

    def _with_past(
        self, k: Heads, v: Heads, positions: Positions
    ) -> tuple[Float[Array, "B H L D"], Float[Array, "B H L D"], Int[Array, "B L"]]:
        """Returns keys, values and positions of this block, after those of the past that a stream carries."""
        if not is_streaming(self):
            return k, v, positions
        batch, heads, steps, width = k.shape
        context = self.config.context
        past = self.variable(STREAM, "past", jnp.zeros, (batch, 2, heads, context, width), k.dtype)
        keys_values = jnp.concatenate([past.value, jnp.stack([k, v], axis=1)], axis=3)
        past.value = keys_values[:, :, :, steps:]
        before = positions[:, :1] - jnp.arange(context, 0, -1)[None]
        return keys_values[:, 0], keys_values[:, 1], jnp.concatenate([before, positions], axis=1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32 whatever the types of input and parameters."""

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Normalises x [B, T, C]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32)
        return jax.nn.standardize(x, epsilon=1e-5) * scale[None, None] + bias[None, None]


class LayerScale(nn.Module):
    """A layer of one learnt factor per channel (arXiv 2103.17239); its result is float32."""

    initial: float

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Scales the channels of x [B, T, C]."""
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x.astype(jnp.float32) * scale.astype(jnp.float32)[None, None]


class TransformerLayer(nn.Module):
    """A pre-norm block: x += scale·attention(norm(x)); x += scale·feed_forward(norm(x))."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations, positions: Positions) -> Activations:
        """Applies the layer to x [B, T, C]; see `CausalAttention` for `positions`."""
        config, dense = self.config, partial(Dense, use_bias=False, dtype=self.dtype)
        y = CausalAttention(config, self.dtype, name="attention")(LayerNorm(name="norm_1")(x), positions)
        x = x + LayerScale(config.layer_scale, name="layer_scale_1")(y)
        y = dense(config.dim_feedforward, name="linear_1")(LayerNorm(name="norm_2")(x))
        y = dense(x.shape[-1], name="linear_2")(jax.nn.gelu(y, approximate=False))
        return x + LayerScale(config.layer_scale, name="layer_scale_2")(y)


class Transformer(nn.Module):
    """A stack of layers without a final norm: [B, T, C] → [B, T, C] float32.

    A stream carries the number of steps that it has had. With `remat`, only the input of each layer is kept for the
    gradient, and the rest is computed again; streams cannot use it.
    """

    config: TransformerConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Applies all layers to x [B, T, C]."""
        batch, steps, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(steps), (batch, steps))
        if is_streaming(self):
            seen = self.variable(STREAM, "seen", jnp.zeros, (batch,), jnp.int32)
            positions = positions + seen.value[:, None]
            seen.value = seen.value + steps
        x = x.astype(jnp.float32)
        names = [f"layer_{i}" for i in range(self.config.num_layers)]
        if self.remat and not self.is_initializing():
            layer = TransformerLayer(self.config, self.dtype, parent=None)
            return scan_layers(layer, [self.variables["params"][name] for name in names], x, positions)[-1]
        for name in names:
            x = TransformerLayer(self.config, self.dtype, name=name)(x, positions)
        return x
