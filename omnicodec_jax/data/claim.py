"""One rule for all jobs that fill a directory: runs whose shares of the work overlap are refused, others share it."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from omnicodec_jax.data.units import Task
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import lock, writing

NAME = re.compile(r"\.omnicodec-(\d+)-of-(\d+)\.lock")


@contextlib.contextmanager
def claim(out: Path, task: Task | None = None) -> Iterator[None]:
    """Holds a share of the work on a directory. Raises DataError while another run holds a share that overlaps.

    task: None for jobs that are not shared. The lock belongs to the process, not to the file that it is on: when a
    process ends, however it ends, the operating system gives it back, and the next run begins at once. Between machines
    it holds where the file system passes locks on (NFS, Lustre with `flock`, GPFS, CephFS). Where there are no locks,
    nothing is refused, and nothing is written half: two runs of the same share then do the same work twice.
    """
    index, count = task or (0, 1)
    own = out / f".omnicodec-{index}-of-{count}.lock"
    hint = "" if task is None else ", or give every run a share of its own (--task i/n, with one n)"
    with contextlib.ExitStack() as held:
        # Others are looked for when its own is held, so that of two that begin at once at least one sees the other.
        others = (path for path in out.glob(".omnicodec-*.lock") if _overlaps(path, Task(index, count)))
        for path in itertools.chain([own], others):
            with writing(out, path):
                out.mkdir(parents=True, exist_ok=True)
                descriptor = lock(path)
            if descriptor is None:
                raise DataError(f"{out}: another run is at work on this ({path.name}); wait until it ends{hint}")
            held.callback(_release, path, descriptor)
        yield


def _overlaps(path: Path, task: Task) -> bool:
    """Whether some unit belongs to both: those of i/n and j/m have numbers that are i modulo n, and j modulo m."""
    if not (name := NAME.fullmatch(path.name)):
        return False
    index, count = int(name[1]), int(name[2])
    return (index, count) != task and count > 0 and (index - task.index) % math.gcd(count, task.count) == 0


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)
