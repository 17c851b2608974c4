"""Audio files that lie inside another file: members of tars, and rows of Parquet. They are read in place."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax import buckets
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.errors import AudioError

PARQUET = ".parquet"
"""Suffix of the containers whose members are rows. Members of all others are bytes that lie side by side."""
MemberPlace = tuple[int, int]
"""The place of a member in its container: its first byte and its size, or, in Parquet, a row group and a row of it."""


class Member(NamedTuple):
    """An audio file inside another file, with the methods of a path that readers of audio call."""

    container: Path
    name: str
    place: MemberPlace

    def __str__(self) -> str:
        return f"{self.container}: {self.name}"

    @property
    def is_row(self) -> bool:
        """Whether it is a row of Parquet."""
        return self.container.suffix.lower() == PARQUET

    def is_file(self) -> bool:
        """Returns whether the container is there."""
        return self.container.is_file()

    def read_bytes(self) -> bytes:
        """Returns what the file holds. Raises OSError, and AudioError where the container does not hold all of it."""
        if self.is_row:
            return _row(self.container, *self.place)
        start, size = self.place
        if isinstance(self.container, BucketPath):
            return self.container.read_range(start, start + size)
        with open(self.container, "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise AudioError(f"{self}: cut off: {len(data)} of {size} bytes are there")
        return data

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Opens the file to be read."""
        return io.BytesIO(self.read_bytes())

    def state(self) -> tuple[int, int]:
        """Returns size and time of the file: of a row, the size of its container stands for its own. Raises OSError."""
        if isinstance(self.container, BucketPath):
            size, modified = buckets.state_of(str(self.container))
        else:
            status = os.stat(self.container)
            size, modified = status.st_size, status.st_mtime_ns
        return (size if self.is_row else self.place[1]), modified


def is_in_bucket(path: Any) -> bool:
    """Returns whether a file, or the container of a member, is in a bucket."""
    return isinstance(path.container if isinstance(path, Member) else path, BucketPath)


@contextlib.contextmanager
def on_disk(path: Any) -> Iterator[Path]:
    """Gives a file of this machine that holds what a file, an object of a bucket or a member does. Raises OSError.

    A member lies in memory for as long as it is read.
    """
    if not isinstance(path, Member):
        with buckets.on_disk(path) as here:
            yield here
        return
    descriptor = os.memfd_create("member")
    try:
        left = memoryview(path.read_bytes())
        while left:
            left = left[os.write(descriptor, left) :]
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# -- Rows of Parquet


def _row(container: Path, group: int, row: int) -> bytes:
    data = _group(container, Member(container, "", (group, row)).state(), group)[row].as_py()
    if data is None:
        raise AudioError("no audio in this row")
    return data


@functools.lru_cache(1)
def _group(container: Path, state: tuple[int, int], group: int) -> Any:
    """Returns the audio of a row group. The last one is kept, since rows are read in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with buckets.on_disk(container) as here, pq.ParquetFile(here) as file:
            name = audio_column(file.schema_arrow)
            if name is None:
                raise AudioError("has no column of audio any more")
            column = file.read_row_group(group, columns=[name]).column(0)
    except (pa.ArrowException, OSError) as error:
        if is_of_system(error):
            raise
        raise AudioError(f"damaged: {str(error).splitlines()[0]}") from None
    if not pa.types.is_struct(column.type):
        return column
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], column.type.field("bytes").type)


def is_of_system(error: Exception) -> bool:
    """Returns whether an error is one of the operating system, and not pyarrow's OSError about what a file holds."""
    return isinstance(error, OSError) and (error.errno is not None or error.filename is not None)


def audio_column(schema: Any) -> str | None:
    """Returns the name of the column that holds audio: a struct of `bytes` and `path`, as of datasets, or bytes."""
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_audio(kind: Any) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)

    fields = {field.name: field.type for field in schema}
    structs = [name for name, kind in fields.items() if is_audio(kind)]
    plain = [name for name in ("audio", "bytes") if name in fields and is_bytes(fields[name])]
    named = [name for name in structs if name == "audio"]
    return next(iter([*named, *structs, *plain]), None)
