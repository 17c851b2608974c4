"""Copies objects to this machine, for libraries that read only files."""

import atexit
import contextlib
import datetime
import email.utils
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax.buckets.requests import ask, missing

CACHE = "omnicodec-buckets-"
"""Prefix of the name of the folder in which a process keeps its copies."""


class _Copy(NamedTuple):
    file: Path
    state: tuple[int, int]


_copies: dict[str, _Copy] = {}
"""The copy that was made last, by its URL."""
_users: dict[Path, int] = {}
"""The number of readers that each copy has now."""
_guard = threading.Lock()


@contextlib.contextmanager
def copied(url: str, suffix: str) -> Iterator[Path]:
    """Gives a copy of an object, whose name ends in `suffix`, as `paths.on_disk` does. Raises OSError."""
    state = state_of(url)
    with _guard:
        kept = _copies.get(url)
        if kept is not None and kept.state == state:
            _users[kept.file] += 1
    if kept is None or kept.state != state:
        file = copies() / f"{uuid.uuid4().hex}{suffix}"
        fetch(url, file)
        kept = _Copy(file, state)
        with _guard:
            outdated = list(_copies.values())
            _copies.clear()
            _copies[url], _users[file] = kept, 1
        for old in outdated:
            _remove_if_unused(old.file)
    try:
        yield kept.file
    finally:
        with _guard:
            _users[kept.file] -= 1
        _remove_if_unused(kept.file)


def _remove_if_unused(file: Path) -> None:
    with _guard:
        if _users.get(file) or any(kept.file == file for kept in _copies.values()):
            return
        _users.pop(file, None)
    file.unlink(missing_ok=True)


def fetch(url: str, file: Path) -> None:
    """Fetches an object into a file of this machine. Raises OSError."""

    def get(system: Any) -> None:
        system.get_file(url, str(file))
        if not file.exists():  # what gcsfs makes of an object of no bytes
            file.touch()

    try:
        ask(url, get)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def state_of(url: str) -> tuple[int, int]:
    """Returns the size of an object, and a number that changes when another takes its place. Raises OSError."""
    info = ask(url, lambda system: system.info(url))
    if info.get("type") != "file":
        raise missing(url)
    return state_in(info)


def state_in(info: dict[str, Any]) -> tuple[int, int]:
    """Returns the state of an object, as `state_of` does, from the server's description of the object."""
    mark = next((info[name] for name in ("etag", "ETag", "blob_id") if info.get(name)), None)
    number = int(seconds(info) * 1e9)
    if mark is not None:
        number = int.from_bytes(hashlib.blake2b(str(mark).encode(), digest_size=7).digest())
    return int(info.get("size") or 0), number


def seconds(info: dict[str, Any]) -> float:
    """Returns when an object was written, by the server's clock, in seconds; 0 where it does not say."""
    if "Last-Modified" in info:  # of a web server
        with contextlib.suppress(ValueError):
            return email.utils.parsedate_to_datetime(info["Last-Modified"]).timestamp()
    moment = next((info[name] for name in ("LastModified", "mtime", "updated") if info.get(name)), None)
    if isinstance(moment, str):
        moment = datetime.datetime.fromisoformat(moment)
    return moment.timestamp() if isinstance(moment, datetime.datetime) else float(moment or 0)


@functools.lru_cache(maxsize=1)
def copies() -> Path:
    """Returns the folder in which this process keeps copies; the variable TMPDIR says on which disk it lies.

    It is deleted when the process ends. The folder of a killed process is deleted by a later process.
    """
    remove_dead_copies()
    folder = _locked(Path(tempfile.mkdtemp(prefix=CACHE)))
    while not folder.is_dir():  # before it was locked, another process has taken it for a leftover
        folder = _locked(Path(tempfile.mkdtemp(prefix=CACHE)))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _locked(folder: Path) -> Path:
    """Locks a folder until the process ends, however it ends. Returns the folder, which may have gone meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    return folder


def remove_dead_copies() -> None:
    """Removes the folders of processes that were ended by a signal, as child processes are at the end of their work."""
    for folder in Path(tempfile.gettempdir()).glob(f"{CACHE}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
