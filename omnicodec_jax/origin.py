"""The source of a file that a command has made. A command replaces the file only with one of the same source."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax import names
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.files import digest


class Origin(NamedTuple):
    """Names the source of a file."""

    path: str
    """Path of the source as seen from the folder of the file, so that both can move together."""
    digest: str
    """Hash of the bytes of the source."""

    @classmethod
    def of(cls, source: Path, made: Path) -> "Origin":
        """Returns the origin to write into a file that is made of `source`. Raises OSError."""
        return cls(_place(source, made), digest(source))

    def is_at(self, source: Path, made: Path) -> bool:
        """Returns whether `made` was made of a file at the path of `source`."""
        return self.path == _place(source, made)

    def is_of(self, source: Path, made: Path) -> bool:
        """Returns whether `made` was made of `source`, by the path or by the bytes. Raises OSError."""
        return self.is_at(source, made) or self.digest == digest(source)

    def to_json(self) -> str:
        """Returns a text for a file's comment."""
        return json.dumps({"source": self._asdict()})

    @classmethod
    def from_json(cls, text: str) -> "Origin | None":
        """Reads the text that `to_json` has made; None for any other comment."""
        try:
            return cls(**json.loads(text)["source"])
        except (ValueError, TypeError, KeyError):
            return None


def _place(source: Path, made: Path) -> str:
    if isinstance(source, BucketPath):
        return relative(source, made.parent)
    # A link keeps its own name, since the file that it points to may change.
    return relative(Path(os.path.realpath(source.parent), source.name), made.parent)


def relative(path: Path, folder: Path) -> str:
    """Returns a path as seen from another folder, without links in its folders, in characters that UTF-8 has.

    A path in one bucket is seen from elsewhere by its URL, and one of this machine from a bucket by its absolute path.
    """
    if isinstance(path, BucketPath) or isinstance(folder, BucketPath):
        is_beside = type(path) is type(folder) and path.parts[:2] == folder.parts[:2]
        return names.text(os.path.relpath(str(path), str(folder)) if is_beside else str(path.absolute()))
    return names.text(os.path.relpath(path, os.path.realpath(folder)))
