"""Metrics that are computed from two signals alone: PESQ, STOI, mel distance, mel-cepstral distance (Table 1).

All compare a clip with its reconstruction of the same length, sample by sample in time: nothing is shifted or warped.
"""

# pyright: reportMissingImports=false
# The packages that they need are optional.

import warnings

import numpy as np

from omnicodec_jax.evaluation.metrics import Metric, Pair, Scorer, Unavailable
from omnicodec_jax.losses import MEL_SCALES

CEPSTRUM = (0.032, 0.008, 20, 16)
"""The window and the hop in seconds, the mel bands and the cepstral coefficients: defaults of mel-cepstral-distance."""
NOISE_POWER = 1e-7
"""The power that is added to every mel band, so that silence has a logarithm: about that of rounding to 16 bits."""


def pesq(mode: str, sample_rate: int) -> Scorer:
    """Loads PESQ, the perceptual quality of speech, mapped to opinions from 1 to 4.64 ("wb") or 4.55 ("nb").

    Args:
        mode: "wb" for ITU-T P.862.2, "nb" for P.862.1.
        sample_rate: 16000 for "wb", 8000 for "nb".
    """
    try:
        from pesq import PesqError
        from pesq import pesq as score
    except ImportError:
        raise Unavailable("pesq is not installed: pip install pesq (which needs a C compiler)") from None

    def scorer(pair: Pair) -> float:
        for name, samples in (("the clip", pair.reference), ("what was made of it", pair.degraded)):
            if not samples.any():  # PESQ would only say that NaN is no integer
                raise Unavailable(f"PESQ: {name} is silent")
        try:
            return float(score(sample_rate, *pair.at(sample_rate), mode))
        except PesqError as error:
            reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
            raise Unavailable(f"PESQ: {reason}") from None
        except ValueError as error:  # the clip has no sound, or is too short
            raise Unavailable(f"PESQ: {error}") from None

    return scorer


def stoi() -> Scorer:
    """Loads STOI, short-time objective intelligibility up to 1 (Taal et al., 2010). It needs 0.4 s of sound."""
    try:
        from pystoi import stoi as score
    except ImportError:
        raise Unavailable("pystoi is not installed: pip install pystoi") from None

    def scorer(pair: Pair) -> float:
        if not pair.reference.any():  # pystoi would return 0, even if the reconstruction is silent, too
            raise Unavailable("STOI: the clip is silent")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(score(*pair.at(16_000), 16_000))
            except RuntimeWarning as warning:  # pystoi would return 1e-5
                raise Unavailable(f"STOI: {str(warning).split('.')[0]}") from None
            except np.exceptions.AxisError:  # there is not even one frame
                raise Unavailable("STOI: the clip is shorter than a window") from None

    return scorer


def mel_distance() -> Scorer:
    """Loads the mel distance that training reports, `losses.multi_scale_mel`.

    It is computed in numpy, since JAX would compile a program for each length of a clip.
    """
    from librosa.feature import melspectrogram

    def log_mel(samples: np.ndarray, sample_rate: int, window: int, bands: int) -> np.ndarray:
        shape = {"n_fft": window, "hop_length": window // 4, "n_mels": bands, "power": 1.0, "pad_mode": "reflect"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some bands are so narrow that they hold no bin
            return np.log10(np.maximum(melspectrogram(y=samples, sr=sample_rate, **shape), 1e-5))

    def scorer(pair: Pair) -> float:
        mels = ([log_mel(x, pair.sample_rate, *s) for s in MEL_SCALES] for x in (pair.reference, pair.degraded))
        return float(sum(np.abs(one - other).mean() for one, other in zip(*mels, strict=True)))

    return scorer


def mel_cepstral_distance() -> Scorer:
    """Loads the mel-cepstral distance (Kubichek, 1993), averaged over frames, in bels of power.

    The first coefficient is left out. Mel filters are triangles on HTK's scale from 0 Hz to half the sample rate. The
    package mel-cepstral-distance computes the same if it neither aligns the clips nor removes silence.
    """

    def scorer(pair: Pair) -> float:
        window, bands = round(CEPSTRUM[0] * pair.sample_rate), CEPSTRUM[2]
        if pair.reference.size <= window:
            raise Unavailable(f"MCD: the clip is not longer than a window of {1e3 * CEPSTRUM[0]:.0f} ms")
        filters = _triangles(pair.sample_rate, window, bands)
        index = np.arange(1, bands + 1)
        cosines = np.cos(index[:, None] * (index - 0.5) * np.pi / bands)[1 : CEPSTRUM[3]]
        difference = _bels(pair.reference, pair.sample_rate, filters) - _bels(pair.degraded, pair.sample_rate, filters)
        return float(np.linalg.norm(difference @ cosines.T, axis=1).mean())

    return scorer


def _bels(samples: np.ndarray, sample_rate: int, filters: np.ndarray) -> np.ndarray:
    """Returns the logarithmic power of mel bands: [N, bands]."""
    window, hop = (round(seconds * sample_rate) for seconds in CEPSTRUM[:2])
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[: samples.size - window : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    return np.log10(power @ filters.T + NOISE_POWER)


def _triangles(sample_rate: int, window: int, bands: int) -> np.ndarray:
    """Returns triangular mel filters with corners on whole bins: [bands, window // 2 + 1]."""
    from librosa import hz_to_mel, mel_to_hz

    corners = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2, htk=True), bands + 2), htk=True)
    bins = np.floor((window + 1) * corners / sample_rate)
    k = np.arange(window // 2 + 1)
    left, centre, right = bins[:-2, None], bins[1:-1, None], bins[2:, None]
    rising, falling = (k - left) / np.maximum(centre - left, 1), (right - k) / np.maximum(right - centre, 1)
    return np.where(k < centre, rising * (k >= left), falling * (k < right))


_PESQ = "Perceptual quality of speech (ITU-T P.862), 1 to {}, at {} kHz"
_MCD = "Mel-cepstral distance (Kubichek, 1993), at 24 kHz"
_MEL = "Mean absolute difference of log10-mel magnitudes, summed over seven window lengths, at 24 kHz"

SIGNAL_METRICS = {
    metric.name: metric
    for metric in (
        Metric("pesq_wb", "PESQ-WB", "higher", _PESQ.format(4.64, 16), lambda: pesq("wb", 16_000), (1, 4.65)),
        Metric("pesq_nb", "PESQ-NB", "higher", _PESQ.format(4.55, 8), lambda: pesq("nb", 8_000), (1, 4.55)),
        Metric("stoi", "STOI", "higher", "Short-time objective intelligibility, up to 1, at 16 kHz", stoi, (-1, 1)),
        Metric("mel_distance", "Mel dis.", "lower", _MEL, mel_distance, (0, None)),
        Metric("mcd", "MCD", "lower", _MCD, mel_cepstral_distance, (0, None)),
    )
}
