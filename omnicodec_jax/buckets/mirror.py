"""Copies a directory in a bucket to this machine and back, for work that a bucket does not allow, such as appending."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from omnicodec_jax.buckets.paths import BucketPath, directory_on_disk, in_threads
from omnicodec_jax.errors import told

LOG = logging.getLogger(__name__)

SYNCED_EVERY = 30.0
"""Seconds between two uploads of the files that have changed."""


@contextlib.contextmanager
def mirrored(directory: Path, journal: str) -> Iterator[Path]:
    """Gives a directory of this machine that stands for `directory`: itself, or copies of the objects in the bucket.

    Changed copies are put into the bucket every `SYNCED_EVERY` seconds, and at the end. If the process is killed, what
    was put last stays there, and the journal in the bucket names no file that is missing there. Hidden files are not
    put there. Raises OSError.

    Args:
        directory: The directory.
        journal: Name of the file in it that only grows. Its lines name files that were written before them.
    """
    if not isinstance(directory, BucketPath):
        yield directory
        return
    with directory_on_disk(directory) as here:
        mirror, ended = _Mirror(here, directory, journal), threading.Event()
        thread = threading.Thread(target=mirror.keep_up, args=(ended,), daemon=True)
        thread.start()
        try:
            yield here
        finally:
            ended.set()
            thread.join()
            mirror.sync()


class _Mirror:
    """A directory of this machine, and the state of each of its files that the bucket has."""

    def __init__(self, here: Path, there: BucketPath, journal: str):
        self._here, self._there, self._journal = here, there, here / journal
        self._known = self._states()

    def keep_up(self, ended: threading.Event) -> None:
        """Puts changed files into the bucket again and again, until the event is set."""
        while not ended.wait(SYNCED_EVERY):
            try:
                self.sync()
            except OSError as error:
                LOG.warning("%s; what has changed is put into the bucket later", told(error))

    def sync(self) -> None:
        """Puts changed files into the bucket, and removes those from it that are no longer here. Raises OSError."""
        # The journal is read before the other files are listed, so that it names no file which is not listed.
        lines = self._journal.read_bytes() if self._journal.is_file() else None
        now = self._states()
        changed = [name for name, state in now.items() if self._known.get(name) != state]
        gone = [name for name in self._known if name not in now]
        for _ in in_threads(self._put, ((name,) for name in changed)):
            pass
        if lines is not None:
            (self._there / self._journal.name).write_bytes(lines)
        for _ in in_threads(lambda name: (self._there / name).unlink(missing_ok=True), ((name,) for name in gone)):
            pass
        self._known = now

    def _put(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # the file has been removed meanwhile
            (self._there / name).put(self._here / name)

    def _states(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of all files by their names in the directory, without the journal and hidden files."""
        found = {}
        for path in self._here.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path != self._journal and not path.name.startswith("."):
                    status = path.stat()
                    found[path.relative_to(self._here).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found
