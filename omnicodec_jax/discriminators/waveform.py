"""The discriminators of the Descript Audio Codec (arXiv 2306.06546 §3.3; spec §2.2).

There are three kinds: multi-period (MPD), multi-rate (named MSD, multi-scale, in the paper) and multi-resolution (MRD).
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.config import WaveformDiscriminatorConfig
from omnicodec_jax.discriminators.cells import CellConv, Cells, apply_cell_layers, from_cells
from omnicodec_jax.discriminators.conv import Conv
from omnicodec_jax.discriminators.output import DiscriminatorOutput
from omnicodec_jax.discriminators.stft import real_and_imaginary
from omnicodec_jax.dsp import reflect_pad, resample, stft
from omnicodec_jax.models.backbone import Audio

NEGATIVE_SLOPE = 0.1
TPU_LANES = 128
"""Lanes of a TPU's vector register. Data that is cut into pieces of this many samples moves in whole registers."""
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Edges of the frequency bands that `Resolution` cuts a spectrum into, as shares of its bins."""


def apply_layers(x: Float[Array, "..."], layers: list[Conv]) -> list[Float[Array, "..."]]:
    """Applies the layers one after the other and returns the activation after each of them (LeakyReLU)."""
    activations = []
    for layer in layers:
        x = nn.leaky_relu(layer(x), NEGATIVE_SLOPE)
        activations.append(x)
    return activations


def deinterleave(x: Float[Array, "B T"], period: int) -> Float[Array, "B p N"]:
    """Cuts audio of T = N · p samples into p rows; row r holds the samples r, r + p, r + 2p and so on."""
    tile = TPU_LANES * period
    tiles = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile))).reshape(x.shape[0], -1, tile)
    # Each tile is transposed by a product with a permutation matrix, which is exact. A plain reshape to rows of three
    # samples takes libtpu eight minutes to compile; this takes four seconds.
    source = np.arange(tile).reshape(TPU_LANES, period).T.ravel()
    rows = jnp.matmul(tiles, jax.nn.one_hot(source, tile, axis=0), precision=jax.lax.Precision.HIGHEST)
    rows = rows.reshape(x.shape[0], -1, period, TPU_LANES).swapaxes(1, 2)
    return rows.reshape(x.shape[0], period, -1)[:, :, : x.shape[1] // period]


class Period(nn.Module):
    """The multi-period sub-discriminator (MPD) of one period p; feature maps [B, p, N, C].

    Every row of its input is every p-th sample of the audio.
    """

    period: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> DiscriminatorOutput:
        batch, _, samples = audio.shape
        # As in the reference, audio whose length is a multiple of the period is padded by a whole period.
        padded = reflect_pad(audio[:, 0], 0, self.period - samples % self.period)
        # The reference runs 2-D convolutions with kernels of width 1 over [N, p]. The same as a 1-D convolution over p
        # rows takes a quarter of the time on a CPU.
        x = deinterleave(padded, self.period).reshape(batch * self.period, -1, 1)
        widths = [self.channels // share for share in (32, 8, 2, 1, 1)]
        layers = [
            Conv(width, (5,), stride=3 if i < 4 else 1, dtype=self.dtype, name=f"conv_{i}")
            for i, width in enumerate(widths)
        ]
        activations = apply_layers(x, layers)
        logits = Conv(1, (3,), dtype=self.dtype, name="conv_post")(activations[-1])

        def unfold(x: Float[Array, "R N C"]) -> Float[Array, "B p N C"]:
            return x.reshape(batch, self.period, *x.shape[1:])

        return DiscriminatorOutput(unfold(logits).astype(jnp.float32), tuple(unfold(x) for x in activations))


class Rate(nn.Module):
    """The multi-rate sub-discriminator (MSD): grouped 1-D convolutions over resampled audio; feature maps [B, N, C].

    The audio is resampled to 1 / `rate` of its sample rate. The paper names this discriminator, but the authors' code
    never builds it; its layers are those of the Descript Audio Codec.
    """

    rate: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> DiscriminatorOutput:
        x = resample(audio[:, 0], self.rate, 1)[..., None]
        widths = [self.channels // share for share in (64, 16, 4, 1, 1)]
        strided = [
            Conv(width, (41,), stride=4, groups=max(1, before // 4), dtype=self.dtype, name=f"conv_{i + 1}")
            for i, (before, width) in enumerate(pairwise(widths))
        ]
        layers = [
            Conv(widths[0], (15,), dtype=self.dtype, name="conv_0"),
            *strided,
            Conv(self.channels, (5,), dtype=self.dtype, name="conv_5"),
        ]
        activations = apply_layers(x, layers)
        logits = Conv(1, (3,), dtype=self.dtype, name="conv_post")(activations[-1])
        return DiscriminatorOutput(logits.astype(jnp.float32), tuple(activations))


class Resolution(nn.Module):
    """The multi-resolution sub-discriminator (MRD) of one window length; feature maps [B, frames, bins, C].

    The spectrum is cut into five bands, and each has 2-D convolutions of its own.
    """

    window: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> DiscriminatorOutput:
        hop = self.window // 4
        edge, missing = (self.window - hop) // 2, -audio.shape[2] % hop
        # The reference pads so that T / hop frames lie inside of the audio, and drops the two frames at either end.
        # Where `window - hop` is odd (a window of 876) there is one frame fewer.
        spectrum = stft(reflect_pad(audio[:, 0], edge, edge + missing), self.window, hop, center=True)[:, 2:-2]
        x = real_and_imaginary(spectrum)
        edges = [int(share * x.shape[2]) for share in BANDS]
        filters = self.channels // 32
        stored: list[Cells] = []
        bins: list[int] = []
        bands = []
        for i, (low, high) in enumerate(pairwise(edges)):
            kernels = [(3, 9)] * 4 + [(3, 3)]
            layers = [
                CellConv(filters, size, 2 if 0 < j < 4 else 1, dtype=self.dtype, name=f"band_{i}_conv_{j}")
                for j, size in enumerate(kernels)
            ]
            maps, sizes = apply_cell_layers(x[:, :, low:high], layers, NEGATIVE_SLOPE)
            stored += maps
            bins += sizes
            bands.append(from_cells(maps[-1], sizes[-1]))
        logits = Conv(1, (3, 3), dtype=self.dtype, name="conv_post")(jnp.concatenate(bands, axis=2))
        return DiscriminatorOutput(logits.astype(jnp.float32), tuple(stored), tuple(bins))


class WaveformDiscriminator(nn.Module):
    """The waveform discriminator: sub-discriminators of all periods, then of all rates, then of all windows.

    Each clip is normalised first: its mean is subtracted and its peak is scaled to 0.8.
    """

    config: WaveformDiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> tuple[DiscriminatorOutput, ...]:
        audio -= audio.mean(axis=2, keepdims=True)
        audio = 0.8 * audio / (jnp.abs(audio).max(axis=2, keepdims=True) + 1e-9)
        config = self.config
        kinds = [(Period, "period", config.periods), (Rate, "rate", config.rates)]
        kinds.append((Resolution, "window", config.windows))
        return tuple(
            kind(size, config.channels, self.dtype, name=f"{name}_{size}")(audio)
            for kind, name, sizes in kinds
            for size in sizes
        )
