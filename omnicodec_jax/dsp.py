"""Signal processing as pure functions of float32 arrays: STFT, mel, resampling, linear interpolation.

Spectral matrix products run at HIGHEST precision, since by default float32 products are computed in bfloat16 on TPUs
and in TF32 on recent GPUs.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from omnicodec_jax.own_rows import on_own_rows

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

MEL_SAMPLE_RATE = 16_000
"""Sample rate that the log-mel front end expects."""
MEL_WINDOW = 400
"""Number of samples in the window of a log-mel frame: 25 ms."""
MEL_HOP = 160
"""Number of samples between two log-mel frames, of which there are 100 per second."""
MEL_BINS = 128
"""Number of mel bins of a log-mel frame."""
FRAMES_PER_FEATURE = 8
"""Number of log-mel frames that the semantic source `log_mel` stacks into one feature vector: 12.5 per second."""

SOXR_REACH = 96
"""Number of samples at the lower of two rates after which soxr's impulse response at high quality has died away."""


@lru_cache
def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, fmax: float | None = None) -> np.ndarray:
    """Computes Slaney-normalised mel filters on the Slaney scale, float32 [n_fft // 2 + 1, n_mels]."""
    from librosa.filters import mel  # imported here, since importing librosa takes longer than the rest of the package

    return mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmax=fmax).T.astype(np.float32)


def frame(x: Float[Array, "*B T"], length: int, hop: int) -> Float[Array, "*B N length"]:
    """Cuts x into overlapping frames without padding: N = (T - length) // hop + 1."""
    count, pieces = (x.shape[-1] - length) // hop + 1, -(-length // hop)
    # Hops are put side by side with the hops after them. A gather would do the same, but its gradient is a scatter.
    end = (count + pieces - 1) * hop
    hops = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(0, end - x.shape[-1], 0)])
    hops = hops.reshape(*x.shape[:-1], -1, hop)
    return jnp.concatenate([hops[..., i : i + count, :] for i in range(pieces)], axis=-1)[..., :length]


