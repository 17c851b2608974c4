"""Decodes files block by block, by libsndfile if it can be told whether the file is whole, or else by FFmpeg."""

import contextlib
import io
import itertools
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
from av.container import InputContainer
from av.error import FFmpegError

from omnicodec_jax.data import containers, streams
from omnicodec_jax.data.levels import as_float
from omnicodec_jax.errors import AudioError

BLOCK = 1 << 16
"""Samples per channel that are decoded at once: what is read stays in the cache until it is resampled."""
SAMPLE_RATES = range(1000, 3_000_001)
"""Sample rates that a file may have. A header with any other rate is wrong."""
SLACK = 0.025
"""Seconds that may be missing at the end of a file, as some writers count wrongly."""
CODEC_SLACK = 0.5
"""Seconds that may be missing where a header also counts what a codec adds at either end."""

SNDFILE = frozenset(
    ("AIFF", "AU", "CAF", "FLAC", "HTK", "MP3", "NIST", "OGG", "RF64", "SDS", "SVX", "W64", "WAV", "WAVEX")
)
"""Formats that libsndfile decodes here. It knows more, but nothing tells whether files of those are whole."""
SEEKING = frozenset(("ALAW", "ULAW", "FLOAT", "DOUBLE", "VORBIS", "OPUS", "IMA_ADPCM", "MS_ADPCM"))
"""Codings besides PCM and MPEG in which libsndfile seeks to a sample without decoding what is before it."""
LOSSY = ("VORBIS", "OPUS", "MPEG")
"""Codings whose first samples after a seek may be others: a frame leans on those before it."""

