"""Holds a share of the work on a directory in a bucket, where no lock goes when its process goes."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax.buckets import BucketPath, state_of
from omnicodec_jax.errors import DataError

FOLDER = "__omnicodec_runs__"
"""The folder for the objects of the runs that are at work."""
RENEWED_EVERY = 10.0
"""Seconds between two times that a run writes its object anew."""
LASTS = 60.0
"""Seconds after which a run that has not written its object anew is taken for dead."""
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Owner(NamedTuple):
    """Names a process among those of all machines."""

    machine: str
    process: int
    began: str
    """The time at which the process began, by its machine's clock of ticks."""

    @classmethod
    def this(cls) -> "Owner":
        """Returns the name of this process."""
        boot = BOOT.read_text().strip() if BOOT.is_file() else ""
        return cls(f"{socket.gethostname()} {boot}", os.getpid(), _began(os.getpid()))

    def is_known_dead(self) -> bool:
        """Returns whether it is a process of this machine that has ended; False for those of other machines."""
        return self.machine == Owner.this().machine and _began(self.process) != self.began

    def is_known_alive(self) -> bool:
        """Returns whether it is a process of this machine that is at work; False for those of other machines."""
        return self.machine == Owner.this().machine and _began(self.process) == self.began


class Lease:
    """An object that says that a run is at work, as a context.

    A run writes its own object first and looks for those of others then, so that of two runs that begin at once at
    least one sees the other. A run of another machine is at work if it writes its object anew while it is watched.
    """

    def __init__(self, out: BucketPath, name: str, overlaps: Callable[[str], bool], hint: str):
        """Takes what to hold.

        Args:
            out: The directory.
            name: The name of the share, as files that are locked have it.
            overlaps: Whether a share with another name, or the same, has work in common with this one.
            hint: What to do where another run is at work, beside waiting.
        """
        self._out, self._name, self._overlaps, self._hint = out, name, overlaps, hint
        self._own = out / FOLDER / f"{name}.{uuid.uuid4().hex}"
        self._text = json.dumps(Owner.this()._asdict())
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lease":
        self._number = 0
        self._write()
        self._renewing.start()
        try:
            for other in (self._out / FOLDER).glob("*.lock.*"):
                share = other.name.rpartition(".")[0]
                if other != self._own and self._overlaps(share):
                    if _is_at_work(other):
                        raise DataError(
                            f"{self._out}: another run is at work on this ({share}); wait until it ends{self._hint}"
                        )
                    other.unlink(missing_ok=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        with suppress(OSError):  # the work is done, and whoever comes next finds that this process has ended
            self._own.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with suppress(OSError):  # the next time may be better; the work itself finds out otherwise
                self._write()

    def _write(self) -> None:
        self._number += 1  # so that the object changes
        self._own.write_text(f"{self._text}\n{self._number}\n")


def _is_at_work(path: BucketPath) -> bool:
    """Returns whether the run that has written an object is at work; one of another machine is watched for a while."""
    try:
        fields = json.loads(path.read_text().splitlines()[0])
        owner = Owner(**{name: fields[name] for name in Owner._fields})  # a later version may have written more
        if owner.is_known_dead() or owner.is_known_alive():
            return owner.is_known_alive()
        first, until = state_of(str(path)), time.monotonic() + LASTS
        while time.monotonic() < until:
            time.sleep(min(RENEWED_EVERY / 4, LASTS / 4))
            if state_of(str(path)) != first:
                return True
    except FileNotFoundError:  # it has just ended
        return False
    except (ValueError, TypeError, LookupError):  # not what this class writes
        return True
    return False


def _began(process: int) -> str:
    """Returns when a process of this machine began, in ticks since it was started; "" if there is no such process."""
    try:
        fields: Any = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return ""
