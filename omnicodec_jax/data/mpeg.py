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
    is_counted: bool
    """Whether the header of the first part says how many frames it has."""


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
    found, is_counted, start = list[Span](), False, frames.following(raw, 0, frames.mpeg)
    while start is not None:
        is_counted |= not found and _xing(raw, start)[1] > 0
        end = _part_end(raw, start)
        found.append((start, end))
        start = frames.following(raw, end, frames.mpeg)
    return Mpeg(found or [(0, len(raw))], is_counted)


def _part_end(raw: mmap.mmap, start: int) -> int:
    """Returns where a part ends that begins at `start`."""
    kind, (length, count) = _kind(raw, start), _xing(raw, start)

    def same(raw: mmap.mmap, position: int) -> int:
        size = frames.mpeg(raw, position)
        return size if size and position + 4 <= len(raw) and _kind(raw, position) == kind else 0

    position = end = start + frames.mpeg(raw, start)
    counted, more = None, 0
    if length > SEARCHED:  # what the header counts need not be gone through
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
    return end if counted is None or more <= MISCOUNTED else counted


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
