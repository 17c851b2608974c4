"""Audio files in and out: decode, check, mix to mono, resample, scale."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr
from av.container import InputContainer
from av.error import FFmpegError

from omnicodec_jax.errors import AudioError
from omnicodec_jax.files import replacing

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("aac", "aif", "aiff", "au", "caf", "flac", "m4a", "m4b", "mka", "mkv", "mov", "mp2", "mp3", "mp4"),
        *("oga", "ogg", "opus", "w64", "wav", "webm", "wma"),
    )
)
"""What is taken for audio in a directory; a file that is named is tried whatever it is called."""

MIN_SECONDS = 0.025
"""One analysis window of the semantic front end."""
SILENCE = 1e-5
"""Peak, of full scale, below which there is nothing to encode (-100 dB)."""
BLOCK = 1 << 16
"""Samples per channel that are decoded at once: what is read stays in the cache until it is resampled."""


class Clip(NamedTuple):
    """Holds one file, or a part of it, ready to encode."""

    samples: np.ndarray
    """float32 [T], mono, at the rate asked for."""
    gain: float
    """What the file was multiplied by."""
    sample_rate: int
    """The file's own."""
    num_samples: int
    """The file's own, at its own rate."""


class Source(NamedTuple):
    """An open file: its format, and its samples in blocks [t, channels], float32."""

    sample_rate: int
    channels: int
    blocks: Iterator[np.ndarray]


