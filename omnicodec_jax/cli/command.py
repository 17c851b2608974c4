"""Runs functions as commands: an error that a user can mend is one line and an exit code, and progress is shown."""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from omnicodec_jax import machine
from omnicodec_jax.errors import OmniCodecError, UsageError, told


def run(command: Callable[..., int | None], prog: str | None = None) -> None:
    """Calls a function with the options in sys.argv, and ends the process with the exit code that it returns."""
    from omnicodec_jax.cli import arguments

    exit_with(lambda: arguments.parse_one(command, prog, sys.argv[1:])())


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Calls a function, and ends the process with the exit code that it returns.

    An error that a user can mend is printed as one line; the exit code is then 1, or 2 for a wrong command line.
    """
    machine.keep_compilers_quiet()
    machine.keep_freed_memory()
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


def log_progress() -> None:
    """Prints the log of this package and warnings of other packages on standard error."""
    # `force` replaces what a library may have set up when it was imported.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("omnicodec_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of errors that it also raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and asyncio those of writers that Orbax has given up on
    sys.excepthook = print_errors_that_end_the_process


def print_errors_that_end_the_process(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an error that ends the process. For `sys.excepthook`, which libraries in C++ call for other errors, too.

    TensorStore prints so a traceback for each array that it cannot write after the first, in any thread: hundreds of
    lines around the one line that says what happened. Only an error that ends the process has come up through all
    frames of the main thread. Python's own threads do not come here.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and (trace is None or trace.tb_frame.f_back is None):
        sys.__excepthook__(kind, error, trace)
