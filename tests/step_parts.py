"""Parts of a training step that run in miniature by themselves: a scalar of variables and audio that has a gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from omnicodec_jax import losses
from omnicodec_jax.config import (
    DiscriminatorConfig,
    TransformerConfig,
    WaveformDiscriminatorConfig,
    WavLMDiscriminatorConfig,
)
from omnicodec_jax.discriminators import Discriminators
from omnicodec_jax.dsp import resample
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.transformer import Transformer
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuT, Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.pretrained.whisper import WhisperConfig
from omnicodec_jax.semantic import semantic_features

WAVLM = WavLMConfig(
    dimension=16,
    num_layers=1,
    num_heads=2,
    dim_feedforward=32,
    conv_channels=(8,) * 7,
    position_kernel=8,
    position_groups=2,
    num_buckets=8,
    max_bucket_distance=16,
)
ENCODER = Qwen3AuTConfig(d_model=16, num_layers=1, num_heads=2, dim_feedforward=32, conv_channels=4, output_dim=12)
WHISPER = WhisperConfig(d_model=12, num_heads=2, num_layers=1, dim_feedforward=24, window_seconds=2)
WAVEFORM = WaveformDiscriminatorConfig(periods=(3,), rates=(2,), windows=(334,), channels=64)
OVER_AUDIO = DiscriminatorConfig(stft=None, waveform=WAVEFORM, wavlm=None)
OVER_STATES = DiscriminatorConfig(
    stft=None, waveform=None, wavlm=WavLMDiscriminatorConfig(hidden_states=2, hidden_size=16, channels=8)
)
SAMPLES = 7 * 960
"""Seven frames of the codec in miniature."""


class Part(NamedTuple):
    """A part of a step: what it computes, in a compute type, and the shapes of its variables."""

    compute: Callable[[DTypeLike, Any, jax.Array], jax.Array]
    variables: Callable[[], Any]


def shapes(module: Any) -> Any:
    return jax.eval_shape(lambda: init_variables(module, jax.random.key(0)))


def mean_square(outputs: Any) -> jax.Array:
    return sum((jnp.mean(one.logits**2) for family in outputs.values() for one in family), start=jnp.zeros(()))


def waveform(dtype: DTypeLike, variables: Any, audio: jax.Array) -> jax.Array:
    return mean_square(Discriminators(OVER_AUDIO, dtype).apply(variables, audio))


def wavlm(dtype: DTypeLike, variables: Any, audio: jax.Array) -> jax.Array:
    frozen = jax.lax.stop_gradient(variables["wavlm"])
    states = WavLM(WAVLM, dtype).apply(frozen, resample(audio[:, 0], 24_000, 16_000))
    return mean_square(Discriminators(OVER_STATES, dtype).apply(variables["discriminator"], audio, states))


def mel(dtype: DTypeLike, scale: Any, audio: jax.Array) -> jax.Array:
    return losses.multi_scale_mel(scale * audio, audio, 24_000)


def features(dtype: DTypeLike, variables: Any, audio: jax.Array) -> jax.Array:
    scale, frozen = variables
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype), frozen)
    return jnp.mean(semantic_features(scale * audio, 24_000, (ENCODER, frozen)) ** 2) * scale


def transformer(dtype: DTypeLike, variables: Any, audio: jax.Array) -> jax.Array:
    rows: Any = Transformer(TRANSFORMER, dtype).apply(variables, audio.reshape(len(audio), -1, 96))
    return jnp.mean(rows**2)


TRANSFORMER = TransformerConfig(num_heads=4, num_layers=1, dim_feedforward=256, context=16)
"""Wide enough for its kernels to be sharded."""
SCALE = jax.ShapeDtypeStruct((), np.float32)
PARTS = {
    "period, rate and resolution": Part(waveform, lambda: shapes(Discriminators(OVER_AUDIO))),
    "WavLM and its discriminator": Part(
        wavlm, lambda: {"wavlm": shapes(WavLM(WAVLM)), "discriminator": shapes(Discriminators(OVER_STATES))}
    ),
    "transformer": Part(
        transformer, lambda: jax.eval_shape(Transformer(TRANSFORMER).init, jax.random.key(0), jnp.zeros((1, 1, 96)))
    ),
    "mel loss": Part(mel, lambda: SCALE),
    "semantic features": Part(features, lambda: (SCALE, shapes(Qwen3AuT(ENCODER)))),
}
