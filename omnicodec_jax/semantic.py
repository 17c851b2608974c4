"""Computes semantic features of audio: of crops inside a jitted training step, and of clips of any length."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
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
from omnicodec_jax.names import an
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, TOKENS_PER_CHUNK, Qwen3AuTConfig, num_tokens
from omnicodec_jax.pretrained.whisper import (
    FEATURE_RATE,
    FRAMES_PER_FEATURE,
    FRAMES_PER_SECOND,
    WhisperConfig,
    WhisperEncoder,
    num_features,
)

EncoderConfig = Qwen3AuTConfig | WhisperConfig
ENCODERS = model_directory.AUDIO_ENCODER.kinds
"""The kinds of frozen encoders of a semantic branch. Each is also the name of a semantic source."""
FrozenEncoder = tuple[EncoderConfig, Any]
"""The config and the variables of a frozen encoder, which computes in the dtype of its parameters."""

SEMANTIC_RATE = 12.75
"""The number of feature vectors a second that is expected: between 12.5 (log-mel, Whisper) and 13 (Qwen3-Omni)."""
MEL_BLOCK = 1000
"""The number of log-mel frames that are computed at once: ten seconds."""
FEATURE_SAMPLES = FRAMES_PER_FEATURE * dsp.MEL_HOP
"""The number of samples at 16 kHz from which Whisper computes one feature vector."""


@dataclasses.dataclass(frozen=True)
class FeatureWindows:
    """The windows of audio that a source of semantic features encodes each by itself."""

    mel_bins: int
    """The number of bins of the log-mel."""
    live_seconds: int
    """The length in seconds of the windows of a live stream."""
    live_vectors: int
    """The number of feature vectors of a window of a live stream."""
    clip_seconds: int | None = None
    """The length in seconds of windows that are encoded as clips of their own; None: the log-mel is normalised over the
    whole clip."""

    @property
    def mel_block(self) -> int:
        """The number of log-mel frames that are computed at once: ten seconds, or a window that counts as a clip."""
        return MEL_BLOCK if self.clip_seconds is None else self.clip_seconds * FRAMES_PER_SECOND

    @classmethod
    def of(cls, config: EncoderConfig | None) -> "FeatureWindows":
        """Returns the windows of an encoder, or with None those of stacked log-mel frames."""
        match config:
            case None:
                return cls(dsp.MEL_BINS, 2, 25)  # vectors are 80 ms apart, so that 2 s hold a whole number of them
            case Qwen3AuTConfig():
                return cls(config.num_mel_bins, 1, TOKENS_PER_CHUNK)
            case WhisperConfig(window_seconds=seconds):
                return cls(config.num_mel_bins, seconds, round(seconds * FEATURE_RATE), seconds)


def num_vectors(source: str, samples: int, sample_rate: int) -> int:
    """Counts the feature vectors of a clip.

    Args:
        source: Semantic source of the features. Those of `stored` are counted as those of Qwen3-Omni.
        samples: Length of the clip in samples.
        sample_rate: Sample rate of the clip, Hz.
    """
    if source == "whisper":
        return -(-samples * dsp.MEL_SAMPLE_RATE // (sample_rate * FEATURE_SAMPLES))
    frames = samples * FRAMES_PER_SECOND // sample_rate
    return -(-frames // dsp.FRAMES_PER_FEATURE) if source == "log_mel" else num_tokens(frames)


def semantic_features(
    audio: Float[Array, "B 1 T"], sample_rate: int, encoder: FrozenEncoder | None
) -> Float[Array, "B S F"]:
    """Computes the semantic features of a batch of crops, each as a clip of its own, inside a jitted step.

    Args:
        audio: float32 [B, 1, T].
        sample_rate: Sample rate of the audio, Hz.
        encoder: Audio encoder of Qwen3-Omni or of Whisper; None for stacked log-mel frames.

    Returns:
        Features float32 [B, S, F].
    """
    if encoder is None:
        return dsp.stack_frames(dsp.log_mel(_low_rate(audio[:, 0], sample_rate)))
    config, variables = encoder
    module = model_directory.build(config, dtype=jax.tree.leaves(variables)[0].dtype)
    if isinstance(config, Qwen3AuTConfig):
        features: Any = module.apply(variables, dsp.log_mel(_low_rate(audio[:, 0], sample_rate)))
        return features
    return _features_of_windows(audio[:, 0], sample_rate, module, variables)


def _low_rate(audio: Float[Array, "B T"], sample_rate: int) -> Float[Array, "B N"]:
    return dsp.resample_as_soxr(audio, sample_rate, dsp.MEL_SAMPLE_RATE)


def _features_of_windows(
    audio: Float[Array, "B T"], sample_rate: int, module: WhisperEncoder, variables: Any
) -> Float[Array, "B S F"]:
    """Computes Whisper's features of crops. The windows of a crop, and its tail, are rows of one batch."""
    bins, window = module.config.num_mel_bins, module.config.window_seconds * sample_rate
    batch, whole = len(audio), audio.shape[1] // window
    parts = (audio[:, : whole * window].reshape(batch * whole, window), audio[:, whole * window :])
    low = [_fill_up(_low_rate(part, sample_rate), part.shape[1], sample_rate) for part in parts if part.size]
    mels = [dsp.log_mel(samples, bins) for samples in low]
    lengths = [mel.shape[1] for mel in mels for _ in range(len(mel) // batch)]
    # The crops stay the first axis, over which they are spread over devices.
    rows = jnp.concatenate(
        [
            jnp.pad(mel, ((0, 0), (0, max(lengths) - mel.shape[1]), (0, 0))).reshape(batch, -1, max(lengths), bins)
            for mel in mels
        ],
        axis=1,
    )
    features: Any = module.apply(
        variables, rows.reshape(-1, *rows.shape[2:]), jnp.tile(jnp.array(lengths, jnp.int32), batch)
    )
    vectors = num_vectors("whisper", audio.shape[1], sample_rate)
    return features.reshape(batch, -1, features.shape[2])[:, :vectors]


def _fill_up(samples: Any, length: int, sample_rate: int) -> Any:
    """Fills samples at 16 kHz up with silence, to as many whole features as `length` samples at `sample_rate` have."""
    size = num_vectors("whisper", length, sample_rate) * FEATURE_SAMPLES
    numpy: Any = np if isinstance(samples, np.ndarray) else jnp
    samples = samples[..., :size]
    return numpy.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(0, size - samples.shape[-1])])


