"""Turns a slice of a corpus into a shard of segments, and a JSON file that says what became of every entry.

A work unit is a slice of a manifest and becomes one shard. Which entries it holds and what its file looks like depends
on the manifest and the settings alone, so that whoever is killed and whoever comes after writes the same bytes.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import attempts, audio, decoders, records, units
from omnicodec_jax.data.attempts import Seen
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.manifest import Manifest
from omnicodec_jax.data.members import Member
from omnicodec_jax.data.units import Outcomes, Slice, Unit
from omnicodec_jax.errors import AudioError, ConfigError, DataError
from omnicodec_jax.files import remove_leftovers, replacing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `omnicodec prepare`; kept as prepared.json, and the same for all that is added to a directory."""

    validation: float = 0.005
    """Share of the files that are held out. They are chosen by their names."""
    segment_seconds: int = 30
    """Longest segment, in seconds. Longer clips are cut into equal segments."""
    shard_hours: float = 1.0
    """Approximate length of a shard, in hours of audio."""
    min_sample_rate: int = 16_000
    """Lowest sample rate in Hz. Files below it are refused: they teach nothing about the upper half of the spectrum."""
    max_sample_rate: int = 96_000
    """Highest sample rate in Hz. Files above it are refused: they hold measurements, or their header is wrong."""
    max_channels: int = 2
    """Largest number of channels. Files with more are refused: they hold microphone arrays or stems, not a mix."""

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise DataError(f"--validation {self.validation}: must be a share in [0, 1)")
        if self.segment_seconds < 10 or not 0 < self.shard_hours < float("inf"):
            raise DataError("--segment-seconds must be 10 or more, --shard-hours a number above 0")
        if not 0 < self.min_sample_rate <= self.max_sample_rate or self.max_channels < 1:
            raise DataError(
                "--min-sample-rate must be above 0 and no more than --max-sample-rate, --max-channels 1 or more"
            )

    def check(self, source: audio.Source) -> None:
        """Raises AudioError for a file of a format that is refused."""
        if not self.min_sample_rate <= source.sample_rate <= self.max_sample_rate:
            rates = f"{self.min_sample_rate} to {self.max_sample_rate} Hz"
            kind = LowRateError if source.sample_rate < self.min_sample_rate else AudioError
            raise kind(f"{source.sample_rate} Hz: only {rates} are taken (--min-sample-rate, --max-sample-rate)")
        if source.channels > self.max_channels:
            raise AudioError(f"{source.channels} channels: at most {self.max_channels} are taken (--max-channels)")


