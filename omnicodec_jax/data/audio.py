"""Audio files in and out: decode, check, mix to mono, resample, scale."""

import os
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr
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


class Clip(NamedTuple):
    """One file, ready to encode."""

    samples: np.ndarray
    """float32 [T], mono, at the rate asked for."""
    gain: float
    """What the file was multiplied by."""
    sample_rate: int
    """The file's own."""
    num_samples: int
    """The file's own, at its own rate."""


def load(path: str | os.PathLike[str], sample_rate: int, peak: float | None = None) -> Clip:
    """Reads any format of libsndfile or FFmpeg, mixes it to mono, resamples it, scales it to `peak`.

    Raises AudioError for what holds no encodable sound: empty, truncated, silent, too short, NaN, no audio.
    """
    path = Path(path)
    samples, rate = decode(path)
    length = samples.shape[0]
    if length < MIN_SECONDS * rate:
        raise AudioError(
            f"{path}: too short: {length} samples at {rate} Hz; at least {MIN_SECONDS * 1e3:.0f} ms are needed"
        )
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds {int((~np.isfinite(samples)).sum())} samples that are NaN or infinite")
    mono = samples.mean(axis=1)
    loudest = float(np.abs(mono).max())
    if loudest < SILENCE:
        raise AudioError(f"{path}: silent: no sample above {SILENCE:g} of full scale")
    gain = 1.0 if peak is None else peak / loudest
    return Clip(resample(mono * np.float32(gain), rate, sample_rate), gain, rate, length)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """float32 [T] → [ceil(T · target / source)], by soxr at high quality."""
    if source == target:
        return samples
    return fit_length(soxr.resample(samples, source, target, quality="HQ"), -(-samples.shape[0] * target // source))


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Cut, or filled up with zeros."""
    return np.pad(samples[:length], (0, max(0, length - samples.shape[0])))


def save(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> None:
    """Writes float32 [T] as 16 bit .wav or .flac, whole or not at all."""
    path = Path(path)
    if path.suffix not in (".wav", ".flac"):
        raise AudioError(f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use .wav or .flac")
    try:
        with replacing(path) as temporary:
            soundfile.write(temporary, samples.clip(-1.0, 1.0), sample_rate)
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
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty file")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw has no header to read
        return _decode_ffmpeg(path)
    try:
        with file:
            samples = file.read(dtype="float32", always_2d=True)
            missing = max(file.frames, _frames_in_riff_header(path, file)) - samples.shape[0]
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: damaged or truncated: {error.error_string}") from None
    if missing > 0:
        raise AudioError(f"{path}: truncated: {missing} of {samples.shape[0] + missing} samples are missing")
    if file.format == "OGG" and not _ogg_ends(path):
        raise AudioError(f"{path}: truncated: the last page of the Ogg stream is missing")
    return samples, file.samplerate


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


def _decode_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: holds no audio")
            stream = container.streams.audio[0]
            rate = stream.rate
            expected = 0.0 if container.duration is None else container.duration / av.time_base
            resampler = av.AudioResampler(format="fltp", rate=rate)
            frames = [
                part.to_ndarray() for frame in (*container.decode(stream), None) for part in resampler.resample(frame)
            ]
    except FFmpegError as error:
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode: {error.strerror}") from None
    if not frames:
        raise AudioError(f"{path}: holds no audio")
    samples = np.ascontiguousarray(np.concatenate(frames, axis=1).T, dtype=np.float32)
    if (found := samples.shape[0] / rate) < 0.95 * expected - 0.2:  # containers round, and delay their first frame
        raise AudioError(f"{path}: truncated: {found:.2f} of {expected:.2f} s could be decoded")
    return samples, rate
