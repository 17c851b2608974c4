"""Parquet with a column of audio, as Hugging Face's datasets have it. A clip is a row."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omnicodec_jax import buckets
from omnicodec_jax.data.entries import Entry, Listed, contained, number, text
from omnicodec_jax.data.members import audio_column, is_of_system
from omnicodec_jax.files import LFS_POINTER, is_lfs_pointer

METADATA = b"omnicodec"
"""Key of the contract in the schema metadata of a shard of tokens, which is no list of audio."""
IDS = ("id", "utt_id", "segment_id", "key")
TEXTS = ("text", "transcription", "transcript", "sentence")
SAID = (*IDS, *TEXTS, "domain", "duration")
"""Columns that say something of a clip, if they are there."""


def entries(files: list[Path], folder: Path) -> Iterator[Listed]:
    """Yields the rows of files of Parquet. Only what is said of the audio is read, not the audio.

    Shards of tokens, which an earlier run may have written into the same folder, are passed over.
    """
    for file in files:
        try:
            yield from _of_file(file, contained(file, folder))
        except (pa.ArrowException, ValueError, OSError) as error:
            if is_of_system(error):
                raise
            why = f"damaged, or no Parquet: {str(error).splitlines()[0]}"
            why = LFS_POINTER if is_lfs_pointer(file) else why
            yield Entry(file.name, contained(file, folder), problem=why), None


def _of_file(path: Path, container: str) -> Iterator[Listed]:
    with buckets.on_disk(path) as here, pq.ParquetFile(here) as file:
        schema = file.schema_arrow
        if METADATA in (schema.metadata or {}):
            return
        column = audio_column(schema)
        if column is None:
            yield Entry(path.name, container, problem="has no column of audio: a struct of bytes and path"), None
            return
        paths = f"{column}.path" if pa.types.is_struct(schema.field(column).type) else None
        wanted = [name for name in SAID if name in schema.names] + ([paths] if paths else [])
        row_in_file = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            rows = file.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * count
            for row, said in enumerate(rows):
                yield _entry(path, container, column, (group, row), row_in_file + row, said)
            row_in_file += count


def _entry(path: Path, container: str, column: str, place: tuple[int, int], row: int, said: Any) -> Listed:
    inside = said.get(column)
    name = (text(inside, "path") if isinstance(inside, dict) else None) or f"{path.stem}-{row:08d}"
    id = next((str(said[field]) for field in IDS if said.get(field) not in (None, "")), name)
    seconds = None
    with contextlib.suppress(ValueError):  # it says only how long the whole clip is
        seconds = number(said, "duration")
    entry = Entry(id, name, seconds=seconds, domain=text(said, "domain"), container=container, place=place)
    return entry, text(said, *TEXTS)
