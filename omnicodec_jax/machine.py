"""Finds out which devices and cores the machine has, and sets options for them before JAX starts."""

import ctypes
import gc
import hashlib
import os
import platform
from pathlib import Path

GOOGLE = "0x1ae0"
"""The number of the PCI vendor that makes TPUs."""
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
"""Environment variables that libtpu reads before it looks for chips."""
NVIDIA = "0x10de"
"""The number of the PCI vendor that makes GPUs."""
NO_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
"""Environment variables that JAX's plugin for CUDA reads before it looks for CUDA's libraries."""
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Numbers of glibc's options of `mallopt`, from its malloc.h."""
OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""New objects after which Python looks for cycles of objects that nothing refers to; its own default is 700 to 2000."""


def cores() -> int:
    """Returns the number of cores that this process may use, which schedulers and `taskset` may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kind_of_cpu() -> str:
    """Returns 8 hex digits that are the same on machines whose CPUs have the same name and the same instructions."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(known)]).encode()).hexdigest()[:8]


def has_tpu() -> bool:
    """Returns whether this machine may have a TPU, which is whether it has a PCI device of their maker."""
    return has_pci_device_of(GOOGLE)


def has_gpu() -> bool:
    """Returns whether this machine may have an NVIDIA GPU, which is whether it has a PCI device of their maker."""
    return has_pci_device_of(NVIDIA)


def has_pci_device_of(maker: str) -> bool:
    """Returns whether this machine has a PCI device of a maker, by the maker's number."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == maker for vendor in vendors)


def keep_compilers_quiet() -> None:
    """Tells libtpu and JAX's plugin for CUDA that there is no TPU and no GPU, on a machine that has none.

    They are installed there to plan for such chips. JAX asks them for chips at every start. Without these variables
    they print long messages about chips that they could not find.
    """
    if not has_tpu():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    if not has_gpu():
        for name, value in NO_GPU.items():
            os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Keeps the memory that this process frees, rather than giving it back to the system, if the CPU computes.

    XLA takes the memory of a program anew at each run of it. glibc gives so much memory back when it is freed, and the
    system clears each page of it when it is next touched: a third of the time of a training step on a CPU. It has an
    effect on threads that start afterwards, so it comes before JAX starts. Where the C library is another one, or where
    a TPU or a GPU computes, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or has_tpu() or has_gpu():
        return
    mallopt(ARENA_MAX, 1)  # only the first arena obeys MMAP_MAX
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)


def collect_garbage_less_often() -> None:
    """Makes Python look less often for cycles of objects that nothing refers to.

    JAX makes millions of small objects when it traces a model, nearly none of them garbage. Python's default looks
    through the latest of them thousands of times, and through all of them often.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
