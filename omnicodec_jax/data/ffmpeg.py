"""Decodes files by FFmpeg, block by block."""

import contextlib
import itertools
import os
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from omnicodec_jax.data import containers, streams
from omnicodec_jax.data.audio_source import CODEC_SLACK, PREROLL, SLACK, Source, check_rate, check_whole, with_channels
from omnicodec_jax.data.levels import as_float
from omnicodec_jax.errors import AudioError

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
GRIDS = {"aac": 1024, "opus": 120}
"""Codecs whose packets are whole multiples of so many samples, which makes times in milliseconds exact."""

CHECKSUMMED = frozenset(("flac", "mlp", "tak", "truehd", "tta", "wavpack"))
"""Lossless codecs that keep a checksum of every packet, which FFmpeg looks at only if it is told to."""


def open_file(path: Path, stack: contextlib.ExitStack) -> InputContainer:
    """Opens a file with FFmpeg. Raises AudioError for a file that it cannot decode, or is not meant to."""
    options = {"format_whitelist": ",".join(sorted(FFMPEG)), "protocol_whitelist": "file,subfile"}
    start, end = streams.content(path)
    is_all = (start, end) == (0, path.stat().st_size)
    name = f"{'' if is_all else f'subfile,,start,{start},end,{end},,:'}file:{os.path.abspath(path)}"
    try:
        container = stack.enter_context(av.open(name, options=options))
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
    if (
        container.format.name in ("wav", "w64")
        and stream.codec_context.name == "aac"
        and stream.codec_context.extradata
    ):
        raise AudioError("AAC in WAV without headers of frames: nothing tells where one begins; use .m4a or .aac")
    if stream.codec_context.name in CHECKSUMMED:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    if _is_trimmed_twice(container):
        stream.codec_context.options = {"flags2": "+skip_manual"}
    return container


def _is_trimmed_twice(container: InputContainer) -> bool:
    """Returns whether FFmpeg would cut the padding of the last packet from what has none: ALAC in CAF."""
    return container.format.name == "caf" and container.streams.audio[0].codec_context.name == "alac"


def _plainly(error: Exception) -> str:
    """Returns what an error says, without FFmpeg's number of it."""
    return error.strerror if isinstance(error, FFmpegError) and error.strerror else str(error)


def source_of(path: Path, stack: contextlib.ExitStack, offset: float, duration: float | None) -> Source:
    """Opens a file, or a part of it, and returns its format and its blocks; see `decoders.reading`."""
    container = open_file(path, stack)
    frames = _frames(container)
    if (first := next(frames, None)) is None:
        raise AudioError("holds no audio")
    rate, channels = first.sample_rate, first.layout.nb_channels
    start = round(offset * rate)
    stop = None if duration is None else start + round(duration * rate)
    if _is_trimmed_twice(container) and (stream := container.streams.audio[0]).duration and stream.time_base:
        length = round(stream.duration * stream.time_base * rate)
        stop = length if stop is None else min(stop, length)
    position, frames = _go_to(path, container, itertools.chain([first], frames), first, start)
    if position is None:
        position, frames = 0, _frames(open_file(path, stack))
    blocks = _ffmpeg_blocks(frames, first, position, start, stop)
    if duration is None:
        blocks = _all_of(path, container, blocks, rate)
    return Source(rate, channels, container.streams.audio[0].codec_context.name, blocks)


def _frames(container: InputContainer) -> Iterator[Any]:
    """Yields the frames that the packets of the first audio stream are decoded to."""
    try:
        for packet in container.demux(container.streams.audio[0]):
            is_cut = packet.is_corrupt and container.format.name not in CHUNKED
            for frame in _decoded(packet):
                if is_cut or frame.is_corrupt:
                    raise AudioError("damaged or truncated: a packet of it is cut or does not fit its checksum")
                yield frame
    except AudioError:
        raise
    except (FFmpegError, ValueError, IndexError) as error:
        raise AudioError(f"damaged or truncated: {_plainly(error)}") from None


def _decoded(packet: Any) -> Any:
    """Returns the frames of a packet; none of one that holds the zeros that fill up a chunk of a container."""
    try:
        return packet.decode()
    except FFmpegError:
        if 0 < packet.size < 8 and not any(bytes(packet)):
            return []
        raise


