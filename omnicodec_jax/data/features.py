"""Stored semantic features: a shard of features for each shard of prepared audio, with a record for each record.

    DIR/features.json     encoder, width, number format, which crops
    DIR/shards/speech-train-000000-CONTENT.array_record

Of Qwen3-Omni's encoder, the record of a segment holds the features of some of its crops, one crop after the other. Each
crop was encoded by itself, from the samples that training uses, so the features are the same that the encoder would
compute in the step. Of Whisper, whose windows are clips of their own, the record of a segment that is no shorter than a
crop holds the features of all of it, in which a crop that begins at any of them finds its own. Shorter segments are as
above.
CONTENT in the name of a file is that of the audio shard that it belongs to (`Shard.content`).

Older directories have no `crop_samples` in features.json. They hold 13·ceil(s) vectors for a segment of s seconds,
which was encoded as a whole, and silence.npy, the features of a second of silence. A crop that begins at a whole second
finds the vectors of its own seconds there, but they were computed with the loudness and the windows of the whole
segment; docs/features.md says how large the difference is.
"""

import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import crops, records
from omnicodec_jax.data.records import SAMPLE_RATE, Shard
from omnicodec_jax.errors import ConfigError, DataError
from omnicodec_jax.files import rewriting
from omnicodec_jax.pretrained import whisper
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, TOKENS_PER_CHUNK, num_tokens

LOG = logging.getLogger(__name__)

EncoderKind = Literal["qwen3_aut", "whisper"]
"""The kinds of encoders whose features are stored."""
SETTINGS, SILENCE = "features.json", "silence.npy"
PER_SECOND = TOKENS_PER_CHUNK
"""Vectors per second of audio of Qwen3-Omni."""
WHISPER_SAMPLES = round(SAMPLE_RATE / whisper.FEATURE_RATE)
"""Samples of a vector of Whisper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureFormat:
    """The format of a directory of features: the content of features.json."""

    encoder: str
    """The hash of the encoder's weights."""
    compute: Literal["bfloat16", "float32"]
    """The number format that the encoder computed in."""
    feature_dim: int
    """The width of a vector."""
    source: EncoderKind = "qwen3_aut"
    """The kind of the encoder, which says how many vectors a crop has."""
    number: Literal["bfloat16", "int8"] = "bfloat16"
    """The number format that is stored; int8 has a float32 scale for each vector."""
    crop_samples: int | None = None
    """The length of the crops in samples at 24 kHz; None: the directory is an older one."""
    stride_samples: int | None = None
    """The distance between the beginnings of two crops of a segment, in samples, about."""

    @property
    def vector_rate(self) -> float:
        """Vectors per second of audio."""
        return whisper.FEATURE_RATE if self.source == "whisper" else float(PER_SECOND)

    def num_vectors(self, samples: int) -> int:
        """Returns the number of vectors of some samples at 24 kHz that were encoded as a clip of their own."""
        if self.source == "whisper":
            return -(-samples // WHISPER_SAMPLES)
        return num_vectors(samples)

    def starts(self, length: int) -> Sequence[int]:
        """Returns at which samples of a segment the crops begin whose features are stored."""
        assert self.crop_samples is not None
        assert self.stride_samples is not None
        if self._is_whole(length):
            return range(0, length - self.crop_samples + 1, WHISPER_SAMPLES)
        return crops.spread_starts(length, self.crop_samples, self.stride_samples)

    def position(self, length: int, number: int) -> int:
        """Returns the vector in the record of a segment with which its crop number `number` begins."""
        assert self.crop_samples is not None
        return number if self._is_whole(length) else number * self.num_vectors(self.crop_samples)

    def parts(self, length: int) -> list[tuple[int, int]]:
        """Returns where the parts of a segment begin that are encoded by themselves, and how long they are."""
        assert self.crop_samples is not None
        return (
            [(0, length)] if self._is_whole(length) else [(start, self.crop_samples) for start in self.starts(length)]
        )

    def _is_whole(self, length: int) -> bool:
        """Says whether a segment is encoded as a whole."""
        return self.source == "whisper" and self.crop_samples is not None and length >= self.crop_samples

    @property
    def bytes_per_vector(self) -> int:
        """The bytes that a vector takes on disk."""
        return 2 * self.feature_dim if self.number == "bfloat16" else self.feature_dim + 4

    def encode(self, features: np.ndarray) -> bytes:
        """Returns the record of features: float32 [S, F]."""
        if self.number == "bfloat16":
            return features.astype(ml_dtypes.bfloat16).tobytes()
        scale = np.maximum(np.abs(features).max(axis=1, keepdims=True), 1e-30).astype(np.float32) / np.float32(127)
        rows = np.rint(features / scale).astype(np.int8)
        return np.concatenate([scale.view(np.int8), rows], axis=1).tobytes()

    def decode(self, record: bytes, start: int, count: int) -> np.ndarray:
        """Returns up to `count` vectors of a record, from vector `start` on: bfloat16 [≤ count, F]."""
        width = self.bytes_per_vector
        rows = np.frombuffer(record, np.int8)[start * width : (start + count) * width].reshape(-1, width)
        if self.number == "bfloat16":
            return rows.view(ml_dtypes.bfloat16)
        scale = np.ascontiguousarray(rows[:, :4]).view(np.float32)
        return (rows[:, 4:] * scale).astype(ml_dtypes.bfloat16)


def num_vectors(samples: int) -> int:
    """Returns the number of vectors of some samples at 24 kHz that begin with a second."""
    return num_tokens(samples * CHUNK_FRAMES // SAMPLE_RATE)


def shard_path(directory: Path, shard: Shard) -> Path:
    """Returns the path of the features of a shard of audio."""
    return records.shard_path(directory, f"{shard.name}-{shard.content}")


def save_format(directory: Path, format: FeatureFormat) -> None:
    """Writes features.json. Raises DataError if the directory has one with another format."""
    kept = read_format(directory)
    if kept not in (None, format):
        raise DataError(f"{directory}: holds features of another encoder, format or crops; use another --out")
    if kept is None:
        with rewriting(directory / SETTINGS) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(format), indent=2) + "\n")


