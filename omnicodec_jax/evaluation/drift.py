"""Measures whether a codec drifts: how near its reconstruction is to the original in each minute of an hour."""

from collections.abc import Sequence

import numpy as np

from omnicodec_jax.evaluation.fidelity_metrics import si_sdr
from omnicodec_jax.evaluation.metrics import Pair
from omnicodec_jax.evaluation.signal_metrics import mel_distance

SECONDS = 60


def repeated_minute(clips: Sequence[np.ndarray], sample_rate: int, minutes: int) -> np.ndarray:
    """Returns one minute of clips, repeated for a number of minutes: float32 [T].

    Every minute has the same content, so that a codec without drift is as good in the last minute as in the first.

    Args:
        clips: Clips, each float32 [T].
        sample_rate: The sample rate of the clips in Hz.
        minutes: The number of minutes.
    """
    return np.tile(np.resize(np.concatenate(clips), SECONDS * sample_rate), minutes)


def by_minute(reference: np.ndarray, degraded: np.ndarray, sample_rate: int) -> list[float]:
    """Returns the SI-SDR of each whole minute in dB. Both signals are float32 [T]."""
    size = SECONDS * sample_rate
    starts = range(0, min(reference.size, degraded.size) - size + 1, size)
    return [si_sdr(reference[start : start + size], degraded[start : start + size]) for start in starts]


def mel_of_ends(reference: np.ndarray, degraded: np.ndarray, sample_rate: int) -> list[float]:
    """Returns the mel distances of the first and of the last minute, for codecs whose SI-SDR says nothing.

    The SI-SDR says nothing of a codec that does not keep phases.
    """
    size, score = SECONDS * sample_rate, mel_distance()
    last = reference.size - size
    both = ((reference[start : start + size], degraded[start : start + size]) for start in (0, last))
    return [score(Pair(real, made, sample_rate, "")) for real, made in both]
