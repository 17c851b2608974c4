"""The multi-scale STFT discriminator (MS-STFT) of EnCodec (arXiv 2210.13438 §3.4; spec §2.1)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Complex, Float

from omnicodec_jax.config import STFTDiscriminatorConfig
from omnicodec_jax.discriminators.cells import CellConv, apply_cell_layers, from_cells
from omnicodec_jax.discriminators.conv import Conv
from omnicodec_jax.discriminators.output import DiscriminatorOutput
from omnicodec_jax.dsp import hann_window, stft
from omnicodec_jax.models.backbone import Audio


def real_and_imaginary(spectrum: Complex[Array, "B N F"]) -> Float[Array, "B N F 2"]:
    """Returns the real and the imaginary part of a complex spectrum, as two channels."""
    return jnp.stack([spectrum.real, spectrum.imag], axis=-1)


class STFTScale(nn.Module):
    """The sub-discriminator of one window length: 2-D convolutions over the spectrum [B, frames, bins, 2]."""

    config: STFTDiscriminatorConfig
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> DiscriminatorOutput:
        filters, dtype = self.config.filters, self.dtype
        energy = np.sum(hann_window(self.window) ** 2, dtype=np.float64)
        x = real_and_imaginary(stft(audio[:, 0], self.window, self.window // 2) / float(np.sqrt(energy)))
        layers = [
            CellConv(filters, (3, 9), weight_norm=False, dtype=dtype, name="conv_0"),
            *[CellConv(filters, (3, 9), stride=2, dilation=2**i, dtype=dtype, name=f"conv_{i + 1}") for i in range(3)],
            CellConv(filters, (3, 3), dtype=dtype, name="conv_4"),
        ]
        maps, bins = apply_cell_layers(x, layers, self.config.negative_slope)
        logits = Conv(1, (3, 3), dtype=dtype, name="conv_post")(from_cells(maps[-1], bins[-1]))
        return DiscriminatorOutput(logits.astype(jnp.float32), maps, bins)


class STFTDiscriminator(nn.Module):
    """The multi-scale STFT discriminator: one sub-discriminator for each window length; logits [B, frames, bins, 1]."""

    config: STFTDiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> tuple[DiscriminatorOutput, ...]:
        return tuple(
            STFTScale(self.config, window, self.dtype, name=f"window_{window}")(audio) for window in self.config.windows
        )