def read_encoder(directory: str | os.PathLike[str]) -> FrozenEncoder:
    """Reads a frozen encoder from a model directory, as numpy arrays.

    Args:
        directory: What `omnicodec convert whisper` or `omnicodec convert qwen3-aut` has written.

    Raises:
        ModelError: If the directory holds another model.
    """
    return model_directory.load(directory, model_directory.AUDIO_ENCODER)


def read_encoder_of(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> FrozenEncoder:
    """Reads the frozen encoder of a codec's semantic branch from a model directory, as numpy arrays.

    Args:
        directory: What `omnicodec convert whisper` or `omnicodec convert qwen3-aut` has written.
        semantic: Semantic branch of the codec; None if it has none.

    Raises:
        ModelError: If the directory holds another model, or the codec takes no features of this encoder.
    """
    config, variables = read_encoder(directory)
    kind, width, takes = model_directory.model_type(config), config.output_dim, None
    if semantic is None or semantic.source == "log_mel":
        takes = "no encoder's features"
    elif semantic.source not in ("stored", kind):
        takes = f"those of {semantic.source}"
    elif semantic.feature_dim != width:
        takes = f"features of width {semantic.feature_dim}"
    if takes is not None:
        raise ModelError(f"{directory}: {an(kind)} encoder, with features of width {width}; the codec takes {takes}")
    return config, variables


def load_encoder(directory: str | os.PathLike[str], semantic: SemanticConfig | None) -> FrozenEncoder:
    """Loads the frozen encoder of a codec's semantic branch onto the default device; see `read_encoder_of`."""
    config, variables = read_encoder_of(directory, semantic)
    return config, jax.tree.map(jnp.asarray, variables)


def in_precision(encoder: FrozenEncoder, precision: Precision) -> FrozenEncoder:
    """Returns an encoder that computes in another precision, with weights as numpy arrays."""
    config, variables = encoder
    return config, jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(precision)), variables)


def check_features(features: np.ndarray, semantic: SemanticConfig | None, seconds: float) -> None:
    """Refuses semantic features that cannot belong to a clip.

    Args:
        features: float32 [S, F].
        semantic: Semantic branch that takes the features; None: the codec has none.
        seconds: Length of the clip in seconds.

    Raises:
        AudioError: If the shape is another, values are not finite, there are too many or too few vectors, or there is
            no semantic branch.
    """
    if semantic is None:
        raise AudioError("semantic features: this model has no semantic branch, and takes none")
    width = semantic.feature_dim
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise AudioError(f"semantic features of shape {list(features.shape)}: must be [S, {width}]")
    if not np.isfinite(features).all():
        raise AudioError("semantic features hold values that are NaN or infinite")
    if abs(len(features) / SEMANTIC_RATE - seconds) > 0.1 * seconds + 0.2:
        raise AudioError(f"{len(features)} semantic feature vectors for {seconds:.2f} s: another clip's?")