COUNTED = frozenset(("ape", "dsf", "flac", "mpc", "mpc8", "osq", "tak", "tta", "wv"))
"""FFmpeg's formats whose header says how long the audio is; elsewhere it estimates that, or means the picture."""
FFMPEG = COUNTED | frozenset(
    (
        *("3g2", "3gp", "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "asf", "au", "avi", "caf", "dts"),
        *("dtshd", "eac3", "g722", "gsm", "iamf", "iff", "ilbc", "loas", "m4a", "matroska", "mj2", "mlp"),
        *("mov", "mp3", "mp4", "mpeg", "mpegts", "mxf", "nistsphere", "ogg", "oma", "qcp", "qoa", "rm", "shn"),
        *("truehd", "voc", "w64", "wav", "webm"),
    )
)
"""Formats that FFmpeg decodes here. None of them leaves the sample rate or the coding open, or names other files."""
CHUNKED = frozenset(("aiff", "au", "caf", "voc", "w64", "wav"))
"""Formats that FFmpeg reads in packets of any size; a packet that is cut does not mean that the file is."""
SEEKABLE = COUNTED | {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Formats in which FFmpeg seeks to a packet whose place is known to the sample; others are decoded from their start."""
PREROLL = 1.0
"""Seconds decoded before an offset, after which codecs give what they give from the start."""
GRIDS = {"aac": 1024, "opus": 120}
"""Codecs whose packets are whole multiples of so many samples, which makes times in milliseconds exact."""


class Source(NamedTuple):
    """Format of an open audio file, and its samples."""

    sample_rate: int
    channels: int
    coding: str
    """Coding of the samples in the file, by libsndfile's or FFmpeg's name."""
    blocks: Iterator[np.ndarray]
    """Samples of the file, float32 [t, channels], block by block."""


@contextlib.contextmanager
def reading(path: Path, offset: float = 0.0, duration: float | None = None) -> Iterator[Source]:
    """Opens a file to be read block by block, or a part of it.

    Opening raises AudioError for a file that is no audio. Reading the blocks raises AudioError for a file that is
    damaged or ends too early.

    Args:
        path: The file.
        offset: Where the part begins, in seconds.
        duration: How long the part is, in seconds; None: it reaches to the end of the file.
    """
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty file")
    try:
        with contextlib.ExitStack() as stack:
            file = _open_sndfile(path, stack)
            source = _sndfile(path, file, offset, duration) if file else _ffmpeg(path, stack, offset, duration)
            if source.sample_rate not in SAMPLE_RATES:
                raise AudioError(f"its header says {source.sample_rate} Hz: no audio has such a rate")
            yield source
    except AudioError as error:
        text = str(error)
        raise type(error)(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except FFmpegError as error:
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode: {error.strerror}") from None
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: damaged or truncated: {error.error_string}") from None


def seconds(path: Path) -> float:
    """Returns how many seconds a file has by its header, without decoding it; 0 if the header does not say."""
    try:
        with contextlib.ExitStack() as stack:
            if file := _open_sndfile(path, stack):
                return file.frames / file.samplerate
            return (_open_ffmpeg(path, stack).duration or 0) / av.time_base
    except (AudioError, OSError, ZeroDivisionError):
        return 0.0


# -- libsndfile


def _open_sndfile(path: Path, stack: contextlib.ExitStack) -> soundfile.SoundFile | None:
    """Opens a file with libsndfile; None for a file that FFmpeg is to read."""
    descriptor = os.open(path, os.O_RDONLY)  # no name that could mean something else to a decoder
    stack.callback(os.close, descriptor)
    try:
        with quiet():
            file = stack.enter_context(soundfile.SoundFile(descriptor, closefd=False))
    except soundfile.LibsndfileError:
        return None
    if file.format not in SNDFILE or file.subtype.startswith("DWVW") or file.frames >= 1 << 62:
        return None
    # A header that was written before the audio, by something that could not go back to it.
    if file.frames == 0 and ((extent := containers.extent(path)) is None or extent.more):
        return None
    if file.subtype == "OPUS" and not streams.ogg_is_marked(path):
        return None  # libsndfile calls it malformed
    if file.format == "W64" and (extent := containers.extent(path)) and extent.has_tail:
        return None  # libsndfile takes the chunks behind the audio for audio
    return file


def _sndfile(path: Path, file: soundfile.SoundFile, offset: float, duration: float | None) -> Source:
    if file.format == "MP3":
        spans, is_counted = streams.mpeg(path)
    else:
        spans = streams.ogg_parts(path) if file.format == "OGG" else [(0, path.stat().st_size)]
        is_counted = not file.subtype.startswith("MPEG")
    if duration is None:
        _check_whole(path, file.frames, file.samplerate)
    length = None if duration is None else round(duration * file.samplerate)
    blocks = _sndfile_blocks(_parts(path, file, spans), is_counted, round(offset * file.samplerate), length)
    blocks = (_with_channels(block, file.channels) for block in blocks)
    if file.format == "MP3" and len(spans) == 1 and duration is None:
        blocks = _to_the_end(path, file, blocks)
    return Source(file.samplerate, file.channels, file.subtype, blocks)


def _check_whole(path: Path, length: int, sample_rate: int) -> None:
    """Raises AudioError for a file that holds less or more than its header promises; length: samples in it."""
    extent = containers.extent(path)
    if extent is None:
        if problem := streams.fault(path):
            raise AudioError(problem)
        return
    if not extent.promised:  # written to a pipe: to the end
        return
    per_byte = length / max(extent.held, 1)
    missing, more = per_byte * (extent.promised - extent.held), per_byte * extent.more
    if missing > (0 if extent.pieces > 1 else _slack(length, sample_rate)):
        raise AudioError(f"truncated: {math.ceil(missing)} of {round(length + missing)} samples are missing")
    if more > _slack(length, sample_rate):
        raise AudioError(
            f"its header counts {length / sample_rate:.2f} s, {more / sample_rate:.2f} s more lie behind them; was it "
            "still being written, or joined from several? Save it anew with a program that reads all of it"
        )


class _Part(NamedTuple):
    """One of the streams that lie in a file one after the other."""

    file: soundfile.SoundFile
    safe: int
    """The last sample that the decoder can seek to."""


def _parts(path: Path, file: soundfile.SoundFile, spans: list[streams.Span]) -> Iterator[_Part]:
    for start, end in spans:
        with contextlib.ExitStack() as stack:
            part = file
            if len(spans) > 1:
                with open(path, "rb") as whole, quiet():
                    whole.seek(start)
                    part = stack.enter_context(soundfile.SoundFile(io.BytesIO(whole.read(end - start))))
            _check_rate(part.samplerate, file.samplerate, f"byte {start}")
            seeks = part.subtype.startswith(("PCM", "MPEG")) or part.subtype in SEEKING
            safe = part.frames if seeks else 0
            if part.subtype == "VORBIS":  # in the last page, libsndfile is off by what is cut from its end
                safe = part.frames - streams.ogg_last_page(path, (start, end))
            yield _Part(part, safe)


def _check_rate(now: int, before: int, place: str) -> None:
    if now != before:
        raise AudioError(f"changes from {before} to {now} Hz after {place}; split it there")


def _with_channels(block: np.ndarray, channels: int) -> np.ndarray:
    """Gives a block [t, any] the file's number of channels. If it has another number, each becomes its mix to mono."""
    if block.shape[1] == channels:
        return block
    return np.repeat(block.mean(axis=1, keepdims=True), channels, axis=1)


def _sndfile_blocks(parts: Iterable[_Part], is_counted: bool, start: int, length: int | None) -> Iterator[np.ndarray]:
    """Yields `length` samples from `start` on; if `length` is None, all of them."""
    for file, safe in parts:
        first = min(start, file.frames)
        start -= first
        position = min(first, safe)
        if file.subtype.startswith(LOSSY):
            position = max(0, position - round(PREROLL * file.samplerate))
        if position:
            with quiet():
                file.seek(position)
        for block in _read(file, None if length is None else first - position + length):
            kept = block[max(0, first - position) :]
            position += len(block)
            if len(kept):
                length = None if length is None else length - len(kept)
                yield kept
        slack = _slack(file.frames, file.samplerate)
        if file.subtype.startswith("MPEG"):  # two frames, since some count the header's
            slack = max(slack, 2304.0 if file.samplerate >= 32_000 else 1152.0)
        if length is None and is_counted and file.frames - position > slack:
            raise AudioError(f"truncated: {file.frames - position} of {file.frames} samples are missing")
        if length == 0:
            return


def _slack(length: int, sample_rate: int) -> float:
    """Returns how many samples may be missing of `length`."""
    return min(SLACK * sample_rate, length / 20)


def _read(file: soundfile.SoundFile, left: int | None) -> Iterator[np.ndarray]:
    while left is None or left > 0:
        with quiet() if file.subtype.startswith("MPEG") else contextlib.nullcontext():
            block = file.read(BLOCK if left is None else min(left, BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            return
        left = None if left is None else left - len(block)
        yield block


def _to_the_end(path: Path, file: soundfile.SoundFile, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Raises AudioError after the blocks if the file goes on: the decoder stops where the sample rate changes."""
    yield from blocks
    position = os.lseek(file.name, 0, os.SEEK_CUR)
    if streams.mpeg_goes_on(path, position):
        raise AudioError(f"changes its sample rate or channels after byte {position}; split it there")


_quiet_lock = threading.Lock()
_quiet_depth, _quiet_stderr = 0, -1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what decoders written in C remark on stderr: it names no file, and what matters becomes an error."""
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


# -- FFmpeg


def _open_ffmpeg(path: Path, stack: contextlib.ExitStack) -> InputContainer:
    """Opens a file with FFmpeg. Raises AudioError for a file that it cannot decode, or is not meant to."""
    options = {"format_whitelist": ",".join(sorted(FFMPEG)), "protocol_whitelist": "file"}
    try:
        container = stack.enter_context(av.open(f"file:{os.path.abspath(path)}", options=options))
    except (FFmpegError, ValueError):
        raise AudioError(
            "not audio, damaged, or of a format that is not read (docs/formats.md has the table)"
        ) from None
    if not container.streams.audio:
        raise AudioError("holds no audio")
    stream: Any = container.streams.audio[0]
    if stream.codec_context is None:
        raise AudioError("damaged, or of a codec that FFmpeg does not decode")
    if not stream.rate or not stream.channels:
        raise AudioError(f"damaged: its header says {stream.rate or 0} Hz and {stream.channels} channels")
    return container


def _plainly(error: Exception) -> str:
    return error.strerror if isinstance(error, FFmpegError) and error.strerror else str(error)


def _ffmpeg(path: Path, stack: contextlib.ExitStack, offset: float, duration: float | None) -> Source:
    container = _open_ffmpeg(path, stack)
    frames = _frames(container)
    if (first := next(frames, None)) is None:
        raise AudioError("holds no audio")
    rate, channels = first.sample_rate, first.layout.nb_channels
    start = round(offset * rate)
    stop = None if duration is None else start + round(duration * rate)
    position, frames = _go_to(container, itertools.chain([first], frames), first, start)
    if position is None:
        position, frames = 0, _frames(_open_ffmpeg(path, stack))
    blocks = _ffmpeg_blocks(frames, first, position, start, stop)
    if duration is None:
        blocks = _all_of(path, container, blocks, start, rate)
    return Source(rate, channels, container.streams.audio[0].codec_context.name, blocks)


def _frames(container: InputContainer) -> Iterator[Any]:
    """Yields the frames that the packets of the first audio stream are decoded to."""
    try:
        for packet in container.demux(container.streams.audio[0]):
            is_cut = packet.is_corrupt and container.format.name not in CHUNKED
            for frame in packet.decode():
                if is_cut or frame.is_corrupt:
                    raise AudioError("damaged or truncated: a packet of it is cut or does not fit its checksum")
                yield frame
    except AudioError:
        raise
    except (FFmpegError, ValueError, IndexError) as error:
        raise AudioError(f"damaged or truncated: {_plainly(error)}") from None


def _go_to(
    container: InputContainer, frames: Iterator[Any], first: Any, start: int
) -> tuple[int | None, Iterator[Any]]:
    """Seeks to some way before `start`. Returns the first frame's sample, None if that is not known, and the frames."""
    stream, rate = container.streams.audio[0], first.sample_rate
    tick = stream.time_base or Fraction(0)
    grid = 1 if tick * rate == 1 else GRIDS.get(stream.codec_context.name, 0)
    if start < 2 * PREROLL * rate or container.format.name not in SEEKABLE or not grid or first.pts is None:
        return 0, frames
    container.seek(first.pts + int((start / rate - PREROLL) / tick), stream=stream)
    frames = _frames(container)
    landed = next(frames, None)
    if landed is None or landed.pts is None:
        return None, frames
    after_first = (landed.pts - first.pts) * tick * rate - first.samples
    position = first.samples + grid * round(after_first / grid)
    return (position if first.samples <= position <= start else None), itertools.chain([landed], frames)


def _ffmpeg_blocks(
    frames: Iterator[Any], first: Any, position: int, start: int, stop: int | None
) -> Iterator[np.ndarray]:
    for frame in frames:
        _check_rate(frame.sample_rate, first.sample_rate, f"{position / first.sample_rate:.2f} s")
        samples = frame.to_ndarray()
        block = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
        kept = block[max(0, start - position) : None if stop is None else max(0, stop - position)]
        position += len(block)
        if len(kept):
            yield np.ascontiguousarray(_with_channels(as_float(kept), first.layout.nb_channels))
        if stop is not None and position >= stop:
            return


def _all_of(
    path: Path, container: InputContainer, blocks: Iterator[np.ndarray], start: int, rate: int
) -> Iterator[np.ndarray]:
    """Yields blocks, and raises AudioError at the end if they are less than the header promises."""
    length, stream, name = start, container.streams.audio[0], container.format.name
    for block in blocks:
        length += len(block)
        yield block
    _check_whole(path, length, rate)
    promised = 0.0
    if stream.duration and stream.time_base and (name in COUNTED or name.startswith("mov")):
        promised = float(stream.duration * stream.time_base)
    if length / rate < promised - (SLACK if name in COUNTED else CODEC_SLACK):
        raise AudioError(f"truncated: {length / rate:.2f} of {promised:.2f} s could be decoded")
