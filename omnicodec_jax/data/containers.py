"""Compares the audio that the header of a file promises with the audio that the file holds.

A decoder says nothing of audio that is missing at the end, nor of audio that the header does not count. Only headers
and tables are read; nothing is decoded. docs/formats.md has the table of containers.
"""

import functools
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

Span = tuple[int, int]
"""First byte of a part of a file, and the one after its last."""
Found = TypeVar("Found")
FILES = 64
"""The number of files of which `once_a_file` keeps what was found."""


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
    end: int = 1 << 62
    """The end of the last chunk, in bytes: nothing behind it belongs to the file."""
    length: tuple[int, bytes] | None = None
    """The place of a length that the header leaves open though audio is there, and the bytes to read there instead."""


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
    single: bool = False
    """Whether decoders read only one chunk of audio."""
    names: re.Pattern[bytes] = re.compile(rb"[\x20-\x7e]{4}")
    """Names that a chunk behind the audio may have."""


RIFF_DATA, W64_DATA = frozenset({b"data"}), frozenset({b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"})
W64_NAMES = re.compile(rb".{10}(?:\x00\xc0\x4f\x8e\xdb\x8a|\xa5\xd6\x28\xdb\x04\xc1\x00\x00)", re.DOTALL)
ASF_DATA = frozenset({bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")})
AIFF_DATA, VOC_DATA = frozenset({b"SSND", b"BODY"}), frozenset({b"\1", b"\2", b"\x09"})
CONTAINERS: dict[re.Pattern[bytes], Chunks] = {
    re.compile(magic, re.DOTALL): chunks
    for magic, chunks in {
        rb"(?:RIFF|RF64|BW64)....WAVE": Chunks(12, 4, 4, "little", RIFF_DATA, align=2, single=True),
        rb"RIFX....WAVE": Chunks(12, 4, 4, "big", RIFF_DATA, align=2, single=True),
        rb"RIFF....AVI ": Chunks(0, 4, 4, "little", frozenset({b"RIFF"}), align=2),
        rb"FORM....(?:AIF[FC]|8SVX|16SV)": Chunks(12, 4, 4, "big", AIFF_DATA, align=2, single=True),
        rb"riff\x2e\x91\xcf\x11": Chunks(40, 16, 8, "little", W64_DATA, True, 8, single=True, names=W64_NAMES),
        rb"caff\x00\x01": Chunks(8, 4, 8, "big", RIFF_DATA, single=True),
        rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": Chunks(0, 16, 8, "little", ASF_DATA, True, names=re.compile(b"")),
        rb"\.RMF": Chunks(0, 4, 4, "big", frozenset({b"DATA"}), whole=True),
        rb"Creative Voice File\x1a": Chunks(26, 1, 3, "little", VOC_DATA, names=re.compile(rb"[\x01-\x09]")),
        rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)": Chunks(
            0, 4, 4, "big", frozenset(), whole=True, size_first=True
        ),
        rb"DSD \x1c": Chunks(0, 4, 8, "little", RIFF_DATA, whole=True),
        rb"FRM8........DSD ": Chunks(16, 4, 8, "big", frozenset({b"DSD ", b"DST "}), align=2),
    }.items()
}
"""Layouts of containers, by the bytes that a file begins with."""
AVI_SOUND = re.compile(rb"strh....auds.{16}(.{4})(.{4}).{4}(.{4})", re.DOTALL)
"""The header of a stream of sound in AVI: the seconds of a unit, as a fraction of two numbers, and its units."""
ANEW = re.compile(
    rb"(?:RIFF|RIFX|RF64|BW64)....(?:WAVE|AVI )|FORM....(?:AIF|8SVX|16SV)|riff\x2e\x91\xcf\x11|....ftyp|caff"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x1aE\xdf\xa3|\.RMF|\.snd|NIST_1A|fLaC|OggS|wvpk|TTA[12]|MAC |Creative "
    rb"|FRM8|DSD \x1c|MP\+|MPCK|tBaK",
    re.DOTALL,
)
"""Bytes that files begin with. Inside a file, they tell where a second file was joined to the first."""
TAGS = re.compile(rb"ID3|TAG|APETAGEX|LYRICSBEGIN")
"""Bytes that tags begin with."""
PADDED = re.compile(rb"fmt .{4}(?:\x01\0|\xfe\xff)(.)\0.{8}(.)\0\x18\0|desc.{16}lpcm.{7}(.).{7}(.)\0{3}\x18", re.DOTALL)
"""The header of WAV, or of CAF, with samples of 24 bits: channels and bytes of a frame, or the other way round."""
OPEN_END = 0x7FFF0000
"""Sizes of 32 bits from here on mean that the audio reaches to the end: the file was written to a pipe."""
EMPTY = 26
"""Bytes that ASF and RealMedia have in a chunk of audio that was not finished."""
SEARCHED = 1 << 16
"""Number of bytes within which the next frame or page must be found."""


def extent(path: Path) -> Extent | None:
    """Returns how much audio the header of a file promises, and how much there is; None if it promises nothing."""
    with mapped(path) as raw:
        start = beginning(raw)
        head = raw[start : start + 20]
        if head[:4] == b".snd":
            length = int.from_bytes(head[8:12], "big")
            if length == 0:
                return Extent(0, 0, length=(start + 8, b"\xff" * 4))
            return None if length >= OPEN_END else _fixed(raw, start + int.from_bytes(head[4:8], "big"), length)
        if head[:7] == b"NIST_1A":
            return _sphere(raw, start)
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska(raw, start)
        return next((_walk(raw, start, chunks) for magic, chunks in CONTAINERS.items() if magic.match(head)), None)


def beginning(raw: mmap.mmap) -> int:
    """Returns where a file begins behind the ID3 tags that some programs put before a file of any format."""
    position = 0
    while raw[position : position + 3] == b"ID3":
        position = _after_id3(raw, position)
    return position if any(raw[position : position + 4]) else after_tags(raw, position)


def _after_id3(raw: mmap.mmap, position: int) -> int:
    """Returns where an ID3 tag ends."""
    head = raw[position : position + 10].ljust(10, b"\0")
    size = sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:])))
    return position + 10 + size + (10 if head[5] & 16 else 0)


