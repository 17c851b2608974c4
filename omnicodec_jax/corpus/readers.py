"""Audio files read ahead of the device, in processes that may die of them."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from omnicodec_jax.data import audio
from omnicodec_jax.data.decoders import drop_remarks
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.data.units import Seen, attempt, death
from omnicodec_jax.errors import AudioError

T = TypeVar("T")

HASHED_FILES = 256
"""Of which a reader remembers the hash, for segments of one file."""
HELD_SAMPLES = 1 << 26
"""Samples that may wait for the device before no more files are begun: 256 MiB."""


class Request(NamedTuple):
    """What to read."""

    path: Any
    """Of the file."""
    entry: Entry
    sample_rate: int
    peak: float | None
    known: str | None = None
    """Source of tokens that are there: with the same source, nothing is read."""
    older: bool = False
    """Whether to compute the hash that segments had before, too."""


class Read(NamedTuple):
    """A clip, and the hash of what it was read from."""

    clip: audio.Clip | None
    """None: its source is the one that is known."""
    source: str
    seen: Seen
    older: str | None = None
    """What `source` was of a segment before: a hash of its bounds and the whole file."""


def read(request: Request) -> Read:
    """Raises AudioError, also for a line of a manifest that is no clip; UnreadableError: the system is at fault."""
    path, entry = request.path, request.entry
    if entry.problem is not None:
        raise AudioError(entry.problem)

    def load() -> Read:
        seen = Seen.of(path)  # before the bytes: what is replaced meanwhile is not what was seen
        source = source_hash(path, entry, seen)
        if source == request.known:
            return Read(None, source, seen)
        clip = audio.load(path, request.sample_rate, request.peak, entry.offset, entry.duration)
        is_older = request.older and entry.duration is not None
        return Read(clip, source, seen, _hash(path, f"{entry.offset}:{entry.duration}") if is_older else None)

    return attempt(path, load)


def source_hash(path: Any, entry: Entry, seen: Seen) -> str:
    """Identifies the bytes of a file and the part of it that an entry takes; of a whole file, the bytes alone."""
    whole = _file_hash(os.fspath(path), seen)
    if entry.duration is None and not entry.offset:
        return whole
    return hashlib.blake2b(f"{whole}:{entry.offset}:{entry.duration}".encode(), digest_size=16).hexdigest()


@lru_cache(HASHED_FILES)
def _file_hash(path: str | bytes, seen: Seen) -> str:
    """Read once for all the entries of a file; `seen` tells it from another that is put in its place."""
    return _hash(path)


def _hash(path: Any, prefix: str = "") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(prefix.encode(), digest_size=16)).hexdigest()


class Reader:
    """A process that reads one file after the other; when it dies, another takes its place."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._process: Any = None
        self._closed = False

    def __call__(self, request: Request) -> Read:
        """Raises AudioError, also for a file at which two processes have died: the first may have been killed."""
        for _ in range(2):
            if self._closed:
                raise AudioError("not read: the job has been stopped")
            if self._process is None:
                self._connection, end = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(end,), daemon=True)
                process.start()
                self._process = process
                end.close()
            try:
                self._connection.send(request)
                result = self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                died, self._process = self._process.exitcode, None
                continue
            if isinstance(result, Exception):
                raise result
            return result
        raise death(died)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._closed = True
        if self._process is not None:
            self._process.terminate()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches every process; the parent decides
    drop_remarks()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            request = connection.recv()
            try:
                result: Any = read(request)
            except Exception as error:
                known = isinstance(error, (AudioError, OSError))
                result = error if known else AudioError(f"{type(error).__name__}: {error}")
            connection.send(result)


class Readers:
    """Some of them, a thread to each: `map` gives what they read in order. A context that ends them."""

    def __init__(self, count: int):
        self._count, self._readers, self._own = count, [], threading.local()
        self._threads = ThreadPoolExecutor(count, "reader", self._begin)

    def _begin(self) -> None:
        self._own.reader = Reader()
        self._readers.append(self._own.reader)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def map(
        self, requests: Iterable[tuple[T, Request]], then: Callable[[Read], Any]
    ) -> Iterator[tuple[T, Read | None, Any]]:
        """For each (key, request): the key, what was read, and what `then`, run in the thread, makes of it.

        Where one of them raises AudioError or OSError: the key, None, and the exception.
        """
        ahead: deque[tuple[T, Future]] = deque()

        def work(request: Request) -> tuple[Read, Any]:
            result = self._own.reader(request)
            return result, then(result)

        def waiting() -> int:
            done = [future.result()[0].clip for _, future in ahead if future.done() and not future.exception()]
            return sum(clip.samples.size for clip in done if clip is not None)

        source = iter(requests)
        while True:
            while len(ahead) < 4 * self._count and (not ahead or waiting() < HELD_SAMPLES):
                if (item := next(source, None)) is None:
                    break
                ahead.append((item[0], self._threads.submit(work, item[1])))
            if not ahead:
                return
            key, future = ahead.popleft()
            try:
                result, made = future.result()
            except (AudioError, OSError) as error:
                yield key, None, error
            else:
                yield key, result, made
