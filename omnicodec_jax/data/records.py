"""Prepared audio on disk: ArrayRecord shards of segments, and the index that lists them.

    DIR/prepared.json                          how it was prepared
    DIR/index.jsonl                            a line per shard
    DIR/rejects.jsonl                          a line per file that was refused, with the reason
    DIR/shards/speech-train-000000.array_record   segments, FLAC-coded, 24 kHz, mono
    DIR/shards/speech-train-000000.json           the shard's index line and rejects; marks it as finished

A clip longer than `segment_seconds` is cut into equal segments, so that a crop never decodes an hour. The segments of
a clip lie side by side, in a shard of its own domain and split.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from omnicodec_jax.buckets import BucketPath, on_disk
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import ranged
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import DataError, told
from omnicodec_jax.files import replacing

SAMPLE_RATE = 24_000
PEAK = 0.95
"""Value that the largest sample of every clip is scaled to, as the reference does with its files (spec §4)."""
SHARDS, INDEX, REJECTS, SETTINGS = "shards", "index.jsonl", "rejects.jsonl", "prepared.json"
SUFFIX = ".array_record"
OPEN_SHARDS = 64
"""Number of shards that a process keeps open. Each holds the positions of its records in memory."""

Split = Literal["train", "validation"]
Samples = TypeVar("Samples", int, np.ndarray)


class Header(NamedTuple):
    """Header of a record, which says what segment of which clip it holds."""

    id: str
    domain: str
    start: int
    """Sample of the clip that the segment begins at, at 24 kHz."""
    clip_samples: int
    """Length of the whole clip, at 24 kHz."""
    gain: float
    """Factor that the file was multiplied by."""
    source_rate: int
    """Sample rate of the file, Hz."""
    source_samples: int
    """Length of the clip in the file, at the file's own rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard, as one line of the index describes it."""

    name: str
    domain: str
    split: Split
    digest: str
    """16 hex digits that identify the lines of the manifest that the shard was made of."""
    clips: tuple[int, ...]
    """Samples of each clip at 24 kHz; `segments` says how many records that makes."""
    bytes: int
    revision: int = 0
    """Number of runs that have added or replaced clips since the shard was first written."""
    audio: str | None = None
    """16 hex digits that identify the records themselves, since equal lines of manifests in two folders name other
    audio. None where an earlier version has written the shard."""

    @property
    def content(self) -> str:
        """A name for what the shard holds. It changes when clips are added or replaced."""
        if self.audio is not None:
            return f"{self.digest}-{self.audio}"
        return self.digest if not self.revision else f"{self.digest}-{self.revision}"


def num_segments(clip_samples: Samples, segment_seconds: int) -> Samples:
    """Returns the number of records that a clip becomes, or for an array of lengths that of each clip."""
    return -(-clip_samples // (segment_seconds * SAMPLE_RATE))


def segments(clip_samples: int, segment_seconds: int) -> list[tuple[int, int]]:
    """Returns start and length of each segment of a clip. They are as equal as whole seconds allow.

    No segment is longer than segment_seconds. Where there are several, each has at least segment_seconds // 2.
    """
    count, seconds = num_segments(clip_samples, segment_seconds), -(-clip_samples // SAMPLE_RATE)
    bounds = [number * seconds // count * SAMPLE_RATE for number in range(count)] + [clip_samples]
    return [(start, end - start) for start, end in itertools.pairwise(bounds)]


def encode(header: Header, samples: np.ndarray) -> bytes:
    """Returns a record of int16 samples [T]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + buffer.getvalue()


def read_header(record: bytes) -> Header:
    """Reads the header of a record."""
    (size,) = struct.unpack_from("<I", record)
    return Header(*json.loads(record[4 : 4 + size]))


def read_samples(record: bytes, start: int = 0, count: int = -1) -> np.ndarray:
    """Reads int16 samples of a record from `start` on: `count` of them, or all if that is -1."""
    (size,) = struct.unpack_from("<I", record)
    with soundfile.SoundFile(io.BytesIO(memoryview(record)[4 + size :])) as file:
        if start:
            file.seek(start)
        return file.read(count, dtype="int16")


@lru_cache(OPEN_SHARDS)
def _reader(path: str) -> ArrayRecordReader:
    if not Path(path).is_file():  # to the library, a file that is missing is a file without records
        raise DataError(f"{path}: no such shard")
    return _opened(path)


def _opened(path: Path | str) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def read_record(path: Path, index: int) -> bytes:
    """Reads one record of a shard. Raises DataError if its checksum is wrong, or the shard has no such record."""
    if isinstance(path, BucketPath):
        try:
            return ranged.read(path, index)
        except (OSError, IndexError) as error:
            raise DataError(f"{path}: record {index} cannot be read: {told(error)}") from None
    try:
        return _reader(str(path)).read([index])[0]
    except (RuntimeError, IndexError, ValueError) as error:
        _reader.cache_clear()  # a reader that has failed once fails always
        raise DataError(f"{path}: record {index} cannot be read: {error}") from None


def is_whole(path: Path, count: int) -> bool:
    """Returns whether a shard that is there has so many records; a machine that went down may have left it cut off.

    Objects in a bucket are always whole.
    """
    return isinstance(path, BucketPath) or _opened(path).num_records() == count


def read_clips(path: Path, clips: tuple[int, ...], segment_seconds: int) -> list[list[bytes]] | None:
    """Reads the records of a shard, clip by clip; None if it is damaged, or holds other clips."""
    counts = [num_segments(clip, segment_seconds) for clip in clips]
    numbers = itertools.count()
    if isinstance(path, BucketPath):
        with on_disk(path) as here:
            return read_clips(here, clips, segment_seconds)
    try:
        if _reader(str(path)).num_records() != sum(counts):
            return None
        return [[read_record(path, next(numbers)) for _ in range(count)] for count in counts]
    except DataError:
        return None


def write_shard(path: Path, records: Any) -> int:
    """Writes an iterable of records, whole or not at all; returns the file's size. Raises OSError on a full disk."""
    with replacing(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None
        return temporary.stat().st_size


def shard_path(directory: Path, name: str) -> Path:
    """Returns the path of a shard's records."""
    return directory / SHARDS / f"{name}{SUFFIX}"


def read_index(directory: Path) -> list[Shard]:
    """Reads the index of a prepared directory. Raises DataError if there is none, or if it is damaged."""
    path = directory / INDEX
    if not path.is_file():
        raise DataError(f"{directory}: no prepared audio here; run: omnicodec prepare --manifest … --out {directory}")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        known = [field.name for field in dataclasses.fields(Shard)]
        if problem := next(filter(None, (config_files.unknown_field(row, known) for row in rows)), None):
            raise DataError(f"{path}: {problem}")
        return [Shard(**{**row, "clips": tuple(row["clips"])}) for row in rows]
    except DataError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged: {error}; run omnicodec prepare again to rebuild it") from None


def fingerprint(shards: list[Shard]) -> str:
    """Returns 16 hex digits that identify data: equal for shards of equal names that hold equal records."""
    text = "".join(f"{shard.name} {shard.content} {shard.clips}\n" for shard in shards)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
