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
"""Seconds between two times that what has changed is put into the bucket."""


@contextlib.contextmanager
def mirrored(directory: Path, journal: str) -> Iterator[Path]:
    """Gives a directory of this machine that stands for `directory`: itself, or copies of what is in the bucket.

    What changes in the copies is put into the bucket now and then, and at the end. Who is killed finds there what was
    put last: the journal never tells of files that are not there. Hidden files stay here. Raises OSError.

    Args:
        directory: The directory.
        journal: Name of the file in it that only grows, by lines that tell what was written before them.
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
    """Knows which state of each file the bucket has."""

    def __init__(self, here: Path, there: BucketPath, journal: str):
        self._here, self._there, self._journal = here, there, here / journal
        self._known = self._states()

    def keep_up(self, ended: threading.Event) -> None:
        """Puts into the bucket what has changed, until the event happens."""
        while not ended.wait(SYNCED_EVERY):
            try:
                self.sync()
            except OSError as error:
                LOG.warning("%s; what has changed is put into the bucket later", told(error))

    def sync(self) -> None:
        """Puts into the bucket what has changed, and removes there what is no longer here. Raises OSError."""
        # As it is before the others are looked at, so that it tells of these alone.
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
        with contextlib.suppress(FileNotFoundError):  # it has been removed meanwhile
            (self._there / name).put(self._here / name)

    def _states(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of all files but the journal and hidden ones, by their names in the directory."""
        found = {}
        for path in self._here.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path != self._journal and not path.name.startswith("."):
                    status = path.stat()
                    found[path.relative_to(self._here).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found
