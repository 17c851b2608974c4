"""Scores all clips of a domain together, for metrics that no single clip has."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.evaluation import frechet
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.metrics import Unavailable
from omnicodec_jax.evaluation.reconstruct import ORIGINAL, Original, audio_path
from omnicodec_jax.evaluation.summary import Mean
from omnicodec_jax.files import digest, replacing


def frechet_means(systems: Sequence[str], clips: Sequence[Original], out: Path, journal: Journal) -> dict[str, Mean]:
    """Returns the Fréchet distance of each system from the originals, over the clips that all systems have.

    Args:
        systems: The names of the systems.
        clips: The clips of a domain.
        out: The folder of the report, in which the embeddings are kept.
        journal: The journal, which keeps for each embedding the hash of its clip and the name of the model.
    """

    @cache
    def embedding() -> frechet.Embedder:
        return frechet.load()

    def embedded(system: str, clip: Original) -> np.ndarray:
        path = audio_path(out, system, clip.clip)
        target = out / "embeddings" / system / clip.clip.domain / f"{clip.clip.id}.npy"
        key, of = ("embedding", system, clip.clip.domain, clip.clip.id), [frechet.name(), digest(path)]
        row = journal.get(*key)
        if row is None or row["of"] != of or not target.is_file():
            vectors = embedding()(*soundfile.read(path, dtype="float32"))
            with replacing(target) as temporary:
                np.save(temporary, vectors)
            journal.add(key, {"of": of})
        return np.load(target)

    having = {name: [clip for clip in clips if audio_path(out, name, clip.clip).is_file()] for name in systems}
    shared = [clip for clip in clips if all(clip in found for found in having.values() if found)]
    try:
        vectors = {name: [embedded(name, clip) for clip in shared] for name, found in having.items() if found}
    except Unavailable as error:
        return {name: Mean(None, None, 0, str(error)) for name in systems}

    def mean(name: str) -> Mean:
        if name not in vectors:
            return Mean(None, None, 0, "no clips")
        if not shared:
            return Mean(None, None, 0, "there is no clip of which every system has a value")
        try:
            return Mean(frechet.distance(vectors[ORIGINAL], vectors[name]), None, len(shared))
        except Unavailable as error:
            return Mean(None, None, 0, str(error))

    return {name: mean(name) for name in systems}
