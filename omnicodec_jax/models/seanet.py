"""SEANet encoder and decoder (SoundStream; spec §1.1–1.2), causal, channels-last, ELU, no normalisation.

Activations have the compute type `dtype`, the residual stream included, since most of the time goes into moving them.
The convolutions from and to audio compute in float32.

With `remat`, only what goes from stage to stage is kept for the gradient, and each stage is computed again. Stages are
cut where tensors are narrow: those at the full rate begin or end with the audio, so that its 64 channels are not kept.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config import SEANetConfig
from omnicodec_jax.models.conv import Activations, CausalConv1d, CausalConvTranspose1d, ConvOutput, Lengths, elu


class ResidualBlock(nn.Module):
    """Residual block x + conv_1(ELU(conv_k(ELU(x)))); the inner, dilated convolution has 1/compress of the channels."""

    config: SEANetConfig
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Applies the block to x [B, T, C]."""
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


def residual_blocks(config: SEANetConfig, dtype: DTypeLike, stage: int, x: Activations) -> Activations:
    """Applies the residual blocks of one stage, with dilations 1, 2, 4, …, inside a compact module."""
    for j in range(config.n_residual_layers):
        x = ResidualBlock(config, config.dilation_base**j, dtype, name=f"stage_{stage}_residual_{j}")(x)
    return x


class SEANetEncoder(nn.Module):
    """Encoder from audio [B, T, 1] to a latent [B, ceil(T / hop), dimension]."""

    config: SEANetConfig
    dimension: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T 1"], lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B N D"], Lengths | None]:
        """Encodes audio.

        Args:
            x: Audio float32 [B, T, 1].
            lengths: Number of valid samples of each row, int32 [B]; None: all.

        Returns:
            The latent, and the number of valid steps of each row if `lengths` was given.
        """
        config, dtype = self.config, self.dtype

        def stage(_: nn.Module, i: int, ratio: int, x: Activations, lengths: Lengths | None) -> ConvOutput:
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
    """Decoder from a latent [B, N, dimension] to audio [B, N·hop, 1], float32, which is not bounded to ±1."""

    config: SEANetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B T 1"]:
        """Decodes a latent."""
        config, dtype = self.config, self.dtype
        stages = len(config.ratios)

        def stage(_: nn.Module, i: int, ratio: int, x: Activations) -> ConvOutput:
            x = CausalConvTranspose1d(x.shape[2] // 2, ratio, dtype=dtype, name=f"stage_{i}_up")(elu(x))
            x = residual_blocks(config, dtype, i, x)
            return CausalConv1d(1, config.last_kernel_size, name="conv_out")(elu(x)) if i == stages - 1 else x

        if self.remat:
            stage = nn.remat(stage, static_argnums=(1, 2))
        x = CausalConv1d(config.n_filters * 2**stages, config.kernel_size, dtype=dtype, name="conv_in")(x)
        for i, ratio in enumerate(config.ratios):
            x = stage(self, i, ratio, x)
        return x