def read_settings(directory: Path) -> PrepareConfig:
    """Reads the settings that a directory was prepared with, in this version or an earlier one. Raises DataError."""
    path = directory / records.SETTINGS
    try:
        return config_files.from_fields(PrepareConfig, units.read_settings(path), str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: {error}; run omnicodec prepare again") from None


class LowRateError(AudioError):
    """Says that a file's sample rate is below the lowest that is taken."""


@dataclasses.dataclass(frozen=True)
class SplitUnit(Unit):
    """A slice of a manifest's files for training, or of those for validation, and the shard that it becomes."""

    split: records.Split

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the lines of the manifest that the shard is made of."""
        return units.entries_digest(self.entries, 8)


def plan(manifests: dict[str, Manifest], config: PrepareConfig) -> Iterator[SplitUnit]:
    """Yields the units of all manifests, one manifest after the other; only units that are being filled are held."""
    for domain, listed in manifests.items():
        slices: dict[records.Split, Slice] = {
            "train": Slice(config.shard_hours),
            "validation": Slice(config.shard_hours),
        }
        for entry in listed:
            split = "validation" if split_position(entry.path) < config.validation else "train"
            if slices[split].add(entry):
                yield _unit(domain, listed.folder, split, slices[split])
        for split, rest in slices.items():
            if rest:
                yield _unit(domain, listed.folder, split, rest)


def _unit(domain: str, folder: Path, split: records.Split, gathered: Slice) -> SplitUnit:
    name = f"{domain}-{split}-{gathered.number:06d}"
    return SplitUnit(name, domain, folder, gathered.take(), split)


def split_position(path: str) -> float:
    """Returns a number in [0, 1) that is compared with `PrepareConfig.validation`, to hold out files.

    It depends on the path alone. So a file stays on its side with all its clips, whatever is added to the manifest.
    """
    name = path.encode(errors="surrogatepass")  # names on disk need not be UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) / 2**64


def prepare_unit(
    unit: SplitUnit,
    out: Path,
    config: PrepareConfig,
    retry_rejected: bool,
    refused: dict[int, AudioError],
    report: Callable[[tuple[int, float | None]], None],
) -> None:
    """Writes the shard of a unit, and the JSON file that marks it as finished.

    Of a unit that is finished already, only the entries that are left to do are read.

    Args:
        unit: The unit.
        out: Directory of the prepared audio.
        config: How audio is prepared.
        retry_rejected: Whether entries that were refused are tried once more.
        refused: Why entries are refused without being tried, by their numbers.
        report: Called with (number, None) before an entry, and with (number, seconds of audio) after it; 0 seconds
            stand for an entry that is refused.

    Raises:
        DataError: If clips would be lost to those of files of the same names in another folder.
        OSError: If `out` cannot be written.
    """
    path = records.shard_path(out, unit.name)
    remove_leftovers(path)
    done, earlier = finished(unit, out), units.read_marker(marker_path(out, unit.name))
    outcomes = Outcomes(unit, done, None if done is None else _clips(path, done, config), retry_rejected)
    to_do, is_changed, held = frozenset(outcomes.to_do), False, hashlib.blake2b(digest_size=8)

    def encoded() -> Iterator[bytes]:
        nonlocal is_changed
        for number, entry in enumerate(unit.entries):
            before, seconds = outcomes.clips.get(number), 0.0
            if number in to_do:
                report((number, None))
                try:
                    file = entry.file(unit.folder)
                    clip, seen = _prepared(file, entry, unit.domain, config, refused.get(number))
                except Exception as error:  # an error in one file must not end the work on the others
                    outcomes.refuse(number, _refusal(number, unit.folder, entry, error))
                else:
                    if clip != before:
                        outcomes.check_place(number)
                    outcomes.add(number, clip, seen)
                    seconds = clip.samples / records.SAMPLE_RATE
            clip = outcomes.clips.get(number)
            is_changed |= clip != before
            if clip is not None:
                for record in clip.records:
                    held.update(record)
                    yield record
                outcomes.clips[number] = clip._replace(
                    records=[]
                )  # so that the records of an hour are not kept in memory
            if number in to_do:
                report((number, seconds))

    size = records.write_shard(path, encoded())
    # What an earlier version has written keeps its name, and so its features, for as long as it stays the same.
    kept = None if done is None else done["shard"].get("audio")
    shard = records.Shard(
        name=unit.name,
        domain=unit.domain,
        split=unit.split,
        digest=unit.digest,
        clips=tuple(outcomes.clips[number].samples for number in sorted(outcomes.clips)),
        bytes=size,
        revision=_revision(earlier, outcomes.is_resumed, is_changed),
        audio=held.hexdigest() if is_changed else kept,
    )
    with replacing(marker_path(out, unit.name)) as temporary:
        temporary.write_text(outcomes.to_json(dataclasses.asdict(shard)))


def _revision(done: dict[str, Any] | None, is_resumed: bool, is_changed: bool) -> int:
    """Returns the revision of a shard that is written: 0 for the first time, and more when its clips have changed."""
    if done is None:
        return 0
    before = done["shard"].get("revision", 0)
    if not is_resumed:  # it is not known which clips there were
        before += 1
    return before + is_changed


def _refusal(number: int, folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """Returns the line of an entry that is refused. For a sample rate that is too low, it counts the seconds lost."""
    row = attempts.refusal(number, folder, entry, error)
    if isinstance(error, LowRateError):
        row["seconds"] = entry.duration or max(0.0, decoders.seconds(entry.file(folder)) - entry.offset)
    return row


class CutClip(NamedTuple):
    """A clip that an entry has become, cut into segments."""

    samples: int
    """Length of the clip at 24 kHz."""
    records: list[bytes]
    """Records of its segments."""


def _prepared(
    path: Path | Member, entry: Entry, domain: str, config: PrepareConfig, refused: AudioError | None
) -> tuple[CutClip, Seen]:
    """Reads the clip of an entry.

    Raises DataError and AudioError for an entry that is refused, UnreadableError for one that the operating system did
    not give.
    """
    if entry.problem:
        raise DataError(entry.problem)
    if refused:
        raise refused

    def load() -> tuple[audio.LoadedClip, Seen]:
        seen = Seen.of(path)  # before the file is read, so that a file that is replaced meanwhile is noticed
        clip = audio.load(path, records.SAMPLE_RATE, records.PEAK, entry.offset, entry.duration, check=config.check)
        return clip, seen

    clip, seen = attempts.attempt(path, load)
    samples = np.rint(clip.samples * 32768).astype(np.int16)  # below full scale: its peak is 0.95
    encoded = []
    for start, size in records.segments(samples.size, config.segment_seconds):
        header = records.Header(entry.id, domain, start, samples.size, clip.gain, clip.sample_rate, clip.num_samples)
        encoded.append(records.encode(header, samples[start : start + size]))
    return CutClip(samples.size, encoded), seen


def _clips(path: Path, done: dict[str, Any], config: PrepareConfig) -> list[CutClip] | None:
    """Returns what the shard of a finished unit holds; None if it is damaged, or does not hold what its JSON says."""
    lengths = tuple(done["shard"]["clips"])
    held = records.read_clips(path, lengths, config.segment_seconds)
    if held is None:
        return None
    return [CutClip(length, clip) for length, clip in zip(lengths, held, strict=True)]


def finished(unit: SplitUnit, out: Path) -> dict[str, Any] | None:
    """Returns what the JSON file of a finished unit says; None if the unit is not finished.

    When a machine goes down, files that were written shortly before may stay behind empty or cut off: such a shard does
    not have the size that the JSON file says. Raises DataError if the unit was made of other lines of the manifest.
    """
    path, shard = marker_path(out, unit.name), records.shard_path(out, unit.name)
    if (done := units.read_marker(path)) is None:
        return None
    if done["shard"]["digest"] != unit.digest:
        raise DataError(f"{path}: was made of other lines of the manifest than {unit.name} has now; use another --out")
    return done if shard.is_file() and shard.stat().st_size == done["shard"]["bytes"] else None


def marker_path(out: Path, name: str) -> Path:
    """Returns the path of the JSON file that marks a unit as finished."""
    return records.shard_path(out, name).with_suffix(".json")
