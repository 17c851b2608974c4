"""WavLM (arXiv 2110.13900), frozen: the hidden states of every layer for 16 kHz audio.

Source: transformers' WavLMModel in evaluation mode. The numbers are the same; no padding is masked.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config.checks import require, require_positive
from omnicodec_jax.models.scan import scan_layers
from omnicodec_jax.own_rows import on_own_rows

Hidden = Float[Array, "B N D"]
PositionBias = Float[Array, "H N N"]

SAMPLE_RATE = 16_000
"""Sample rate of the audio that WavLM takes, Hz."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WavLMConfig:
    """Config of WavLM. The defaults are those of base and base-plus, which have 94.4 M parameters."""

    dimension: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dim_feedforward: int = 3072
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    """Normalisation of the convolutions. `group`: each channel is normalised over time, after the first convolution
    only. `layer`: LayerNorm follows each convolution (large)."""
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    """Number of rows of the relative position table."""
    max_bucket_distance: int = 800
    """Distance from which on all keys share a row."""
    stable_layer_norm: bool = False
    """If true, norms stand before attention and feed-forward, and after the last layer (large). Otherwise they stand
    after attention and feed-forward."""
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        require_positive(self, "dimension", "num_layers", "num_heads", "dim_feedforward", "norm_epsilon")
        require_positive(self, "position_kernel", "position_groups", "num_buckets")
        for name in ("conv_channels", "conv_kernels", "conv_strides"):
            require(bool(getattr(self, name)) and min(getattr(self, name)) > 0, self, name, "positive numbers")
            require(len(getattr(self, name)) == len(self.conv_channels), self, name, "as many as conv_channels")
        for name in ("num_heads", "position_groups"):
            require(self.dimension % getattr(self, name) == 0, self, name, f"a divisor of dimension={self.dimension}")
        require(self.conv_norm in ("group", "layer"), self, "conv_norm", "'group' or 'layer'")
        require(self.num_buckets % 4 == 0, self, "num_buckets", "a multiple of 4")
        exact = self.num_buckets // 4
        require(self.max_bucket_distance > exact, self, "max_bucket_distance", f"above num_buckets / 4 = {exact}")

    @property
    def receptive_field(self) -> int:
        """Number of samples that one step depends on: the length of the shortest audio."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


def relative_buckets(steps: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Computes the row of the position table for each query and key, int [steps, steps].

    Half of the rows are for keys after the query. In each half, the first half of the rows are for one distance each.
    The others are for distances that grow by equal ratios up to `max_distance`, and all longer distances share the last
    row. It is computed in float32, as in transformers.
    """
    offset = np.arange(steps)[None] - np.arange(steps)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(offset)
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (share * (half - exact)).astype(int), half - 1)
    return half * (offset > 0) + np.where(distance < exact, distance, far)


def gelu(x: Hidden) -> Hidden:
    """Computes the exact GELU; jax's default is an approximation."""
    return jax.nn.gelu(x, approximate=False)


def conv_of_own_rows(x: Hidden, kernel: Float[Array, "k I O"], *arguments: Any, **options: Any) -> Hidden:
    """Computes `jax.lax.conv_general_dilated` on each device of the rows that it holds."""

    def convolve(x: Hidden, kernel: Float[Array, "k I O"]) -> Hidden:
        return jax.lax.conv_general_dilated(x, kernel, *arguments, **options)

    return on_own_rows(convolve, x, kernel)


class FeatureEncoder(nn.Module):
    """Front end of strided convolutions without padding."""

    config: WavLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, audio: Float[Array, "B T"]) -> Float[Array, "B N C"]:
        """Convolves audio; each layer makes (T - kernel) // stride + 1 steps of T steps."""
        config, x = self.config, audio[..., None]
        for i, (channels, kernel, stride) in enumerate(
            zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True)
        ):
            x = nn.Conv(
                channels, kernel, stride, "VALID", use_bias=config.conv_bias, dtype=self.dtype, name=f"conv_{i}"
            )(x)
            if config.conv_norm == "layer":
                x = nn.LayerNorm(1e-5, name=f"norm_{i}")(x.astype(jnp.float32))
            elif i == 0:
                x = nn.InstanceNorm(epsilon=1e-5, name="norm_0")(x.astype(jnp.float32))
            x = gelu(x)
        return x


