"""Reads single records of ArrayRecord shards in buckets, with one request for each.

ArrayRecord's own reader reads files of this machine, and no S3. A shard that `records.write_shard` has written is laid
out so that a record's bytes are easily found (https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md):
every record is a chunk of its own and not compressed; a footer chunk says where each begins; the last block says where
the footer begins. A header of 24 bytes, which belongs to none of them, stands at every 64 KiB.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.errors import DataError

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
"""Bytes between two block headers, and bytes of the headers of blocks and of chunks."""
TAIL = 4 * BLOCK
"""Bytes at the end of a shard that are read first. They hold the footer of some 15 000 records."""
OPEN_SHARDS = 4096
"""Number of shards whose footers a process remembers, at 8 bytes for each record."""


class Footer(NamedTuple):
    """The places of a shard's records."""

    starts: np.ndarray
    """The first byte of each record's chunk, and last of all that of the footer: int64 [records + 1]."""


def num_records(path: BucketPath) -> int:
    """Returns the number of records of a shard. Raises DataError, OSError."""
    return len(_footer(path).starts) - 1


def read(path: BucketPath, index: int) -> bytes:
    """Returns one record of a shard. Raises DataError, OSError, IndexError."""
    starts = _footer(path).starts
    if not 0 <= index < len(starts) - 1:
        raise IndexError(f"{len(starts) - 1} records")
    start, end = int(starts[index]), int(starts[index + 1])
    (record,) = _records(path, _without_block_headers(path.read_range(start, end), start))
    return record


@lru_cache(OPEN_SHARDS)
def _footer(path: BucketPath) -> Footer:
    size = path.stat().st_size
    if size < 2 * BLOCK or size % BLOCK:
        raise DataError(f"{path}: not a shard, or not all of one")
    first = max(0, size - TAIL)
    tail = path.read_range(first, size)
    postscript = _records(path, _without_block_headers(tail[-BLOCK:], size - BLOCK))[0]
    place = _fields(postscript).get(1, 0)
    if not 0 < place < size - BLOCK:
        raise DataError(f"{path}: damaged: says that its footer begins at byte {place}")
    if place < first:
        tail, first = path.read_range(place, size), place
    _, *rows = _records(path, _without_block_headers(tail[place - first : -BLOCK], place))
    starts = [_fields(row).get(1, 0) for row in rows]
    if any(_fields(row).get(3, 0) != 1 for row in rows):
        raise DataError(f"{path}: holds several records in a chunk")
    return Footer(np.array([*starts, place], np.int64))


def _without_block_headers(raw: bytes, start: int) -> bytes:
    """Returns the bytes from `start` of a shard on without the block headers among them."""
    first = -start % BLOCK
    parts = [raw[:first], *(raw[at + BLOCK_HEADER : at + BLOCK] for at in range(first, len(raw), BLOCK))]
    return b"".join(parts)


def _records(path: BucketPath, chunk: bytes) -> list[bytes]:
    """Returns the records of a chunk that is not compressed. Raises DataError for any other."""
    try:
        data_size, kind, compression = struct.unpack_from("<8xQ8xB15xB", chunk)
        data = chunk[CHUNK_HEADER : CHUNK_HEADER + data_size]
        if kind != ord("r") or compression != 0 or len(data) != data_size:
            raise DataError(f"{path}: damaged, or not written by omnicodec")
        length, position = _varint(data, 1)
        sizes, values = data[position : position + length], position + length
        records, position = [], 0
        while position < len(sizes):
            size, position = _varint(sizes, position)
            records.append(data[values : values + size])
            values += size
    except (struct.error, IndexError) as error:
        raise DataError(f"{path}: damaged: {error}") from None
    if values != len(data):
        raise DataError(f"{path}: damaged: a chunk is longer than its records")
    return records


def _fields(message: bytes) -> dict[int, int]:
    """Returns the whole numbers of a protocol buffer by their fields' numbers."""
    found, position = {}, 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == 0:
            found[tag >> 3], position = _varint(message, position)
        elif tag & 7 == 1:
            position += 8
        elif tag & 7 == 2:
            length, position = _varint(message, position)
            position += length
        else:
            position += 4
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the whole number that begins at a byte, and the byte behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
