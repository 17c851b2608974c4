"""Reads audio files (decode, check, mix to mono, resample, scale), and writes them."""

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr

from omnicodec_jax.buckets import as_path
from omnicodec_jax.data.audio_source import Source
from omnicodec_jax.data.decoders import reading
from omnicodec_jax.data.levels import Level, as_float, is_silent
from omnicodec_jax.data.members import Member
from omnicodec_jax.data.sndfile import BLOCK
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import AudioError
from omnicodec_jax.files import replacing

LOG = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("8svx", "aac", "ac3", "adts", "aif", "aifc", "aiff", "amr", "ape", "asf", "au", "avi", "awb", "bwf"),
        *("caf", "dff", "dsf", "dts", "eac3", "ec3", "flac", "g722", "gsm", "iff", "lbc", "loas", "m2ts"),
        *("m4a", "m4b", "m4r", "m4v", "mka", "mkv", "mlp", "mov", "mp1", "mp2", "mp3", "mp4", "mp+", "mpc"),
        *("mpeg", "mpg", "mpga", "mts", "mxf", "nist", "oga", "ogg", "ogm", "ogv", "ogx", "oma", "opus"),
        *("qcp", "qoa", "ra", "rf64", "rm", "rmvb", "sds", "shn", "snd", "sph", "spx", "svx", "tak", "thd"),
        *("tta", "voc", "vob", "w64", "wav", "wave", "webm", "weba", "wma", "wmv", "wv", "3g2", "3gp", "3gpp"),
    )
)
"""Suffixes of the files that are taken for audio in a directory. A file that is named is tried whatever its suffix."""

MIN_SECONDS = 0.025
"""Length of the shortest clip that can be encoded: one analysis window of the semantic front end."""
OVERHANG = 0.5
"""Seconds by which a part may reach past the end of its file, since manifests round lengths and include the padding of
codecs."""
LONGEST = 1e100
"""Seconds from which on a number of samples may overflow; no file has them."""
LOUD = 2.0
"""Peak, of full scale, above which a file is worth a remark (+6 dB): lossy codecs do not overshoot by that."""


class LoadedClip(NamedTuple):
    """Holds one file, or a part of it, ready to encode."""

    samples: np.ndarray
    """Mono samples, float32 [T], at the rate that was asked for."""
    gain: float
    """Factor that the file was multiplied by. For samples above full scale, it counts from full scale."""
    sample_rate: int
    """Sample rate of the file, Hz."""
    num_samples: int
    """Length of the clip in the file, at the file's own rate."""


