"""Whisper's audio encoder (arXiv 2212.04356): log-mel in, 12.5 features a second out.

    audio     ├─ window_seconds ─┼─ window_seconds ─┼─ … ─┼─ tail ─┤   each window is a clip of its own
    log-mel   ├── 100 frames a second, normalised over the window ──┤
    tokens    ├── 50 a second, with positions and attention of the window
    features  ├── 12.5 a second, the means of four tokens

A tail is filled up with silence to a whole feature. So the features of a window depend on nothing outside of it, and a
live stream gives those of the whole clip.

Source: transformers' WhisperEncoder, whose tokens the features are the means of. It was trained on windows of 30 s that
are filled up with silence; docs/features.md says what other windows change.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.config.checks import require
from omnicodec_jax.models.conv import Lengths
from omnicodec_jax.models.transformer import LayerNorm
from omnicodec_jax.pretrained.encoder_layer import EncoderLayer, require_sizes, sinusoids

FRAMES_PER_TOKEN = 2
"""Number of log-mel frames of a token."""
TOKENS_PER_FEATURE = 4
"""Number of tokens whose mean is a feature."""
FRAMES_PER_FEATURE = FRAMES_PER_TOKEN * TOKENS_PER_FEATURE
"""Number of log-mel frames of a feature: 80 ms."""
FEATURE_RATE = 12.5
"""Features per second."""
FRAMES_PER_SECOND = 100
"""Log-mel frames per second."""
LONGEST_WINDOW = 30
"""Seconds that Whisper was trained on at once, and that it has positions for."""

Count = TypeVar("Count", int, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Config of the encoder. The defaults are those of `tiny`, which has 7.6 M parameters."""

    num_mel_bins: int = 80
    """Number of mel bins: 128 in large-v3, 80 in all other sizes."""
    d_model: int = 384
    num_heads: int = 6
    num_layers: int = 4
    dim_feedforward: int = 1536
    window_seconds: int = 4
    """Seconds of audio that are encoded by themselves: an even number, at most 30."""

    def __post_init__(self):
        require_sizes(self)
        fits = self.window_seconds <= LONGEST_WINDOW and self.window_seconds % 2 == 0  # a whole number of features
        require(fits, self, "window_seconds", f"even, and at most {LONGEST_WINDOW}")

    @property
    def output_dim(self) -> int:
        """Width of the features."""
        return self.d_model


SIZES = {
    "tiny": WhisperConfig(),
    "base": WhisperConfig(d_model=512, num_heads=8, num_layers=6, dim_feedforward=2048),
    "small": WhisperConfig(d_model=768, num_heads=12, num_layers=12, dim_feedforward=3072),
    "medium": WhisperConfig(d_model=1024, num_heads=16, num_layers=24, dim_feedforward=4096),
    "large": WhisperConfig(d_model=1280, num_heads=20, num_layers=32, dim_feedforward=5120),
    "large-v3": WhisperConfig(num_mel_bins=128, d_model=1280, num_heads=20, num_layers=32, dim_feedforward=5120),
}
"""The released sizes. Those for English alone (tiny.en, …) are the same, and so is large-v3-turbo as large-v3."""


def num_features(frames: Count) -> Count:
    """Counts the features of so many log-mel frames: one for each eight, the last of which may be fewer."""
    return -(-frames // FRAMES_PER_FEATURE)


class WhisperEncoder(nn.Module):
    """Encoder from log-mel [B, M, num_mel_bins] of 16 kHz audio to features [B, S, d_model], S = num_features(M).

    A row is a window. Matrix products and convolutions compute in `dtype`. The parameters may be float32 or `dtype`,
    and the features are float32.
    """

    config: WhisperConfig
    dtype: DTypeLike = jnp.float32

    def example_inputs(self) -> tuple[Float[Array, "..."], ...]:
        """Makes inputs of the smallest shape, for `init` to call the module with."""
        return (jnp.zeros((1, FRAMES_PER_FEATURE, self.config.num_mel_bins)),)

    @nn.compact
    def __call__(self, mel: Float[Array, "B M F"], lengths: Lengths | None = None) -> Float[Array, "B S D"]:
        """Encodes windows, each by itself, whatever stands behind it or in other rows.

        Args:
            mel: Log-mel float32 [B, M, num_mel_bins].
            lengths: Number of valid frames of each row, [B]; None: all.

        Returns:
            Features float32 [B, num_features(M), d_model]; the first num_features(length) of each row are valid.
        """
        config, dtype = self.config, self.dtype
        lengths = jnp.full(len(mel), mel.shape[1]) if lengths is None else lengths

        # What stands behind a window's end is zero before each convolution, as if the window were all there is.
        x = jnp.where(_inside(mel, lengths), mel, 0)
        x = nn.Conv(config.d_model, (3,), padding=1, dtype=dtype, name="conv_1")(x)
        x = jnp.where(_inside(x, lengths), jax.nn.gelu(x, approximate=False), 0)
        x = nn.Conv(config.d_model, (3,), FRAMES_PER_TOKEN, padding=1, dtype=dtype, name="conv_2")(x)
        x = jax.nn.gelu(x, approximate=False).astype(jnp.float32)
        x = x + sinusoids(x.shape[1], config.d_model)[None]

        tokens = -(-lengths // FRAMES_PER_TOKEN)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=config.num_layers,
        )
        stack = layers(config.num_heads, config.dim_feedforward, x.shape[1], dtype, key_bias=False, name="layers")
        x, _ = stack(x, tokens)
        return _means(LayerNorm(name="norm")(x), tokens)


def _means(x: Float[Array, "B L D"], lengths: Lengths) -> Float[Array, "B S D"]:
    """Takes the mean of each `TOKENS_PER_FEATURE` neighbouring tokens. The last mean of a row may be of fewer."""
    x = jnp.pad(jnp.where(_inside(x, lengths), x, 0), ((0, 0), (0, -x.shape[1] % TOKENS_PER_FEATURE), (0, 0)))
    groups = x.reshape(len(x), -1, TOKENS_PER_FEATURE, x.shape[2])
    first = TOKENS_PER_FEATURE * jnp.arange(groups.shape[1])
    counts = jnp.clip(lengths[:, None] - first[None], 1, TOKENS_PER_FEATURE)
    return groups.sum(axis=2) / counts[..., None].astype(x.dtype)


def _inside(x: Float[Array, "B L C"], lengths: Lengths) -> Array:
    """Marks the steps of each row that come before its end, [B, L, 1]."""
    return (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None]
