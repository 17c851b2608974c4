"""Semantic features of audio: those of a batch of crops inside a jitted step, and those of clips of any length."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from omnicodec_jax import model_directory, signal
from omnicodec_jax.config import SemanticConfig
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, Qwen3AuT, Qwen3AuTConfig, num_tokens

Encoder = tuple[Qwen3AuTConfig, Any]
"""Config and variables of the frozen encoder; the dtype of its parameters is what it computes in."""

MEL_BLOCK = 1000
"""Log-mel frames that are computed at once: ten seconds."""
ACCELERATOR_WINDOWS = 16
"""Attention windows side by side on a GPU or TPU, at most."""


def semantic_features(audio: Float[Array, "B 1 T"], sample_rate: int, encoder: Encoder | None) -> Float[Array, "B S F"]:
    """Features of each row as a clip of its own; without an encoder, stacked log-mel frames. To be jitted."""
    mel = signal.log_mel(signal.resample(audio[:, 0], sample_rate, signal.MEL_SAMPLE_RATE))
    if encoder is None:
        return signal.stack_frames(mel)
    config, variables = encoder
    features: Any = Qwen3AuT(config, jax.tree.leaves(variables)[0].dtype).apply(variables, mel)
    return jax.lax.stop_gradient(features)


def load_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> Encoder:
    """The encoder in a model directory, for a codec's semantic branch. Raises ModelError."""
    config, variables = model_directory.load(directory)
    if not isinstance(config, Qwen3AuTConfig):
        raise ModelError(f"{directory}: a {model_directory.model_type(config)} model, not the Qwen3-Omni audio encoder")
    wanted = None if semantic is None or semantic.source == "log_mel" else semantic.feature_dim
    if wanted != config.output_dim:
        takes = "no encoder's features" if wanted is None else f"features of width {wanted}"
        raise ModelError(f"{directory}: makes features of width {config.output_dim}; the codec takes {takes}")
    return config, jax.tree.map(jnp.asarray, variables)


class FeatureExtractor:
    """Semantic features of whole clips, with memory that does not grow with their length.

    The log-mel is normalised over the clip; the encoder's attention sees windows of eight seconds, each of which is
    a row of a batch. So these are the features of the clip in one piece.
    """

    def __init__(self, encoder: Encoder | None):
        self._encoder = encoder
        self._log10_mel = jax.jit(signal.log10_mel)
        if encoder is not None:
            config, self._variables = encoder
            self._windows = jax.jit(Qwen3AuT(config, jax.tree.leaves(self._variables)[0].dtype).apply)
            self._window = config.window_chunks * CHUNK_FRAMES

    def __call__(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Samples float32 [T] → features float32 [S, F]. Raises AudioError for a clip of under 25 ms."""
        samples = audio_files.resample(clip, sample_rate, signal.MEL_SAMPLE_RATE)
        if samples.size < signal.MEL_WINDOW:
            raise AudioError(
                f"{clip.size} samples: too short; at least {audio_files.MIN_SECONDS * 1e3:.0f} ms are needed"
            )
        mel = self._log_mel(samples)
        return signal.stack_frames(mel) if self._encoder is None else self._encode(mel)

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """[N, 128] of 16 kHz audio, in blocks."""
        frames, hop = samples.size // signal.MEL_HOP, signal.MEL_HOP
        padded = np.pad(samples, signal.MEL_WINDOW // 2, mode="reflect")
        size = MEL_BLOCK * hop + signal.MEL_WINDOW - hop
        blocks = [padded[start * hop :][:size] for start in range(0, frames, MEL_BLOCK)]
        mel = np.concatenate([self._log10_mel(audio_files.fit_length(block, size)) for block in blocks])
        return signal.normalize_log_mel(mel[:frames])

    def _encode(self, mel: np.ndarray) -> np.ndarray:
        """Features of all windows, some of them side by side."""
        frames, size = mel.shape[0], self._window
        count = -(-frames // size)
        # On a CPU one window fills the cores; elsewhere, few sizes of tiles are compiled.
        tile = 1 if jax.default_backend() == "cpu" else min(ACCELERATOR_WINDOWS, 1 << (count - 1).bit_length())
        starts = np.arange(-(-count // tile) * tile) * size
        rows = np.pad(mel, ((0, len(starts) * size - frames), (0, 0))).reshape(len(starts), size, -1)
        lengths = np.clip(frames - starts, 0, size).astype(np.int32)
        outputs = []
        for first in range(0, len(starts), tile):
            part = slice(first, first + tile)
            output = self._windows(self._variables, rows[part], lengths[part], starts[part] > 0)
            outputs += [row[: num_tokens(int(n))] for row, n in zip(np.asarray(output), lengths[part], strict=True)]
        return np.concatenate(outputs)
