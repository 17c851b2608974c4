"""Finds what is wrong inside streams of pages, frames or blocks, and their parts: Ogg, MPEG audio, Matroska, FLAC."""

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax.data.containers import SEARCHED, after_tags, beginning, mapped, segment, vint

Span = tuple[int, int]
"""First byte of a part of a file, and the one after its last."""
MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in reverse order."""
CLUSTER = bytes.fromhex("1f43b675")
"""Name of the element of Matroska that holds blocks."""
ELEMENTS = {
    *map(bytes.fromhex, ("114d9b74", "1549a966", "1654ae6b", "1f43b675", "1c53bb6b", "1941a469", "1043a770")),
    *map(bytes.fromhex, ("1254c367", "1b538667", "e7", "5854", "a7", "ab", "a3", "a0", "af", "ec", "bf")),
}
"""Names of the elements of Matroska in a segment and in a cluster."""


def fault(path: Path) -> str | None:
    """Returns what is wrong with a file of pages, frames or blocks; None if nothing is.

    Something is wrong if the last piece is cut, if pieces are missing or damaged where that can be told, or if another
    file follows. A missing end-of-stream mark of Ogg, and other bytes after the last piece, are accepted.
    """
    with mapped(path) as raw:
        start = beginning(raw)
        for magic in (b"fLaC\0\0\0\x22", b"TTA1"):
            if raw[start : start + len(magic)] == magic and len(places := list(_places(raw, magic))) > 1:
                return f"another file begins at byte {places[1]}, joined to the first; split them there"
        if raw[start : start + 4] == b"OggS":
            return _ogg_fault(raw, start)
        if raw[start : start + 4] == b"\x1aE\xdf\xa3":
            return _matroska_fault(raw, start)
        if _mpeg_frame_size(raw, after_tags(raw, 0)):
            return _cut_mpeg(raw)
        if raw[:1] == raw[188:189] == raw[376:377] == b"\x47" and len(raw) % 188:
            return "truncated: the last packet of the transport stream is cut"
    return None


def _places(raw: mmap.mmap, what: bytes, first: int = 0, last: int | None = None) -> Iterator[int]:
    """Yields the positions of some bytes. To search piece by piece is faster in Python than to search a mapping."""
    for start in range(first, len(raw) if last is None else min(last, len(raw)), 1 << 20):
        piece, place = raw[start : start + (1 << 20) + len(what) - 1], -1
        while (place := piece.find(what, place + 1)) >= 0:
            yield start + place


def _ogg_fault(raw: mmap.mmap, page: int) -> str | None:
    """Returns what is wrong with the pages of an Ogg file, of which the first begins at `page`; None if nothing is.

    Every page has a checksum and, in its stream, a number. Recorders that came late begin with any number behind the
    headers, whose granule position is 0.
    """
    numbers: dict[bytes, int | None] = {}
    while page >= 0:
        body = page + 27 + raw[page + 26] if page + 27 <= len(raw) else len(raw) + 1
        end = body + sum(raw[page + 27 : body])
        if end > len(raw):
            return "truncated: the last page of the Ogg stream is cut"
        if not _is_whole(raw, page, end):
            return f"damaged: the page of the Ogg stream at byte {page} does not fit its checksum"
        stream, number = raw[page + 14 : page + 18], int.from_bytes(raw[page + 18 : page + 22], "little")
        if not raw[page + 5] & 2 and numbers.get(stream) not in (None, number):
            return f"damaged: pages of the Ogg stream are missing, or twice there, before byte {page}"
        is_header = not any(raw[page + 6 : page + 14])
        numbers[stream] = None if is_header else (number + 1) % (1 << 32)
        page = end if raw[end : end + 5] == b"OggS\0" else raw.find(b"OggS\0", end)
    return None


def _is_whole(raw: mmap.mmap, page: int, end: int) -> bool:
    """Returns whether a page of Ogg fits its checksum."""
    data = raw[page : page + 22] + bytes(4) + raw[page + 26 : end]
    # Ogg's checksum has the bits of zlib's the other way round, and begins and ends with zeros.
    mirrored = zlib.crc32(data.translate(MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2) == int.from_bytes(raw[page + 22 : page + 26], "little")


def _matroska_fault(raw: mmap.mmap, start: int) -> str | None:
    """Returns what is wrong with the elements of a Matroska file that begins at `start`. It goes through all blocks."""
    position, length = segment(raw, start)
    end = len(raw) if length is None else min(len(raw), position + length)
    while position < end:
        width = 9 - raw[position].bit_length()
        name = raw[position : position + width]
        if name not in ELEMENTS:
            is_rest = length is None and after_tags(raw, position) == end
            return None if is_rest else f"damaged: no element of Matroska begins at byte {position}"
        size, behind = vint(raw, position + width)
        position = behind if name == CLUSTER or size is None else behind + size
    return "truncated: the last block of the Matroska stream is cut" if length is None and position > end else None


def _cut_mpeg(raw: mmap.mmap) -> str | None:
    """Returns what is wrong with the last frame of MPEG audio; None if nothing is."""
    frame = _mpeg_frame(raw, max(after_tags(raw, 0), len(raw) - SEARCHED // 2))
    while frame is not None and (size := _mpeg_frame_size(raw, frame)):
        frame += size
        if frame > len(raw):
            return "truncated: its last frame is cut"
    return None


# -- Ogg


def ogg_parts(path: Path) -> list[Span]:
    """Returns the parts of an Ogg file whose streams follow one another, as radio recorders chain them."""
    with mapped(path) as raw:
        starts, after = [], 0
        for page in _places(raw, b"OggS\0\2"):
            if page != after or not starts:  # those that play together begin side by side
                starts.append(page)
            table = raw[page + 27 : page + 27 + raw[page + 26]]
            after = page + 27 + len(table) + sum(table)
        return _spans(starts, len(raw))


def ogg_is_marked(path: Path) -> bool:
    """Returns whether the last page of an Ogg file has the mark of the last page."""
    with mapped(path) as raw:
        return bool(raw[raw.rfind(b"OggS") + 5] & 4)


def ogg_last_page(path: Path, span: Span) -> int:
    """Returns how many samples the last page of a stream has, by the granule positions of the last two pages."""
    with mapped(path) as raw:
        positions, end = [], span[1]
        while len(positions) < 2 and (end := raw.rfind(b"OggS", span[0], end)) >= 0:
            position = int.from_bytes(raw[end + 6 : end + 14], "little")
            positions += [position] if position >> 63 == 0 else []
        return positions[0] - positions[-1]


def _spans(starts: list[int], size: int) -> list[Span]:
    """Returns the parts of a file of `size` bytes that begin at some positions; the first one begins at 0."""
    starts = [0, *starts[1:]]
    return list(zip(starts, [*starts[1:], size], strict=True))


# -- FLAC


def flac_goes_on(path: Path, position: int, total: int) -> bool:
    """Returns whether, near a position, frames of FLAC follow that lie behind the first `total` samples."""
    with mapped(path) as raw:
        start, ends = max(0, position - SEARCHED), set[int]()
        for place in _places(raw, b"\xff", start, position + SEARCHED):
            if frame := _flac_frame(raw[place : place + 16]):
                first, size = frame
                if first >= total and first in ends:  # two in a row are no chance
                    return True
                ends.add(first + size)
    return False


def _flac_frame(head: bytes) -> tuple[int, int] | None:
    """Reads the header of a frame: its first sample and its number of samples; None if it is none."""
    if len(head) < 16 or head[1] & 0xFE != 0xF8 or head[2] < 16 or head[2] & 15 == 15 or head[3] & 1:
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
        for bit in range(7, -1, -1):
            check = (check << 1 ^ (7 if (check >> 7 ^ byte >> bit) & 1 else 0)) & 0xFF
    return (number if head[1] & 1 else number * size, size) if check == head[end] else None


# -- MPEG audio


RATES = (44_100, 48_000, 32_000)
"""Sample rates of MPEG 1 in Hz; those of MPEG 2 are half of them, those of MPEG 2.5 a quarter."""
KBITS = {
    (3, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBITS[2, 3] = KBITS[2, 2]
"""Bit rates of MPEG audio in kbit/s, by version (3: MPEG 1) and layer."""


class Mpeg(NamedTuple):
    """The MPEG audio in a file."""

    parts: list[Span]
    """Parts of the file: several, if files were joined whose headers tell where each ends."""
    is_counted: bool
    """Whether the header of the first part says how many frames it has."""


def mpeg(path: Path) -> Mpeg:
    """Finds the parts of an MP3 file."""
    with mapped(path) as raw:
        starts, counted, frame = [], False, _mpeg_frame(raw, after_tags(raw, 0))
        while frame is not None:
            starts.append(frame)
            length, has_frames = _xing(raw, frame)
            counted |= len(starts) == 1 and has_frames
            rest = after_tags(raw, frame + length) if length else len(raw)
            frame = (
                _mpeg_frame(raw, rest) if len(raw) - rest > 4096 else None
            )  # the count in a header may be wrong by one frame
        if not starts:
            starts = [0]
        return Mpeg(_spans(starts, len(raw)), counted)


def mpeg_goes_on(path: Path, position: int) -> bool:
    """Returns whether more MPEG audio follows after a position."""
    with mapped(path) as raw:
        return len(raw) - position > 4096 and _mpeg_frame(raw, position) is not None


def _mpeg_frame(raw: mmap.mmap, position: int) -> int | None:
    """Returns the position of the next frame that another frame follows; None if there is none."""
    end = min(len(raw), position + SEARCHED)
    while (position := raw.find(b"\xff", position, end)) >= 0:
        if (size := _mpeg_frame_size(raw, position)) and _mpeg_frame_size(raw, position + size):
            return position
        position += 1
    return None


def _mpeg_frame_size(raw: mmap.mmap, position: int) -> int:
    """Returns the size in bytes of the frame that begins at a position; 0 if none does."""
    head = int.from_bytes(raw[position : position + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    kbits, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or kbits in (0, 15) or rate == 3:
        return 0
    hertz = RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * KBITS[3 if version == 3 else 2, layer][kbits - 1]
    if layer == 1:
        return 4 * (12 * bits // hertz + padding)
    return (72 if layer == 3 and version != 3 else 144) * bits // hertz + padding


def _xing(raw: mmap.mmap, frame: int) -> tuple[int, bool]:
    """Reads the header in a first frame: bytes of the stream (0: not given), and whether it counts the frames."""
    mono, mpeg1 = raw[frame + 3] >> 6 == 3, raw[frame + 1] >> 3 & 3 == 3
    tag = frame + 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg1, mono]
    if raw[tag : tag + 4] in (b"Xing", b"Info"):
        flags = raw[tag + 7]
        at = tag + 8 + 4 * (flags & 1)
        return (int.from_bytes(raw[at : at + 4], "big") if flags & 2 else 0), bool(flags & 1)
    if raw[frame + 36 : frame + 40] == b"VBRI":
        return int.from_bytes(raw[frame + 46 : frame + 50], "big"), False
    return 0, False