def load(
    path: str | os.PathLike[str],
    sample_rate: int,
    peak: float | None = None,
    offset: float = 0.0,
    duration: float | None = None,
    check: Callable[[Source], None] = lambda source: None,
) -> Clip:
    """Reads any format of libsndfile or FFmpeg, mixes it to mono, resamples it, scales it to `peak`.

    Args:
        path: The file.
        sample_rate: What to resample to, Hz.
        peak: What the largest sample is scaled to, full scale 1; None: the audio stays as loud as it is.
        offset: Where the part to read begins, seconds; only that part is held, and as mono.
        duration: How long it is, seconds; None: up to the end.
        check: Looks at the file's format before anything is decoded, to refuse it.

    Returns:
        The samples, and what brings the file's own rate, length and loudness back.

    Raises:
        AudioError: If there is no encodable sound: empty, truncated, silent, too short, NaN, no audio; or if the part
            reaches past the end.

    Examples:
        >>> clip = load("examples/audio/sound_bell.flac", 24_000, peak=0.95)
        >>> clip.samples.shape, clip.sample_rate, clip.num_samples
        ((98400,), 44100, 180810)
    """
    path = Path(path)
    with reading(path, offset, duration) as source:
        check(source)
        rate, length, parts = source.sample_rate, 0, []
        resampler = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, quality="HQ")
        share = np.full(source.channels, 1 / source.channels, np.float32)
        for block in source.blocks:
            mono = block @ share if source.channels > 1 else block[:, 0]
            length += mono.size
            parts.append(mono if resampler is None else resampler.resample_chunk(mono))
    if duration is not None and length < round(duration * rate):
        raise AudioError(f"{path}: ends at {offset + length / rate:.2f} s; {offset + duration:.2f} s were asked for")
    if length < MIN_SECONDS * rate:
        raise AudioError(
            f"{path}: too short: {length} samples at {rate} Hz; at least {MIN_SECONDS * 1e3:.0f} ms are needed"
        )
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = fit_length(np.concatenate(parts), -(-length * sample_rate // rate))
    loudest = float(max(samples.max(), -samples.min()))
    if not np.isfinite(loudest):
        raise AudioError(f"{path}: holds samples that are NaN or infinite")
    if loudest < SILENCE:
        raise AudioError(f"{path}: silent: no sample above {SILENCE:g} of full scale")
    gain = 1.0 if peak is None else peak / loudest
    return Clip(samples * np.float32(gain), gain, rate, length)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """float32 [T] → [ceil(T · target / source)], by soxr at high quality."""
    if source == target:
        return samples
    return fit_length(soxr.resample(samples, source, target, quality="HQ"), -(-samples.shape[0] * target // source))


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Cut, or filled up with zeros; no copy of what is long enough."""
    missing = length - samples.shape[0]
    return np.pad(samples, (0, missing)) if missing > 0 else samples[:length]


def save(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> None:
    """Writes mono audio as 16 bit .wav or .flac, whole or not at all.

    Args:
        path: Where to; its suffix says which.
        samples: float32 [T]; what is beyond full scale, ±1, is clipped.
        sample_rate: Hz.

    Raises:
        AudioError: If the suffix is another, or the format has no such rate.

    Examples:
        >>> import numpy as np
        >>> save("tone.wav", np.sin(np.arange(24_000, dtype=np.float32) / 10), 24_000)
    """
    path = Path(path)
    if path.suffix not in (".wav", ".flac"):
        raise AudioError(f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use .wav or .flac")
    try:
        with replacing(path) as temporary, soundfile.SoundFile(temporary, "w", sample_rate, 1) as file:
            for start in range(0, samples.size, BLOCK):  # an hour of audio is not copied as a whole
                file.write(samples[start : start + BLOCK].clip(-1.0, 1.0))
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be written at {sample_rate} Hz: {error.error_string}") from None


def find(path: Path, extensions: frozenset[str] = EXTENSIONS) -> list[Path]:
    """The file itself, or all files below a directory with one of the extensions, sorted; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in extensions and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def decode(path: Path) -> tuple[np.ndarray, int]:
    """float32 [T, channels] and the sample rate, as they are in the file. Raises AudioError."""
    with reading(path) as source:
        return np.concatenate([np.zeros((0, source.channels), np.float32), *source.blocks]), source.sample_rate


@contextlib.contextmanager
def reading(path: Path, offset: float = 0.0, duration: float | None = None) -> Iterator[Source]:
    """A file to read block by block, or the part of it from `offset`, of `duration` seconds.

    Raises AudioError here for what is no audio, and from the last block for what ends too early.
    """
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty file")
    with contextlib.ExitStack() as stack:
        try:
            name: Any = os.fsencode(path)  # need not be UTF-8
            file = stack.enter_context(soundfile.SoundFile(name))
        except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw has no header to read
            yield _open_ffmpeg(path, stack, offset, duration)
        else:
            yield Source(file.samplerate, file.channels, _sndfile_blocks(path, file, offset, duration))


def _sndfile_blocks(
    path: Path, file: soundfile.SoundFile, offset: float, duration: float | None
) -> Iterator[np.ndarray]:
    promised = max(file.frames, _frames_in_riff_header(path, file))
    start = min(round(offset * file.samplerate), file.frames)
    left = promised - start if duration is None else round(duration * file.samplerate)
    try:
        if start:
            file.seek(start)
        while left > 0 and len(block := file.read(min(left, BLOCK), dtype="float32", always_2d=True)):
            left -= len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: damaged or truncated: {error.error_string}") from None
    if duration is None and left > 0:
        raise AudioError(f"{path}: truncated: {left} of {promised} samples are missing")
    if duration is None and file.format == "OGG" and not _ogg_ends(path):
        raise AudioError(f"{path}: truncated: the last page of the Ogg stream is missing")


def _frames_in_riff_header(path: Path, file: soundfile.SoundFile) -> int:
    """What a WAV file's data chunk claims to hold; libsndfile silently makes do with less. 0 where it says nothing."""
    if file.format not in ("WAV", "WAVEX"):
        return 0
    width = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}.get(file.subtype)
    with open(path, "rb") as raw:
        raw.seek(12)
        while width and len(header := raw.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":
                return 0 if size >= 0x7FFF0000 else size // (width * file.channels)  # as written to a pipe
            raw.seek(size + size % 2, os.SEEK_CUR)
    return 0


def _ogg_ends(path: Path) -> bool:
    """Whether the last page of an Ogg file is marked as the end of its stream."""
    with open(path, "rb") as raw:
        raw.seek(max(0, path.stat().st_size - 65_536))  # a page is smaller
        tail = raw.read()
    page = tail.rfind(b"OggS")
    return page >= 0 and len(tail) > page + 5 and bool(tail[page + 5] & 4)


def _open_ffmpeg(path: Path, stack: contextlib.ExitStack, offset: float, duration: float | None) -> Source:
    try:
        container = stack.enter_context(av.open(str(path)))
    except FFmpegError as error:
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode: {error.strerror}") from None
    if not container.streams.audio:
        raise AudioError(f"{path}: holds no audio")
    stream = container.streams.audio[0]
    return Source(stream.rate, stream.channels, _ffmpeg_blocks(path, container, offset, duration))


def _ffmpeg_blocks(path: Path, container: InputContainer, offset: float, duration: float | None):
    stream = container.streams.audio[0]
    resampler = av.AudioResampler(format="fltp", rate=stream.rate)
    first = round(offset * stream.rate)
    last = None if duration is None else first + round(duration * stream.rate)
    position = 0
    try:
        for frame in itertools.chain(container.decode(stream), [None]):
            for part in resampler.resample(frame):
                block = part.to_ndarray().T
                kept = block[max(0, first - position) : None if last is None else max(0, last - position)]
                position += len(block)
                if len(kept):
                    yield np.ascontiguousarray(kept, np.float32)
                if last is not None and position >= last:
                    return
    except FFmpegError as error:
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode: {error.strerror}") from None
    if not position:
        raise AudioError(f"{path}: holds no audio")
    expected = 0.0 if container.duration is None else container.duration / av.time_base
    if (found := position / stream.rate) < 0.95 * expected - 0.2:  # containers round, and delay their first frame
        raise AudioError(f"{path}: truncated: {found:.2f} of {expected:.2f} s could be decoded")
