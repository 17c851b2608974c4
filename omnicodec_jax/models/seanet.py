"""SEANet encoder and decoder (SoundStream; spec §1.1–1.2), causal, channels-last, ELU, no normalisation."""

from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.config import SEANetConfig
from omnicodec_jax.models.conv import CausalConv1d, CausalConvTranspose1d, Lengths, Sequence, elu


class ResidualBlock(nn.Module):
    """x + conv1(ELU(conv_k,dilated(ELU(x)))), the inner convolution at 1/compress of the channels."""

    config: SEANetConfig
    dilation: int

    @nn.compact
    def __call__(self, x: Sequence) -> Sequence:
        channels, config = x.shape[2], self.config
        y = elu(x)
        y = CausalConv1d(
            channels // config.compress, config.residual_kernel_size, dilation=self.dilation, name="conv_1"
        )(y)
        return x + CausalConv1d(channels, 1, name="conv_2")(elu(y))


def residual_blocks(config: SEANetConfig, stage: int, x: Sequence) -> Sequence:
    """The residual blocks of one stage, dilations 1, 2, 4, …; called inside a compact module."""
    for j in range(config.n_residual_layers):
        x = ResidualBlock(config, config.dilation_base**j, name=f"stage_{stage}_residual_{j}")(x)
    return x


class SEANetEncoder(nn.Module):
    """Audio [B, T, 1] → latent [B, ceil(T / hop), dimension]."""

    config: SEANetConfig
    dimension: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T 1"], lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B N D"], Lengths | None]:
        """Also returns how many of the N steps are valid in each row, if `lengths` says so of the samples."""
        config = self.config
        x = CausalConv1d(config.n_filters, config.kernel_size, name="conv_in")(x)
        for i, ratio in enumerate(reversed(config.ratios)):
            x = elu(residual_blocks(config, i, x))
            x = CausalConv1d(2 * x.shape[2], 2 * ratio, stride=ratio, name=f"stage_{i}_down")(x, lengths)
            lengths = None if lengths is None else -(-lengths // ratio)
        x = CausalConv1d(self.dimension, config.last_kernel_size, name="conv_out")(elu(x))
        return x, lengths


class SEANetDecoder(nn.Module):
    """Latent [B, N, dimension] → audio [B, N·hop, 1], unbounded."""

    config: SEANetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B T 1"]:
        config = self.config
        x = CausalConv1d(config.n_filters * 2 ** len(config.ratios), config.kernel_size, name="conv_in")(x)
        for i, ratio in enumerate(config.ratios):
            x = CausalConvTranspose1d(x.shape[2] // 2, ratio, name=f"stage_{i}_up")(elu(x))
            x = residual_blocks(config, i, x)
        return CausalConv1d(1, config.last_kernel_size, name="conv_out")(elu(x))