def _go_to(
    path: Path, container: InputContainer, frames: Iterator[Any], first: Any, start: int
) -> tuple[int | None, Iterator[Any]]:
    """Seeks to some way before `start`. Returns the first frame's sample, None if that is not known, and the frames."""
    stream, rate = container.streams.audio[0], first.sample_rate
    tick = stream.time_base or Fraction(0)
    grid = _grid(container, rate)
    if start < 2 * PREROLL * rate or container.format.name not in SEEKABLE or not grid or first.pts is None:
        return 0, frames
    if container.format.name not in COUNTED and _has_gaps(path):
        return 0, frames
    try:
        container.seek(first.pts + int((start / rate - PREROLL) / tick), stream=stream)
    except (FFmpegError, OverflowError):  # further than any file reaches
        return None, frames
    frames = _frames(container)
    landed = next(frames, None)
    if landed is None or landed.pts is None:
        return None, frames
    after_first = (landed.pts - first.pts) * tick * rate - first.samples
    position = first.samples + grid * round(after_first / grid)
    return (position if first.samples <= position <= start else None), itertools.chain([landed], frames)


def _grid(container: InputContainer, rate: int) -> int:
    """Returns of how many samples packets are whole multiples, so that their times tell samples; 0: they do not."""
    stream = container.streams.audio[0]
    return 1 if stream.time_base and stream.time_base * rate == 1 else GRIDS.get(stream.codec_context.name, 0)


@containers.once_a_file
def _has_gaps(path: Path) -> bool:
    """Returns whether the times of a file's packets do not tell how many samples are before them.

    So it is where a recorder paused, and where a list of edits leaves something out. Nothing is decoded.
    """
    with contextlib.ExitStack() as stack:
        container = open_file(path, stack)
        stream, rate = container.streams.audio[0], container.streams.audio[0].codec_context.sample_rate
        grid, tick = _grid(container, rate), stream.time_base or Fraction(0)
        try:
            times = np.array([packet.pts for packet in container.demux(stream) if packet.pts is not None], float)
        except FFmpegError:
            return True
    samples = (times - times[:1]) * float(tick * rate)
    packet = grid * round(float(np.median(np.diff(samples))) / grid) if len(samples) > 1 else 0
    return bool(np.abs(samples - packet * np.arange(len(samples))).max(initial=0) > grid / 2)


def _ffmpeg_blocks(
    frames: Iterator[Any], first: Any, position: int, start: int, stop: int | None
) -> Generator[np.ndarray, None, tuple[int, float]]:
    """Yields the samples from `start` on, up to `stop` if that is given. The first frame begins at `position`.

    Returns how many samples there are up to the end, and the time of the end, in seconds, which gaps make later.
    """
    end = 0.0
    for frame in frames:
        check_rate(frame.sample_rate, first.sample_rate, f"{position / first.sample_rate:.2f} s")
        samples = _samples(frame)
        block = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
        kept = block[max(0, start - position) : None if stop is None else max(0, stop - position)]
        position += len(block)
        end = (frame.time or 0.0) + len(block) / first.sample_rate
        if len(kept):
            yield np.ascontiguousarray(with_channels(as_float(kept), first.layout.nb_channels))
        if stop is not None and position >= stop:
            break
    return position, end


def _samples(frame: Any) -> np.ndarray:
    """Returns the samples of a frame in their own format. Raises AudioError for a format that is not read."""
    try:
        return frame.to_ndarray()
    except ValueError:
        raise AudioError(f"its samples are {frame.format.name}, which are not read") from None


def _all_of(
    path: Path, container: InputContainer, blocks: Generator[np.ndarray, None, tuple[int, float]], rate: int
) -> Iterator[np.ndarray]:
    """Yields blocks, and raises AudioError at the end if they are less than the header promises."""
    stream, name = container.streams.audio[0], container.format.name
    length, end = yield from blocks
    check_whole(path, length, rate)
    if problem := streams.flac_fault(path, length=length):
        raise AudioError(problem)
    promised, there = 0.0, length / rate
    if name == "avi":  # FFmpeg estimates the duration by the size of the file
        promised = containers.avi_seconds(path) if containers.extent(path) else 0.0
    elif stream.duration and stream.time_base and (name in COUNTED or name == "caf" or name.startswith("mov")):
        promised = float(stream.duration * stream.time_base)
        there = max(there, end) if name.startswith("mov") else there  # it counts gaps, and what is before the first
    if there < promised - (SLACK if name in COUNTED else CODEC_SLACK):
        raise AudioError(f"truncated: {there:.2f} of {promised:.2f} s could be decoded")
