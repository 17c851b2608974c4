"""Reads audio files ahead of the devices, in child processes, since a damaged file may crash its decoder."""

import contextlib
import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from omnicodec_jax import buckets
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.child_processes import Child, Died, Tell
from omnicodec_jax.data import audio
from omnicodec_jax.data.attempts import Seen, attempt, death
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.members import Member
from omnicodec_jax.data.sndfile import drop_remarks
from omnicodec_jax.errors import AudioError

T = TypeVar("T")

HASHED_FILES = 256
"""Number of files whose hash a reader remembers, since a manifest may list many segments of one file."""
HELD_SAMPLES = 1 << 26
"""Number of samples that may wait for the devices before no more files are begun: 256 MiB."""


class Request(NamedTuple):
    """A request to a reader for one clip."""

    path: Any
    """Path of the file."""
    entry: Entry
    """Entry of the manifest, which says what part of the file is the clip."""
    sample_rate: int
    """Rate that the clip is resampled to, Hz."""
    peak: float | None
    """The peak that the clip is scaled to; None: the clip stays as loud as it is."""
    known: str | None = None
    """Hash of the source of tokens that exist already. If the clip has the same, its audio is not read."""
    older: bool = False
    """Whether to compute also the hash that version 0.1 gave to segments."""


class Read(NamedTuple):
    """A clip that has been read, and the hash of its source."""

    clip: audio.LoadedClip | None
    """The clip; None if its source is the one that is known."""
    source: str
    """Hash of the file's bytes, and of the part of the file that is the clip."""
    seen: Seen
    """State of the file before it was read."""
    older: str | None = None
    """Hash that version 0.1 gave to a segment, of its bounds and the whole file; None if it was not asked for."""


def read(request: Request) -> Read:
    """Reads a clip in this process.

    Raises AudioError for a clip that cannot be used, and for a line of a manifest that is no clip; UnreadableError if
    the operating system is at fault.
    """
    path, entry = request.path, request.entry
    if entry.problem is not None:
        raise AudioError(entry.problem)

    def load() -> Read:
        seen = Seen.of(path)  # before the file is read, so that a file that is replaced meanwhile is noticed
        source = source_hash(path, entry, seen)
        if source == request.known:
            return Read(None, source, seen)
        clip = audio.load(path, request.sample_rate, request.peak, entry.offset, entry.duration)
        is_older = request.older and entry.duration is not None
        return Read(clip, source, seen, _hash(path, f"{entry.offset}:{entry.duration}") if is_older else None)

    return attempt(path, load)


def source_hash(path: Any, entry: Entry, seen: Seen) -> str:
    """Returns the hash of a file's bytes and of the part that an entry takes; for a whole file, of the bytes alone."""
    whole = _file_hash(path if isinstance(path, (BucketPath, Member)) else os.fspath(path), seen)
    if entry.duration is None and not entry.offset:
        return whole
    return hashlib.blake2b(f"{whole}:{entry.offset}:{entry.duration}".encode(), digest_size=16).hexdigest()


@lru_cache(HASHED_FILES)
def _file_hash(path: str | bytes | BucketPath | Member, seen: Seen) -> str:
    """Returns the hash of a file. It is computed once for all entries of the file, while the file stays as `seen`."""
    return _hash(path)


def _hash(path: Any, prefix: str = "") -> str:
    """Returns the hash of a text and of the bytes of a file."""
    with path.open("rb") if isinstance(path, (BucketPath, Member)) else open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(prefix.encode(), digest_size=16)).hexdigest()


class Reader:
    """A child process that reads one file after the other."""

    def __init__(self):
        self._child: Child[Request] = Child(_serve, "forkserver", preload=[__name__], set_up=drop_remarks)

    def __call__(self, request: Request) -> Read:
        """Reads a file. Raises AudioError, also for a file at which two processes have died, and OSError.

        One death is not held against the file: someone may have killed the process.
        """
        exit_code = None
        for _ in range(2):
            self._child.begin(request)
            event = None
            while event is None:
                event = self._child.next_event()
            if not isinstance(event, Died):
                return event.value
            exit_code = event.exit_code
        raise death(exit_code)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._child.close()

    def join(self) -> None:
        """Waits until the closed process has ended."""
        self._child.join()


def _serve(request: Request, _report: Tell) -> Read:
    """Reads a file in the child process. Whatever is wrong with it becomes an AudioError or an OSError."""
    try:
        return read(request)
    except (AudioError, OSError):
        raise
    except Exception as error:
        raise AudioError(f"{type(error).__name__}: {error}") from error


class Readers:
    """Several readers, each with a thread of its own. Use it in a `with` statement, which ends them."""

    def __init__(self, count: int):
        self._count, self._readers, self._own = count, [], threading.local()
        self._held, self._changed = 0, threading.Condition()
        self._wanted: int | float = -1
        """Number of the last request whose result was asked for, which is not put off any more; infinite at the end."""
        self._threads = ThreadPoolExecutor(count, "reader", self._begin)

    def _begin(self) -> None:
        self._own.reader = Reader()
        self._readers.append(self._own.reader)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._want(math.inf)
        for reader in self._readers:
            reader.close()
        for reader in self._readers:
            reader.join()
        buckets.remove_dead_copies()

    def map(
        self, requests: Iterable[tuple[T, Request]], then: Callable[[Read], Any]
    ) -> Iterator[tuple[T, Read | None, Any]]:
        """Reads files ahead, and yields them in the order of the requests.

        Args:
            requests: Pairs of a key and a request.
            then: Function that is called with what was read, in the reader's thread.

        Yields:
            The key, what was read, and what `then` has made of it. If one of the two has raised AudioError or OSError:
            the key, None, and the exception.
        """
        ahead: deque[tuple[int, T, Future[tuple[Read, Any]]]] = deque()

        def oldest() -> tuple[T, Read | None, Any]:
            number, key, future = ahead.popleft()
            self._want(number)
            try:
                result, made = future.result()
            except (AudioError, OSError) as error:
                return key, None, error
            with self._changing():
                self._held -= _size(result)
            return key, result, made

        for number, (key, request) in enumerate(requests):
            while len(ahead) >= 4 * self._count:
                yield oldest()
            ahead.append((number, key, self._threads.submit(self._work, number, request, then)))
        while ahead:
            yield oldest()

    def _work(self, number: int, request: Request, then: Callable[[Read], Any]) -> tuple[Read, Any]:
        """Reads a file in a reader's thread, once there is room for it or its result is asked for."""
        with self._changed:
            self._changed.wait_for(lambda: self._held < HELD_SAMPLES or number <= self._wanted)
            if self._wanted == math.inf:
                raise CancelledError
        result = self._own.reader(request)
        made = then(result)
        with self._changing():
            self._held += _size(result)
        return result, made

    def _want(self, number: int | float) -> None:
        with self._changing():
            self._wanted = number

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Wakes the threads that wait, after what they wait for has changed."""
        with self._changed:
            yield
            self._changed.notify_all()


def _size(result: Read) -> int:
    """Returns how many samples a result holds."""
    return 0 if result.clip is None else result.clip.samples.size
