"""Entries of lists of audio: what each says of one clip, and where its file is."""

from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax.buckets import BucketPath, as_path, joined
from omnicodec_jax.buckets.requests import WEB
from omnicodec_jax.data.members import Member, MemberPlace


class Entry(NamedTuple):
    """One clip of a corpus, or a line of a manifest that is no clip."""

    id: str
    path: str
    """Path of the file, absolute or relative to the `folder` of the list, or its URL in a bucket; with a `container`,
    the name of the file in it."""
    offset: float = 0.0
    """The clip's beginning in its file, in seconds."""
    duration: float | None = None
    """How long the clip is, in seconds from `offset` on; None: it reaches to the end of the file."""
    seconds: float | None = None
    """How long the clip is by the manifest, in seconds; None if the manifest does not say it."""
    domain: str | None = None
    """Domain of the clip by the manifest; None if the manifest does not say it."""
    problem: str | None = None
    """The reason why the line is no clip; None if it is one."""
    container: str | None = None
    """Path of the file that the clip's file lies in, such as a tar; None: it is a file of its own."""
    place: MemberPlace | None = None
    """The place of the clip's file in its container."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """The fields that tell the entry from others. Files in a tar are the same clips as in its folder."""
        return self[: Entry._fields.index("container")]

    def file(self, folder: Path) -> Any:
        """Returns the path of the clip's file, or what stands for it in a container.

        Args:
            folder: The directory that relative paths of the list begin in.
        """
        if self.container is None or self.place is None:
            return joined(folder, self.path)
        return Member(joined(folder, self.container), self.path, self.place)


WRONG = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors that a line of a list ends in which is no clip: of JSON, of Unicode, and of values of another type."""
Listed = tuple[Entry, str | None]
"""An entry with its transcript; None: it has none."""


def readable(name: str) -> str:
    """Returns the name of a file, as a list has it. Raises ValueError for a URL that is not read."""
    if "://" in name:
        as_path(name)
    return name


def contained(container: Path, folder: Path) -> str:
    """Returns the name by which the entries of a list in a folder call a container.

    It is without the folder, so that both can be moved; but for a web server it is the URL, since a name is written
    otherwise in one.
    """
    if not isinstance(container, BucketPath):
        return container.name if container.parent == folder else str(container.absolute())
    return container.name if container.parent == folder and container.scheme not in WEB else str(container)


def number(fields: Any, name: str) -> int | float | None:
    """Returns a field that says seconds, None if it is absent. Raises ValueError for anything else."""
    value = fields.get(name)
    if value is not None and not (type(value) in (int, float) and 0 <= float(value) < float("inf")):
        raise ValueError(f"{name} = {value!r}: must be seconds")
    return value


def text(fields: Any, *names: str) -> str | None:
    """Returns the first of some fields that is a text and not empty; None if there is none."""
    return next((fields[name] for name in names if isinstance(fields.get(name), str) and fields[name]), None)
