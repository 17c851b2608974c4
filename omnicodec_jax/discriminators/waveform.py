"""Discriminators of the Descript Audio Codec (arXiv 2306.06546 §3.3; spec §2.2): periods, rates, resolutions."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.config import WaveformDiscriminatorConfig
from omnicodec_jax.discriminators.conv import Conv, Judgement
from omnicodec_jax.discriminators.stft import real_and_imaginary
from omnicodec_jax.dsp import reflect_pad, resample, stft
from omnicodec_jax.models.backbone import Audio

NEGATIVE_SLOPE = 0.1
TPU_LANES = 128
"""Of a TPU's vector registers: what is cut into pieces of so many samples moves in whole registers."""
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Edges of the bands that a resolution is cut into, as shares of its bins."""


def apply_layers(x: Float[Array, "..."], layers: list[Conv]) -> list[Float[Array, "..."]]:
    """The activation after each layer."""
    activations = []
    for layer in layers:
        x = nn.leaky_relu(layer(x), NEGATIVE_SLOPE)
        activations.append(x)
    return activations


def deinterleave(x: Float[Array, "B T"], period: int) -> Float[Array, "B p N"]:
    """Row r: samples r, r + period, … of T = N · period."""
    tile = TPU_LANES * period
    tiles = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile))).reshape(x.shape[0], -1, tile)
    # A transpose within each tile, as an exact product with a permutation: rows of three samples, which is how one
    # would put it, take libtpu eight minutes to compile, and this four seconds.
    source = np.arange(tile).reshape(TPU_LANES, period).T.ravel()
    rows = jnp.matmul(tiles, jax.nn.one_hot(source, tile, axis=0), precision=jax.lax.Precision.HIGHEST)
    rows = rows.reshape(x.shape[0], -1, period, TPU_LANES).swapaxes(1, 2)
    return rows.reshape(x.shape[0], period, -1)[:, :, : x.shape[1] // period]


class Period(nn.Module):
    """Multi-period: every p-th sample is a row of its own; feature maps [B, p, steps, C]."""

    period: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> Judgement:
        batch, _, samples = audio.shape
        # A whole period more where none is missing.
        padded = reflect_pad(audio[:, 0], 0, self.period - samples % self.period)
        # The reference convolves [steps, p] with kernels of width 1. As rows of a 1-D convolution that takes a
        # quarter of the time on a CPU.
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

        return Judgement(unfold(logits).astype(jnp.float32), tuple(unfold(x) for x in activations))


class Rate(nn.Module):
    """Multi-rate: grouped 1-D convolutions over audio at 1/rate of its sample rate; feature maps [B, steps, C].

    The paper names this discriminator. The released code never builds it; the layers are those of its original.
    """

    rate: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> Judgement:
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
        return Judgement(logits.astype(jnp.float32), tuple(activations))


class Resolution(nn.Module):
    """Multi-resolution: 2-D convolutions over each of five bands of a spectrum; feature maps [B, frames, bins, C]."""

    window: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> Judgement:
        hop = self.window // 4
        edge, missing = (self.window - hop) // 2, -audio.shape[2] % hop
        # Frames that lie in the audio alone, T / hop of them: padded to that, centred, and cut. An odd `window - hop`
        # (876) leaves one fewer.
        spectrum = stft(reflect_pad(audio[:, 0], edge, edge + missing), self.window, hop, center=True)[:, 2:-2]
        x = real_and_imaginary(spectrum)
        edges = [int(share * x.shape[2]) for share in BANDS]
        filters = self.channels // 32
        activations, bands = [], []
        for i, (low, high) in enumerate(pairwise(edges)):
            kernels = [(3, 9)] * 4 + [(3, 3)]
            layers = [
                Conv(filters, size, 2 if 0 < j < 4 else 1, dtype=self.dtype, name=f"band_{i}_conv_{j}")
                for j, size in enumerate(kernels)
            ]
            activations += apply_layers(x[:, :, low:high], layers)
            bands.append(activations[-1])
        logits = Conv(1, (3, 3), dtype=self.dtype, name="conv_post")(jnp.concatenate(bands, axis=2))
        return Judgement(logits.astype(jnp.float32), tuple(activations))


class WaveformDiscriminator(nn.Module):
    """Sub-discriminators of all periods, then rates, then windows, over audio without offset and of peak 0.8."""

    config: WaveformDiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Audio) -> tuple[Judgement, ...]:
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
