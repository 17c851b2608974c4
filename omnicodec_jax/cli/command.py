"""Runs functions as commands: an error that a user can mend is one line and an exit code, and progress is shown."""

import functools
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from omnicodec_jax import machine, signals
from omnicodec_jax.errors import OmniCodecError, UsageError, told


def run(command: Callable[..., int | None], prog: str | None = None) -> None:
    """Calls a function with the options in sys.argv, and ends the process with the exit code that it returns."""
    from omnicodec_jax.cli import arguments

    exit_with(lambda: arguments.parse_one(command, prog, sys.argv[1:])())


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Calls a function, and ends the process with the exit code that it returns.

    An error that a user can mend is printed as one line; the exit code is then 1, or 2 for a wrong command line. After
    Ctrl-C it is 130, and after SIGTERM 143.
    """
    machine.keep_compilers_quiet()
    machine.keep_freed_memory()
    machine.collect_garbage_less_often()
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can hold what the terminal cannot show
    try:
        with signals.raised():
            status = work()
            print(end="", flush=True)  # so that its errors are caught; nothing happens if stdout is closed
    except (OmniCodecError, OSError) as error:
        status = 2 if isinstance(error, UsageError) else 1
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            status = 128 + signal.SIGPIPE
        else:
            fail(_of_output(error))
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, signals.Stopped) else signal.SIGINT
        signals.say(number)
        status = 128 + number
    sys.exit(status)


def exit_at_once(work: Callable[[], int | None]) -> NoReturn:
    """Does what `exit_with` does without waiting for other threads, such as a compiler that cannot be stopped."""
    try:
        exit_with(work)
    except SystemExit as status:
        print(end="", flush=True)
        print(end="", file=sys.stderr, flush=True)
        os._exit(status.code if isinstance(status.code, int) else 0)


def open_closed_streams() -> None:
    """Opens standard streams that are closed, as a service may leave them, to nothing.

    A file that is opened would take their place otherwise, and get what libraries print. Standard output stays None, so
    that a command that has to write there can say that it is closed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it is the lowest that is not open
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def fail(error: BaseException | str) -> None:
    """Prints an error as one line on standard error."""
    print(f"error: {error if isinstance(error, str) else told(error)}", file=sys.stderr)


def _of_output(error: OSError | OmniCodecError) -> OSError | OmniCodecError:
    """Returns an error with the name of standard output, if that is what cannot be written; else the error itself."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            print(end="", flush=True)
        except OSError as refused:
            return OSError(refused.errno, refused.strerror, "standard output")
    return error


def _nobody_reads() -> bool:
    """Returns whether the reader of standard output, such as `head`, has closed it. If so, nothing more is written."""
    if sys.stdout is None:
        return False
    output = sys.stdout.fileno()
    asked = select.poll()
    asked.register(output, 0)  # poll reports errors in any case
    if not asked.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes standard output once more when it ends
    return True


def fail_if_none(done: int, listed: int, rejects: Path) -> int:
    """Returns the exit code of a job over many files: 1 if none of the listed files could be used, which it prints."""
    if done or not listed:
        return 0
    fail(f"none of {listed} files could be used: see {rejects}; --retry-rejected tries them once more")
    return 1


def log_progress() -> None:
    """Prints the log of this package and warnings of other packages on standard error."""
    # `force` replaces handlers that a library may have set up when it was imported.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("omnicodec_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of errors that it also raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs tracebacks of writers that Orbax has cancelled
    sys.unraisablehook = functools.partial(print_unless_a_writer_was_given_up, otherwise=sys.unraisablehook)


def print_unless_a_writer_was_given_up(
    unraisable: "sys.UnraisableHookArgs", otherwise: Callable[["sys.UnraisableHookArgs"], Any]
) -> None:
    """Hands on an error that nothing can catch, unless it comes from a writer that Orbax has cancelled.

    Orbax closes asyncio's loop at the first array that it cannot write, on a full disk for example. TensorStore then
    calls the closed loop for each array that was still being written. These errors would be hundreds of lines around
    the one that says what happened.
    """
    closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not (closed and unraisable.object is None):
        otherwise(unraisable)
