"""Runs functions as commands: an error that a user can mend is one line and an exit code, and progress is shown."""

import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omnicodec_jax.errors import OmniCodecError, UsageError, told

GOOGLE = "0x1ae0"
"""The number of the PCI vendor that makes TPUs."""
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
"""Environment variables that libtpu reads before it looks for chips."""
NVIDIA = "0x10de"
"""The number of the PCI vendor that makes GPUs."""
NO_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
"""Environment variables that JAX's plugin for CUDA reads before it looks for CUDA's libraries."""


def run(command: Callable[..., int | None], prog: str | None = None) -> None:
    """Calls a function with the options in sys.argv, and ends the process with the exit code that it returns."""
    from omnicodec_jax.cli import arguments

    exit_with(lambda: arguments.parse_one(command, prog, sys.argv[1:])())


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Calls a function, and ends the process with the exit code that it returns.

    An error that a user can mend is printed as one line; the exit code is then 1, or 2 for a wrong command line.
    """
    _keep_compilers_quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can hold what the terminal cannot show
    try:
        status = work()
    except (OmniCodecError, OSError) as error:
        fail(error)
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        fail("interrupted")
        status = 130
    sys.exit(status)


def exit_at_once(work: Callable[[], int | None]) -> NoReturn:
    """Does what `exit_with` does without waiting for other threads, such as a compiler that cannot be stopped."""
    try:
        exit_with(work)
    except SystemExit as status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status.code if isinstance(status.code, int) else 0)


def fail(error: BaseException | str) -> None:
    """Prints an error as one line on standard error."""
    print(f"error: {error if isinstance(error, str) else told(error)}", file=sys.stderr)


def fail_if_none(done: int, listed: int, rejects: Path) -> int:
    """Returns the exit code of a job over many files: 1, with one line, if none of the listed files could be used."""
    if done or not listed:
        return 0
    fail(f"none of {listed} files could be used: see {rejects}; --retry-rejected tries them once more")
    return 1


def _keep_compilers_quiet() -> None:
    """Tells libtpu and JAX's plugin for CUDA that there is no TPU and no GPU, on a machine that has none.

    They are installed there to plan for such chips. JAX asks them for chips at every start; they find none either way,
    but without these variables they print at length what they could not find out.
    """
    if not has_tpu():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    if not has_pci_device_of(NVIDIA):
        for name, value in NO_GPU.items():
            os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Returns whether this machine may have a TPU, which is whether it has a PCI device of their maker."""
    return has_pci_device_of(GOOGLE)


def has_pci_device_of(maker: str) -> bool:
    """Returns whether this machine has a PCI device of a maker, by the maker's number."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == maker for vendor in vendors)


def log_progress() -> None:
    """Prints the log of this package and warnings of other packages on standard error."""
    # `force` replaces what a library may have set up when it was imported.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("omnicodec_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of errors that it also raises
