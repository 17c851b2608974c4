"""Semantic features of audio: those of a batch of crops inside a jitted step, and those of clips of any length."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.config import SemanticConfig
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.lanes import Clock, Inputs, Lanes, Work
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, Qwen3AuT, Qwen3AuTConfig, num_tokens

Encoder = tuple[Qwen3AuTConfig, Any]
"""Config and variables of the frozen encoder; the dtype of its parameters is what it computes in."""

MEL_BLOCK = 1000
"""Log-mel frames that are computed at once: ten seconds."""


def semantic_features(audio: Float[Array, "B 1 T"], sample_rate: int, encoder: Encoder | None) -> Float[Array, "B S F"]:
    """Features of each row as a clip of its own; without an encoder, stacked log-mel frames. To be jitted."""
    mel = dsp.log_mel(dsp.resample_as_soxr(audio[:, 0], sample_rate, dsp.MEL_SAMPLE_RATE))
    if encoder is None:
        return dsp.stack_frames(mel)
    config, variables = encoder
    features: Any = Qwen3AuT(config, jax.tree.leaves(variables)[0].dtype).apply(variables, mel)
    return jax.lax.stop_gradient(features)


def read_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> Encoder:
    """Reads the encoder in a model directory (numpy), for a codec's semantic branch. Raises ModelError."""
    config, variables = model_directory.load(directory)
    if not isinstance(config, Qwen3AuTConfig):
        raise ModelError(f"{directory}: a {model_directory.model_type(config)} model, not the Qwen3-Omni audio encoder")
    wanted = None if semantic is None or semantic.source == "log_mel" else semantic.feature_dim
    if wanted != config.output_dim:
        takes = "no encoder's features" if wanted is None else f"features of width {wanted}"
        raise ModelError(f"{directory}: makes features of width {config.output_dim}; the codec takes {takes}")
    return config, variables


def load_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> Encoder:
    """Loads the same onto the default device. Raises ModelError."""
    config, variables = read_encoder(directory, semantic)
    return config, jax.tree.map(jnp.asarray, variables)


class FeatureExtractor:
    """Semantic features of whole clips, with device memory that does not grow with their length.

    The log-mel is normalised over the clip; the encoder's attention sees windows of eight seconds, each of which is
    a row of its own. So these are the features of the clip in one piece.
    """

    def __init__(self, encoder: Encoder | None, devices: Sequence[Any], clock: Clock | None = None):
        self._log10_mel = jax.jit(dsp.log10_mel)
        self._windows = None
        if encoder is not None:
            config, variables = encoder
            model = Qwen3AuT(config, jax.tree.leaves(variables)[0].dtype)
            self._windows = Lanes(
                model, Qwen3AuT.__call__, variables, axis=0, devices=devices, clock=clock, blocks=(1,)
            )
            self._window = config.window_chunks * CHUNK_FRAMES

    def __call__(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Samples float32 [T] → features float32 [S, F]. Raises AudioError for a clip of under 25 ms."""
        ((_, features),) = self.features([(None, self.log_mel(clip, sample_rate))])
        return features

    def log_mel(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Samples float32 [T] → log-mel float32 [N, 128]. Raises AudioError for a clip of under 25 ms."""
        return dsp.normalize_log_mel(self.log10_mel(clip, sample_rate))

    def log10_mel(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """The same before its normalisation over the clip, in blocks."""
        samples = audio_files.resample(clip, sample_rate, dsp.MEL_SAMPLE_RATE)
        if samples.size < dsp.MEL_WINDOW:
            raise AudioError(
                f"{clip.size} samples: too short; at least {audio_files.MIN_SECONDS * 1e3:.0f} ms are needed"
            )
        frames, hop = samples.size // dsp.MEL_HOP, dsp.MEL_HOP
        padded = np.pad(samples, dsp.MEL_WINDOW // 2, mode="reflect")
        size = MEL_BLOCK * hop + dsp.MEL_WINDOW - hop
        blocks = [padded[start * hop :][:size] for start in range(0, frames, MEL_BLOCK)]
        mel = np.concatenate([self._log10_mel(audio_files.fit_length(block, size)) for block in blocks])
        return mel[:frames]

    def features(self, mels: Iterable[tuple[Any, np.ndarray]]) -> Iterator[tuple[Any, np.ndarray]]:
        """Keys and log-mels [N, 128] → keys and features float32 [S, F]; in no order if an encoder is run."""
        if self._windows is None:
            return ((key, dsp.stack_frames(mel)) for key, mel in mels)
        return self._windows.run(self._work(key, mel) for key, mel in mels)

    def _work(self, key: Any, mel: np.ndarray) -> Work:
        frames, size = mel.shape[0], self._window
        count = -(-frames // size)

        def window(start: int, _: int) -> Inputs:
            part = mel[start * size :][:size]
            return np.pad(part, ((0, size - len(part)), (0, 0))), np.int32(len(part)), np.bool_(start > 0)

        return Work(key, count, window, num_tokens(frames), frames / size)
