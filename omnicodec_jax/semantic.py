"""Semantic features of audio: of a batch of crops inside a jitted training step, and of clips of any length."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from omnicodec_jax import dsp, exact, model_directory
from omnicodec_jax.config import Precision, SemanticConfig
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.lanes import BlockInputs, Clock, ContinuousBatcher, InputSequence, Key, map_present
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, Qwen3AuT, Qwen3AuTConfig, num_tokens

FrozenEncoder = tuple[Qwen3AuTConfig, Any]
"""Config and variables of the frozen encoder. It computes in the dtype of its parameters."""

SEMANTIC_RATE = 12.75
"""Feature vectors per second that a clip is expected to have: between 12.5 (log-mel) and 13 (Qwen3-Omni)."""
MEL_BLOCK = 1000
"""Number of log-mel frames that are computed at once: ten seconds."""


def semantic_features(
    audio: Float[Array, "B 1 T"], sample_rate: int, encoder: FrozenEncoder | None
) -> Float[Array, "B S F"]:
    """Computes the semantic features of a batch of crops, each as a clip of its own, inside a jitted step.

    Args:
        audio: float32 [B, 1, T].
        sample_rate: Sample rate of the audio, Hz.
        encoder: Qwen3-Omni's audio encoder; None for stacked log-mel frames.

    Returns:
        Features float32 [B, S, F], through which no gradient passes to the encoder.
    """
    mel = dsp.log_mel(dsp.resample_as_soxr(audio[:, 0], sample_rate, dsp.MEL_SAMPLE_RATE))
    if encoder is None:
        return dsp.stack_frames(mel)
    config, variables = encoder
    features: Any = Qwen3AuT(config, jax.tree.leaves(variables)[0].dtype).apply(variables, mel)
    return jax.lax.stop_gradient(features)


def read_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> FrozenEncoder:
    """Reads the frozen encoder of a codec's semantic branch from a model directory, as numpy arrays.

    Args:
        directory: What `omnicodec convert qwen3-aut` has written.
        semantic: Semantic branch of the codec; None if it has none.

    Raises:
        ModelError: If the directory holds another model, or the codec takes no features of this encoder.
    """
    config, variables = model_directory.load(directory)
    if not isinstance(config, Qwen3AuTConfig):
        raise ModelError(f"{directory}: a {model_directory.model_type(config)} model, not the Qwen3-Omni audio encoder")
    wanted = None if semantic is None or semantic.source == "log_mel" else semantic.feature_dim
    if wanted != config.output_dim:
        takes = "no encoder's features" if wanted is None else f"features of width {wanted}"
        raise ModelError(f"{directory}: makes features of width {config.output_dim}; the codec takes {takes}")
    return config, variables


def load_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> FrozenEncoder:
    """Loads the frozen encoder of a codec's semantic branch onto the default device; see `read_encoder`."""
    config, variables = read_encoder(directory, semantic)
    return config, jax.tree.map(jnp.asarray, variables)


def in_precision(encoder: FrozenEncoder, precision: Precision) -> FrozenEncoder:
    """Returns an encoder that computes in another precision. Its weights are numpy arrays, as `read_encoder` reads."""
    config, variables = encoder
    return config, jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(precision)), variables)


def check_features(features: np.ndarray, semantic: SemanticConfig, seconds: float) -> None:
    """Refuses semantic features that cannot belong to a clip.

    Args:
        features: float32 [S, F].
        semantic: Semantic branch that is to take them.
        seconds: Length of the clip.

    Raises:
        AudioError: If the shape is another, values are not finite, or there are too many or too few vectors.
    """
    width = semantic.feature_dim
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise AudioError(f"semantic features of shape {list(features.shape)}: must be [S, {width}]")
    if not np.isfinite(features).all():
        raise AudioError("semantic features hold values that are NaN or infinite")
    if abs(len(features) / SEMANTIC_RATE - seconds) > 0.1 * seconds + 0.2:
        raise AudioError(f"{len(features)} semantic feature vectors for {seconds:.2f} s: another clip's?")


