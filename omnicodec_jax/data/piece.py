"""A piece of a file, as a file by itself."""

import io
import os
from pathlib import Path

from omnicodec_jax.data.containers import mapped


class Piece(io.RawIOBase):
    """Reads the bytes of a file between two positions, some of which are replaced, and others before them."""

    def __init__(
        self, path: Path, span: tuple[int, int], replaced: dict[int, bytes] | None = None, before: bytes = b""
    ):
        self._raw, self._before = mapped(path), before
        self._start, self._end = span[0] - len(before), span[1]
        self._replaced = replaced or {}
        self._position = self._start

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a position in the piece; returns it."""
        base = {os.SEEK_SET: self._start, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = max(self._start, base + offset)
        return self._position - self._start

    def readinto(self, buffer) -> int:
        """Fills a buffer with the next bytes; returns how many there were."""
        first = self._position
        last = max(first, min(self._end, first + len(buffer)))
        begin = self._start + len(self._before)
        data = bytearray(self._before[first - self._start : last - self._start])
        data += self._raw[max(first, begin) : max(last, begin)]
        for place, new in self._replaced.items():
            for at, byte in enumerate(new, place - first):
                if 0 <= at < len(data):
                    data[at] = byte
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def place(self) -> int:
        """Returns the position in the file."""
        return self._position

    def close(self) -> None:
        """Closes the file."""
        self._raw.close()
        super().close()
