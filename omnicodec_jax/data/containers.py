"""Compares the audio that the header of a file promises with the audio that the file holds.

A decoder says nothing of audio that is missing at the end, nor of audio that the header does not count. Only headers
and tables are read; nothing is decoded. docs/formats.md has the table of containers.
"""

import mmap
import re
from pathlib import Path
from typing import Literal, NamedTuple


class Extent(NamedTuple):
    """The size of the coded audio of a file: what its header promises, and what is there."""

    promised: int
    """Bytes of coded audio by the header."""
    held: int
    """Number of these bytes that are in the file."""
    more: int = 0
    """Bytes after the audio that belong to nothing that the header knows."""
    pieces: int = 1
    """Number of chunks that the audio lies in."""
    has_tail: bool = False
    """Whether other chunks follow the audio."""


class Chunks(NamedTuple):
    """The layout of a container of chunks, each of which has a name, a size, and that many bytes."""

    start: int
    """Byte that the first chunk begins at."""
    name: int
    """Width of a chunk's name, in bytes."""
    size: int
    """Width of a chunk's size, in bytes."""
    order: Literal["little", "big"]
    """Byte order of the size."""
    audio: frozenset[bytes]
    """Names of the chunks that hold the audio."""
    whole: bool = False
    """Whether a chunk's size counts the bytes of its name and size, too."""
    align: int = 1
    """Number of bytes that the beginning of every chunk is a multiple of."""
    size_first: bool = False
    """Whether a chunk's size stands before its name."""
    strict: bool = False
    """Whether nothing but chunks can follow the audio."""


