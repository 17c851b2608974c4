"""Paths in buckets, with the methods of `pathlib.Path` that this package calls: gs://, s3://; to read: hf://, https://.

`as_path` makes a path of what a user has typed: a `BucketPath` of a URL, and a plain `Path` of anything else, so that
local files are read as fast as without this module. fsspec reads and writes the buckets, with gcsfs and s3fs (the
extras `gcs` and `s3`), as it does for Orbax's paths (etils.epath) and for datasets; with aiohttp (the extra `http`) it
reads files of web servers.

In a bucket, these rules hold:

- An object is whole or not there. It is written to a file of this machine, which is put into the bucket when it is
  complete (`files.replacing`). No object grows, and neither objects nor folders are renamed.
- A folder is a prefix of names. It exists while an object in it exists, and need not be made.
- A web server names no folders' contents, so that each file is named, such as the shards of a list with braces.
- A request that a server does not answer is repeated after growing pauses. If it fails for good, an OSError names the
  object.
- Code that cannot use a bucket refuses it: `os.fspath` of a `BucketPath` raises an error of one line. So a URL is never
  taken for a file of this machine, and no folder called "gs:" is made.
"""

from omnicodec_jax.buckets.copies import copies, remove_dead_copies, state_in, state_of
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
    "remove_dead_copies",
    "state_in",
    "state_of",
]
