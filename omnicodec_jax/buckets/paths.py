"""Paths of objects and folders in buckets."""

import contextlib
import errno
import fnmatch
import functools
import io
import logging
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from omnicodec_jax.buckets.copies import copied, copies, fetch, seconds
from omnicodec_jax.buckets.requests import LIBRARIES, BucketError, ask, missing

T = TypeVar("T")

LOG = logging.getLogger(__name__)

THREADS = 16
"""Number of requests that are under way at a time where many objects are asked for."""

KINDS_OF_REPOSITORIES = ("datasets", "spaces", "kernels", "buckets")
"""What stands before the name of a repository of the hub that is not a model's."""


class BucketPath(type(Path())):
    """The path of an object, or of a folder, in a bucket. `as_path` makes it.

    It joins, splits and compares as other paths do. What it does not define, such as renaming, is refused.
    """

    def __str__(self) -> str:
        text = super().__str__()
        scheme, slash, rest = text.partition(":/")
        return f"{scheme}://{rest.lstrip('/')}" if slash and scheme in LIBRARIES else text

    def __fspath__(self) -> str:
        raise BucketError(f"{self}: in a bucket; this works only on files and directories of this machine")

    @property
    def scheme(self) -> str:
        """The scheme of the URL, such as "gs"."""
        return str(self).partition("://")[0]

    @property
    def parent(self) -> "BucketPath":  # pyright: ignore[reportIncompatibleVariableOverride]
        """The folder that the object or folder lies in; of a bucket, and of a repository of the hub, itself."""
        return super().parent if len(self.parts) - 1 > _root(self.scheme, self.parts[1:]) else self

    def absolute(self) -> "BucketPath":
        """Returns the path itself."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Returns the path itself, as buckets have no links."""
        return self

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing, as folders of buckets need not be made."""

    # -- What is there

    def info(self) -> dict[str, Any] | None:
        """Returns what the server says of an object or a folder, or None if there is neither. Raises OSError."""
        try:
            return ask(str(self), lambda system: system.info(str(self)))
        except FileNotFoundError:
            return None

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Returns size, kind and time of an object or a folder. Raises OSError."""
        if (info := self.info()) is None:
            raise missing(str(self))
        mode = stat.S_IFDIR if info.get("type") == "directory" else stat.S_IFREG
        moment = seconds(info)
        fields = (mode, 0, 0, 1, 0, 0, int(info.get("size") or 0), int(moment), int(moment), int(moment))
        return os.stat_result(fields, {"st_mtime": moment, "st_mtime_ns": int(moment * 1e9)})

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is an object or a folder of this name."""
        return self.info() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is an object of this name."""
        info = self.info()
        return info is not None and info.get("type") == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is an object whose name begins with this one and a slash."""
        info = self.info()
        return info is not None and info.get("type") == "directory"

    def is_symlink(self) -> bool:
        """Returns False, as buckets have no links."""
        return False

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yields what lies in a folder, which is read at once; nothing for a folder that is not there."""
        return (path for path, _ in self._listed())

    def glob(self, pattern: str, **options: Any) -> Iterator["BucketPath"]:
        """Yields what lies in a folder under names that fit a pattern; the pattern must not hold "**"."""
        name, _, rest = pattern.partition("/")
        if not rest and not _is_pattern(name):
            yield from [path for path in [self / name] if path.exists()]
        elif not _is_pattern(name):
            yield from (self / name).glob(rest)
        else:
            for path, info in self._listed():
                if fnmatch.fnmatchcase(path.name, name):
                    if not rest:
                        yield path
                    elif info.get("type") == "directory":
                        yield from path.glob(rest)

    def rglob(self, pattern: str = "*", **options: Any) -> Iterator["BucketPath"]:
        """Yields all objects below a folder whose last name fits a pattern, in the order of their names."""
        return (path for path in sorted(self.find()) if fnmatch.fnmatchcase(path.name, pattern))

    def find(self) -> dict["BucketPath", dict[str, Any]]:
        """Returns all objects below a folder, with what the server says of each. Raises OSError.

        What stands for an empty folder, an object whose name ends in a slash, is none of them.
        """
        found = ask(str(self), lambda system: system.find(str(self), detail=True))
        paths = self._named({name: row for name, row in found.items() if row.get("type") == "file"})
        return {path: row for path, row in paths if path != self}

    def _listed(self) -> list[tuple["BucketPath", dict[str, Any]]]:
        try:
            rows = ask(str(self), lambda system: system.ls(str(self), detail=True))
        except FileNotFoundError:
            return []
        paths = self._named({row["name"].rstrip("/"): row for row in rows})
        return sorted(((path, row) for path, row in paths if path != self), key=lambda listed: listed[0])

    def _named(self, found: dict[str, Any]) -> list[tuple["BucketPath", Any]]:
        """Returns the paths of names that the server has given, without those that no path can say."""
        paths = {name: type(self)(f"{self.scheme}://{name}") for name in found if not name.endswith("/")}
        unsaid = [name for name in paths if posixpath.normpath(name) != name]
        if unsaid:
            some = f"{self}: passed over {len(unsaid)} objects with //, /./ or /../ in their names, such as {unsaid[0]}"
            _warn_once(some)
        for name in unsaid:
            del paths[name]
        return [(path, found[name]) for name, path in paths.items()]

    # -- Read

    def open(
        self, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None
    ) -> Any:
        """Opens an object to be read: all of it is fetched into a file of this machine. Raises OSError.

        To write, see `files.replacing`.
        """
        if set(mode) - set("rbt"):
            raise BucketError(f"{self}: an object in a bucket is written as a whole, not opened as {mode!r}")
        with copied(str(self)) as copy:
            return open(copy, mode, buffering, encoding, errors, newline)

    def read_bytes(self) -> bytes:
        """Returns what an object holds. Raises OSError."""
        return ask(str(self), lambda system: system.cat_file(str(self)))

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """Returns the text of an object. Raises OSError."""
        with io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors, newline) as text:
            return text.read()

    def read_range(self, start: int, end: int) -> bytes:
        """Returns the bytes of an object from `start` up to but without `end`. Raises OSError."""
        part = ask(str(self), lambda system: system.cat_file(str(self), start=start, end=end))
        if len(part) != end - start:
            raise OSError(errno.EIO, f"ends before byte {end}", str(self))
        return part

    # -- Written

    def put(self, file: Path) -> None:
        """Puts a file of this machine into the place of the object. Raises OSError."""
        self.check_writable()
        ask(str(self), lambda system: system.put_file(str(file), str(self)))

    def write_bytes(self, data: Any) -> int:
        """Writes an object, which is there at once. Raises OSError."""
        self.check_writable()
        ask(str(self), lambda system: system.pipe_file(str(self), bytes(data)))
        return len(data)

    def write_text(self, data: str, encoding: Any = None, errors: Any = None, newline: Any = None) -> int:
        """Writes an object, which is there at once. Raises OSError."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object. Raises OSError."""
        self.check_writable()
        try:
            ask(str(self), lambda system: system.rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_all(self) -> None:
        """Removes all objects below a folder. Raises OSError.

        One by one: the libraries would take some signs of a name for a pattern, and remove an empty bucket, too.
        """
        self.check_writable()
        with contextlib.suppress(FileNotFoundError):
            for _ in in_threads(lambda path: path.unlink(missing_ok=True), ((path,) for path in self.find())):
                pass

    def check_writable(self) -> None:
        """Raises BucketError for a URL that is only read here, those of the hub."""
        if self.scheme == "hf":
            raise BucketError(f"{self}: hf:// is only read here; write to gs://, s3:// or a directory")


# -- Paths of texts


def as_path(text: str | os.PathLike[str]) -> Path:
    """Makes a path of what a user has typed.

    Args:
        text: A path of this machine, or a URL.

    Returns:
        A `BucketPath` of a URL, else a `Path`.

    Raises:
        BucketError: For a URL of another scheme, or one that names no bucket.

    Names with //, /./ or /../ are taken as a disk takes them, since no path can say what they would be in a bucket.

    Examples:
        >>> as_path("gs://bucket/data") / "prepared.json"
        BucketPath('gs://bucket/data/prepared.json')
        >>> as_path("data/prepared").name
        'prepared'
    """
    if isinstance(text, Path):
        return text
    if (typo := re.match(r"(gs|s3|hf):/(?!/)", os.fspath(text))) is not None:
        raise BucketError(f"{text}: a bucket's URL has two slashes; must be {typo[1]}://BUCKET/NAME")
    scheme, mark, rest = os.fspath(text).partition("://")
    if not (mark and scheme.isidentifier()):
        return Path(text)
    if scheme not in LIBRARIES:
        raise BucketError(f"{text}: {scheme}:// is not read; gs://, s3:// and hf:// are, and plain paths")
    rest = rest.removeprefix("models/" if scheme == "hf" else "")
    names = [part for part in rest.split("/") if part]
    if len(names) < _root(scheme, names) or rest.startswith("/"):
        wanted = "repository; must be hf://OWNER/NAME" if scheme == "hf" else f"bucket; must be {scheme}://BUCKET/NAME"
        raise BucketError(f"{text}: names no {wanted}")
    bucket, _, name = rest.partition("/")
    return BucketPath(f"{scheme}://{bucket}{posixpath.normpath(f'/{name}')}")


def _root(scheme: str, names: Sequence[str]) -> int:
    """Returns how many of the first names of a URL are those of the bucket, or of the hub's repository."""
    if scheme != "hf":
        return 1
    return 3 if names[:1] and names[0] in KINDS_OF_REPOSITORIES else 2


def joined(folder: Any, name: str) -> Any:
    """Returns the path that a list in a folder means by a name: a URL, an absolute path, or one from the folder on."""
    if "://" in name and isinstance(path := as_path(name), BucketPath):
        return path
    if not isinstance(folder, BucketPath):
        return folder / name
    return Path(name) if name.startswith("/") else as_path(f"{folder}/{name}")


@functools.lru_cache
def _warn_once(text: str) -> None:
    """Warns, but not of the same in each listing of a folder."""
    LOG.warning("%s", text)


def _is_pattern(name: str) -> bool:
    return not set("*?[").isdisjoint(name)


# -- Files of this machine


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """Gives a file of this machine that holds what `path` does: the file itself, or a copy of an object.

    The copy has the suffix of the object. The last one that a process has made is kept until it makes another, so that
    segments of one recording fetch it once. Raises OSError.
    """
    if not isinstance(path, BucketPath):
        yield path
        return
    with copied(str(path)) as copy:
        yield copy


@contextlib.contextmanager
def directory_on_disk(path: Path) -> Iterator[Path]:
    """Gives a directory of this machine that holds what `path` does: the directory itself, or copies of all objects.

    Raises OSError.
    """
    if not isinstance(path, BucketPath):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=copies()) as made:
        folder = Path(made) / path.name
        folder.mkdir()
        fetch_all({file: folder / file.relative_to(path) for file in path.find()})
        yield folder


def fetch_all(files: dict[BucketPath, Path]) -> None:
    """Fetches objects into files of this machine, many at a time. Raises OSError."""
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    for _ in in_threads(fetch, ((str(path), file) for path, file in files.items())):
        pass


def in_threads(function: Callable[..., T], arguments: Iterable[Any]) -> Iterator[T]:
    """Calls a function with each of some tuples of arguments in threads, and yields the results in their order.

    It hides the time that servers take to answer.
    """
    with ThreadPoolExecutor(THREADS, "bucket") as threads:
        yield from threads.map(lambda each: function(*each), arguments)
