"""Reconstructs clips with codecs and writes them to files, so that the scored audio can be listened to.

Every file is 24 kHz mono FLAC with 16 bits at the level of the original: OUT/audio/SYSTEM/DOMAIN/CLIP.flac. Files are
read as for training: mixed to mono, resampled by soxr. A codec of another sample rate gets the clip at that rate, and
its output is resampled back. A reconstruction is cut or filled up with zeros to the length of the original; one that is
shorter or longer by more than `TOLERANCE` is refused.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.data import audio
from omnicodec_jax.data.attempts import Seen, reason
from omnicodec_jax.data.members import Member
from omnicodec_jax.data.units import Progress
from omnicodec_jax.errors import AudioError, DataError, OmniCodecError
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.systems import Codec, Folder, outputs
from omnicodec_jax.files import digest, replacing
from omnicodec_jax.lanes import CPU_BLOCKS

LOG = logging.getLogger(__name__)

RATE = 24_000
"""The sample rate of all files, Hz."""
TOLERANCE = 0.25
"""The number of seconds by which a reconstruction may be shorter or longer than the original."""
VECTORS_PER_SECOND = 12.5, 13.0
"""The least and the largest number of semantic feature vectors a second, which are computed in blocks as frames are."""
ORIGINAL = "Original"
"""The name of the system that stands for the clips themselves."""


class Original(NamedTuple):
    """A clip that was read, and written into the folder of the report."""

    clip: EvalClip
    seconds: float
    digest: str
    """The hash of the clip's file in the folder of the report."""


class Failure(NamedTuple):
    """A clip that a system could not reconstruct, or that could not be read."""

    system: str
    clip: EvalClip
    why: str


def audio_path(out: Path, system: str, clip: EvalClip) -> Path:
    """Returns the path of a system's reconstruction of a clip."""
    return out / "audio" / system / clip.domain / f"{clip.id}.flac"


def codes_path(out: Path, system: str, clip: EvalClip) -> Path:
    """Returns the path of a system's codes of a clip: uint16 [K, N]."""
    return out / "codes" / system / clip.domain / f"{clip.id}.npy"


def originals(clips: Sequence[EvalClip], out: Path, journal: Journal) -> Iterator[Original | Failure]:
    """Writes the clips into the folder of the report, and yields each, or why it cannot be used."""
    for clip in clips:
        if clip.problem is not None:
            yield Failure(ORIGINAL, clip, clip.problem)
            continue
        target, key = audio_path(out, ORIGINAL, clip), (ORIGINAL, clip.domain, clip.id)
        row, samples = journal.get(*key), None
        try:
            about = _about(clip)
            if row is None or row["source"] != about or not target.is_file():
                samples = audio.load(clip.path, RATE, offset=clip.offset, duration=clip.duration).samples
        except (AudioError, OSError) as error:
            yield Failure(ORIGINAL, clip, reason(clip.path, error))
            continue
        if samples is not None:  # a disk that cannot be written to says nothing about the clip
            audio.save(target, samples, RATE)
            row = {"source": about, "seconds": samples.size / RATE}
            journal.add(key, row)
        assert row is not None
        yield Original(clip, row["seconds"], digest(target))


def check_same_sources(clips: Sequence[EvalClip], out: Path, journal: Journal) -> None:
    """Raises DataError if `out` has a clip of the same name from another file, which would be lost with its scores."""
    for clip in clips:
        row = journal.get(ORIGINAL, clip.domain, clip.id)
        if clip.problem is None and row is not None and _place(row["source"][0]) != _place(clip.path):
            held = f"{clip.domain}/{clip.id} of {row['source'][0]}"
            raise DataError(f"{out}: holds {held}; that of {clip.path} would replace it: use another --out")


def _about(clip: EvalClip) -> list[Any]:
    """Returns the values by which a clip is known to be unchanged. Raises AudioError if its file is missing."""
    if not clip.path.is_file():  # it is False, and no error, for names that no file can have
        raise AudioError(f"{clip.path}: no such file")
    return [_place(clip.path), *Seen.of(clip.path), clip.offset, clip.duration]


