"""Decodes files by libsndfile, block by block."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.data import containers, mpeg, streams
from omnicodec_jax.data.audio_source import PREROLL, Source, check_rate, check_whole, slack, with_channels
from omnicodec_jax.data.piece import Piece
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import AudioError

BLOCK = 1 << 16
"""Samples per channel that are decoded at once: what is read stays in the cache until it is resampled."""
SNDFILE = frozenset(
    ("AIFF", "AU", "CAF", "FLAC", "HTK", "MP3", "NIST", "OGG", "RF64", "SDS", "SVX", "W64", "WAV", "WAVEX")
)
"""Formats that libsndfile decodes here. It knows others, of which it cannot tell whether a file is complete."""
SEEKING = frozenset(("ALAW", "ULAW", "FLOAT", "DOUBLE", "VORBIS", "OPUS", "IMA_ADPCM", "MS_ADPCM"))
"""Codings besides PCM and MPEG in which libsndfile seeks to a sample without decoding what is before it."""
TAGS = 1024
"""Bytes behind the last frame of an MP3 that its decoder passes over by itself."""
LOSSY = ("VORBIS", "OPUS", "MPEG")
"""Codings whose first samples after a seek may be others: a frame leans on those before it."""


def open_file(path: Path, stack: contextlib.ExitStack) -> soundfile.SoundFile | None:
    """Opens a file with libsndfile; None for a file that FFmpeg is to read."""
    extent = containers.extent(path)
    if extent and extent.length:  # a header that was written by something that could not go back to it
        file = _opened(Piece(path, (0, path.stat().st_size), dict([extent.length])), stack)
    else:
        file = _opened(os.open(path, os.O_RDONLY), stack)  # no name that could mean something else to a decoder
    if file is None or file.subtype == "OPUS":
        spans = streams.ogg_parts(path)
        if spans != [(0, path.stat().st_size)]:  # if one is not marked, libsndfile calls all malformed
            file = _opened(_part(path, spans[0]), stack)
        elif file and streams.ogg_mark(path, spans[0]):
            return None
        if not all(streams.has_opus_rate(path, span) for span in spans):  # libsndfile would take 8 kHz
            return None
    if file is None:
        return None
    if file.format not in SNDFILE or file.subtype.startswith("DWVW") or file.frames >= 1 << 62:
        return None
    if file.frames == 0 and (extent is None or extent.more):
        return None
    if file.format == "W64" and extent and (extent.has_tail or extent.end < path.stat().st_size):
        return None  # libsndfile takes what is behind the audio for audio
    return file


class Sound(soundfile.SoundFile):
    """A file of which soundfile reads block after block of a lossy coding without seeking in between."""

    def seekable(self) -> bool:
        """Returns whether soundfile is to seek, after each block, to where it is; behind that, MP3 may be mute."""
        return not self.subtype.startswith(LOSSY) and super().seekable()


def _opened(source: Any, stack: contextlib.ExitStack) -> soundfile.SoundFile | None:
    """Opens a descriptor or a piece, which the stack closes; None if libsndfile cannot read it."""
    stack.callback(lambda: os.close(source) if isinstance(source, int) else source.close())
    try:
        with quiet():
            return stack.enter_context(Sound(source, closefd=False))
    except soundfile.LibsndfileError:
        return None


def _part(path: Path, span: streams.Span) -> Piece:
    """Returns a part of a file as a file by itself; an Opus stream with the mark of its end, without which libsndfile
    reads none."""
    return Piece(path, span, streams.ogg_mark(path, span) if streams.is_opus(path, span) else None)


def source_of(path: Path, file: soundfile.SoundFile, offset: float, duration: float | None) -> Source:
    """Returns the format and the blocks of an open file, or of a part of it; see `decoders.reading`."""
    size = path.stat().st_size
    spans, uncounted = [(0, size)], [0]
    if file.format == "MP3":
        spans, uncounted = mpeg.read(path)
        if len(spans) == 1 and size - spans[0][1] <= TAGS and uncounted[0] <= file.frames:
            spans = [(0, size)]  # libsndfile seeks far faster by itself
    elif file.format == "OGG":
        spans = streams.ogg_parts(path)
        uncounted = [0] * len(spans)
    elif file.subtype.startswith("MPEG") and (extent := containers.extent(path)):  # the decoder chokes on zeros
        spans = [(0, min(extent.end, size))]
    if duration is None:
        check_whole(path, file.frames, file.samplerate)
    length = None if duration is None else round(duration * file.samplerate)
    parts = _parts(path, file, list(zip(spans, uncounted, strict=True)))
    blocks = _sndfile_blocks(path, parts, round(offset * file.samplerate), length)
    blocks = (with_channels(block, file.channels) for block in blocks)
    if file.format == "FLAC" and duration is None:
        blocks = _to_the_end(path, file, blocks)
    return Source(file.samplerate, file.channels, file.subtype, blocks)


class _Part(NamedTuple):
    """One of the streams that lie in a file one after the other."""

    file: soundfile.SoundFile
    safe: int
    """The last sample that the decoder can seek to."""
    is_counted: bool
    """Whether its header says how many samples it has."""
    end: int
    """The byte at which it ends."""
    tell: Callable[[], int]
    """Returns the byte up to which the decoder has read."""


def _parts(path: Path, file: soundfile.SoundFile, spans: list[tuple[streams.Span, int]]) -> Iterator[_Part]:
    """Yields the streams of a file, each opened by itself if there are several.

    With each goes its number of samples if its header does not say it.
    """
    size = path.stat().st_size
    for (start, end), uncounted in spans:
        with contextlib.ExitStack() as stack:
            part, tell = file, partial(os.lseek, file.name, 0, os.SEEK_CUR)
            if (start, end) != (0, size) or file.frames < uncounted:
                part, tell = _opened_part(_part(path, (start, end)), stack)
                if part.frames < uncounted:
                    part, tell = _opened_part(
                        Piece(path, (start, end), before=mpeg.counting(path, start, uncounted)), stack
                    )
            check_rate(part.samplerate, file.samplerate, f"byte {start}")
            seeks = part.subtype.startswith(("PCM", "MPEG")) or part.subtype in SEEKING
            safe = part.frames if seeks else 0
            if part.subtype == "VORBIS":  # in the last page, libsndfile is off by what is cut from its end
                safe = part.frames - streams.ogg_last_page(path, (start, end))
            is_counted = not uncounted and (part.format == "MP3" or not part.subtype.startswith("MPEG"))
            yield _Part(part, safe, is_counted, end, tell)


def _opened_part(piece: Piece, stack: contextlib.ExitStack) -> tuple[soundfile.SoundFile, Callable[[], int]]:
    """Opens a piece, and returns with it what says up to which byte of the whole file it was read."""
    source: Any = stack.enter_context(contextlib.closing(piece))
    with quiet():
        return stack.enter_context(Sound(source)), piece.place


def _sndfile_blocks(path: Path, parts: Iterable[_Part], start: int, length: int | None) -> Iterator[np.ndarray]:
    """Yields `length` samples from `start` on; if `length` is None, all of them."""
    for file, safe, is_counted, end, tell in parts:
        first = min(start, file.frames)
        start -= first
        position = min(first, safe)
        if file.subtype.startswith(LOSSY):
            position = max(0, position - round(PREROLL * file.samplerate))
        if position:
            with quiet():
                file.seek(position)
        there = file.frames - position
        for block in _read(file, there if length is None else min(first - position + length, there)):
            kept = block[max(0, first - position) :]
            position += len(block)
            if len(kept):
                length = None if length is None else length - len(kept)
                yield kept
        missing = slack(file.frames, file.samplerate)
        if file.subtype.startswith("MPEG"):  # two frames, since some count the header's
            missing = max(missing, 2304.0 if file.samplerate >= 32_000 else 1152.0)
            is_read = length is None and file.format == "MP3" and first < file.frames
            if is_read and mpeg.goes_on(path, tell(), end):
                raise AudioError(
                    f"its header counts {file.frames / file.samplerate:.2f} s, and more lie behind them; save it anew "
                    "with a program that reads all of it"
                )
        if length is None and is_counted and file.frames - position > missing:
            raise AudioError(f"truncated: {file.frames - position} of {file.frames} samples are missing")
        if length == 0:
            return


def _read(file: soundfile.SoundFile, left: int) -> Iterator[np.ndarray]:
    """Yields the next `left` samples of a file in blocks."""
    while left > 0:
        with quiet() if file.subtype.startswith("MPEG") else contextlib.nullcontext():
            block = file.read(min(left, BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            return
        left -= len(block)
        yield block


def _to_the_end(path: Path, file: soundfile.SoundFile, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Raises AudioError after the blocks of a FLAC file if it goes on: the decoder stops where its header says."""
    yield from blocks
    if problem := streams.flac_fault(path, os.lseek(file.name, 0, os.SEEK_CUR)):
        raise AudioError(problem)


# -- Remarks of libraries

_quiet_lock = threading.Lock()
_quiet_depth, _quiet_stderr = 0, -1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the messages that decoders written in C print on stderr: they name no file, and what matters becomes an
    error."""
    global _quiet_depth, _quiet_stderr
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_stderr = _without_stderr()
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_stderr >= 0:
                os.dup2(_quiet_stderr, 2)
                os.close(_quiet_stderr)


def drop_remarks() -> None:
    """Drops these remarks for the rest of a process. Python's own stderr still reaches the user."""
    sys.stderr = os.fdopen(_without_stderr(), "w", buffering=1, errors="backslashreplace")


def _without_stderr() -> int:
    """Points the process's stderr to nowhere; returns a descriptor of what it was, -1 if it was closed."""
    try:
        kept = os.dup(2)
    except OSError:
        return -1
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return kept