def hann_window(length: int) -> np.ndarray:
    """Computes the periodic Hann window, float32 [length]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def stft(x: Float[Array, "*B T"], window: int, hop: int, center: bool = False) -> Complex[Array, "*B N F"]:
    """Computes the spectrum of frames under a periodic Hann window, unnormalised.

    Args:
        x: float32 [*B, T].
        window: Number of samples in a frame.
        hop: Number of samples from one frame to the next.
        center: Whether frame n is centred at sample n·hop, over edges of window // 2 samples that are reflected, so
            that N = T // hop + 1 for an even window. Otherwise frame n starts there, and nothing is padded.

    Returns:
        complex64 [*B, N, window // 2 + 1].
    """
    if center:
        x = reflect_pad(x, window // 2, window // 2)
    frames = frame(x, window, hop) * hann_window(window).reshape((1,) * x.ndim + (-1,))
    # With windows of 2000 samples, an FFT is ten times as fast on a CPU as the product. On a TPU the product moves a
    # fifth of the bytes, and windows such as 2296 compile in seconds. The checkpoint keeps its matrix out of memory.
    transform = partial(jax.lax.platform_dependent, tpu=dft, default=jnp.fft.rfft)
    return on_own_rows(jax.checkpoint(transform, prevent_cse=False), frames)


def dft(x: Float[Array, "*B W"]) -> Complex[Array, "*B F"]:
    """Computes what `rfft` gives for real rows, as a product with a matrix of cosines and sines."""
    window, bins = x.shape[-1], x.shape[-1] // 2 + 1
    turns = jax.lax.iota(jnp.int32, window)[:, None] * jax.lax.iota(jnp.int32, bins)[None] % window
    angle = turns.astype(jnp.float32) * (2 * math.pi / window)
    product = jnp.matmul(
        x, jnp.concatenate([jnp.cos(angle), -jnp.sin(angle)], axis=1), precision=jax.lax.Precision.HIGHEST
    )
    return jax.lax.complex(product[..., :bins], product[..., bins:])


def reflect_pad(x: Float[Array, "*B T"], left: int, right: int) -> Float[Array, "*B N"]:
    """Pads x with its mirror images. The sample at the edge is not repeated."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], mode="reflect")


def mel_spectrogram(
    audio: Float[Array, "*B T"], sample_rate: int, window: int, hop: int, n_mels: int
) -> Float[Array, "*B N M"]:
    """Computes mel magnitudes of centred frames, from 0 Hz to half of the sample rate; N = T // hop + 1."""
    magnitude = jnp.abs(stft(audio, window, hop, center=True))
    filters = mel_filterbank(sample_rate, window, n_mels)
    return jnp.matmul(magnitude, filters, precision=jax.lax.Precision.HIGHEST)


def log10_mel(samples: Float[Array, "*B T"], bins: int = MEL_BINS) -> Float[Array, "*B N M"]:
    """Computes log10 of the mel power of 16 kHz audio in frames without padding: `log_mel` before its normalisation."""
    spectrum = stft(samples, MEL_WINDOW, MEL_HOP)
    power = spectrum.real**2 + spectrum.imag**2
    filters = mel_filterbank(MEL_SAMPLE_RATE, MEL_WINDOW, bins)
    mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    return jnp.log10(jnp.maximum(mel, 1e-10))


def normalize_log_mel(log10_mel: ArrayT, loudest: np.float32 | None = None) -> ArrayT:
    """Limits a log-mel to Whisper's dynamic range, 8 decades below the loudest bin, and scales it to about ±1.

    Args:
        log10_mel: The log-mel of each clip, [*B, N, M].
        loudest: log10 of the loudest bin; None: that of each clip.
    """
    ceiling = log10_mel.max(axis=(-2, -1), keepdims=True) if loudest is None else loudest
    return (log10_mel.clip(ceiling - 8.0) + 4.0) / 4.0


def log_mel(audio: Float[Array, "*B T"], bins: int = MEL_BINS) -> Float[Array, "*B N M"]:
    """Computes the log-mel spectrogram of 16 kHz audio as Whisper and Qwen3-Omni do; N = T // 160, T > 200.

    Qwen3-Omni and Whisper large-v3 have 128 bins, all other Whispers 80. Frames are centred over reflected edges, and
    the last one is dropped. Source: transformers' WhisperFeatureExtractor.
    """
    edge = MEL_WINDOW // 2
    padded = reflect_pad(audio, edge, edge)
    return normalize_log_mel(log10_mel(padded, bins)[..., : audio.shape[-1] // MEL_HOP, :])


def stack_frames(mel: ArrayT) -> ArrayT:
    """Puts eight neighbouring log-mel frames side by side: [*B, N, 128] → [*B, ceil(N / 8), 1024].

    The last frame is repeated where N is no multiple of eight.
    """
    count = -(-mel.shape[-2] // FRAMES_PER_FEATURE)
    index = np.minimum(np.arange(count * FRAMES_PER_FEATURE), mel.shape[-2] - 1)
    return mel[..., index, :].reshape(*mel.shape[:-2], count, -1)


Filters = Callable[[int, int], tuple[np.ndarray, int]]
"""Computes the low-pass filters of a resampler, one for each output phase, and how many samples they reach back.

It takes the two rates. `source` samples make `target` phases, and the filters are float32
[2·reach + source, 1, target].
"""


@lru_cache
def sinc_filters(source: int, target: int) -> tuple[np.ndarray, int]:
    """Computes the filters of torchaudio's `Resample` with its defaults, as for the input of WavLM (spec §2.3).

    They are sincs under a Hann window, cut off at 0.99 of the lower Nyquist frequency, with six zero crossings on
    either side.
    """
    crossings, cutoff = 6, 0.99 * min(source, target)
    reach = math.ceil(crossings * source / cutoff)
    taps, phases = np.arange(-reach, reach + source)[:, None, None], np.arange(target)
    time = (cutoff * (taps / source - phases / target)).clip(-crossings, crossings)
    window = np.cos(np.pi * time / (2 * crossings)) ** 2
    return (cutoff / source * np.sinc(time) * window).astype(np.float32), reach


@lru_cache
def soxr_filters(source: int, target: int) -> tuple[np.ndarray, int]:
    """Measures the filters of soxr at high quality, which files are resampled with, as its answers to impulses.

    With them, a jitted step gets the samples that the tokenizer gets. Up to 7.4 of 8 kHz any good filter would do, but
    above that only the same filter gives the same.
    """
    import soxr

    reach = math.ceil(SOXR_REACH * source / min(source, target))
    before = -(-reach // source)  # in periods of `source` samples
    filters = np.zeros((2 * reach + source, 1, target), np.float32)
    for phase in range(source):
        impulse = np.zeros((2 * before + 2) * source, np.float32)
        impulse[(before + 1) * source + phase] = 1
        answer = soxr.resample(impulse, source, target, quality="HQ").reshape(-1, target)
        for period, values in enumerate(answer, -before - 1):
            if 0 <= (tap := reach + phase - period * source) < len(filters):
                filters[tap, 0] = values
    return filters, reach


def whole_periods(source: int, target: int) -> tuple[int, int]:
    """Returns how many samples a step of a resampler takes and makes: a whole number of periods, of some 32 phases.

    The kernel is mostly zeros then, yet ten times as fast as one of two or three phases.
    """
    divisor = math.gcd(source, target)
    periods = max(1, 32 * divisor // target)
    return periods * source // divisor, periods * target // divisor


def resample(
    samples: Float[Array, "*B T"], source: int, target: int, filters: Filters = sinc_filters
) -> Float[Array, "*B N"]:
    """Resamples audio to another integer sample rate, N = ceil(T · target / source).

    It is one strided convolution, each step of which makes all phases of a whole number of periods.

    Args:
        samples: float32 [*B, T].
        source: Sample rate of the samples, Hz.
        target: Sample rate wanted, Hz.
        filters: Which low-pass filters to use.
    """
    if source == target:
        return samples
    source, target = whole_periods(source, target)
    kernel, reach = filters(source, target)
    resampled = jax.lax.conv_general_dilated(
        samples.reshape(-1, samples.shape[-1], 1),
        jnp.asarray(kernel),
        window_strides=(source,),
        padding=[(reach, reach + source)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(*samples.shape[:-1], -1)
    return resampled[..., : -(-samples.shape[-1] * target // source)]


def resample_as_soxr(samples: Float[Array, "*B T"], source: int, target: int) -> Float[Array, "*B N"]:
    """Resamples audio with soxr's filters, which gives what `data.audio.resample` and librosa give for a clip.

    soxr rounds the length to the nearest integer, while N is rounded up. The sample that soxr may lack is zero.
    """
    resampled = resample(samples, source, target, soxr_filters)
    given = (2 * samples.shape[-1] * target + source) // (2 * source)
    return jnp.pad(resampled[..., :given], [(0, 0)] * (samples.ndim - 1) + [(0, resampled.shape[-1] - given)])


def interpolation_cells(places: np.ndarray, steps: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the two steps between which each place of an interpolated sequence lies.

    Both sequences divide the same time into equal cells, and their samples lie at the centres of the cells. Positions
    are exact integer fractions, so that every place of a sequence of any length is met to the sample.

    Args:
        places: Numbers of the wanted samples of the interpolated sequence, int64.
        steps: Number of samples of the given sequence in some length of time.
        size: Number of samples of the interpolated sequence in the same length of time.

    Returns:
        The number of the step before each place, int64, and the weight of the step after it, float32.
    """
    position, cell = np.maximum((2 * places + 1) * steps - size, 0), 2 * size
    return position // cell, ((position % cell) / cell).astype(np.float32)


def interpolate_part(x: ArrayT, first: int, places: np.ndarray, steps: int, size: int) -> ArrayT:
    """Interpolates linearly at some places of a long sequence of which only a part is at hand.

    Args:
        x: The part [B, S, C]. Its last step stands for those after it.
        first: Number of the first step of the part.
        places: Numbers of the wanted samples; see `interpolation_cells`, also for `steps` and `size`.

    Returns:
        float32 [B, len(places), C].
    """
    left, weight = interpolation_cells(places, steps, size)
    last = first + x.shape[1] - 1
    before, after = np.minimum(left, last) - first, np.minimum(left + 1, last) - first
    weight = weight[None, :, None]
    return x[:, before] * (1 - weight) + x[:, after] * weight


def interpolate(x: ArrayT, size: int, places: range | None = None) -> ArrayT:
    """Interpolates linearly along time, [B, S, C] → [B, size, C], with the samples at the centres of equal cells.

    It gives what torch's `interpolate(mode="linear", align_corners=False)` gives, for numpy and for jax arrays.

    Args:
        x: float32 [B, S, C].
        size: Number of steps of the whole result.
        places: Which of those steps to compute; None: all.

    Examples:
        >>> interpolate(np.array([[[0.0], [1.0]]], np.float32), 4)[0, :, 0].tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    wanted = np.arange(size, dtype=np.int64) if places is None else np.array(places, np.int64)
    return interpolate_part(x, 0, wanted, x.shape[1], size)
