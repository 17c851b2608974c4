"""Finds where streams of frames, packets or blocks without a container end: AAC, AC-3, AMR, MPEG, WavPack, others."""

import mmap
import re
from collections.abc import Callable

from omnicodec_jax.data.containers import ANEW, SEARCHED, after_tags

UNHEARD = 256
"""Number of bytes that may follow the audio without being read. Files of audible audio are larger."""
Size = Callable[[mmap.mmap, int], int]
"""Returns the size in bytes of the frame that begins at a position; 0 if none does."""


def kind(raw: mmap.mmap, start: int) -> tuple[int, Size] | None:
    """Returns where the first frame begins in a file that begins at `start`, and what gives the size of a frame.

    It is None for a file of another kind.
    """
    for magic, size in MAGICS.items():
        if found := magic.match(raw, start):
            return found.end(), size
    for size in map(_transport, (0, 4), (188, 192)):
        if size(raw, start) and _is_frame(raw, start + size(raw, start), size):
            return start, size
    for size in (mpeg, _adts, _ac3, _loas):
        if _is_frame(raw, start, size):
            return start, size
    return None


def end(raw: mmap.mmap, position: int, size: Size) -> int:
    """Returns where the frames end that begin at a position; it lies behind the end of the file if the last is cut."""
    while position < len(raw):
        if raw[position] in b"\0TAIL" and after_tags(raw, position) == len(raw):
            break
        step = size(raw, position)
        if not step:
            found = following(raw, position, size)
            if found is None:
                break
            step = found - position
        position += step
    return position


def following(raw: mmap.mmap, position: int, size: Size, mark: bytes | None = None) -> int | None:
    """Returns the position of the next frame that another frame follows; None if there is none near.

    Frames begin with the bytes `mark`; if that is None, with those of `MARKS`.
    """
    if (mark := mark or MARKS.get(size)) is None:
        return None
    position = after_tags(raw, position)
    marks = re.finditer(mark, raw[position : position + SEARCHED])
    return next((at for mark in marks if _is_frame(raw, at := position + mark.start(), size)), None)


def _is_frame(raw: mmap.mmap, position: int, size: Size) -> bool:
    """Returns whether a frame begins at a position, and another one, or the end of the file, follows it."""
    step = size(raw, position)
    return bool(step) and (position + step == len(raw) or size(raw, position + step) > 0)


def stranger(raw: mmap.mmap, position: int, last: int | None = None) -> str | None:
    """Returns a complaint if the bytes from where a file's audio ends up to `last` are neither tags nor zeros.

    A few that are the beginning of no file are accepted. If `last` is None, it is the end of the file.
    """
    last = len(raw) if last is None else last
    position = min(after_tags(raw, position), last)
    if last - position <= UNHEARD and (position == last or not begins(raw, position)):
        return None
    return f"{last - position} bytes from byte {position} on are none of its own: it is cut, or files were joined there"


def begins(raw: mmap.mmap, position: int) -> bool:
    """Returns whether at a position there is what files of audio begin with."""
    return bool(ANEW.match(raw, position)) or kind(raw, position) is not None


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


def mpeg(raw: mmap.mmap | bytes, position: int) -> int:
    """Returns the size of a frame of MPEG audio, layers I to III."""
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


# -- Others


