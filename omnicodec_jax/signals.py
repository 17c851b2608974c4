"""Ends a command that is asked to stop, by Ctrl-C or SIGTERM, with one line and an exit code, whatever it is doing.

It imports nothing that takes time, so that a command can be stopped while it imports the rest.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a command to stop. One that is ignored stays so, as Ctrl-C is for jobs in the background."""
PATIENCE = 3.0
"""Seconds that the main thread has to notice a signal: a compiler lets no handler run until it is done."""
FRAGILE = ("jax", "jaxlib")
"""Packages in whose callbacks an exception is dropped, or ends the process by a segmentation fault."""


QUIETLY = "ignore:resource_tracker:UserWarning"
"""The option of Python for the process that clears the shared memory of one that has ended: not to tell of it."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal that asks to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        """The number of the signal."""


_said = False


def say(number: int) -> None:
    """Prints the line about a signal on standard error, once."""
    global _said
    if not _said and sys.stderr is not None:
        _said = True
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        bars: Any = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
        start = "\n" if getattr(bars, "_instances", ()) else ""  # a progress bar does not end its line before it ends
        with contextlib.suppress(OSError):
            print(f"{start}error: interrupted{by}", file=sys.stderr, flush=True)


def end_at_once() -> None:
    """Makes a signal end the process at once. It is for the time before a command begins and after it has ended."""
    for number in _handled():
        signal.signal(number, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """A context in which the first signal raises `Stopped`, and a second one ends the process at once.

    The first one ends it at once, too, where the main thread does not notice it, or is within JAX. Nothing half-written
    stands under a final name then, and child processes end with their parent. Handlers that others set go before it.
    """
    stopping = _Stopping()
    before = {number: signal.signal(number, stopping.handle) for number in _handled()}
    if not before:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=stopping.watch, args=[reader], daemon=True)
    watcher.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hook, sys.unraisablehook = sys.unraisablehook, _end_if_dropped
    sys.warnoptions.append(QUIETLY)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        sys.unraisablehook = hook
        sys.warnoptions.remove(QUIETLY)
        os.close(writer)
        watcher.join()
        os.close(reader)


class _Stopping:
    """What has become of the signals since the context began."""

    def __init__(self):
        self._is_raised = threading.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal, in the main thread."""
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] in FRAGILE:
                _end(number)
            frame = frame.f_back
        if not self._is_raised.is_set():
            self._is_raised.set()
            raise Stopped(number)

    def watch(self, reader: int) -> None:
        """Ends the process where the handler does not; runs in a thread of its own."""
        count = 0
        while number := os.read(reader, 1):
            if signal.getsignal(number[0]) == self.handle:
                count += 1
                if count > 1 or not self._is_raised.wait(PATIENCE):
                    _end(number[0])


def _end_if_dropped(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ends the process where Python has dropped `Stopped`, as it does with what the end of an object raises."""
    if isinstance(unraisable.exc_value, Stopped):
        _end(unraisable.exc_value.number)
    sys.__unraisablehook__(unraisable)


def _handled() -> tuple[int, ...]:
    """Returns the signals to handle: none but in the main thread, which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(number for number in NUMBERS if signal.getsignal(number) not in (signal.SIG_IGN, None))


def _end(number: int, _: FrameType | None = None) -> NoReturn:
    """Ends the process at once. In another thread, what was printed is not flushed: the main one may be at it."""
    say(number)
    if threading.current_thread() is threading.main_thread() and sys.stdout is not None:
        with contextlib.suppress(OSError, RuntimeError):
            sys.stdout.flush()
    os._exit(128 + number)


# A fork would write its own signals to the pipe of its parent.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
