"""Reads checkpoints as transformers saves them: a config.json, and safetensors files, in a directory or on the hub."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from omnicodec_jax.buckets import BucketPath, as_path, on_disk
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.files import refuse_lfs_pointer
from omnicodec_jax.model_directory import CONFIG, CONVERTERS, QWEN3_OMNI, WEIGHTS, kind_of
from omnicodec_jax.names import an

INDEX = WEIGHTS + ".index.json"


def locate(checkpoint: str | Path, *names: str) -> Path:
    """Returns the directory of a checkpoint. From a checkpoint on the hub, the named files are downloaded."""
    if (path := as_path(checkpoint)).is_dir():
        return path
    if isinstance(path, BucketPath):
        raise ConversionError(f"{checkpoint}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=list(names)))
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{checkpoint}: no such directory, and not to be had from the hub: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file. Raises ConversionError if it cannot be read."""
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; give a directory that transformers has saved")
    refuse_lfs_pointer(path, ConversionError)
    try:
        mapping = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(mapping, dict):
        raise ConversionError(f"{path}: holds no JSON object")
    return mapping


def read_config(directory: Path, kind: str) -> dict[str, Any]:
    """Reads the config.json of a checkpoint of transformers. Raises ConversionError if it is of another kind of model.

    Args:
        directory: Where it is.
        kind: The kind that is wanted, of `CONVERTERS`. The message names the command that takes the other one.
    """
    mapping = read_json(directory / CONFIG)
    found = mapping.get("model_type")
    held = kind_of(found)
    if "format" in mapping:
        raise ConversionError(
            f"{directory}: {an(held)} model that is converted already; give the checkpoint it is made of"
        )
    if held != kind:
        wanted = f"{QWEN3_OMNI}…" if kind == "qwen3_aut" else kind
        hint = f"; {CONVERTERS[held]} takes such a checkpoint" if held in CONVERTERS else ""
        raise ConversionError(f"{directory / CONFIG}: model_type = {found!r}: only {wanted!r} is supported{hint}")
    return mapping


@contextlib.contextmanager
def naming(directory: str | Path) -> Iterator[None]:
    """Names the directory in what is said of its config.json, and turns a KeyError into a ConversionError."""
    try:
        yield
    except KeyError as error:
        raise ConversionError(f"{directory}: its {CONFIG} has no {error}") from None
    except (ConversionError, ConfigError) as error:
        raise type(error)(f"{directory}: {CONFIG}: {error}") from None


def require_options(mapping: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises ConversionError for an option of a config.json that has another value than the one that is supported.

    An option that is absent counts as supported, except for `model_type`.
    """
    for name, value in supported.items():
        if (found := mapping.get(name, None if name == "model_type" else value)) != value:
            raise ConversionError(f"{name} = {found!r}: only {value!r} is supported")


def read_tensors(checkpoint: str | Path, prefixes: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads a part of a checkpoint. Of a checkpoint in many files, only the files that hold the part are opened or
    downloaded.

    Args:
        checkpoint: Directory or hub id.
        prefixes: What the names of the part's tensors may begin with; the first that occurs is that of the part.

    Returns:
        The part's tensors by names without the prefix, in the number format of the file (bfloat16 is ml_dtypes').

    Raises:
        ConversionError: With the file that cannot be read.
    """
    directory = locate(checkpoint, INDEX)
    shards, prefix = [WEIGHTS], None
    # Where both are there, one file has been written after the others; transformers reads that, too.
    if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file():
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ConversionError(f"{directory / INDEX}: has no weight_map, which says where each tensor is")
        prefix = _first_found(prefixes, index)
        shards = sorted({shard for key, shard in index.items() if key.startswith(prefix)})
    directory = locate(checkpoint, *shards)
    state_dict: dict[str, np.ndarray] = {}
    for shard in shards:
        if (directory / shard).is_file():
            refuse_lfs_pointer(directory / shard, ConversionError)
        try:
            with on_disk(directory / shard) as here, safe_open(here, framework="numpy") as file:
                keys = list(file.keys())
                start = prefix if prefix is not None else _first_found(prefixes, keys)
                own = [key for key in keys if key.startswith(start)]
                state_dict |= {key.removeprefix(start): file.get_tensor(key) for key in own}
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{directory / shard}: not a readable safetensors file: {error}") from None
    return state_dict


def _first_found(prefixes: Sequence[str], names: Sequence[str] | dict[str, str]) -> str:
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), prefixes[0])