@dataclasses.dataclass(frozen=True)
class MelWindows(InputSequence):
    """Gives the log-mel of a clip to `Qwen3AuT`, one attention window after the other."""

    mel: np.ndarray
    """float32 [M, 128]."""
    size: int
    """Number of log-mel frames in a window."""

    @property
    def num_frames(self) -> int:
        """Number of windows, the last of which may be filled up."""
        return -(-len(self.mel) // self.size)

    @property
    def num_outputs(self) -> int:
        """Number of feature vectors."""
        return num_tokens(len(self.mel))

    @property
    def num_valid(self) -> float:
        """Length of the log-mel in windows."""
        return len(self.mel) / self.size

    def block(self, start: int, size: int) -> BlockInputs:
        """Cuts out window number `start`, its number of valid frames, and whether it continues a clip. size is 1."""
        part = self.mel[start * self.size :][: self.size]
        padded = np.pad(part, ((0, self.size - len(part)), (0, 0)))
        return padded, np.int32(len(part)), np.bool_(start > 0)


def host() -> Any:
    """Returns the CPU as a device; where JAX_PLATFORMS leaves it out, the default device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class FeatureExtractor:
    """Computes semantic features of whole clips, with device memory that does not grow with their length.

    The log-mel is computed on the host, in 2 ms for ten seconds. On an accelerator it would wait in the queue behind
    the steps of all lanes, each of which takes as long as dozens of short clips. It is normalised over the clip. The
    encoder's attention sees windows of eight seconds, and each window is a row of its own. So the features are those
    of the clip in one piece.
    """

    def __init__(self, encoder: FrozenEncoder | None, devices: Sequence[Any], clock: Clock | None = None):
        """Takes the encoder, or None for stacked log-mel frames, and the devices that it runs on."""
        self._host = host()
        self._log10_mel = exact.jit(dsp.log10_mel, self._host.platform)
        self._batcher = None
        if encoder is not None:
            config, variables = encoder
            model = Qwen3AuT(config, jax.tree.leaves(variables)[0].dtype)
            self._batcher = ContinuousBatcher(
                model, Qwen3AuT.__call__, variables, axis=0, devices=devices, clock=clock, blocks=(1,)
            )
            self._window = config.window_chunks * CHUNK_FRAMES

    def __call__(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Computes the features of one clip.

        Args:
            clip: float32 [T].
            sample_rate: Sample rate of the clip, Hz.

        Returns:
            Features float32 [S, F].

        Raises:
            AudioError: If the clip is shorter than 25 ms.
        """
        ((_, features),) = self.features([(None, self.log_mel(clip, sample_rate))])
        return features

    def log_mel(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Computes the log-mel float32 [M, 128] of a clip float32 [T]. Raises AudioError if it is under 25 ms."""
        return dsp.normalize_log_mel(self.log10_mel(clip, sample_rate))

    def log10_mel(self, clip: np.ndarray, sample_rate: int) -> np.ndarray:
        """Computes the log-mel before it is normalised over the clip, block by block; see `log_mel`."""
        samples = audio_files.resample(clip, sample_rate, dsp.MEL_SAMPLE_RATE)
        if samples.size < dsp.MEL_WINDOW:
            raise AudioError(
                f"{clip.size} samples: too short; at least {audio_files.MIN_SECONDS * 1e3:.0f} ms are needed"
            )
        frames, hop = samples.size // dsp.MEL_HOP, dsp.MEL_HOP
        padded = np.pad(samples, dsp.MEL_WINDOW // 2, mode="reflect")
        size = MEL_BLOCK * hop + dsp.MEL_WINDOW - hop
        blocks = [padded[start * hop :][:size] for start in range(0, frames, MEL_BLOCK)]
        placed = jax.device_put([audio_files.fit_length(block, size) for block in blocks], self._host)
        mel = np.concatenate([self._log10_mel(block) for block in placed])
        return mel[:frames]

    @overload
    def features(self, mels: Iterable[tuple[Key, np.ndarray]]) -> Iterator[tuple[Key, np.ndarray]]: ...
    @overload
    def features(self, mels: Iterable[tuple[Key, np.ndarray] | None]) -> Iterator[tuple[Key, np.ndarray] | None]: ...
    def features(self, mels: Iterable[tuple[Key, np.ndarray] | None]) -> Iterator[tuple[Key, np.ndarray] | None]:
        """Computes the features of any number of clips.

        Args:
            mels: Keys of the caller's choice and log-mels float32 [M, 128]; None for one that must wait, as
                `ContinuousBatcher.run` takes it.

        Yields:
            Keys and features float32 [S, F]; if an encoder computes them, not in the order of the clips.
        """
        if self._batcher is None:
            return map_present(lambda key, mel: (key, dsp.stack_frames(mel)), mels)
        return self._batcher.run(map_present(lambda key, mel: (key, MelWindows(mel, self._window)), mels))
