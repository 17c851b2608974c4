"""Paths of objects and folders in buckets, and of files of web servers."""

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
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from omnicodec_jax.buckets.copies import copied, copies, fetch, seconds
from omnicodec_jax.buckets.requests import LIBRARIES, READ_ONLY, WEB, BucketError, ask, missing

T = TypeVar("T")

LOG = logging.getLogger(__name__)

QUOTED = str.maketrans({sign: f"%{ord(sign):02X}" for sign in "%?#"})
"""Signs of the names of files that would mean something else in the URL of a web server, and what stands for them."""
THREADS = 16
"""Number of requests that run at a time where many objects are read or written."""

KINDS_OF_REPOSITORIES = ("datasets", "spaces", "kernels", "buckets")
"""Prefixes that the URL of a repository of the hub has, unless it holds a model."""


WANTED = {
    "hf": "repository; must be hf://OWNER/NAME",
    **{scheme: f"file; must be {scheme}://HOST/NAME" for scheme in WEB},
}
"""The text of an error about a URL that is too short, by scheme. Other schemes have buckets."""


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
    def is_read_only(self) -> bool:
        """Whether the URL is one of the hub or of a web server, which this package only reads."""
        return self.scheme in READ_ONLY

    @property
    def suffix(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The last suffix of the name."""
        return self._own_name.suffix

    @property
    def suffixes(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All suffixes of the name."""
        return self._own_name.suffixes

    @property
    def stem(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name without its last suffix."""
        return self._own_name.stem

    @property
    def _own_name(self) -> PurePosixPath:
        """The name without the query that the URL of a web server may have."""
        return PurePosixPath(self.name.partition("?")[0] if self.scheme in WEB else self.name)

    @property
    def parent(self) -> "BucketPath":  # pyright: ignore[reportIncompatibleVariableOverride]
        """The folder that the object or folder lies in. A bucket, or a repository of the hub, is its own parent."""
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
        """Yields the objects and folders in a folder, which is listed at once; none if the folder does not exist."""
        return (path for path, _ in self._listed())

    def glob(self, pattern: str, **options: Any) -> Iterator["BucketPath"]:
        """Yields the objects and folders in a folder whose names fit a pattern, which must not hold "**"."""
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
        """Returns all objects below a folder, with the server's description of each. Raises OSError.

        Objects whose names end in a slash, which stand for empty folders, are left out.
        """
        self._check_listed()
        found = ask(str(self), lambda system: system.find(str(self), detail=True))
        paths = self._named({name: row for name, row in found.items() if row.get("type") == "file"})
        return {path: row for path, row in paths if path != self}

    def _listed(self) -> list[tuple["BucketPath", dict[str, Any]]]:
        self._check_listed()
        try:
            rows = ask(str(self), lambda system: system.ls(str(self), detail=True))
        except FileNotFoundError:
            return []
        paths = self._named({row["name"].rstrip("/"): row for row in rows})
        return sorted(((path, row) for path, row in paths if path != self), key=lambda listed: listed[0])

    def _check_listed(self) -> None:
        """Raises BucketError for the URL of a web server."""
        if self.scheme in WEB:
            raise BucketError(f"{self}: a web server does not say what a folder holds; name each file")

    def _named(self, found: dict[str, Any]) -> list[tuple["BucketPath", Any]]:
        """Returns the paths of names that the server has given, without names that a path would change."""
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
        """Opens an object for reading, after all of it was fetched into a file of this machine. Raises OSError.

        Objects are written by `files.replacing`.
        """
        if set(mode) - set("rbt"):
            raise BucketError(f"{self}: an object in a bucket is written as a whole, not opened as {mode!r}")
        with copied(str(self), self.suffix) as copy:
            return open(copy, mode, buffering, encoding, errors, newline)

    def read_bytes(self) -> bytes:
        """Returns the bytes of an object. Raises OSError."""
        return ask(str(self), lambda system: system.cat_file(str(self)))

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """Returns the text of an object. Raises OSError."""
        with io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors, newline) as text:
            return text.read()

    def read_range(self, start: int, end: int) -> bytes:
        """Returns the bytes of an object from byte `start` on, up to but without byte `end`. Raises OSError."""
        part = ask(str(self), lambda system: system.cat_file(str(self), start=start, end=end))
        if len(part) > end - start and self.scheme in WEB:  # some servers send the whole file
            part = part[start:end]
        if len(part) != end - start:
            raise OSError(errno.EIO, f"ends before byte {end}", str(self))
        return part

    # -- Written

    def put(self, file: Path) -> None:
        """Uploads a file of this machine as the object. Raises OSError."""
        self.check_writable()
        ask(str(self), lambda system: system.put_file(str(file), str(self)))

    def write_bytes(self, data: Any) -> int:
        """Writes bytes as the object, and returns when it is in the bucket. Raises OSError."""
        self.check_writable()
        ask(str(self), lambda system: system.pipe_file(str(self), bytes(data)))
        return len(data)

    def write_text(self, data: str, encoding: Any = None, errors: Any = None, newline: Any = None) -> int:
        """Writes a text as the object, and returns when it is in the bucket. Raises OSError."""
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

        They are removed one by one, since the libraries' removal of folders would take some characters of a name for a
        pattern, and would remove an empty bucket, too.
        """
        self.check_writable()
        with contextlib.suppress(FileNotFoundError):
            for _ in in_threads(lambda path: path.unlink(missing_ok=True), ((path,) for path in self.find())):
                pass

    def check_writable(self) -> None:
        """Raises BucketError for a URL of the hub or of a web server, which this package only reads."""
        if self.is_read_only:
            raise BucketError(f"{self}: {self.scheme}:// is only read here; write to gs://, s3:// or a directory")


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
    if (typo := re.match(r"(gs|s3|hf|https?):/(?!/)", os.fspath(text))) is not None:
        raise BucketError(f"{text}: a bucket's URL has two slashes; must be {typo[1]}://…")
    scheme, mark, rest = os.fspath(text).partition("://")
    if not (mark and scheme.isidentifier()):
        return Path(text)
    if scheme not in LIBRARIES:
        raise BucketError(f"{text}: {scheme}:// is not read; gs://, s3://, hf:// and https:// are, and plain paths")
    rest = rest.removeprefix("models/" if scheme == "hf" else "")
    rest, question, query = rest.partition("?") if scheme in WEB else (rest, "", "")
    rest = rest.replace("#", "%23") if scheme in WEB else rest  # a part of the name: no file is asked for by fragments
    names = [part for part in rest.split("/") if part]
    if len(names) < _root(scheme, names) + (scheme in WEB) or rest.startswith("/"):
        wanted = WANTED.get(scheme, f"bucket; must be {scheme}://BUCKET/NAME")
        raise BucketError(f"{text}: names no {wanted}")
    if "/" in query:
        raise BucketError(f"{text}: a slash behind the question mark; must be written as %2F")
    bucket, _, name = rest.partition("/")
    return BucketPath(f"{scheme}://{bucket}{posixpath.normpath(f'/{name}')}{question}{query}")


def _root(scheme: str, names: Sequence[str]) -> int:
    """Returns how many of the first parts of a URL name the bucket, the repository of the hub, or the web server."""
    if scheme != "hf":
        return 1
    return 3 if names[:1] and names[0] in KINDS_OF_REPOSITORIES else 2


def joined(folder: Any, name: str) -> Any:
    """Returns the path of a name in a list that lies in a folder: a URL, an absolute path, or a path in the folder."""
    if "://" in name and isinstance(path := as_path(name), BucketPath):
        return path
    if not isinstance(folder, BucketPath):
        return folder / name
    if folder.scheme in WEB:
        name = name.translate(QUOTED)
    return Path(name) if name.startswith("/") else as_path(f"{folder}/{name}")


@functools.lru_cache
def _warn_once(text: str) -> None:
    """Logs a warning once, however often a folder is listed."""
    LOG.warning("%s", text)


def _is_pattern(name: str) -> bool:
    return not set("*?[").isdisjoint(name)


# -- Files of this machine


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """Gives a file of this machine with the content of `path`: the file itself, or a copy of the object.

    The copy has the suffix of the object. A process keeps its last copy until it makes another, so that a recording is
    fetched once for all of its segments. Raises OSError.
    """
    if not isinstance(path, BucketPath):
        yield path
        return
    with copied(str(path), path.suffix) as copy:
        yield copy


@contextlib.contextmanager
def directory_on_disk(path: Path) -> Iterator[Path]:
    """Gives a directory of this machine with the content of `path`: the directory itself, or copies of all objects.

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
    """Fetches many objects at a time into files of this machine. Raises OSError."""
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    for _ in in_threads(fetch, ((str(path), file) for path, file in files.items())):
        pass


def in_threads(function: Callable[..., T], arguments: Iterable[Any]) -> Iterator[T]:
    """Calls a function with each tuple of arguments, in threads, and yields the results in the order of the tuples.

    Requests to a server then wait for its answers at the same time.
    """
    with ThreadPoolExecutor(THREADS, "bucket") as threads:
        yield from threads.map(lambda each: function(*each), arguments)