RIFF_DATA, W64_DATA = frozenset({b"data"}), frozenset({b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"})
W64_NAMES = (bytes.fromhex("00c04f8edb8a"), bytes.fromhex("a5d628db04c10000"))
"""Ends of the names of chunks in Wave64."""
ASF_DATA = frozenset({bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")})
CONTAINERS: dict[re.Pattern[bytes], Chunks] = {
    re.compile(rb"(?:RIFF|RF64|BW64)....WAVE", re.DOTALL): Chunks(12, 4, 4, "little", RIFF_DATA, align=2, strict=True),
    re.compile(rb"RIFX....WAVE", re.DOTALL): Chunks(12, 4, 4, "big", RIFF_DATA, align=2, strict=True),
    re.compile(rb"RIFF....AVI ", re.DOTALL): Chunks(0, 4, 4, "little", frozenset({b"RIFF"}), align=2),
    re.compile(rb"FORM....(?:AIF[FC]|8SVX|16SV)", re.DOTALL): Chunks(
        12, 4, 4, "big", frozenset({b"SSND", b"BODY"}), align=2, strict=True
    ),
    re.compile(rb"riff\x2e\x91\xcf\x11"): Chunks(40, 16, 8, "little", W64_DATA, whole=True, align=8, strict=True),
    re.compile(rb"caff\x00\x01"): Chunks(8, 4, 8, "big", RIFF_DATA, strict=True),
    re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"): Chunks(0, 16, 8, "little", ASF_DATA, whole=True),
    re.compile(rb"\.RMF"): Chunks(0, 4, 4, "big", frozenset({b"DATA"}), whole=True),
    re.compile(rb"Creative Voice File\x1a"): Chunks(26, 1, 3, "little", frozenset({b"\1", b"\2", b"\x09"})),
    re.compile(rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL): Chunks(
        0, 4, 4, "big", frozenset({b"mdat"}), whole=True, size_first=True
    ),
}
"""Layouts of containers, by the bytes that a file begins with."""
ANEW = re.compile(
    rb"(?:RIFF|RIFX|RF64)....(?:WAVE|AVI )|FORM....AIF|riff\x2e\x91\xcf\x11|....ftyp|\x30\x26\xb2\x75\x8e\x66\xcf\x11"
    rb"|\x1aE\xdf\xa3|\.RMF",
    re.DOTALL,
)
"""Bytes that files begin with. Inside a file, they tell where a second file was joined to the first."""
OPEN_END = 0x7FFF0000
"""Sizes of 32 bits from here on mean that the audio reaches to the end: the file was written to a pipe."""
SEARCHED = 1 << 16
"""Number of bytes within which the next frame or page must be found."""


def extent(path: Path) -> Extent | None:
    """Returns how much audio the header of a file promises, and how much there is; None if it promises nothing."""
    with mapped(path) as raw:
        start = beginning(raw)
        head = raw[start : start + 20]
        if head[:4] == b".snd":
            return _fixed(raw, start + int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big"))
        if head[:7] == b"NIST_1A":
            return _sphere(raw, start)
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska(raw, start)
        return next((_walk(raw, start, chunks) for magic, chunks in CONTAINERS.items() if magic.match(head)), None)


def beginning(raw: mmap.mmap) -> int:
    """Returns where a file begins behind the ID3 tags that some programs put before a file of any format."""
    return after_tags(raw, 0) if raw[:3] == b"ID3" else 0


def mapped(path: Path) -> mmap.mmap:
    """Maps the bytes of a file into memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _walk(raw: mmap.mmap, start: int, chunks: Chunks) -> Extent | None:
    """Goes from chunk to chunk of a file that begins at `start`, and returns the extent of the audio.

    It is None if the header does not say where the audio ends.
    """
    position, promised, held, found, large, tail = start + chunks.start, 0, 0, 0, 0, False
    header = chunks.name + chunks.size
    while position + header <= len(raw):
        if found and ANEW.match(raw, position):
            return Extent(promised, held, len(raw) - position, found)
        fields = raw[position : position + header]
        name, size = fields[: chunks.name], fields[chunks.name :]
        if chunks.size_first:
            size, name = fields[: chunks.size], fields[chunks.size :]
        length, begin = int.from_bytes(size, chunks.order), position + header
        if chunks.size_first and length == 1:  # 64 bits follow
            length, begin = int.from_bytes(raw[begin : begin + 8], "big"), begin + 8
        if name == b"ds64":
            large = int.from_bytes(raw[begin + 8 : begin + 16], "little")
        is_audio = name in chunks.audio
        if is_audio and length == 0xFFFFFFFF and large:
            length = large
        elif (is_audio and (length >= OPEN_END if chunks.size == 4 else length >> 62)) or (
            chunks.size_first and length == 0
        ):
            return None
        end = begin + length if not chunks.whole else max(begin, position + length)
        tail = not is_audio
        if is_audio and chunks.strict and promised:  # decoders read one
            break
        if is_audio:
            found += 1
            begin = min(begin + 8, end) if name == b"SSND" else begin  # two numbers come first
            promised, held = promised + end - begin, held + max(0, min(end, len(raw)) - begin)
        elif found and chunks.strict and not (_is_name(name) and end <= len(raw)):
            break
        position, unpadded = end + (start - end) % chunks.align, end
        if chunks.strict and position != unpadded and _is_name(raw[unpadded : unpadded + 4]):
            position = unpadded  # some writers forget to pad
    if not found:
        return None
    return Extent(promised, held, _more(raw, position) if chunks.strict else 0, found, tail)


def _is_name(name: bytes) -> bool:
    """Returns whether four bytes, or the sixteen of Wave64, can be the name of a chunk."""
    if len(name) == 16:
        return name.endswith(W64_NAMES)
    return len(name) == 4 and name.isascii() and name.decode().isprintable()


def _more(raw: mmap.mmap, position: int) -> int:
    """Returns how many bytes there are after the audio, if they are neither tags nor zeros."""
    position = after_tags(raw, position)
    return len(raw) - position if raw[position : position + SEARCHED].strip(b"\0") else 0


def _fixed(raw: mmap.mmap, start: int, length: int) -> Extent | None:
    """Returns the extent of audio that lies in one piece, where the header says."""
    if length >= OPEN_END:
        return None
    held = max(0, min(length, len(raw) - start))
    return Extent(length, held, _more(raw, start + length))


def _sphere(raw: mmap.mmap, start: int) -> Extent | None:
    """Returns the extent of the audio of a NIST SPHERE file; None if its header does not say it."""
    head = raw[start : start + 1024]
    found = {
        name: int(value) for name, value in re.findall(rb"(sample_count|channel_count|sample_n_bytes) -i (\d+)", head)
    }
    if b"embedded" in head or not found.get(b"sample_count"):
        return None
    samples = found[b"sample_count"] * found.get(b"channel_count", 1)
    return _fixed(raw, start + int(head[8:16]), samples * found.get(b"sample_n_bytes", 1))


def _matroska(raw: mmap.mmap, start: int) -> Extent | None:
    """Returns the extent of the segment that holds all clusters of a Matroska file."""
    start, length = segment(raw, start)
    if length is None:
        return None
    return Extent(
        length, min(length, len(raw) - start), len(raw) - start - length if ANEW.match(raw, start + length) else 0
    )


def segment(raw: mmap.mmap, start: int) -> tuple[int, int | None]:
    """Returns where the segment of a Matroska file begins, and its size in bytes: None if it was written live."""
    header, position = vint(raw, start + 4)
    length, start = vint(raw, position + (header or 0) + 4)
    return start, length


def vint(raw: mmap.mmap, position: int) -> tuple[int | None, int]:
    """Reads an EBML number of variable width. Returns the number, None for an unknown size, and where it ends."""
    width = 9 - raw[position : position + 1][0].bit_length() if raw[position : position + 1] else 1
    bits = (1 << 7 * width) - 1
    value = int.from_bytes(raw[position : position + width], "big") & bits
    return (None if value == bits else value), position + width


def after_tags(raw: mmap.mmap, position: int) -> int:
    """Returns where the ID3, APE and Lyrics3 tags and the zeros end that begin at a position."""
    while position < len(raw):
        head = raw[position : position + 32]
        if head[:3] == b"ID3":
            size = sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:10])))
            position += 10 + size + (10 if head[5:6] and head[5] & 16 else 0)
        elif head[:8] == b"APETAGEX":
            position += 32 + int.from_bytes(head[12:16], "little")
        elif head[:3] == b"TAG":
            position += 128
        elif head[:11] == b"LYRICSBEGIN" and (end := raw.find(b"LYRICS200", position)) >= 0:
            position = end + 9
        elif head[:1] == b"\0" and (rest := re.compile(rb"\0*").match(raw, position)):
            position = rest.end()
        else:
            break
    return min(position, len(raw))
