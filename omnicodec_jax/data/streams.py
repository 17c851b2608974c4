"""Finds what is wrong inside streams of pages, frames or blocks, and their parts: Ogg, MPEG audio, Matroska, FLAC."""

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

from omnicodec_jax.data import containers, flac, frames, mpeg
from omnicodec_jax.data.containers import Span, after_tags, beginning, mapped, once_a_file, segment, vint
from omnicodec_jax.data.frames import begins, stranger

MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in reverse order."""
CLUSTER = bytes.fromhex("1f43b675")
"""Name of the element of Matroska that holds blocks."""
ELEMENTS = {
    *map(bytes.fromhex, ("114d9b74", "1549a966", "1654ae6b", "1f43b675", "1c53bb6b", "1941a469", "1043a770")),
    *map(bytes.fromhex, ("1254c367", "1b538667", "e7", "5854", "a7", "ab", "a3", "a0", "af", "ec", "bf")),
}
"""Names of the elements of Matroska in a segment and in a cluster."""


@once_a_file
def fault(path: Path) -> str | None:
    """Returns what is wrong with a file of pages, frames or blocks; None if nothing is.

    Something is wrong if the last piece is cut, if pieces are missing or damaged where that can be told, or if more
    follows than tags, zeros and a few bytes. A missing end-of-stream mark of Ogg is accepted.
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
        if frames.mpeg(raw, after_tags(raw, 0)):
            spans = mpeg.parts(raw).parts
        elif found := frames.kind(raw, start):
            spans = [(start, frames.end(raw, *found))]
        else:
            return None
        if spans[-1][1] > len(raw) or frames.mxf_footer(raw, start) >= len(raw):
            return "truncated: its last frame, packet or block is cut"
        gaps = zip([end for _, end in spans], [*(first for first, _ in spans[1:]), len(raw)], strict=True)
        return next(filter(None, (stranger(raw, *gap) for gap in gaps)), None)


@once_a_file
def content(path: Path) -> Span:
    """Returns the part of a file between the tags before and behind it, as far as its format tells where it ends."""
    with mapped(path) as raw:
        start, extent = beginning(raw), containers.extent(path)
        end = extent.end if extent else len(raw)
        if raw[start : start + 4] == b"OggS":
            end = _page_end(raw, raw.rfind(b"OggS\0"))
        elif found := frames.kind(raw, start):
            end = frames.end(raw, *found)
        return start, min(end, len(raw))


def another(path: Path, position: int) -> str | None:
    """Returns what is wrong if another file begins where a file ends, at `position` and behind tags."""
    with mapped(path) as raw:
        position = after_tags(raw, position)
        if position < len(raw) and begins(raw, position):
            return f"another file begins at byte {position}, joined to the first; split them there"
    return None


def flac_fault(path: Path, position: int | None = None, length: int | None = None) -> str | None:
    """Returns what is wrong with the end of a FLAC file; see `flac.fault`."""
    with mapped(path) as raw:
        start = beginning(raw)
        return flac.fault(raw, start, position, length) if raw[start : start + 4] == b"fLaC" else None


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
        end = _page_end(raw, page)
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
        if page != end and (problem := stranger(raw, end, None if page < 0 else page)):
            return problem
    return None


def _page_end(raw: mmap.mmap, page: int) -> int:
    """Returns where a page of Ogg ends; behind the end of the file if the page is cut."""
    body = page + 27 + raw[page + 26] if page + 27 <= len(raw) else len(raw) + 1
    return body + sum(raw[page + 27 : body])


def _is_whole(raw: mmap.mmap, page: int, end: int) -> bool:
    """Returns whether a page of Ogg fits its checksum."""
    return _checksum(raw[page:end]) == raw[page + 22 : page + 26]


def _checksum(page: bytes) -> bytes:
    """Returns the checksum that a page of Ogg ought to have."""
    # It has the bits of zlib's the other way round, and begins and ends with zeros.
    data = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(data.translate(MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2).to_bytes(4, "little")


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


# -- Ogg


def ogg_parts(path: Path) -> list[Span]:
    """Returns the parts of an Ogg file whose streams follow one another, as radio recorders chain them."""
    with mapped(path) as raw:
        starts, after = [], 0
        for page in _places(raw, b"OggS\0\2") if raw[(start := beginning(raw)) : start + 4] == b"OggS" else ():
            if page != after or not starts:  # those that play together begin side by side
                starts.append(page)
            table = raw[page + 27 : page + 27 + raw[page + 26]]
            after = page + 27 + len(table) + sum(table)
        return _spans(starts, len(raw))


def is_opus(path: Path, span: Span) -> bool:
    """Returns whether a part of a file is an Ogg stream of Opus."""
    with mapped(path) as raw:
        return raw[span[0] : span[0] + 4] == b"OggS" and raw[span[0] + 28 : span[0] + 36] == b"OpusHead"


def has_opus_rate(path: Path, span: Span) -> bool:
    """Returns whether a part of a file is no Opus, or Opus whose header says which rate its audio had before."""
    with mapped(path) as raw:
        rate = int.from_bytes(raw[span[0] + 40 : span[0] + 44], "little")
    return not is_opus(path, span) or 0 < rate <= 1_000_000


def ogg_mark(path: Path, span: Span) -> dict[int, bytes]:
    """Returns what to read where in a part of an Ogg file, so that its last page has the mark of the last page.

    It is empty if the page has that mark.
    """
    with mapped(path) as raw:
        page = raw.rfind(b"OggS\0", *span)
        data = bytearray(raw[page : _page_end(raw, page)])
        if data[5] & 4:
            return {}
        data[5] |= 4
        return {page + 5: bytes(data[5:6]), page + 22: _checksum(bytes(data))}


def ogg_last_page(path: Path, span: Span) -> int:
    """Returns how many samples the last page of a stream has, by the granule positions of the last two pages."""
    with mapped(path) as raw:
        positions, end = [], span[1]
        while len(positions) < 2 and (end := raw.rfind(b"OggS", span[0], end)) >= 0:
            position = int.from_bytes(raw[end + 6 : end + 14], "little")
            positions += [position] if position >> 63 == 0 else []
        return positions[0] - positions[-1]


def _spans(starts: list[int], size: int) -> list[Span]:
    """Returns the parts of a file of `size` bytes that begin at some positions; without any, it is one part."""
    starts = starts or [0]
    return list(zip(starts, [*starts[1:], size], strict=True))
