"""AuT, the audio encoder of Qwen3-Omni (arXiv 2509.17765): log-mel in, 13 features a second out.

    log-mel  ├─ 100 frames ─┼─ 100 frames ─┼─ … ─┼─ tail ─┤   convolved each by itself, 8 frames to a token
    tokens   ├── 13 tokens ─┼── 13 tokens ─┼─ … ─┼────────┤   positions start anew in every chunk
    windows  ├──────── window_chunks ────────┼─── … ───────┤   attention sees its window, both ways, and no other

Source: transformers' Qwen3OmniMoeAudioEncoder, as it encodes each clip by itself.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from omnicodec_jax.models.conv import Lengths
from omnicodec_jax.models.transformer import LayerNorm
from omnicodec_jax.pretrained.encoder_layer import EncoderLayer, require_sizes, sinusoids

CHUNK_FRAMES = 100
"""Number of log-mel frames that are convolved together: 1 s."""
TOKENS_PER_CHUNK = 13
"""Number of tokens of a whole chunk."""
FRAMES_PER_TOKEN = 8
"""Number of log-mel frames of a token; the last token of a chunk has four."""

Count = TypeVar("Count", int, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3AuTConfig:
    """Config of the encoder. The defaults are those of the released one, which has 648 M parameters."""

    num_mel_bins: int = 128
    conv_channels: int = 480
    d_model: int = 1280
    num_heads: int = 20
    num_layers: int = 32
    dim_feedforward: int = 5120
    window_chunks: int = 8
    """Number of chunks of 1 s in an attention window."""
    output_dim: int = 2048

    def __post_init__(self):
        require_sizes(self)


def num_tokens(frames: Count) -> Count:
    """Counts the features of a clip of so many log-mel frames: 13 for each whole chunk, and fewer for the tail."""
    return frames // CHUNK_FRAMES * TOKENS_PER_CHUNK + -(-(frames % CHUNK_FRAMES) // FRAMES_PER_TOKEN)


class ConvFrontEnd(nn.Module):
    """Front end of three convolutions, each of which halves time and frequency: one token for 8 log-mel frames."""

    config: Qwen3AuTConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, chunks: Float[Array, "N 100 F"], ends: Int[Array, " N"]) -> Float[Array, "N 13 D"]:
        """Convolves chunks. Beyond `ends`, their numbers of valid frames, every layer gives zeros."""
        x = chunks[..., None]
        for i in (1, 2, 3):
            x = nn.Conv(self.config.conv_channels, (3, 3), 2, padding=1, dtype=self.dtype, name=f"conv_{i}")(x)
            ends = -(-ends // 2)
            inside = (jnp.arange(x.shape[1])[None] < ends[:, None])[..., None, None]
            x = jnp.where(inside, jax.nn.gelu(x, approximate=False), 0)
        channel_major = jnp.swapaxes(x, 2, 3).reshape(*x.shape[:2], -1)  # as the checkpoints flatten them
        x = nn.Dense(self.config.d_model, use_bias=False, dtype=self.dtype, name="out")(channel_major)
        return x.astype(jnp.float32) + sinusoids(TOKENS_PER_CHUNK, self.config.d_model)[None]


class Qwen3AuT(nn.Module):
    """Encoder from log-mel [B, M, num_mel_bins] of 16 kHz audio (`dsp.log_mel`) to features [B, S, output_dim].

    S is num_tokens(M). Matrix products and convolutions compute in `dtype`. The parameters may be float32 or
    `dtype`, and the features are float32. The convolutions take 6 MB per second of audio in float32.
    """

    config: Qwen3AuTConfig
    dtype: DTypeLike = jnp.float32

    def example_inputs(self) -> tuple[Float[Array, "..."], ...]:
        """Makes inputs of the smallest shape, for `init` to call the module with."""
        return (jnp.zeros((1, CHUNK_FRAMES, self.config.num_mel_bins)),)

    @nn.compact
    def __call__(
        self,
        mel: Float[Array, "B M F"],
        lengths: Lengths | None = None,
        continued: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B S O"]:
        """Encodes clips, each by itself, whatever stands behind it or in other rows.

        Args:
            mel: Log-mel float32 [B, M, num_mel_bins].
            lengths: Number of valid frames of each row, [B]; None: all.
            continued: Booleans [B] that mark rows that continue a clip; None: no row does. A long clip may be cut
                into rows between its windows.

        Returns:
            Features float32 [B, num_tokens(M), output_dim]; the first num_tokens(length) of each row are valid.
        """
        config, dtype = self.config, self.dtype
        batch, frames, bins = mel.shape
        chunks = -(-frames // CHUNK_FRAMES)
        lengths = jnp.full(batch, frames) if lengths is None else lengths

        valid = (jnp.arange(frames)[None] < lengths[:, None])[..., None]
        mel = jnp.pad(jnp.where(valid, mel, 0), ((0, 0), (0, chunks * CHUNK_FRAMES - frames), (0, 0)))
        # A clip of one chunk ends where its frames end. The last chunk of a longer clip is filled up with zeros, and
        # its last tokens depend on what the convolutions compute from these zeros, as in transformers.
        ends = jnp.minimum(lengths, CHUNK_FRAMES)
        ends = ends if continued is None else jnp.where(continued, CHUNK_FRAMES, ends)
        mel = mel.reshape(-1, CHUNK_FRAMES, bins)
        x = ConvFrontEnd(config, dtype, name="front_end")(mel, jnp.repeat(ends, chunks))
        x = x.reshape(batch, -1, config.d_model)[:, : num_tokens(frames)]

        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=config.num_layers,
        )
        window = config.window_chunks * TOKENS_PER_CHUNK
        x, _ = layers(config.num_heads, config.dim_feedforward, window, dtype, name="layers")(x, num_tokens(lengths))
        x = nn.Dense(config.d_model, dtype=dtype, name="proj_1")(LayerNorm(name="norm")(x))
        x = nn.Dense(config.output_dim, dtype=dtype, name="proj_2")(jax.nn.gelu(x, approximate=False))
        return x.astype(jnp.float32)
