"""Paths in buckets (gs://, s3://, and hf:// to read), with the methods of `pathlib.Path` that this package calls.

`as_path` makes a path of what a user has typed: a `BucketPath` of a URL, a plain `Path` of anything else, for which all
stays as fast as it is. fsspec does the work, with gcsfs and s3fs (the extras `gcs` and `s3`), as it does for Orbax's
paths (etils.epath) and for datasets.

The laws of files hold in a bucket:

- An object is whole or not there. It is written to a file of this machine, which is put into the bucket when it is
  complete (`files.replacing`). No object grows, and nothing is renamed, neither objects nor folders.
- A folder is the beginning of names. It is there while an object in it is, and need not be made.
- What is asked of a server is asked again, later and later, when the server does not answer. What fails for good is an
  OSError that names the object.
- Whatever has not been taught about buckets refuses them: a `BucketPath` cannot be taken for a file of this machine, as
  `os.fspath` raises an error of one line. So no folder called "gs:" comes about.
"""

from omnicodec_jax.buckets.copies import copies, state_in, state_of
from omnicodec_jax.buckets.mirror import mirrored
from omnicodec_jax.buckets.paths import (
    BucketPath,
    as_path,
    directory_on_disk,
    fetch_all,
    in_threads,
    joined,
    on_disk,
)
from omnicodec_jax.buckets.requests import BucketError

__all__ = [
    "BucketError",
    "BucketPath",
    "as_path",
    "copies",
    "directory_on_disk",
    "fetch_all",
    "in_threads",
    "joined",
    "mirrored",
    "on_disk",
    "state_in",
    "state_of",
]