@dataclasses.dataclass(frozen=True)
class MelWindows(InputSequence):
    """Gives the log-mel of a clip to an encoder, one attention window after the other."""

    mel: np.ndarray
    """The log-mel, float32 [M, mel bins]."""
    config: EncoderConfig
    """The config of the encoder."""

    @property
    def size(self) -> int:
        """The number of log-mel frames in a window."""
        if isinstance(self.config, Qwen3AuTConfig):
            return self.config.window_chunks * CHUNK_FRAMES
        return self.config.window_seconds * FRAMES_PER_SECOND

    @property
    def num_frames(self) -> int:
        """The number of windows, the last of which may be padded."""
        return -(-len(self.mel) // self.size)

    @property
    def num_outputs(self) -> int:
        """The number of feature vectors of the clip."""
        count = num_tokens if isinstance(self.config, Qwen3AuTConfig) else num_features
        return count(len(self.mel))

    @property
    def num_valid(self) -> float:
        """The length of the log-mel in windows, which may have a fraction."""
        return len(self.mel) / self.size

    def block(self, start: int, size: int) -> BlockInputs:
        """Returns window number `start`, its number of valid frames, and for Qwen3-Omni whether it continues a clip.

        `size` is 1, as blocks are single windows.
        """
        part = self.mel[start * self.size :][: self.size]
        padded = np.pad(part, ((0, self.size - len(part)), (0, 0)))
        if isinstance(self.config, WhisperConfig):
            return padded, np.int32(len(part))
        return padded, np.int32(len(part)), np.bool_(start > 0)


def host() -> Any:
    """Returns the CPU as a device of JAX, or the default device where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class FeatureExtractor:
    """Computes semantic features of whole clips, with device memory that does not grow with their length.

    The log-mel is computed on the host, in 2 ms for ten seconds of audio. On an accelerator, it would wait in the queue
    behind the steps of all lanes, each of which takes as long as dozens of short clips. The log-mel is normalised over
    the clip, or over each window where windows are clips of their own. The encoder's attention does not reach beyond a
    window, so each window is a row of its own, and the features are those of the clip in one piece.
    """

    def __init__(self, encoder: FrozenEncoder | None, devices: Sequence[Any], clock: Clock | None = None):
        """Takes the encoder, or None for stacked log-mel frames, and the devices that the encoder runs on."""
        self._config, self._batcher = None, None
        if encoder is not None:
            self._config, variables = encoder
            model = model_directory.build(self._config, dtype=jax.tree.leaves(variables)[0].dtype)
            self._batcher = ContinuousBatcher(
                model, type(model).__call__, variables, axis=0, devices=devices, clock=clock, blocks=(1,)
            )
        self.windows = FeatureWindows.of(self._config)
        """The windows of audio that are encoded each by itself."""
        self._host = host()
        self._log10_mel = exact.jit(partial(dsp.log10_mel, bins=self.windows.mel_bins), self._host.platform)

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
        """Computes the log-mel float32 [M, bins] of a clip float32 [T]. Raises AudioError if it is under 25 ms."""
        if clip.size < audio_files.MIN_SECONDS * sample_rate:
            raise AudioError(
                f"{clip.size} samples: too short; at least {audio_files.MIN_SECONDS * 1e3:.0f} ms are needed"
            )
        size = clip.size if self.windows.clip_seconds is None else self.windows.clip_seconds * sample_rate
        parts = [clip[start : start + size] for start in range(0, clip.size, size)]
        return np.concatenate([dsp.normalize_log_mel(self._log10_mel_of(part, sample_rate)) for part in parts])

    def live_log_mel(self, samples: np.ndarray, sample_rate: int, loudest: float) -> tuple[np.ndarray, float]:
        """Computes the log-mel of the next samples of a live stream: of a window, or of the rest at the end.

        Args:
            samples: float32 [T], at most `windows.live_seconds` of audio.
            sample_rate: Sample rate of the audio, Hz.
            loudest: log10 of the loudest bin of the stream so far.

        Returns:
            Log-mel float32 [M, bins], and log10 of the loudest bin of the stream by now.
        """
        if self.windows.clip_seconds is not None:
            return dsp.normalize_log_mel(self._log10_mel_of(samples, sample_rate)), loudest
        filled = audio_files.fit_length(samples, self.windows.live_seconds * sample_rate)
        mel = self._log10_mel_of(filled, sample_rate)
        loudest = max(loudest, float(mel.max()))
        return dsp.normalize_log_mel(mel, np.float32(loudest)), loudest

    def _log10_mel_of(self, part: np.ndarray, sample_rate: int) -> np.ndarray:
        """Computes block by block the log-mel, not normalised, of a clip or of a window that is a clip of its own."""
        samples = audio_files.resample(part, sample_rate, dsp.MEL_SAMPLE_RATE)
        if self.windows.clip_seconds is not None:
            samples = _fill_up(samples, part.size, sample_rate)
        block = self.windows.mel_block
        frames, hop = samples.size // dsp.MEL_HOP, dsp.MEL_HOP
        padded = np.pad(samples, dsp.MEL_WINDOW // 2, mode="reflect")
        size = block * hop + dsp.MEL_WINDOW - hop
        blocks = [padded[start * hop :][:size] for start in range(0, frames, block)]
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
            mels: Keys of the caller's choice and log-mels float32 [M, bins]; None for a clip that must wait, as
                `ContinuousBatcher.run` takes it.

        Yields:
            Keys and features float32 [S, F], which an encoder may compute in another order than that of the clips.
        """
        config = self._config
        if self._batcher is None or config is None:
            return map_present(lambda key, mel: (key, dsp.stack_frames(mel)), mels)
        return self._batcher.run(map_present(lambda key, mel: (key, MelWindows(mel, config)), mels))
