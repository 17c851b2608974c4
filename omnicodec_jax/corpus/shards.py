"""Token shards: Parquet files with a row for each clip, and with the token contract in their metadata.

    DIR/shards/speech-000000.parquet
    DIR/__omnicodec__/tokens.json      the contract, and how the corpus was cut into units
    DIR/__omnicodec__/index.jsonl      a line per shard
    DIR/__omnicodec__/rejects.jsonl    a line per file that was refused, with the reason
    DIR/__omnicodec__/units/speech-000000.json    what became of the shard's files; marks it as finished

`pyarrow.parquet.read_table(shard)["codes"]` has a list of frames for each clip, of K codes each. Files that are not
Parquet lie in a folder that readers of whole directories pass over: pyarrow and Spark skip names that begin with "_",
and datasets skips folders that begin with "__". Version 0.1 wrote these files to DIR and beside the shards; they are
read from there, too.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnicodec_jax.buckets import BucketPath, as_path, on_disk
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import units
from omnicodec_jax.data.claim import MARKERS
from omnicodec_jax.data.listings.parquet import METADATA
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import refuse_lfs_pointer, replacing

SHARDS, STATE = "shards", "__omnicodec__"
UNITS, INDEX, REJECTS, SETTINGS = f"{STATE}/units", f"{STATE}/index.jsonl", f"{STATE}/rejects.jsonl", "tokens.json"
SUFFIX, MARKER = ".parquet", ".json"
FORMAT = 1
"""Format of shards, which the contract holds as `format`. It grows when shards change so that earlier versions would
misread them. Version 0.1 wrote no format."""
MAGIC = b"PAR1"
"""The last bytes of every Parquet file."""
GROUP = 64
"""Number of clips in a row group, which are read at once."""


class Clip(NamedTuple):
    """Holds one row of a token shard: a clip's codes, and what restores its length and loudness."""

    id: str
    """Name of the clip in the manifest."""
    domain: str
    """Domain of the clip in the manifest."""
    codes: np.ndarray
    """Codes, uint16 [N, K]; k = 0 is the semantic codebook."""
    gain: float
    """Factor that the original was multiplied by before it was encoded."""
    sample_rate: int
    """Sample rate of the original, Hz."""
    num_samples: int
    """Length of the original in samples, at its own rate."""
    source: str
    """Hash of the bytes of the original file, and of the part of it that was taken."""


def schema(num_codebooks: int, contract: dict[str, Any]) -> pa.Schema:
    """Returns the columns of a shard, with the contract in their metadata."""
    columns = {
        "id": pa.string(),
        "domain": pa.string(),
        "frames": pa.int32(),
        "duration": pa.float64(),
        "codes": pa.list_(pa.list_(pa.uint16(), num_codebooks)),
        "gain": pa.float64(),
        "sample_rate": pa.int32(),
        "num_samples": pa.int64(),
        "source": pa.string(),
    }
    return pa.schema(list(columns.items()), {METADATA: json.dumps(contract).encode()})


def shard_path(out: Path, name: str) -> Path:
    """Returns the path of a unit's shard."""
    return out / SHARDS / f"{name}{SUFFIX}"


def marker_path(out: Path, name: str) -> Path:
    """Returns the path of the JSON file that says what became of a unit's entries, and marks it as finished."""
    return out / UNITS / f"{name}{MARKER}"


def check_apart(out: Path, makes: str) -> None:
    """Raises DataError for a directory of tokens, or of their shards: what is written between them would be read."""
    for path in (out / STATE, *sorted(out.glob(f"[!.]*{SUFFIX}"))[:1]):
        if path.exists():
            raise DataError(f"{out}: holds tokens ({path.name}), with which {makes} would be mixed; use another OUT")


def settings(out: Path) -> dict[str, Any] | None:
    """Reads the contract and the length of the shards of a directory; None if there are none. Raises DataError."""
    paths = [path for path in (out / STATE / SETTINGS, out / SETTINGS) if path.is_file()]
    return _with_format(units.read_settings(paths[0]), paths[0]) if paths else None


def _with_format(contract: dict[str, Any], where: Path) -> dict[str, Any]:
    """Returns a contract with its format. Raises DataError for a format that this version does not read."""
    contract = {"format": 1, **contract}
    if problem := config_files.format_problem(contract["format"], FORMAT, contract.get("made_by")):
        raise DataError(f"{where}: {problem}")
    return contract


def rejects_path(out: Path) -> Path:
    """Returns the path of the list of files that were refused."""
    return next((path for path in (out / REJECTS, out / "rejects.jsonl") if path.is_file()), out / REJECTS)


def finished(out: Path, name: str) -> dict[str, Any] | None:
    """Reads what became of a unit's entries; None if it is not finished. Its shard is written before this file."""
    done = units.read_marker(marker_path(out, name))
    return done if done is not None and _is_whole(shard_path(out, name)) else None


def _is_whole(shard: Path) -> bool:
    """Returns whether a shard is there and ends as Parquet does, whoever has written it.

    When a machine goes down, files that were written shortly before may stay behind empty or cut off. Objects in a
    bucket are always whole.
    """
    if isinstance(shard, BucketPath) or not shard.is_file():
        return shard.is_file()
    with shard.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(MAGIC)))
        return file.read() == MAGIC


def move_old(out: Path) -> None:
    """Moves the files that are not Parquet and were written by version 0.1 to where readers pass them over."""
    if isinstance(out, BucketPath) or not ((out / SETTINGS).is_file() and (out / SHARDS).is_dir()):
        return  # version 0.1 wrote to no bucket
    for path in (out / SHARDS).glob(f"[!.]*{MARKER}"):
        _move(path, out / UNITS / path.name)
    for name in ("index.jsonl", "rejects.jsonl", SETTINGS):
        _move(out / name, out / STATE / name)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process moves the same
        path.replace(to)


