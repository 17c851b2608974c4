"""Reads how much memory processes take on their host now."""

import multiprocessing
import os
from pathlib import Path


def of_process(pid: int | None = None) -> float:
    """Returns the resident memory of a process (default: this one) in GiB; 0 where the system does not tell it."""
    try:
        pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def of_workers() -> list[float]:
    """Returns the resident memory in GiB of each process that reads data for this one, in the order they started."""
    workers = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
    return [of_process(process.pid) for process in workers]