class GatedAttention(nn.Module):
    """Self-attention with a relative position bias that each query scales by a gate of its own."""

    config: WavLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Hidden, position_bias: PositionBias) -> Hidden:
        """Applies attention to x, float32 in and out. The position bias is the same for all layers."""
        batch, steps, width = x.shape

        def heads(y: Hidden) -> Float[Array, "B H N C"]:
            return y.reshape(batch, steps, self.config.num_heads, -1).swapaxes(1, 2)

        q, k, v = (heads(nn.Dense(width, dtype=self.dtype, name=name)(x)) for name in ("query", "key", "value"))
        # Logits and softmax are float32 whatever the compute type.
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(logits + self._gate(heads(x)) * position_bias[None]).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v).swapaxes(1, 2).reshape(batch, steps, width)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed).astype(jnp.float32)

    def _gate(self, x: Float[Array, "B H N C"]) -> Float[Array, "B H N 1"]:
        """Computes the gate a·(b·scale - 1) + 2; a and b are between 0 and 1 and depend on the query's own step."""
        scale = self.param("gate_scale", nn.initializers.ones, (1, x.shape[1], 1, 1))
        # The eight features are added up in two groups of four.
        sums = nn.Dense(8, precision=jax.lax.Precision.HIGHEST, name="gate")(x).reshape(*x.shape[:3], 2, 4).sum(-1)
        a, b = jnp.split(nn.sigmoid(sums), 2, axis=-1)
        return a * (b * scale - 1) + 2


class FeedForward(nn.Module):
    """Two dense layers around a GELU."""

    config: WavLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Applies the layers to x, float32 in and out."""
        y = gelu(nn.Dense(self.config.dim_feedforward, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="linear_2")(y).astype(jnp.float32)


class WavLMLayer(nn.Module):
    """Transformer layer of attention and feed-forward."""

    config: WavLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Hidden, position_bias: PositionBias) -> Hidden:
        """Applies the layer, float32 in and out; `stable_layer_norm` says where its norms stand."""
        attention = GatedAttention(self.config, self.dtype, name="attention")
        feed_forward = FeedForward(self.config, self.dtype, name="feed_forward")
        norm_1, norm_2 = (nn.LayerNorm(self.config.norm_epsilon, name=name) for name in ("norm_1", "norm_2"))
        if self.config.stable_layer_norm:
            x = x + attention(norm_1(x), position_bias)
            return x + feed_forward(norm_2(x))
        x = norm_1(x + attention(x, position_bias))
        return norm_2(x + feed_forward(x))


class WavLM(nn.Module):
    """The WavLM model: float32 hidden states of 16 kHz audio, 50 per second, differentiable in the audio.

    Matrix products and convolutions compute in `dtype`, float32 or bfloat16; norms, softmax and the residual stream
    are float32. With `remat`, only the input of each layer is kept for the gradient, and the rest is computed again.
    """

    config: WavLMConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def example_inputs(self) -> tuple[Float[Array, "1 T"]]:
        """Makes inputs of the smallest shape, for `init` to call the module with."""
        return (jnp.zeros((1, self.config.receptive_field)),)

    @nn.compact
    def __call__(self, audio: Float[Array, "B T"]) -> tuple[Hidden, ...]:
        """Computes the hidden states: the input of the first layer, and the output of each layer.

        With `stable_layer_norm` the last one is normed, as transformers' `last_hidden_state` is.

        Args:
            audio: float32 [B, T]; its amplitude is not normalised.
        """
        config = self.config
        x = FeatureEncoder(config, self.dtype, name="feature_encoder")(audio)
        x = nn.LayerNorm(config.norm_epsilon, name="feature_norm")(x.astype(jnp.float32))
        x = nn.Dense(config.dimension, dtype=self.dtype, name="feature_projection")(x)
        kernel = config.position_kernel
        position = nn.Conv(
            config.dimension,
            kernel,
            padding=[(kernel // 2, (kernel - 1) // 2)],
            feature_group_count=config.position_groups,
            dtype=self.dtype,
            conv_general_dilated=conv_of_own_rows,
            name="position_conv",
        )(x)
        x = x.astype(jnp.float32) + gelu(position).astype(jnp.float32)
        norm = nn.LayerNorm(config.norm_epsilon, name="norm")
        hidden_states = [x if config.stable_layer_norm else norm(x)]

        table_shape = (config.num_buckets, config.num_heads)
        table = self.param("position_table", nn.initializers.normal(0.02), table_shape)
        buckets = relative_buckets(x.shape[1], config.num_buckets, config.max_bucket_distance)
        position_bias = table.T[:, buckets]
        names = [f"layer_{i}" for i in range(config.num_layers)]
        if self.remat and not self.is_initializing():
            layer = WavLMLayer(config, self.dtype, parent=None)
            params = [self.variables["params"][name] for name in names]
            hidden_states += [*scan_layers(layer, params, hidden_states[0], position_bias)]
        else:
            for name in names:
                hidden_states.append(WavLMLayer(config, self.dtype, name=name)(hidden_states[-1], position_bias))
        if config.stable_layer_norm:
            hidden_states[-1] = norm(hidden_states[-1])
        return tuple(hidden_states)
