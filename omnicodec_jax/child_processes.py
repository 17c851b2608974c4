"""Child processes that may die: a death is noticed, and it is known what the process was working on.

A decoder may crash on a damaged file, the operating system may kill what takes too much memory, and someone may stop a
process by hand. Whoever starts processes here says what such a death means: try the item once more, or refuse it.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from omnicodec_jax import buckets

Item = TypeVar("Item")
Tell: TypeAlias = Callable[[Any], None]
"""A function that a child calls to tell its parent something while it works."""

GRACE = 5.0
"""Seconds that a process has to end after SIGTERM, before it is killed."""

# An exit code can be read once. Starting a process reads those of all processes that have ended, so that a thread that
# does so beside another thread would leave it nothing but 255, which looks like a crash.
_EXIT_CODES = threading.Lock()


class Reported(NamedTuple):
    """A child has reported something about its item, and goes on with it."""

    value: Any


class Finished(NamedTuple):
    """A child has finished its item."""

    value: Any
    """The result of the work function."""


class Died(NamedTuple):
    """A child has died while it worked on its item."""

    exit_code: int | None
    """Exit code of the process. A negative one is the number of the signal that killed it: -9 is SIGKILL, which is also
    what the operating system sends when memory runs out."""


Event: TypeAlias = Reported | Finished | Died


class _Ready(NamedTuple):
    """A child has started, and waits for its first item."""


class _Failed(NamedTuple):
    """The work function has raised an exception."""

    error: Exception


class Child(Generic[Item]):
    """A process that works on one item after the other, and is started again after it has died.

    The process ignores Ctrl-C, which a terminal sends to every process of a job: the parent decides what ends. It ends
    when it is closed, and when its parent ends, however that comes about.
    """

    def __init__(
        self,
        work: Callable[[Item, Tell], Any],
        method: Literal["spawn", "forkserver"],
        preload: Sequence[str] = (),
        set_up: Callable[[], None] | None = None,
        daemon: bool = True,
    ):
        """Starts nothing yet: the process is started for the first item.

        Args:
            work: Function of an item and of `report`. It must be picklable, as items and results must be.
            method: How processes are started: anew ("spawn"), or as forks of a server process ("forkserver").
            preload: Modules that the server process imports before it forks.
            set_up: Function that the process calls once, before its first item.
            daemon: False for work that starts processes itself.
        """
        self._context: Any = multiprocessing.get_context(method)  # the contexts' classes have no common type
        if preload:
            self._context.set_forkserver_preload(list(preload))
        self._work, self._set_up, self._daemon = work, set_up, daemon
        self._process: Any = None
        self._is_closed = False
        self._lock = threading.Lock()  # since different threads may start and close the process

    def begin(self, item: Item) -> None:
        """Gives the process an item to work on. Its last item must be finished. Raises RuntimeError after `close`."""
        self.item = item
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the child process has been closed")
            if self._process is None or _has_ended(self._process, within=0.0):
                self._start()
                return
        with contextlib.suppress(OSError):  # it has just died, as `next_event` will find
            self.connection.send(item)

    def _start(self) -> None:
        self.connection, end = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._work, self._set_up, end), daemon=self._daemon)
        with end, _EXIT_CODES, _without_interrupts():
            process.start()
        self._process = process

    def next_event(self) -> Event | None:
        """Waits until the process says something, or dies.

        Returns:
            What has happened to the item; None if the process has only just started.

        Raises:
            Exception: What the work function has raised. The process is then free for another item.
        """
        try:
            message = self.connection.recv()
            if isinstance(message, _Ready):
                self.connection.send(self.item)
                return None
        except (EOFError, OSError):  # the other end of the pipe is gone
            _has_ended(self._process, within=None)
            return Died(self._process.exitcode)
        if isinstance(message, _Failed):
            raise message.error
        return message

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.terminate()

    def join(self) -> None:
        """Waits until a closed process has ended."""
        if self._process is not None and not _has_ended(self._process, within=GRACE):
            self._process.kill()
            _has_ended(self._process, within=None)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A context in which this thread, and what it starts, gets no Ctrl-C, which a process can get while it starts."""
    resource_tracker.ensure_running()  # this is what `start` does first, and it would end the context
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_ended(process: Any, within: float | None) -> bool:
    """Waits until a process has ended, for so many seconds or for ever, and reads its exit code."""
    is_ending = wait([process.sentinel], within)
    with _EXIT_CODES:
        if is_ending:
            process.join()
        return not process.is_alive()


class Children(Generic[Item]):
    """Several child processes that share a list of items. Use it in a `with` statement, which ends the processes."""

    def __init__(self, children: Iterable[Child[Item]]):
        self._free = list(children)
        self._busy: list[Child[Item]] = []
        self._again: deque[Item] = deque()

    def __enter__(self) -> "Children[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        children = [*self._free, *self._busy]
        for child in children:
            child.close()
        for child in children:
            child.join()
        buckets.remove_dead_copies()

    @property
    def at_hand(self) -> list[Item]:
        """Items that have been begun and are not finished."""
        return [child.item for child in self._busy]

    def again(self, item: Item) -> None:
        """Puts an item before those that have not been begun: the usual answer to a death."""
        self._again.append(item)

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, Event]]:
        """Works on all items, one to each process at a time.

        Yields:
            The events of every item, as they happen. An item whose process has died is given up, unless it is given to
            `again` before the next event is taken.

        Raises:
            Exception: What the work function has raised for any of the items.
        """
        remaining = iter(items)
        while True:
            self._begin(remaining)
            if not self._busy:
                return
            ready = wait([child.connection for child in self._busy])
            for child in [child for child in self._busy if child.connection in ready]:
                event = child.next_event()
                if isinstance(event, Finished | Died):
                    self._busy.remove(child)
                    self._free.append(child)
                if event is not None:
                    yield child.item, event

    def _begin(self, remaining: Iterator[Item]) -> None:
        """Gives every free process an item, as long as there are items."""
        while self._free:
            if self._again:
                item = self._again.popleft()
            else:
                try:
                    item = next(remaining)
                except StopIteration:
                    return
            child = self._free.pop()
            self._busy.append(child)
            child.begin(item)


# -- In the child


def _serve(work: Callable[[Any, Tell], Any], set_up: Callable[[], None] | None, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if set_up is not None:
        set_up()

    def report(value: Any) -> None:
        connection.send(Reported(value))

    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection.send(_Ready())
        while True:
            item = connection.recv()
            try:
                message: Finished | _Failed = Finished(work(item, report))
            except Exception as error:
                message = _Failed(_picklable(error))
            connection.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    """Returns the exception with its traceback as a note, or one of the same words if it cannot be sent."""
    error.add_note(f"In a child process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
