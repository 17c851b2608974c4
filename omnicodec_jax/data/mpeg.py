"""Finds the parts of a file of MPEG audio, as joined MP3 files have them."""

import mmap
from pathlib import Path
from typing import NamedTuple

from omnicodec_jax.data import frames
from omnicodec_jax.data.containers import SEARCHED, Span, mapped, once_a_file

MISCOUNTED = 2
"""Number of frames by which the header of an MP3 may be wrong: some writers do not count the header's own."""


class Mpeg(NamedTuple):
    """The MPEG audio in a file."""

    parts: list[Span]
    """Parts of the file: several, if files were joined. None contains tags, or what else is behind its last frame."""
    uncounted: list[int]
    """The number of samples of each part whose header does not say it; 0 for others."""


@once_a_file
def read(path: Path) -> Mpeg:
    """Finds the parts of an MP3 file."""
    with mapped(path) as raw:
        return parts(raw)


def parts(raw: mmap.mmap) -> Mpeg:
    """Finds the parts of an MP3 file. Frames that follow one another are one part, whatever lies between them.

    A part ends where the sample rate or the number of channels changes, before the header of an MP3, and where the
    frames end that its own header counts.
    """
    found, uncounted, start = list[Span](), list[int](), frames.following(raw, 0, frames.mpeg)
    while start is not None:
        end, number = _part_end(raw, start)
        found.append((start, end))
        uncounted.append(0 if _xing(raw, start)[1] else number * _samples(raw, start))
        start = frames.following(raw, end, frames.mpeg)
    return Mpeg(found or [(0, len(raw))], uncounted or [0])


def goes_on(path: Path, position: int, end: int) -> bool:
    """Returns whether between two positions there are more frames than a header may miscount."""
    with mapped(path) as raw:
        for _ in range(MISCOUNTED + 1):
            size = frames.mpeg(raw, position)
            if not size or position >= end:
                return False
            position += size
    return True


def _part_end(raw: mmap.mmap, start: int) -> tuple[int, int]:
    """Returns where a part ends that begins at `start`, and the number of its frames if its header does not say it."""
    kind, (length, count) = _kind(raw, start), _xing(raw, start)

    def same(raw: mmap.mmap, position: int) -> int:
        size = frames.mpeg(raw, position)
        return size if size and position + 4 <= len(raw) and _kind(raw, position) == kind else 0

    position = end = start + frames.mpeg(raw, start)
    counted, more = None, 0
    if length > SEARCHED and count:  # what the header counts need not be gone through
        near = min(start + length, len(raw)) - SEARCHED // 2
        position = end = frames.following(raw, near, same, b"\xff") or position
    for number in range(1, len(raw)):
        if counted is None and (start + length <= position if length else number == count + 1 > 1):
            counted = end
        size = same(raw, position)
        if not size:
            found = frames.following(raw, position, frames.mpeg)
            if found is None or not (size := same(raw, found)):
                break
            position = found
        if any(_xing(raw, position)):
            break
        more += counted is not None
        position = end = position + size
    return (end, number) if counted is None or more <= MISCOUNTED else (counted, number - more)


def _samples(raw: mmap.mmap, frame: int) -> int:
    """Returns the number of samples of a frame."""
    version, layer = raw[frame + 1] >> 3 & 3, 4 - (raw[frame + 1] >> 1 & 3)
    return 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152


def counting(path: Path, start: int, samples: int) -> bytes:
    """Returns a frame to be read before a part that begins at `start`: it says how many samples the part has.

    Without it, decoders guess that by the first frames, and read no further.
    """
    with mapped(path) as raw:
        _, one, two, three = raw[start : start + 4]
        number = samples // _samples(raw, start)
    head = bytes([0xFF, one | 1, two & 0x0C | 0x90, three])
    place = {(True, False): 36, (True, True): 21, (False, False): 21, (False, True): 13}[one & 8 > 0, three >= 0xC0]
    return (head.ljust(place, b"\0") + b"Xing\0\0\0\1" + number.to_bytes(4, "big")).ljust(frames.mpeg(head, 0), b"\0")


def _kind(raw: mmap.mmap, frame: int) -> tuple[int, int, bool]:
    """Returns the version and layer, the sample rate, and whether it is mono, of a frame."""
    return raw[frame + 1] & 0x1E, raw[frame + 2] & 0x0C, raw[frame + 3] >= 0xC0


def _xing(raw: mmap.mmap, frame: int) -> tuple[int, int]:
    """Reads the header in a first frame: the bytes and the frames of the stream, 0 where they are not given."""
    head = raw[frame : frame + 64]
    for name in (b"Xing", b"Info"):
        if (tag := head.find(name)) in (13, 21, 36):
            flags, at = head[tag + 7], tag + 8 + 4 * (head[tag + 7] & 1)
            count = int.from_bytes(head[tag + 8 : tag + 12], "big") if flags & 1 else 0
            return int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0, count
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[46:50], "big"), 0
    return 0, 0
