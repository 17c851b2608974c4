"""Stored semantic features: one shard beside each shard of prepared audio, record for record.

    DIR/features.json     encoder, width, number format, which crops
    DIR/shards/speech-train-000000-DIGEST.array_record

A segment's record holds the features of some of its crops, one crop after the other: each encoded by itself, from the
very samples that the learner hears, so that they are those that the encoder would compute there and then. The file's
name carries the digest of the audio shard that it belongs to.

Older directories (no `crop_samples` in features.json) hold 13·ceil(s) vectors of a segment of s seconds, encoded as a
whole, and silence.npy, features of a second of silence. Crops at whole seconds find vectors there that were computed of
their own seconds, but under the segment's loudness and in the segment's windows (docs/features.md says how far off).
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from omnicodec_jax.data import crops, records
from omnicodec_jax.data.records import SAMPLE_RATE, Shard
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import rewriting
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, TOKENS_PER_CHUNK, num_tokens

LOG = logging.getLogger(__name__)

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
    crop_samples: int | None = None
    """Length of the crops, at 24 kHz; None: an older directory."""
    stride_samples: int | None = None
    """How far apart the crops of a segment begin, about."""

    def starts(self, length: int) -> list[int]:
        """Where the crops of a segment of so many samples begin whose features are stored."""
        assert self.crop_samples is not None
        assert self.stride_samples is not None
        return crops.spread_starts(length, self.crop_samples, self.stride_samples)

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
    return records.shard_path(directory, f"{shard.name}-{shard.content}")


def save_format(directory: Path, format: FeatureFormat) -> None:
    """Starts a directory of features. Raises DataError if it was begun in another format."""
    path, text = directory / SETTINGS, json.dumps(dataclasses.asdict(format), indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise DataError(f"{directory}: holds features of another encoder, format or crops; use another --out")
    with rewriting(path) as temporary:
        temporary.write_text(text)


def identity(directory: Path) -> dict[str, object]:
    """What a run that has learnt from these features must find again: the encoder, and the numbers that are kept."""
    return json.loads((directory / SETTINGS).read_text())


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A directory of features, to read from."""

    directory: Path
    format: FeatureFormat
    silence: np.ndarray | None
    """float32 [13, F], of an older directory."""

    @classmethod
    def open(cls, directory: Path, shards: list[Shard], crop_samples: int) -> "FeatureStore":
        """Raises DataError if it lacks the features of one of the shards, or of crops of that length."""
        if not (directory / SETTINGS).is_file():
            raise DataError(f"{directory}: no semantic features here; run omnicodec convert semantic-features")
        try:
            format = FeatureFormat(**json.loads((directory / SETTINGS).read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{directory / SETTINGS}: damaged, or of a later version: {error}") from None
        if format.crop_samples not in (None, crop_samples):
            held, wanted = (samples / SAMPLE_RATE for samples in (format.crop_samples, crop_samples))
            raise DataError(
                f"{directory}: holds features of crops of {held:g} s; data.segment_samples = {crop_samples} are "
                f"{wanted:g} s: run omnicodec convert semantic-features --crop-seconds {wanted:g} with another --out"
            )
        held = {path.name for path in (directory / records.SHARDS).glob(f"[!.]*{records.SUFFIX}")}
        if missing := [shard.name for shard in shards if shard_path(directory, shard).name not in held]:
            raise DataError(
                f"{directory}: lacks the features of {len(missing)} of {len(shards)} shards, {missing[0]} for one; "
                "run omnicodec convert semantic-features again"
            )
        if format.crop_samples is not None:
            return cls(directory, format, None)
        LOG.warning(
            "%s: features of an older version, not those of the very crops that are heard; docs/features.md says how "
            "far off they are. omnicodec convert semantic-features with another --out computes them anew.",
            directory,
        )
        return cls(directory, format, np.load(directory / SILENCE))

    def read_crop(self, shard: Shard, record: int, number: int) -> np.ndarray:
        """bfloat16 [S, F] of the crop that begins at `format.starts(…)[number]` of a segment."""
        assert self.format.crop_samples is not None
        count = num_vectors(self.format.crop_samples)
        stored = records.read_record(shard_path(self.directory, shard), record)
        vectors = self.format.decode(stored, number * count, count)
        if len(vectors) != count:
            raise DataError(f"{self.directory}: {shard.name}, record {record}: holds no crop {number}")
        return vectors

    def read_seconds(self, shard: Shard, record: int, start: int, count: int) -> np.ndarray:
        """bfloat16 [count, F] from vector `start` of a segment on, of an older directory; past its end, of silence."""
        assert self.silence is not None
        stored = self.format.decode(records.read_record(shard_path(self.directory, shard), record), start, count)
        missing = count - len(stored)
        silence = np.resize(self.silence, (missing, self.format.feature_dim)).astype(ml_dtypes.bfloat16)
        return np.concatenate([stored, silence])