def write(path: Path, clips: Iterable[Clip], contract: dict[str, Any]) -> int:
    """Writes a shard, whole or not at all; returns its bytes."""
    clips, width = list(clips), len(contract["codebook_sizes"])
    codes = np.concatenate([np.zeros((0, width), np.uint16), *(clip.codes for clip in clips)])
    ends = np.cumsum([0, *(len(clip.codes) for clip in clips)]).astype(np.int32)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), width)
    columns = [
        [clip.id for clip in clips],
        [clip.domain for clip in clips],
        [len(clip.codes) for clip in clips],
        [clip.num_samples / clip.sample_rate for clip in clips],
        pa.ListArray.from_arrays(pa.array(ends), frames),
        [clip.gain for clip in clips],
        [clip.sample_rate for clip in clips],
        [clip.num_samples for clip in clips],
        [clip.source for clip in clips],
    ]
    kinds = schema(width, contract)
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, kinds, strict=True)]
    # The temporary file lies elsewhere, since readers take every file beside shards for a shard, hidden or not.
    with replacing(path, path.parent.parent / STATE) as temporary:
        table = pa.Table.from_arrays(arrays, schema=kinds)
        pq.write_table(table, temporary, compression="zstd", row_group_size=GROUP)
        return temporary.stat().st_size


def shards(out: Path) -> list[Path]:
    """Returns the paths of all finished shards, in the order of their names. Raises DataError if there are none."""
    # In this order, since `move_old` may be at it.
    if others := [held for name, held in MARKERS.items() if held != "tokens" and (out / name).is_file()]:
        raise DataError(f"{out}: holds {others[0]}, and no tokens (omnicodec tokenize)")
    names = {marker.stem for folder in (SHARDS, UNITS) for marker in (out / folder).glob(f"[!.]*{MARKER}")}
    if not names:
        raise DataError(f"{out}: holds no finished token shards (omnicodec tokenize)")
    return sorted(shard_path(out, name) for name in names)


def contract(out: Path) -> dict[str, Any]:
    """Reads what the tokens in a directory are, and what they depend on. Raises DataError."""
    return read_contract(shards(out)[0])


def read_contract(shard: Path) -> dict[str, Any]:
    """Reads the contract of one shard. Raises DataError for a file that is no token shard, or one of a newer format."""
    try:
        with on_disk(shard) as file:
            return _contract_of(pq.read_schema(file), shard)
    except (OSError, pa.ArrowException) as error:
        refuse_lfs_pointer(shard, DataError)
        raise DataError(f"{shard}: not a shard of omnicodec tokenize ({error})") from None


def _contract_of(schema: pa.Schema, shard: Path) -> dict[str, Any]:
    """Reads the contract in the metadata of a shard's schema. Raises DataError as `read_contract` does."""
    try:
        return _with_format(json.loads((schema.metadata or {})[METADATA]), shard)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{shard}: not a shard of omnicodec tokenize ({error})") from None


@contextlib.contextmanager
def opened(shard: Path) -> Iterator[pq.ParquetFile]:
    """Opens a shard to read its rows. Raises DataError for one that is damaged, or of a newer format."""
    try:
        with on_disk(shard) as here, pq.ParquetFile(here) as file:
            _contract_of(file.schema_arrow, shard)
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; pyarrow's own have no number
            raise
        refuse_lfs_pointer(shard, DataError)
        raise DataError(f"{shard}: damaged: {str(error).splitlines()[0]}; remove it, and tokenize again") from None


def read_tokens(out: Path | str, domain: str | None = None) -> Iterator[Clip]:
    """Reads the clips of a directory of token shards, in the order of the shards.

    Args:
        out: Directory that `omnicodec tokenize` has written.
        domain: Only the clips of this one.

    Yields:
        The clips, one after the other.

    Raises:
        DataError: If the directory holds no finished shards, or no clip of the domain.

    Examples:
        >>> sorted(clip.id for clip in read_tokens("data/tokens", domain="speech"))
        ['english_class', 'english_fricatives', 'french_patte_pente']
    """
    found = set()
    for path in shards(as_path(out)):
        for clip in read_shard(path):
            found.add(clip.domain)
            if domain in (None, clip.domain):
                yield clip
    if domain is not None and domain not in found:
        raise DataError(
            f"{out}: holds no clip of the domain {domain!r}; it has {', '.join(sorted(found)) or 'no clips'}"
        )


def read_shard(path: Path) -> Iterator[Clip]:
    """Reads the clips of one shard, in the order of the manifest."""
    with opened(path) as file:
        for group in range(file.num_row_groups):
            yield from read_group(file, group)


def read_ids(path: Path) -> Iterator[tuple[str, str, str]]:
    """Reads domain, id and source of each clip of one shard, in the order of the clips."""
    columns = ["domain", "id", "source"]
    table = read_columns(path, columns)
    yield from zip(*(table[name].to_pylist() for name in columns), strict=True)


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Reads some columns of one shard. Raises DataError as `opened` does."""
    with opened(path) as file:
        return file.read(columns)


def read_group(file: pq.ParquetFile, group: int) -> list[Clip]:
    """Reads the clips of one row group."""
    table = file.read_row_group(group)
    column = table["codes"].combine_chunks()
    frames = column.values
    codes = frames.values.to_numpy().reshape(-1, frames.type.list_size)
    ends = column.offsets.to_numpy()
    rest = table.select(["id", "domain", "gain", "sample_rate", "num_samples", "source"]).to_pylist()
    return [Clip(codes=codes[ends[row] : ends[row + 1]], **fields) for row, fields in enumerate(rest)]
