"""One rule for all jobs that fill a directory: runs whose shares of the work overlap are refused."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.data.lease import Lease
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import lock, writing

MARKERS = {
    "prepared.json": "prepared audio",
    "features.json": "semantic features",
    "detokenized.json": "detokenized audio",
    "tokens.json": "tokens",
    "__omnicodec__/tokens.json": "tokens",
}
"""The contents of a directory, by the file that its job writes first. Two kinds of jobs would mix their shards."""
NAME = re.compile(r"\.omnicodec-(\d+)-of-(\d+)\.lock")


@contextlib.contextmanager
def claim(out: Path, share: Share | None = None, makes: str | None = None) -> Iterator[None]:
    """Holds a share of the work on a directory.

    Raises DataError while another run holds a share that overlaps, and where the directory holds what another kind of
    job has made.

    The lock belongs to the process, not to the file that it is on: when a process ends, however it ends, the operating
    system gives the lock back, and the next run begins at once. Between machines, locks hold where the file system
    passes them on (NFS, Lustre with `flock`, GPFS, CephFS). Where there are no locks, nothing is refused, and two runs
    of the same share do the same work twice; every file is still written whole. Buckets have no locks: there, a run
    leaves an object that it writes anew every few seconds (lease.py).

    Args:
        out: The directory. It is made if it is not there.
        share: Which units of the job this run does; None for jobs that are not shared.
        makes: What the job makes, one of `MARKERS`; None for jobs that get along with the others.
    """
    for name, held in MARKERS.items():
        if makes not in (None, held) and (out / name).exists():
            raise DataError(f"{out}: holds {held} ({name}), with which {makes} would be mixed; use another directory")
    index, count = share or Share()
    own = out / f".omnicodec-{index}-of-{count}.lock"
    hint = "" if share is None else ", or give every run a share of its own (--task i/n, with one n)"
    if isinstance(out, BucketPath):
        with Lease(out, own.name, lambda name: name == own.name or _overlaps(name, Share(index, count)), hint):
            yield
        return
    made = list(itertools.takewhile(lambda folder: not folder.exists(), (out, *out.parents)))
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, made)  # those of a run that is refused before it writes
        # First its own, then the others: so of two runs that begin at once, at least one sees the other.
        others = (path for path in out.glob(".omnicodec-*.lock") if _overlaps(path.name, Share(index, count)))
        for path in itertools.chain([own], others):
            with writing(out, path):
                out.mkdir(parents=True, exist_ok=True)
                descriptor = lock(path)
            if descriptor is None:
                raise DataError(f"{out}: another run is at work on this ({path.name}); wait until it ends{hint}")
            held.callback(_release, path, descriptor)
        yield


def _overlaps(lock: str, share: Share) -> bool:
    """Returns whether some unit belongs both to a share and to the share of another run's lock.

    Units of the share i/n have numbers that are i modulo n. A number can be i modulo n and j modulo m when i and j are
    equal modulo the greatest common divisor of n and m.
    """
    if not (name := NAME.fullmatch(lock)):
        return False
    index, count = int(name[1]), int(name[2])
    return (index, count) != share and count > 0 and (index - share.index) % math.gcd(count, share.count) == 0


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)
