"""Stored semantic features: one shard beside each shard of prepared audio, record for record.

    DIR/features.json     encoder, width, number format
    DIR/silence.npy       features of a second of silence, with which clips that are padded are padded
    DIR/shards/speech-train-000000-DIGEST.array_record

A segment of s seconds has 13·ceil(s) vectors: the encoder starts anew at every second, so that a crop that begins at a
whole second has exactly its own vectors. The file's name carries the digest of the audio shard that it belongs to.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from omnicodec_jax.data import records
from omnicodec_jax.data.records import SAMPLE_RATE, Shard
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import replacing
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, TOKENS_PER_CHUNK, num_tokens

SETTINGS, SILENCE = "features.json", "silence.npy"
PER_SECOND = TOKENS_PER_CHUNK


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureFormat:
    """features.json."""

    encoder: str
    """Hash of the encoder's weights."""
    compute: Literal["bfloat16", "float32"]
    """What it computed in."""
    feature_dim: int
    number: Literal["bfloat16", "int8"] = "bfloat16"
    """int8 has one float32 scale per vector."""

    @property
    def bytes_per_vector(self) -> int:
        """On disk."""
        return 2 * self.feature_dim if self.number == "bfloat16" else self.feature_dim + 4

    def encode(self, features: np.ndarray) -> bytes:
        """float32 [S, F] → a record."""
        if self.number == "bfloat16":
            return features.astype(ml_dtypes.bfloat16).tobytes()
        scale = np.maximum(np.abs(features).max(axis=1, keepdims=True), 1e-30).astype(np.float32) / np.float32(127)
        rows = np.rint(features / scale).astype(np.int8)
        return np.concatenate([scale.view(np.int8), rows], axis=1).tobytes()

    def decode(self, record: bytes, start: int, count: int) -> np.ndarray:
        """bfloat16 [≤ count, F] from vector `start` of a record on."""
        width = self.bytes_per_vector
        rows = np.frombuffer(record, np.int8)[start * width : (start + count) * width].reshape(-1, width)
        if self.number == "bfloat16":
            return rows.view(ml_dtypes.bfloat16)
        scale = np.ascontiguousarray(rows[:, :4]).view(np.float32)
        return (rows[:, 4:] * scale).astype(ml_dtypes.bfloat16)


def num_vectors(samples: int) -> int:
    """Vectors of so many samples at 24 kHz, from the beginning of a second on."""
    return num_tokens(samples * CHUNK_FRAMES // SAMPLE_RATE)


def shard_path(directory: Path, shard: Shard) -> Path:
    """Where the features of a shard of audio are."""
    return records.shard_path(directory, f"{shard.name}-{shard.digest}")


def save_format(directory: Path, format: FeatureFormat, silence: np.ndarray) -> None:
    """Starts a directory of features. Raises DataError if it was begun in another format."""
    path, text = directory / SETTINGS, json.dumps(dataclasses.asdict(format), indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise DataError(f"{directory}: holds features of another encoder or format; use another --out")
    with replacing(directory / SILENCE) as temporary:
        np.save(temporary, silence.astype(np.float32))
    with replacing(path) as temporary:
        temporary.write_text(text)


def identity(directory: Path) -> dict[str, object]:
    """What a run that has learnt from these features must find again: the encoder, and the numbers that are kept."""
    return json.loads((directory / SETTINGS).read_text())


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A directory of features, to read from."""

    directory: Path
    format: FeatureFormat
    silence: np.ndarray
    """float32 [13, F]"""

    @classmethod
    def open(cls, directory: Path, shards: list[Shard]) -> "FeatureStore":
        """Raises DataError if it lacks the features of one of the shards."""
        if not (directory / SETTINGS).is_file():
            raise DataError(f"{directory}: no semantic features here; run python -m convert.semantic_features")
        format = FeatureFormat(**json.loads((directory / SETTINGS).read_text()))
        held = {path.name for path in (directory / records.SHARDS).glob(f"[!.]*{records.SUFFIX}")}
        if missing := [shard.name for shard in shards if shard_path(directory, shard).name not in held]:
            raise DataError(
                f"{directory}: lacks the features of {len(missing)} of {len(shards)} shards, {missing[0]} for one; "
                "run python -m convert.semantic_features again"
            )
        return cls(directory, format, np.load(directory / SILENCE))

    def read(self, shard: Shard, record: int, start: int, count: int) -> np.ndarray:
        """bfloat16 [count, F] from vector `start` of a segment on; past its end, those of silence."""
        stored = self.format.decode(records.read_record(shard_path(self.directory, shard), record), start, count)
        missing = count - len(stored)
        silence = np.resize(self.silence, (missing, self.format.feature_dim)).astype(ml_dtypes.bfloat16)
        return np.concatenate([stored, silence])
