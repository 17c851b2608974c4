"""Limits the memory of the host that clips take while a job holds them, so that long clips do not fill it."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BYTES_PER_SAMPLE = 12
"""Bytes that a clip takes on its way through the lanes for each of its samples: audio, log-mel, semantic features."""
SHARE = 0.25
"""Share of the memory that clips on their way through the lanes may take."""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files in which Linux keeps the memory of a container: a number of bytes, or a word if there is no limit."""


class MemoryBudget:
    """The number of samples that the clips which are held at a time may have together."""

    def __init__(self, samples: int):
        self._samples, self.held = samples, 0

    @property
    def is_spent(self) -> bool:
        """Whether the next clip must wait. A clip that is larger than what is left is still taken in."""
        return self.held >= self._samples

    def entering(
        self, items: Iterable[tuple[Any, T]], size: Callable[[T], int]
    ) -> Iterator[tuple[tuple[Any, int], T] | None]:
        """Takes in keyed items when they are asked for.

        Args:
            items: Keys and what they name.
            size: Returns how many samples an item holds.

        Yields:
            Each item, under its key and its size; None whenever the next item must wait, because the budget is spent.
        """
        source = iter(items)
        while True:
            if self.is_spent:
                yield None
                continue
            if (keyed := next(source, None)) is None:
                return
            key, item = keyed
            samples = size(item)
            self.held += samples
            yield (key, samples), item

    def leaving(self, results: Iterable[tuple[tuple[Any, int], T] | None]) -> Iterator[tuple[Any, T]]:
        """Lets go of items: yields results under the items' own keys, and passes over None."""
        for held in results:
            if held is not None:
                (key, samples), result = held
                self.held -= samples
                yield key, result


def budget_of_lanes() -> MemoryBudget:
    """Returns the budget that this machine has for clips on their way through the lanes."""
    return MemoryBudget(max(1, int(SHARE * memory()) // BYTES_PER_SAMPLE))


def memory() -> int:
    """Returns the bytes of memory of this machine, or of the container that this process runs in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [path.read_text().strip() for path in LIMITS if path.is_file()]
    return min([whole, *(int(text) for text in texts if text.isdecimal())])
