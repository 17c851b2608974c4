"""SEANet encoder and decoder (SoundStream; spec §1.1–1.2), causal, channels-last, ELU, no normalisation.

Activations have the compute type `dtype`, the residual stream included, since most of the time goes into moving them.
The convolutions from and to audio compute in float32.

With `remat`, only the inputs of stages are kept for the gradient, and each stage is computed again. Stages are cut
where tensors are small: those at the full rate begin or end with the audio, so that its 64 channels are not kept.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config import SEANetConfig
from omnicodec_jax.models.conv import (
    Activations,
    CausalConv1d,
    CausalConvTranspose1d,
    ConvOutput,
    Lengths,
    elu,
    is_streaming,
)
from omnicodec_jax.models.residual_stage import BlockParameters, residual_stage


class ResidualBlock(nn.Module):
    """A residual block x + conv_1(ELU(conv_k(ELU(x)))), whose dilated conv_k gives 1/compress of the channels."""

    config: SEANetConfig
    channels: int
    dilation: int
    dtype: DTypeLike

    def setup(self) -> None:
        """Makes the two convolutions."""
        hidden, size = self.channels // self.config.compress, self.config.residual_kernel_size
        self.conv_1 = CausalConv1d(hidden, size, dilation=self.dilation, dtype=self.dtype)
        self.conv_2 = CausalConv1d(self.channels, 1, dtype=self.dtype)

    def __call__(self, x: Activations) -> Activations:
        """Applies the block to x [B, T, C]."""
        return x + self.conv_2(elu(self.conv_1(elu(x))))

    def parameters(self) -> BlockParameters:
        """Returns the parameters of a block that has them already."""
        return BlockParameters(*self.conv_1.parameters(), *self.conv_2.parameters())


def residual_blocks(
    module: nn.Module,
    config: SEANetConfig,
    dtype: DTypeLike,
    stage: int,
    x: Float[Array, "B T _"],
    remat: bool,
    conv_in: CausalConv1d | None = None,
    conv_out: CausalConv1d | None = None,
) -> Float[Array, "B T _"]:
    """Applies the residual blocks of one stage, with dilations 1, 2, 4, …, inside a compact module.

    With `remat` and in bfloat16, a TPU runs them as one kernel. `conv_in` is a convolution of audio before the blocks,
    and `conv_out` a convolution after them, which makes audio of ELU(x).
    """
    dilations = tuple(config.dilation_base**j for j in range(config.n_residual_layers))
    channels = x.shape[2] if conv_in is None else conv_in.features
    blocks = [
        ResidualBlock(config, channels, dilation, dtype, name=f"stage_{stage}_residual_{j}")
        for j, dilation in enumerate(dilations)
    ]
    if blocks and remat and dtype == jnp.bfloat16 and not module.is_initializing() and not is_streaming(module):
        ends = [None if conv is None else conv.parameters() for conv in (conv_in, conv_out)]
        return residual_stage(x, [block.parameters() for block in blocks], dilations, dtype, *ends)
    x = (x if conv_in is None else conv_in(x)).astype(dtype)
    for block in blocks:
        x = block(x)
    return x if conv_out is None else conv_out(elu(x))


class SEANetEncoder(nn.Module):
    """The encoder from audio [B, T, 1] to a latent [B, ceil(T / hop), dimension]."""

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

        def stage(module: nn.Module, i: int, ratio: int, x: Activations, lengths: Lengths | None) -> ConvOutput:
            conv_in = CausalConv1d(config.n_filters, config.kernel_size, name="conv_in") if i == 0 else None
            x = elu(residual_blocks(module, config, dtype, i, x, self.remat, conv_in))
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
    """The decoder from a latent [B, N, dimension] to audio [B, N·hop, 1], float32, which is not bounded to ±1."""

    config: SEANetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B T 1"]:
        """Decodes a latent."""
        config, dtype = self.config, self.dtype
        stages = len(config.ratios)

        def stage(module: nn.Module, i: int, ratio: int, x: Activations) -> ConvOutput:
            x = CausalConvTranspose1d(x.shape[2] // 2, ratio, dtype=dtype, name=f"stage_{i}_up")(elu(x))
            conv_out = CausalConv1d(1, config.last_kernel_size, name="conv_out") if i == stages - 1 else None
            return residual_blocks(module, config, dtype, i, x, self.remat, conv_out=conv_out)

        if self.remat:
            stage = nn.remat(stage, static_argnums=(1, 2))
        x = CausalConv1d(config.n_filters * 2**stages, config.kernel_size, dtype=dtype, name="conv_in")(x)
        for i, ratio in enumerate(config.ratios):
            x = stage(self, i, ratio, x)
        return x
