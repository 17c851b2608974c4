"""Metrics against other people's implementations, on real clips with known degradations."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from omnicodec_jax.data import audio
from omnicodec_jax.evaluation.metrics import Pair, Unavailable
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS
from omnicodec_jax.evaluation.summary import codebook_use, mean
from omnicodec_jax.losses import multi_scale_mel

pytestmark = pytest.mark.quick

RATE = 24_000


@pytest.fixture(scope="module")
def speech(clips) -> np.ndarray:
    samples = next(audio.load(path, RATE).samples for path in clips if "fricatives" in path.name)
    # Without digital silence, of which packages differ in what they make.
    return samples + np.random.default_rng(1).normal(0, 1e-3, samples.size).astype(np.float32)


def noisy(samples: np.ndarray, decibels: float) -> Pair:
    noise = np.random.default_rng(0).normal(0, samples.std() * 10 ** (-decibels / 20), samples.size)
    return Pair(samples, (samples + noise).astype(np.float32), RATE, "speech")


def low_passed(samples: np.ndarray, rate: int) -> Pair:
    return Pair(
        samples, audio.resample(audio.resample(samples, RATE, rate), rate, RATE)[: samples.size], RATE, "speech"
    )


def scorer(name: str):
    try:
        return SIGNAL_METRICS[name].load()
    except Unavailable as error:
        pytest.skip(str(error))


def test_pesq_and_stoi_are_what_their_packages_give_at_the_right_rates(speech):
    pair = noisy(speech, 15)
    pesq, pystoi = pytest.importorskip("pesq", reason="needs a C compiler"), pytest.importorskip("pystoi")
    wide, narrow = (
        [audio.resample(samples, RATE, rate) for samples in (pair.reference, pair.degraded)] for rate in (16_000, 8_000)
    )
    assert scorer("pesq_wb")(pair) == pytest.approx(pesq.pesq(16_000, *wide, "wb"))
    assert scorer("pesq_nb")(pair) == pytest.approx(pesq.pesq(8_000, *narrow, "nb"))
    assert scorer("stoi")(pair) == pytest.approx(pystoi.stoi(*wide, 16_000))


def test_the_mel_distance_is_that_of_training(speech):
    pair = noisy(speech[:40_000], 15)
    both = (jnp.asarray(samples)[None, None] for samples in (pair.degraded, pair.reference))
    expected = jax.jit(multi_scale_mel, static_argnums=2)(*both, RATE)
    assert scorer("mel_distance")(pair) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("decibels", [30, 5])
def test_mcd_is_what_mel_cepstral_distance_gives(speech, tmp_path, decibels):
    package = pytest.importorskip("mel_cepstral_distance", reason="an independent implementation")
    pair = noisy(speech, decibels)
    for name, samples in (("reference", pair.reference), ("degraded", pair.degraded)):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a chunk that soundfile writes
        expected, _ = package.compare_audio_files(
            tmp_path / "reference.wav", tmp_path / "degraded.wav", aligning="pad", norm_audio=False
        )
    assert scorer("mcd")(pair) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", list(SIGNAL_METRICS))
def test_the_worse_the_degradation_the_worse_the_score(speech, name):
    score, sign = scorer(name), 1 if SIGNAL_METRICS[name].better == "higher" else -1
    by_noise = [sign * score(noisy(speech, decibels)) for decibels in (60, 30, 15, 0)]
    assert by_noise == sorted(by_noise, reverse=True)
    # STOI looks no higher than 4.3 kHz, and to MCD an empty band is no worse than two of them.
    if name not in ("stoi", "mcd"):
        by_bandwidth = [sign * score(low_passed(speech, rate)) for rate in (20_000, 7_000, 4_000)]
        assert by_bandwidth == sorted(by_bandwidth, reverse=True)
    perfect = score(Pair(speech, speech, RATE, "speech"))
    assert perfect == pytest.approx({"pesq_wb": 4.644, "pesq_nb": 4.549, "stoi": 1.0}.get(name, 0.0), abs=1e-3)
    low, high = SIGNAL_METRICS[name].range
    assert low <= min(abs(value) for value in (*by_noise, perfect))
    assert high is None or perfect <= high


@pytest.mark.parametrize("size", [700, 600, 1])
@pytest.mark.parametrize("name", ["pesq_wb", "stoi", "mcd"])
def test_what_cannot_be_scored_says_why_and_is_no_number(speech, name, size):
    with pytest.raises(Unavailable, match=r"\w+: \w+"):
        scorer(name)(Pair(speech[:size], speech[:size], RATE, "speech"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_silence_has_no_perceptual_score(speech):
    silence = np.zeros_like(speech)
    for reference, who in ((silence, "the clip"), (speech, "what was made of it")):
        with pytest.raises(Unavailable, match=f"PESQ: {who} is silent"):
            scorer("pesq_wb")(Pair(reference, silence, RATE, "speech"))
    for made in (silence, speech):
        with pytest.raises(Unavailable, match="STOI: the clip is silent"):
            scorer("stoi")(Pair(silence, made, RATE, "speech"))


def test_stoi_of_noise_against_other_noise_may_be_below_0():
    one, other = np.random.default_rng(4).standard_normal((2, 2 * RATE)).astype(np.float32)
    low, _ = SIGNAL_METRICS["stoi"].range
    assert low is not None
    assert low <= scorer("stoi")(Pair(one, other, RATE, "sound")) < 0


def test_means_have_intervals_of_students_t():
    cell = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert cell.mean == 3
    assert cell.ci95 == pytest.approx(2.776445 * np.std([1, 2, 3, 4, 5], ddof=1) / 5**0.5, rel=1e-5)


def test_of_fewer_than_five_clips_there_is_a_number_of_clips_and_no_interval():
    assert mean([1.0, 2.0, 3.0, 4.0]) == (2.5, None, 4, None)
    assert mean([2.0]) == (2.0, None, 1, None)
    assert mean([], ["no transcript", "too short", "no transcript"]) == (None, None, 0, "no transcript")


def test_codebook_use_counts_entries_over_all_clips():
    use = codebook_use([np.array([[0, 1], [3, 3]]), np.array([[2, 3], [3, 3]])], [4, 8])
    assert use.usage == [1.0, 1 / 8]
    assert use.perplexity == pytest.approx([4.0, 1.0])
