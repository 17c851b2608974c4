"""What a file was made of: a command makes it again of that, and of nothing else without being told to."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax import names
from omnicodec_jax.files import digest


class Origin(NamedTuple):
    """Names the source of a file."""

    path: str
    """As seen from the folder of what was made of it, so that both can move together."""
    digest: str
    """Hash of its bytes."""

    @classmethod
    def of(cls, source: Path, made: Path) -> "Origin":
        """The origin to write into a file that is made of `source`. Raises OSError."""
        return cls(_place(source, made), digest(source))

    def is_of(self, source: Path, made: Path) -> bool:
        """Whether `source` is what `made` was made of: it lies where that lay, or holds the same. Raises OSError."""
        return self.path == _place(source, made) or self.digest == digest(source)

    def to_json(self) -> str:
        """For a file's comment."""
        return json.dumps({"source": self._asdict()})

    @classmethod
    def from_json(cls, text: str) -> "Origin | None":
        """The inverse of `to_json`; None for any other comment."""
        try:
            return cls(**json.loads(text)["source"])
        except (ValueError, TypeError, KeyError):
            return None


def _place(source: Path, made: Path) -> str:
    # A link to a file is a name of its own: what it points to may change.
    return relative(Path(os.path.realpath(source.parent), source.name), made.parent)


def relative(path: Path, folder: Path) -> str:
    """A path without links in its folders as seen from another folder, in characters that UTF-8 has."""
    return names.text(os.path.relpath(path, os.path.realpath(folder)))