def once_a_file(function: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Makes a function of a file compute once, and not for each part of the file that is read."""

    @functools.lru_cache(FILES)
    def kept(path: Path, state: tuple[int, ...]) -> Found:
        return function(path)

    @functools.wraps(function)
    def found(path: Path) -> Found:
        status = path.stat()
        return kept(path, (status.st_ino, status.st_size, status.st_mtime_ns))

    return found


def mapped(path: Path) -> mmap.mmap:
    """Maps the bytes of a file into memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _walk(raw: mmap.mmap, start: int, chunks: Chunks) -> Extent | None:
    """Goes from chunk to chunk of a file that begins at `start`, and returns the extent of the audio.

    It is None if the header does not say where the audio ends. Of a container whose chunks of audio have no name, all
    chunks count.
    """
    position, promised, held, found, large, tail = start + chunks.start, 0, 0, 0, (0, 0), False
    header = chunks.name + chunks.size
    while position + header <= len(raw):
        fields = raw[position : position + header]
        name, size = fields[: chunks.name], fields[chunks.name :]
        if chunks.size_first:
            size, name = fields[: chunks.size], fields[chunks.size :]
        if found and (ANEW.match(raw, position) or not chunks.names.match(name)):
            break
        if chunks.size_first and TAGS.match(raw, position):  # which would be boxes of gigabytes
            break
        length, begin = int.from_bytes(size, chunks.order), position + header
        if chunks.size_first and length == 1:  # 64 bits follow
            length, begin = int.from_bytes(raw[begin : begin + 8], "big"), begin + 8
        if name == b"ds64":
            large = begin + 8, int.from_bytes(raw[begin + 8 : begin + 16], "little")
        is_audio = not chunks.audio or name in chunks.audio
        is_large = is_audio and length == 0xFFFFFFFF and large[0] > 0
        if is_large:
            length = large[1] if large[1] >> 62 == 0 else 0
        elif (is_audio and (length >= OPEN_END if chunks.size == 4 else length >> 62)) or (
            chunks.size_first and length == 0
        ):
            return None
        end = begin + length if not chunks.whole else max(begin, position + length)
        tail = not is_audio
        if is_audio and chunks.single:
            if promised:
                break
            first = min(begin + 8, len(raw)) if name == b"SSND" else begin  # two numbers come first
            if end <= first and (is_large or not chunks.names.match(raw, first)) and _more(raw, first):
                size = len(raw) - (position if chunks.whole else begin)
                at, width = (large[0], 8) if is_large else (position + chunks.name, chunks.size)
                return Extent(0, 0, length=(at, size.to_bytes(width, chunks.order)))
            begin = min(first, end)
        if is_audio:
            found += 1
            promised, held = promised + end - begin, held + max(0, min(end, len(raw)) - begin)
        elif found and end > len(raw):
            break
        position, unpadded = end + (start - end) % chunks.align, end
        if position != unpadded and chunks.single and chunks.names.match(raw, unpadded):
            position = unpadded  # some writers forget to pad
    more = _more(raw, position)
    if not found or (chunks.name >= 4 and held <= EMPTY and more):
        return None
    return Extent(promised, held, more, found, tail, end=position)


def is_padded(path: Path) -> bool:
    """Returns whether a WAV or CAF file has samples of 24 bits in 4 bytes each, which decoders read as they like."""
    with mapped(path) as raw:
        found = PADDED.search(raw, 0, SEARCHED)
        channels, size, caf_size, caf_channels = (ord(field or b"\0") for field in found.groups()) if found else [0] * 4
    return found is not None and (size, caf_size) == (4 * channels, 4 * caf_channels)


def avi_seconds(path: Path) -> float:
    """Returns how long the first stream of sound in an AVI file is by its header; 0 if the header does not say."""
    with mapped(path) as raw:
        found = AVI_SOUND.search(raw, beginning(raw), max(raw.find(b"movi"), 0))
        scale, rate, units = (int.from_bytes(field, "little") for field in found.groups()) if found else (0, 0, 0)
        return units * scale / rate if rate else 0.0


def _more(raw: mmap.mmap, position: int) -> int:
    """Returns how many bytes there are after the audio, if they are neither tags nor zeros."""
    position = after_tags(raw, position)
    return len(raw) - position if raw[position : position + SEARCHED].strip(b"\0") else 0


def _fixed(raw: mmap.mmap, start: int, length: int) -> Extent:
    """Returns the extent of audio that lies in one piece, where the header says."""
    held = max(0, min(length, len(raw) - start))
    return Extent(length, held, _more(raw, start + length), end=start + length)


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
    return None if length is None else _fixed(raw, start, length)


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
            position = _after_id3(raw, position)
        elif head[:8] == b"APETAGEX":
            position += 32 + int.from_bytes(head[12:16], "little")
        elif head[:3] == b"TAG":
            position += 128
        elif head[:11] == b"LYRICSBEGIN" and (lyrics := re.compile(rb"LYRICS(?:200|END)").search(raw, position)):
            position = lyrics.end()
        elif behind := _behind_footer(raw, position):
            position = behind
        elif head[:1] == b"\0" and (rest := re.compile(rb"\0*").match(raw, position)):
            position = rest.end()
        else:
            break
    return min(position, len(raw))


def _behind_footer(raw: mmap.mmap, position: int) -> int | None:
    """Returns where an APE tag ends that begins at a position and has no header, as of version 1; None if none does."""
    for tail in (0, 128):  # an ID3 tag may follow
        footer = len(raw) - tail - 32
        if raw[footer : footer + 8] == b"APETAGEX" and footer + 32 - position == int.from_bytes(
            raw[footer + 12 : footer + 16], "little"
        ):
            return footer + 32
    return None
