"""The places that Orbax can write checkpoints to: directories, and buckets of Google or Amazon."""

import functools
import importlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from etils import epath
from orbax.checkpoint import options

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.errors import CheckpointError

COMMITTED = "commit_success.txt"
"""The object that Orbax writes last into a checkpoint in a bucket, where it cannot rename a finished folder."""
REPLACED = {
    "_normalize_path": "orbax.checkpoint._src.serialization.tensorstore_utils",
    "_use_gcs_driver": "orbax.checkpoint._src.serialization.tensorstore_utils",
    "get_kvstore_for_gcs": "orbax.checkpoint._src.path.gcs_utils",
}
"""Private functions of Orbax that keep it from writing to S3, and the modules that they are in."""


def directory(path: Path) -> epath.Path:
    """Returns the path of a directory as Orbax takes it. Raises CheckpointError if Orbax cannot write to it."""
    if isinstance(path, BucketPath):
        if path.is_read_only:
            raise CheckpointError(f"{path}: {path.scheme}:// is only read; train into gs://, s3:// or a directory")
        if marks := set("#?%") & set(str(path)):
            raise CheckpointError(
                f"{path}: a run in a bucket must have a name without {' '.join(sorted(marks))}, as Orbax reads it as "
                "a URL; choose another --workdir"
            )
        if path.scheme == "s3":
            _register_s3()
    return epath.Path(str(path))


def atomicity(path: Path) -> options.AtomicityOptions | None:
    """Returns how Orbax marks a checkpoint as complete: in a bucket by an object in it, elsewhere by its name."""
    if isinstance(path, BucketPath):
        return options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)
    return None


def steps(path: Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a directory, in order.

    On a disk, Orbax gives a checkpoint the name of its step when all of it is written. Orbax's own list also has the
    checkpoints that it has only begun to write.
    """
    if isinstance(path, BucketPath):
        found = {file.relative_to(path).parts for file in path.find()}
        return sorted(int(parts[0]) for parts in found if parts[0].isdecimal() and parts[1:] == (COMMITTED,))
    return sorted(int(folder.name) for folder in path.glob("*") if folder.name.isdecimal())


def base(path: Path) -> str | dict[str, str]:
    """Returns the path of a directory as TensorStore takes it."""
    if isinstance(path, BucketPath):
        return _s3(f"{path}/") if path.scheme == "s3" else f"{path}/"
    return {"driver": "file", "path": f"{path}/"}  # in a URL, #, % and ? would have a meaning


def _s3(url: str) -> dict[str, str]:
    """Returns TensorStore's description of a URL of S3, at Amazon or at the server that AWS_ENDPOINT_URL names."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": path}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return spec


@functools.cache
def _register_s3() -> None:
    """Makes Orbax pass URLs of S3 to TensorStore, which can write to them.

    Orbax 0.12.8 supports gs:// alone, takes s3:// for a relative path, and has no public option for another store. So
    some private functions of it are replaced. Raises CheckpointError for a version that does not have them.
    """
    theirs = {name: _of_orbax(module, name) for name, module in REPLACED.items()}

    def normalize_path(path: str) -> str:
        return f"s3://{os.path.normpath(path[5:])}" if path.startswith("s3://") else theirs["_normalize_path"](path)

    def use_gcs_driver(path: str) -> bool:
        return path.startswith("s3://") or theirs["_use_gcs_driver"](path)

    def get_kvstore(path: str) -> dict[str, str]:
        return _s3(path) if path.startswith("s3://") else theirs["get_kvstore_for_gcs"](path)

    for name, ours in zip(REPLACED, (normalize_path, use_gcs_driver, get_kvstore), strict=True):
        setattr(importlib.import_module(REPLACED[name]), name, ours)


def _of_orbax(module: str, name: str) -> Any:
    """Returns a private function of Orbax. Raises CheckpointError if the installed version has none of that name."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise CheckpointError(
            f"s3://: checkpoints are written there by {module}.{name}, which orbax-checkpoint "
            f"{importlib.metadata.version('orbax-checkpoint')} does not have; install another version (0.12.8 has it), "
            "or train into gs:// or a directory"
        ) from None
