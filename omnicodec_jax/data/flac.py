"""Finds where the frames of a FLAC file end."""

import itertools
import mmap
import re
from collections.abc import Iterator

from omnicodec_jax.data.containers import SEARCHED
from omnicodec_jax.data.frames import stranger

TRIED = 4
"""Number of places that may look like the last frame. By chance, one in 16 million does."""
LOST = 0.025
"""Seconds of the last frame that the header may leave out."""


def _remainders(bits: int, polynomial: int) -> list[int]:
    """Returns the cyclic checksum of each byte."""
    table = []
    for check in range(0, 256 << (bits - 8), 1 << (bits - 8)):
        for _ in range(8):
            check = check << 1 ^ (polynomial if check >> (bits - 1) else 0)
        table.append(check)
    return table


CRC_8, CRC_16 = _remainders(8, 0x107), _remainders(16, 0x18005)
"""Checksums of each byte, as headers and frames have them."""


def fault(raw: mmap.mmap, start: int, position: int | None = None, length: int | None = None) -> str | None:
    """Returns what is wrong with the end of a FLAC file that begins at `start`; None if nothing is.

    Nothing but tags may follow its last frame, nor may that frame go on behind the samples that the header counts, or,
    if it counts none, behind the `length` samples that were decoded. It begins before `position`, up to which a decoder
    has read.
    """
    block = int.from_bytes(raw[start + 10 : start + 12], "big")
    rate = int.from_bytes(raw[start + 18 : start + 21], "big") >> 4
    total = int.from_bytes(raw[start + 21 : start + 26], "big") & ((1 << 36) - 1)
    channels, width = (raw[start + 20] >> 1 & 7) + 1, ((raw[start + 20] & 1) << 1 | raw[start + 21] >> 7) + 1
    for place, number, size in itertools.islice(_frames_from_the_end(raw, start, block), TRIED):
        longest = size * (channels * width + 1) + 1024
        if any(stranger(raw, end) is None for end in _ends(raw[place : place + longest], place)):
            there = number + size - _first_sample(raw, start, block)
            if not total and length is not None and there - length > LOST * rate:
                return f"damaged: {there - length} of {there} samples are lost in between"
            if total and number + size - total > LOST * rate:
                return (
                    f"its header counts {total / rate:.2f} s, and more lie behind them; save it anew with a "
                    "program that reads all of it"
                )
            if position is not None and place >= position:
                return f"goes on behind byte {position} with something else; was another file joined to it? Split them"
            return None
    return "its last frame is cut, or something else follows it; if another file was joined to it, split them"


def _first_sample(raw: mmap.mmap, start: int, block: int) -> int:
    """Returns the number of the first sample of the first frame, which follows the blocks of metadata."""
    place, is_last = start + 4, False
    while not is_last and place + 4 <= len(raw):
        is_last = raw[place] >= 128
        place += 4 + int.from_bytes(raw[place + 1 : place + 4], "big")
    frame = _frame(raw[place : place + 16], block)
    return frame[0] if frame else 0


def _frames_from_the_end(raw: mmap.mmap, start: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Yields, from the last one on, where a frame begins, its first sample, and its number of samples."""
    for low in range(len(raw) - SEARCHED, start - SEARCHED, -SEARCHED):
        low = max(start, low)
        for match in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", raw[low : low + SEARCHED + 1]))):
            if frame := _frame(raw[low + match.start() : low + match.start() + 16], block):
                yield (low + match.start(), *frame)


def _ends(data: bytes, place: int) -> Iterator[int]:
    """Yields where a frame that begins with the bytes `data` at `place` may end: where its checksum is 0."""
    check = 0
    for at, byte in enumerate(data, place + 1):
        check = (check << 8 & 0xFF00) ^ CRC_16[check >> 8 ^ byte]
        if not check:
            yield at


def _frame(head: bytes, block: int) -> tuple[int, int] | None:
    """Reads the header of a frame: its first sample and its number of samples; None if it is none.

    Frames of fixed size are numbered by `block` samples.
    """
    head = head.ljust(16, b"\0")  # the last frame of silence may be shorter
    if head[1] & 0xFE != 0xF8 or head[2] < 16 or head[2] & 15 == 15 or head[3] & 1:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # the number is written as UTF-8 writes a character
    if ones == 1 or ones > 7:
        return None
    end = 4 + max(1, ones)
    number = head[4] & ((1 << (7 - ones)) - 1)
    for byte in head[5:end]:
        number = number << 6 | byte & 63
    code, width = head[2] >> 4, {6: 1, 7: 2}.get(head[2] >> 4, 0)
    size = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8) if code > 7 else 1
    size += int.from_bytes(head[end : end + width], "big")
    end += width + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    check = 0
    for byte in head[:end]:
        check = CRC_8[check ^ byte]
    return (number if head[1] & 1 else number * block, size) if check == head[end] else None
