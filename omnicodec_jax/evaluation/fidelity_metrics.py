"""Metrics of the waveform, the spectrum and the pitch, which the paper does not have, but others report.

They are computed from the two signals alone, as the metrics of signal_metrics.py.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from omnicodec_jax.evaluation.metrics import Metric, Pair, Scorer, SharedComputation, Unavailable, require_speech

STFTS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""The FFT, hop and window in samples of each resolution, as in Parallel WaveGAN (arXiv 1910.11480)."""
SMALLEST_POWER = 1e-8
PITCH_RATE = 16_000
FRAME, HOP = 1024, 160
"""The length and the hop of the pitch tracker's frames in samples: 64 and 10 ms."""
PITCH = {"fmin": 75.0, "fmax": 500.0, "frame_length": FRAME, "hop_length": HOP}
"""The options of the pitch tracker: the frames, and the range of the voice in Hz, above the hum of the mains."""
QUIET = 0.06
"""The level, as a share of the loudest frame's, up to which a frame is unvoiced: hum in pauses has a pitch, too."""


def si_sdr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Returns the scale-invariant ratio of signal to distortion in dB (Le Roux et al., arXiv 1811.02508).

    The means of both signals are subtracted, and the ratio is kept within ±100 dB, the limits of float32. Raises
    Unavailable if a signal is silent.
    """
    signal, estimate = (samples - samples.mean(dtype=np.float64) for samples in (reference, degraded))
    if not signal.any() or not estimate.any():
        raise Unavailable(f"SI-SDR: {'what was made of it' if signal.any() else 'the clip'} is silent")
    target = (estimate @ signal / (signal @ signal)) * signal
    powers = (max(float(part @ part), 1e-300) for part in (target, target - estimate))
    return float(np.clip(10 * np.subtract(*map(np.log10, powers)), -100, 100))


def stft_distance() -> Scorer:
    """Loads the distance of STFT magnitudes: spectral convergence plus difference of logarithms, over resolutions."""
    from librosa import stft

    def magnitudes(samples: np.ndarray, size: int, hop: int, window: int) -> np.ndarray:
        spectrum = stft(samples, n_fft=size, hop_length=hop, win_length=window, pad_mode="reflect")
        return np.sqrt(np.maximum(np.abs(spectrum) ** 2, SMALLEST_POWER))

    def scorer(pair: Pair) -> float:
        if pair.reference.size <= max(size for size, _, _ in STFTS) // 2:
            raise Unavailable("STFT distance: the clip is too short")
        if not pair.reference.any():  # the difference is divided by the reference
            raise Unavailable("STFT distance: the clip is silent")
        total = 0.0
        for shape in STFTS:
            real, made = (magnitudes(samples, *shape) for samples in (pair.reference, pair.degraded))
            total += float(np.linalg.norm(real - made) / np.linalg.norm(real))
            total += float(np.abs(np.log(real) - np.log(made)).mean())
        return total / len(STFTS)

    return scorer


def _pitch() -> Callable[[Pair], dict[str, float]]:
    """Loads the comparison of pitch by librosa's tracker pYIN (Mauch and Dixon, 2014).

    numba keeps the machine code of pYIN on disk for later processes. If two processes write it at the same time, the
    file crashes all later ones. So the first call is under a lock.
    """
    from librosa import pyin
    from librosa.feature import rms

    with open(Path(tempfile.gettempdir()) / f"omnicodec_jax-numba-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pyin(np.sin(np.arange(PITCH_RATE // 2) / 20), sr=PITCH_RATE, **PITCH)

    def track(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples = samples - samples.mean()  # a constant in pauses would be as loud as a voice
        pitch, voiced, _ = pyin(samples, sr=PITCH_RATE, **PITCH)
        level = rms(y=samples, frame_length=FRAME, hop_length=HOP)[0]
        return pitch, voiced & (level > QUIET * level.max())

    def scores(pair: Pair) -> dict[str, float]:
        require_speech(pair)
        (real, voiced), (made, made_voiced) = (track(samples) for samples in pair.at(PITCH_RATE))
        both = voiced & made_voiced
        cents = 1200 * np.log2(made[both] / real[both])
        error = float(np.sqrt(np.mean(cents**2))) if both.any() else float("nan")
        return {"f0_error": error, "voicing_error": float(np.mean(voiced != made_voiced))}

    return scores


_SHARED_PITCH = SharedComputation(_pitch)


def _f0_error() -> Scorer:
    """Loads the error of the pitch where both clips are voiced."""
    score = _SHARED_PITCH.scorer("f0_error")

    def scorer(pair: Pair) -> float:
        if np.isnan(cents := score(pair)):
            raise Unavailable("F0 error: no frame is voiced in both")
        return cents

    return scorer


def _voicing_error() -> Scorer:
    return _SHARED_PITCH.scorer("voicing_error")


_PITCH_VERSION = 2
"""The first version took hum and constants in pauses for a voice."""
_STFT = "Spectral convergence plus mean difference of log magnitudes, over three resolutions, at 24 kHz"
_F0 = "Root mean square difference of the pitch (pYIN) where both are voiced, in cents (100 are a semitone), of speech"
_VOICING = "Share of frames of 10 ms that are voiced in one and not in the other, of speech; quiet frames are unvoiced"

FIDELITY_METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "si_sdr",
            "SI-SDR",
            "higher",
            "Scale-invariant ratio of signal to distortion, in dB, at 24 kHz",
            lambda: lambda pair: si_sdr(pair.reference, pair.degraded),
        ),
        Metric("stft_distance", "STFT dis.", "lower", _STFT, stft_distance, (0, None)),
        Metric("f0_error", "F0 error", "lower", _F0, _f0_error, (0, None), version=_PITCH_VERSION),
        Metric("voicing_error", "Voicing error", "lower", _VOICING, _voicing_error, (0, 1), version=_PITCH_VERSION),
    )
}