def read_format(directory: Path) -> FeatureFormat | None:
    """Reads the format of a directory of features; None if there is none yet. Raises DataError for what is damaged."""
    path = directory / SETTINGS
    if not path.is_file():
        return None
    try:
        return config_files.from_fields(FeatureFormat, json.loads(path.read_text()), str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}") from None


def identity(directory: Path) -> dict[str, object]:
    """Returns what must be the same when a run that uses these features goes on: the whole format."""
    return json.loads((directory / SETTINGS).read_text())


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A directory of features that is open for reading."""

    directory: Path
    format: FeatureFormat
    silence: np.ndarray | None
    """The features of a second of silence, float32 [13, F], in an older directory; else None."""

    @classmethod
    def open(cls, directory: Path, shards: list[Shard], crop_samples: int) -> "FeatureStore":
        """Opens a directory. Raises DataError if it lacks the features of a shard, or of crops of this length."""
        if (format := read_format(directory)) is None:
            raise DataError(
                f"{directory}: no semantic features here; run omnicodec convert semantic-features, or, where "
                "codec.semantic.source is an encoder, let the step compute them: --data.features None --run.encoder DIR"
            )
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
            "%s: features of an older version, which were not computed from the crops themselves; docs/features.md "
            "says how large the difference is. To compute them anew, run omnicodec convert semantic-features with "
            "another --out.",
            directory,
        )
        return cls(directory, format, np.load(io.BytesIO((directory / SILENCE).read_bytes())))

    def read_crop(self, shard: Shard, record: int, position: int) -> np.ndarray:
        """Returns the features of the crop that begins with vector `position` of a record: bfloat16 [S, F]."""
        assert self.format.crop_samples is not None
        count = self.format.num_vectors(self.format.crop_samples)
        stored = records.read_record(shard_path(self.directory, shard), record)
        vectors = self.format.decode(stored, position, count)
        if len(vectors) != count:
            raise DataError(f"{self.directory}: {shard.name}, record {record}: holds no crop at vector {position}")
        return vectors

    def read_seconds(self, shard: Shard, record: int, start: int, count: int) -> np.ndarray:
        """Returns vectors of a segment in an older directory, from vector `start` on: bfloat16 [count, F].

        Past the end of the segment, they are the features of silence.
        """
        assert self.silence is not None
        stored = self.format.decode(records.read_record(shard_path(self.directory, shard), record), start, count)
        missing = count - len(stored)
        silence = np.resize(self.silence, (missing, self.format.feature_dim)).astype(ml_dtypes.bfloat16)
        return np.concatenate([stored, silence])