def load(
    path: str | os.PathLike[str] | Member,
    sample_rate: int,
    peak: float | None = None,
    offset: float = 0.0,
    duration: float | None = None,
    check: Callable[[Source], None] = lambda source: None,
) -> LoadedClip:
    """Reads a file of any format in docs/formats.md: mixes it to mono, resamples it, and scales it to `peak`.

    Args:
        path: The file, or a member of a tar or of Parquet.
        sample_rate: Rate that the audio is resampled to, Hz.
        peak: Value that the largest sample is scaled to, where full scale is 1; None: the audio stays as loud as it is.
        offset: Where the part to read begins, in seconds. Only that part is held in memory, and as mono.
        duration: How long the part is, in seconds; None: it reaches to the end. A part that reaches past the end by up
            to `OVERHANG` is read as far as there is audio.
        check: Looks at the file's format before anything is decoded, to refuse it.

    Returns:
        The samples, and the properties of the file that restore its rate, length and loudness. Floats above full scale
        are brought down to it.

    Raises:
        AudioError: If there is no encodable sound (see docs/formats.md): empty, truncated, silent, too short, out of
            range, NaN, no audio; or if the part reaches further past the end.

    Examples:
        >>> clip = load("clips/sound_bell.flac", 24_000, peak=0.95)
        >>> clip.samples.shape, clip.sample_rate, clip.num_samples
        ((98400,), 44100, 180810)
    """
    path = path if isinstance(path, Member) else as_path(path)
    if not (0 <= offset < LONGEST and 0 <= (duration or 0) < LONGEST):
        raise AudioError(f"{path}: offset {offset}, duration {duration}: must be seconds, from 0 on")
    with reading(path, offset, duration) as source:
        check(source)
        rate, length, parts, level = source.sample_rate, 0, [], Level(source.coding)
        resampler = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, quality="HQ")
        share = np.full(source.channels, 1 / source.channels, np.float32)
        for block in source.blocks:
            with np.errstate(invalid="ignore"):  # infinities of both signs; what is not finite is refused below
                mono = block @ share if source.channels > 1 else block[:, 0]
            level.add(block, mono)
            length += mono.size
            parts.append(mono if resampler is None else resampler.resample_chunk(mono))
        if offset and not length and (duration is None or duration * rate >= 1):
            raise AudioError(f"ends before {offset:.2f} s, where the part that was asked for begins")
        if duration is not None and length < round((duration - OVERHANG) * rate):
            raise AudioError(f"ends at {offset + length / rate:.2f} s; {offset + duration:.2f} s were asked for")
        if length < MIN_SECONDS * rate:
            raise AudioError(
                f"too short: {length} samples at {rate} Hz; at least {MIN_SECONDS * 1e3:.0f} ms are needed"
            )
        level.check()
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = fit_length(np.concatenate(parts), -(-length * sample_rate // rate))
    if is_silent(samples):  # scaled up, it would be the resampler's rounding
        highest = min(rate, sample_rate) // 2
        raise AudioError(f"silent below {highest} Hz: what it holds lies higher, and is lost at {sample_rate} Hz")
    full_scale = max(1.0, level.peak)
    if full_scale > LOUD:
        LOG.warning("%s: samples reach %.4g, where full scale is 1; brought down to it", path, full_scale)
    scale = 1 / full_scale if peak is None else peak / float(max(samples.max(), -samples.min()))
    return LoadedClip(samples * np.float32(scale), scale * full_scale, rate, length)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resamples float32 [T] from the rate `source` to `target`; returns [ceil(T · target / source)]."""
    if source == target:
        return samples
    return fit_length(soxr.resample(samples, source, target, quality="HQ"), -(-samples.shape[0] * target // source))


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns samples cut to a length, or filled up to it with zeros. Samples that are long enough are not copied."""
    missing = length - samples.shape[0]
    return np.pad(samples, (0, missing)) if missing > 0 else samples[:length]


def save(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int, comment: str | None = None) -> None:
    """Writes mono audio as 16 bit .wav or .flac, whole or not at all.

    Args:
        path: File to write. Its suffix chooses the format.
        samples: [T], floats or integers. Floats beyond full scale, ±1, are clipped.
        sample_rate: Rate of the samples, Hz.
        comment: Text to keep in the file.

    Raises:
        AudioError: If the suffix is another, the format has no such rate, or the samples are not mono or hold NaN.
        OSError: If the file cannot be written.

    Examples:
        >>> import numpy as np
        >>> save("tone.wav", np.sin(np.arange(24_000, dtype=np.float32) / 10), 24_000)
    """
    path = as_path(path)
    if path.suffix not in (".wav", ".flac"):
        raise AudioError(f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use .wav or .flac")
    samples = as_float(samples)
    if samples.ndim != 1 or np.isnan(samples.min(initial=0.0)):
        raise AudioError(f"{path}: samples of shape {list(samples.shape)}: must be [T], mono, without NaN")
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as raw:
        output: Any = _Output(raw)
        try:
            with soundfile.SoundFile(output, "w", sample_rate, 1, format=path.suffix[1:]) as file:
                if comment is not None:
                    file.comment = comment
                for start in range(0, samples.size, BLOCK):  # an hour of audio is not copied as a whole
                    file.write(samples[start : start + BLOCK].clip(-1.0, 1.0))
        except (soundfile.LibsndfileError, AssertionError) as error:  # it asserts that samples have been written
            if output.error is None:
                why = getattr(error, "error_string", error)
                raise AudioError(f"{path}: cannot be written at {sample_rate} Hz: {why}") from None
        if output.error is not None:
            raise OSError(output.error.errno, output.error.strerror, str(path))


def comment(path: Path) -> str:
    """Returns the comment that `save` has written into a file; an empty text if it has none."""
    try:
        with path.open("rb") as raw, soundfile.SoundFile(raw) as file:
            return file.comment
    except soundfile.LibsndfileError:
        return ""


class _Output:
    """A file that libsndfile writes to. It keeps an error of the disk, which libsndfile would call "System error"."""

    def __init__(self, file: io.FileIO):
        self._file = file
        self.seek, self.tell, self.read = file.seek, file.tell, file.read
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Returns how many bytes were written: all, or none."""
        try:
            left = memoryview(data)
            while left:  # a disk that fills up takes a part of the data first
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
            return 0
        return len(data)


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Returns the samples of a file, float32 [T, channels], and its sample rate. Raises AudioError."""
    with reading(path) as source:
        return np.concatenate([np.zeros((0, source.channels), np.float32), *source.blocks]), source.sample_rate