def _adts(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a frame of AAC in ADTS."""
    head = raw[position : position + 7]
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > 7 else 0


def _loas(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a frame of AAC in LOAS."""
    head = raw[position : position + 3]
    return ((head[1] & 31) << 8 | head[2]) + 3 if len(head) == 3 and head[0] == 0x56 and head[1] >> 5 == 7 else 0


AC3_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


def _ac3(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a frame of AC-3 or E-AC-3."""
    head = raw[position : position + 6]
    if len(head) < 6 or head[:2] != b"\x0b\x77":
        return 0
    if head[5] >> 3 > 10:
        return 2 * ((head[2] & 7) << 8 | head[3]) + 2
    rate, code = head[4] >> 6, head[4] & 63
    if rate == 3 or code >= 2 * len(AC3_KBITS):
        return 0
    kbits = AC3_KBITS[code >> 1]
    return 2 * (2 * kbits, 320 * kbits // 147 + (code & 1), 3 * kbits)[rate]


def _amr(*sizes: int) -> Size:
    """Returns what gives the size of a frame of AMR, by the sizes of the first modes."""

    def size(raw: mmap.mmap, position: int) -> int:
        head = raw[position : position + 1]
        if not head or head[0] & 0x83:
            return 0
        return (*sizes, *[1] * 16)[head[0] >> 3]

    return size


def _transport(offset: int, width: int) -> Size:
    """Returns what gives the size of a packet of an MPEG transport stream, by the place of its mark and its width."""
    return lambda raw, position: width if raw[position + offset : position + offset + 1] == b"\x47" else 0


def _wavpack(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a block of WavPack."""
    return (
        8 + int.from_bytes(raw[position + 4 : position + 8], "little") if raw[position : position + 4] == b"wvpk" else 0
    )


def _tta(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a whole file of True Audio, by its table of frames."""
    if raw[position : position + 4] != b"TTA1":
        return 0
    rate, length = (int.from_bytes(raw[position + at : position + at + 4], "little") for at in (10, 14))
    table = position + 22
    frames = -(-length // max(256 * rate // 245, 1))
    sizes = (int.from_bytes(raw[at : at + 4], "little") for at in range(table, min(table + 4 * frames, len(raw)), 4))
    return 22 + 4 * frames + 4 + sum(sizes)


def _program(raw: mmap.mmap, position: int) -> int:
    """Returns the size of a packet, or of the header of a pack, of an MPEG program stream."""
    head = raw[position : position + 14]
    if len(head) < 4 or head[:3] != b"\0\0\1":
        return 0
    if head[3] == 0xBA:
        return 12 if len(head) > 4 and head[4] >> 4 == 2 else 14 + (head[-1] & 7)
    return 4 if head[3] == 0xB9 else 6 + int.from_bytes(head[4:6], "big") if head[3] > 0xBA else 0


def _mxf(raw: mmap.mmap, position: int) -> int:
    """Returns the size of an item of MXF: its key, its length and its value."""
    head = raw[position : position + 25]
    if len(head) < 17 or head[:4] != b"\x06\x0e\x2b\x34":
        return 0
    width = head[16] & 127 if head[16] & 128 else 0
    return 17 + width + (int.from_bytes(head[17 : 17 + width], "big") if width else head[16])


def mxf_footer(raw: mmap.mmap, start: int) -> int:
    """Returns where the header of an MXF file says that its footer begins; 0 if it does not, or for another file."""
    if raw[start : start + 4] != b"\x06\x0e\x2b\x34":
        return 0
    at = start + 17 + (raw[start + 16] & 127 if raw[start + 16] & 128 else 0) + 24
    footer = int.from_bytes(raw[at : at + 8], "big")
    return start + footer if footer else 0


MAGICS: dict[re.Pattern[bytes], Size] = {
    re.compile(rb"#!AMR\n"): _amr(13, 14, 16, 18, 20, 21, 27, 32, 6),
    re.compile(rb"#!AMR-WB\n"): _amr(18, 24, 33, 37, 41, 47, 51, 59, 61, 6),
    re.compile(rb"(?=wvpk)"): _wavpack,
    re.compile(rb"(?=TTA1)"): _tta,
    re.compile(rb"(?=\x00\x00\x01\xba)"): _program,
    re.compile(rb"(?=\x06\x0e\x2b\x34)"): _mxf,
}
"""Bytes that files begin with, up to the first frame, and what gives the size of a frame."""
MARKS: dict[Size, bytes] = {
    mpeg: b"\xff",
    _adts: b"\xff",
    _ac3: b"\x0b\x77",
    _loas: b"\x56",
    _wavpack: b"wvpk",
    _tta: b"TTA1",
    _program: b"\0\0\x01",
    _mxf: b"\x06\x0e\x2b\x34",
}
"""Bytes that frames begin with. What is lost in AMR and in transport streams, whose marks are short, is not bridged."""