def _place(path: Any) -> str:
    """Returns the name of a file that is the same from every folder, whichever links lead to the folder it lies in."""
    if isinstance(path, Member):
        return f"{_place(path.container)}: {path.name}"
    if "://" in str(path):
        return str(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def by_codec(codec: Codec, clips: Sequence[Original], out: Path, journal: Journal) -> Iterator[Failure]:
    """Reconstructs the clips that a codec has not reconstructed yet, and yields those that it cannot reconstruct.

    Args:
        codec: The codec.
        clips: The clips.
        out: The folder of the report.
        journal: The journal, which keeps the bits and the seconds of each reconstruction.
    """

    def is_done(original: Original) -> bool:
        rows = [journal.get(system.name, original.clip.domain, original.clip.id) for system in codec.systems]
        files = [audio_path(out, system.name, original.clip) for system in codec.systems]
        same = (bool(row) and row["of"] == [codec.identity(row["of"][0]), original.digest] for row in rows)
        return all(same) and all(map(Path.is_file, files))

    left = [original for original in clips if not is_done(original)]
    if not left:
        return
    for seconds in warm_up_lengths(max(original.seconds for original in left), codec.systems[-1].frame_rate):
        with contextlib.suppress(AudioError):  # a codec that always fails is reported below, for each clip
            for _ in outputs(codec, np.sin(0.1 * np.arange(round(seconds * codec.sample_rate), dtype=np.float32))):
                pass  # this compiles the programs, so that their compilation does not count as time of a clip
    progress = Progress(codec.systems[0].name, len(left))
    for original in left:
        clip, system = original.clip, codec.systems[0]
        try:
            samples = audio.load(audio_path(out, ORIGINAL, clip), RATE).samples
            made = outputs(codec, audio.resample(samples, RATE, codec.sample_rate))
            for system, output in zip(codec.systems, made, strict=True):
                fitted = fit(output.samples, codec.sample_rate, samples.size)
                if output.codes is not None:
                    with replacing(codes_path(out, system.name, clip)) as temporary:
                        np.save(temporary, output.codes.astype(np.uint16))
                audio.save(audio_path(out, system.name, clip), fitted, RATE)
                row = {"of": [codec.identity(), original.digest], "bits": output.bits, "seconds": output.seconds}
                journal.add((system.name, clip.domain, clip.id), row)
            progress.add(original.seconds)
        except OmniCodecError as error:  # the codec may still reconstruct the other clips
            LOG.warning("%s, %s: %s", system.name, clip.id, names.text(str(error)))
            progress.add(0.0)
            for system in codec.systems:  # files may be left of another model with the same name
                audio_path(out, system.name, clip).unlink(missing_ok=True)
                codes_path(out, system.name, clip).unlink(missing_ok=True)
                yield Failure(system.name, clip, reason(clip.path, error))
    progress.bar.close()


def warm_up_lengths(longest: float, frame_rate: float | None) -> list[float]:
    """Returns lengths of clips for which a codec of this package compiles every program that shorter clips need, too.

    On a CPU it works in blocks of several lengths, each of which has a program of its own (lanes.py).

    Args:
        longest: The length of the longest clip in seconds.
        frame_rate: The frame rate of the codec in Hz, 12.5 or lower for those of this package; None: it has none.
    """
    rate = min(VECTORS_PER_SECOND[0], frame_rate or VECTORS_PER_SECOND[0])
    needed = [size for size in CPU_BLOCKS if size < VECTORS_PER_SECOND[1] * longest + CPU_BLOCKS[-1]]
    return [max(1.0, size / rate) for size in needed]


def by_folder(folder: Folder, clips: Sequence[Original], out: Path, journal: Journal) -> Iterator[Failure]:
    """Converts the reconstructions of another system into the same form, and yields the clips that it lacks."""
    for original in clips:
        clip, target = original.clip, audio_path(out, folder.system.name, original.clip)
        target.unlink(missing_ok=True)
        codes_path(out, folder.system.name, clip).unlink(missing_ok=True)
        if journal.get(*(key := (folder.system.name, clip.domain, clip.id))):  # a codec had this name before
            journal.add(key, {})
        try:
            if (source := folder.file(clip.id, clip.domain)) is None:
                raise AudioError("the folder holds no reconstruction of this clip")
            fitted = fit(audio.load(source, RATE).samples, RATE, round(original.seconds * RATE))
        except (AudioError, OSError) as error:
            yield Failure(folder.system.name, clip, str(error))
        else:
            audio.save(target, fitted, RATE)


def fit(samples: np.ndarray, sample_rate: int, size: int) -> np.ndarray:
    """Resamples a reconstruction to 24 kHz, and cuts or pads it to a number of samples.

    Raises AudioError if it is too long or too short, or holds samples that are not finite.
    """
    if not np.isfinite(samples).all():
        raise AudioError("samples that are NaN or infinite")
    resampled = audio.resample(samples, sample_rate, RATE)
    if abs(resampled.size - size) > TOLERANCE * RATE:
        raise AudioError(f"lasts {resampled.size / RATE:.2f} s, the original {size / RATE:.2f} s")
    return audio.fit_length(resampled, size)
