"""SEANet encoder and decoder (SoundStream; spec §1.1–1.2), causal, channels-last, ELU, no normalisation.

Activations are of the compute type `dtype`, the residual stream too: the time goes into moving them. The convolutions
from and to audio compute in float32.

With `remat`, the gradient keeps only what goes from stage to stage, and computes each stage anew. The stages are cut
where tensors are narrow: those at full rate begin and end with the audio, so no 64 channels of it are kept.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config import SEANetConfig
from omnicodec_jax.models.conv import CausalConv1d, CausalConvTranspose1d, Lengths, Output, Sequence, elu


class ResidualBlock(nn.Module):
    """x + conv1(ELU(conv_k,dilated(ELU(x)))), the inner convolution at 1/compress of the channels."""

    config: SEANetConfig
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Sequence) -> Sequence:
        channels, config = x.shape[2], self.config
        y = elu(x)
        y = CausalConv1d(
            channels // config.compress,
            config.residual_kernel_size,
            dilation=self.dilation,
            dtype=self.dtype,
            name="conv_1",
        )(y)
        return x + CausalConv1d(channels, 1, dtype=self.dtype, name="conv_2")(elu(y))


def residual_blocks(config: SEANetConfig, dtype: DTypeLike, stage: int, x: Sequence) -> Sequence:
    """The residual blocks of one stage, dilations 1, 2, 4, …; called inside a compact module."""
    for j in range(config.n_residual_layers):
        x = ResidualBlock(config, config.dilation_base**j, dtype, name=f"stage_{stage}_residual_{j}")(x)
    return x


class SEANetEncoder(nn.Module):
    """Audio [B, T, 1] → latent [B, ceil(T / hop), dimension]."""

    config: SEANetConfig
    dimension: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T 1"], lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B N D"], Lengths | None]:
        """Also returns how many of the N steps are valid in each row, if `lengths` says so of the samples."""
        config, dtype = self.config, self.dtype

        def stage(_: nn.Module, i: int, ratio: int, x: Sequence, lengths: Lengths | None) -> Output:
            if i == 0:
                x = CausalConv1d(config.n_filters, config.kernel_size, name="conv_in")(x).astype(dtype)
            x = elu(residual_blocks(config, dtype, i, x))
            down = CausalConv1d(2 * x.shape[2], 2 * ratio, stride=ratio, dtype=dtype, name=f"stage_{i}_down")
            return down(x, lengths)

        if self.remat:
            stage = nn.remat(stage, static_argnums=(1, 2))
        for i, ratio in enumerate(reversed(config.ratios)):
            x = stage(self, i, ratio, x, lengths)
            lengths = None if lengths is None else -(-lengths // ratio)
        x = CausalConv1d(self.dimension, config.last_kernel_size, dtype=dtype, name="conv_out")(elu(x))
        return x, lengths


class SEANetDecoder(nn.Module):
    """Latent [B, N, dimension] → audio [B, N·hop, 1], float32, unbounded."""

    config: SEANetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B T 1"]:
        config, dtype = self.config, self.dtype
        stages = len(config.ratios)

        def stage(_: nn.Module, i: int, ratio: int, x: Sequence) -> Output:
            x = CausalConvTranspose1d(x.shape[2] // 2, ratio, dtype=dtype, name=f"stage_{i}_up")(elu(x))
            x = residual_blocks(config, dtype, i, x)
            return CausalConv1d(1, config.last_kernel_size, name="conv_out")(elu(x)) if i == stages - 1 else x

        if self.remat:
            stage = nn.remat(stage, static_argnums=(1, 2))
        x = CausalConv1d(config.n_filters * 2**stages, config.kernel_size, dtype=dtype, name="conv_in")(x)
        for i, ratio in enumerate(config.ratios):
            x = stage(self, i, ratio, x)
        return x
