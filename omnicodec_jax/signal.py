"""Signal processing as pure functions: framing, log-mel, linear interpolation. All of it float32.

Nothing here holds state; spectral matmuls run at HIGHEST precision, since float32 matmuls are bf16 on TPUs and
TF32 on recent GPUs by default.
"""

from functools import lru_cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

MEL_SAMPLE_RATE = 16_000
"""Sample rate that the log-mel front end expects."""
MEL_WINDOW = 400
MEL_HOP = 160
"""100 frames per second."""
MEL_BINS = 128
FRAMES_PER_FEATURE = 8
"""Log-mel frames stacked into one feature vector of the `log_mel` semantic source: 12.5 Hz."""


@lru_cache
def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, fmax: float | None = None) -> np.ndarray:
    """Slaney-normalised mel filters on the Slaney scale, float32 [n_fft // 2 + 1, n_mels]."""
    from librosa.filters import mel  # takes longer to import than the rest of the package

    return mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmax=fmax).T.astype(np.float32)


def frame(x: Float[Array, "*B T"], length: int, hop: int) -> Float[Array, "*B N length"]:
    """Overlapping frames; N = (T - length) // hop + 1, so nothing is padded."""
    starts = np.arange((x.shape[-1] - length) // hop + 1) * hop
    return x[..., starts[:, None] + np.arange(length)]


def hann_window(length: int) -> np.ndarray:
    """Periodic Hann window, float32 [length]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def log10_mel(samples: Float[Array, "*B T"]) -> Float[Array, "*B N 128"]:
    """log10 of the mel power of unpadded frames of 16 kHz audio: `log_mel` before its clip-wide normalisation."""
    window = hann_window(MEL_WINDOW).reshape((1,) * samples.ndim + (-1,))
    spectrum = jnp.fft.rfft(frame(samples, MEL_WINDOW, MEL_HOP) * window)
    power = spectrum.real**2 + spectrum.imag**2
    filters = mel_filterbank(MEL_SAMPLE_RATE, MEL_WINDOW, MEL_BINS)
    mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    return jnp.log10(jnp.maximum(mel, 1e-10))


def normalize_log_mel(log10_mel: ArrayT) -> ArrayT:
    """Whisper's dynamic range: 8 decades below the loudest bin of each clip [*B, N, 128], then scaled near ±1."""
    ceiling = log10_mel.max(axis=(-2, -1), keepdims=True)
    return (log10_mel.clip(ceiling - 8.0) + 4.0) / 4.0


def log_mel(audio: Float[Array, "*B T"]) -> Float[Array, "*B N 128"]:
    """Log-mel spectrogram of 16 kHz audio as Whisper and Qwen3-Omni compute it; N = T // 160, T > 200.

    Centred frames over reflected edges, the last one dropped. Source: transformers' WhisperFeatureExtractor.
    """
    edge = MEL_WINDOW // 2
    padded = jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(edge, edge)], mode="reflect")
    return normalize_log_mel(log10_mel(padded)[..., : audio.shape[-1] // MEL_HOP, :])


def stack_frames(mel: ArrayT) -> ArrayT:
    """Eight neighbouring log-mel frames side by side: [N, 128] → [ceil(N / 8), 1024]; the last frame is repeated."""
    count = -(-mel.shape[0] // FRAMES_PER_FEATURE)
    index = np.minimum(np.arange(count * FRAMES_PER_FEATURE), mel.shape[0] - 1)
    return mel[index].reshape(count, -1)


def interpolate(x: ArrayT, size: int) -> ArrayT:
    """Linear interpolation along time, [B, S, C] → [B, size, C], with the samples at the centres of equal cells.

    As torch's `interpolate(mode="linear", align_corners=False)`; the positions are exact integer fractions, so
    that a clip of any length is met to the sample. Works on numpy and jax arrays.
    """
    steps, cell = x.shape[1], 2 * size
    position = np.maximum((2 * np.arange(size, dtype=np.int64) + 1) * steps - size, 0)
    left = np.minimum(position // cell, steps - 1)
    right = np.minimum(left + 1, steps - 1)
    weight = ((position % cell) / cell).astype(np.float32)[None, :, None]
    return x[:, left] * (1 - weight) + x[:, right] * weight
