"""What becomes of a slice of a corpus: a shard of segments, and a JSON file that says what became of every entry.

A work unit is a slice of a manifest and becomes one shard. Which entries it holds and what its file looks like depends
on the manifest and the settings alone, so that whoever is killed and whoever comes after writes the same bytes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.data import audio, decoders, manifest, records, units
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.data.units import ASSUMED_SECONDS, UNIT_ENTRIES, Seen
from omnicodec_jax.errors import AudioError, DataError, UnreadableError
from omnicodec_jax.files import remove_leftovers, replacing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What becomes of a corpus; kept as prepared.json, and the same for all that is added to a directory."""

    validation: float = 0.005
    """Share of the files that are held out, chosen by their names."""
    segment_seconds: int = 30
    """Longer clips are cut into equal segments."""
    shard_hours: float = 1.0
    """Audio of a shard, about."""
    min_sample_rate: int = 16_000
    """Files below are refused: they have nothing to teach of the upper half of the spectrum."""
    max_sample_rate: int = 96_000
    """Files above are refused: such rates are measurements, or a header that lies."""
    max_channels: int = 2
    """Files with more are refused: the sum of a microphone array or of stems is not what anyone heard."""

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise DataError(f"--validation {self.validation}: must be a share in [0, 1)")
        if self.segment_seconds < 10 or self.shard_hours <= 0:
            raise DataError("--segment-seconds must be 10 or more, --shard-hours above 0")

    def check(self, source: audio.Source) -> None:
        """Raises AudioError for a format that is refused."""
        if not self.min_sample_rate <= source.sample_rate <= self.max_sample_rate:
            rates = f"{self.min_sample_rate} to {self.max_sample_rate} Hz"
            kind = LowRateError if source.sample_rate < self.min_sample_rate else AudioError
            raise kind(f"{source.sample_rate} Hz: only {rates} are taken (--min-sample-rate, --max-sample-rate)")
        if source.channels > self.max_channels:
            raise AudioError(f"{source.channels} channels: at most {self.max_channels} are taken (--max-channels)")


class LowRateError(AudioError):
    """A sample rate below the least that is taken."""


class Unit(NamedTuple):
    """A slice of a manifest, and the shard that it becomes."""

    name: str
    domain: str
    split: records.Split
    folder: Path
    """Where the entries' relative paths begin."""
    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """Of all that decides what the shard holds."""
        return hashlib.blake2b(json.dumps(self.entries).encode(), digest_size=8).hexdigest()


def plan(sources: dict[str, Path], config: PrepareConfig) -> Iterator[Unit]:
    """The work units of all manifests, one after the other; only the open ones are held."""
    for domain, path in sources.items():
        batches: dict[records.Split, list[Entry]] = {"train": [], "validation": []}
        seconds, numbers = dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0)

        def close(
            split: records.Split, domain=domain, path=path, batches=batches, seconds=seconds, numbers=numbers
        ) -> Unit:
            name = f"{domain}-{split}-{numbers[split]:06d}"
            unit = Unit(name, domain, split, manifest.folder(path), tuple(batches[split]))
            batches[split], seconds[split], numbers[split] = [], 0.0, numbers[split] + 1
            return unit

        for entry in manifest.read(path):
            if not manifest.is_of(entry, domain):
                continue
            split = "validation" if share(entry.path) < config.validation else "train"
            batches[split].append(entry)
            seconds[split] += ASSUMED_SECONDS if entry.seconds is None else entry.seconds
            if seconds[split] >= 3600 * config.shard_hours or len(batches[split]) == UNIT_ENTRIES:
                yield close(split)
        for split in batches:
            if batches[split]:
                yield close(split)


def share(path: str) -> float:
    """A number in [0, 1) that depends on the file alone: it stays on its side whatever is added, with all its clips."""
    name = path.encode(errors="surrogatepass")  # names on disk need not be UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) / 2**64


def prepare_unit(
    unit: Unit, out: Path, config: PrepareConfig, retry_rejected: bool, refused: dict[int, AudioError], report: Any
) -> None:
    """Writes the shard of a unit and the JSON file that marks it as finished; of one that is, only what is left to do.

    refused: entries not to try, with the reason. report(number, seconds) is called before an entry (seconds None)
    and after it.
    """
    path = records.shard_path(out, unit.name)
    remove_leftovers(path)
    before = _Before.of(unit, out, config, retry_rejected)
    clips: list[_Clip] = []
    rejects, is_changed = [], False

    def keep(clip: _Clip) -> list[bytes]:
        clips.append(clip._replace(records=[]))  # an hour of them is not held
        return clip.records

    def encoded() -> Iterator[bytes]:
        nonlocal is_changed
        for number, entry in enumerate(unit.entries):
            held = before.clips.get(number)
            if number not in before.to_do:
                if held is None:
                    rejects.append(before.rejects[number])
                else:
                    yield from keep(held)
                continue
            report(number, None)
            source = unit.folder / entry.path
            try:
                clip = _prepared(source, entry, number, unit.domain, config, refused.get(number))
            except Exception as error:  # whatever is wrong with one file, the others are done
                if held is None or not isinstance(error, (UnreadableError, OSError)):
                    rejects.append(_refusal(number, unit.folder, entry, error))
                    is_changed |= held is not None
                else:  # what it was before is not lost
                    yield from keep(held)
                report(number, 0.0)
                continue
            is_changed |= held is None or held.records != clip.records
            yield from keep(clip)
            report(number, clip.samples / records.SAMPLE_RATE)

    size = records.write_shard(path, encoded())
    shard = records.Shard(
        name=unit.name,
        domain=unit.domain,
        split=unit.split,
        digest=unit.digest,
        clips=tuple(clip.samples for clip in clips),
        bytes=size,
        revision=0 if before.revision is None else before.revision + is_changed,
    )
    seen = [[clip.number, *clip.seen] for clip in clips]
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"shard": dataclasses.asdict(shard), "rejects": rejects, "clips": seen}) + "\n")


def _refusal(number: int, folder: Any, entry: Entry, error: Exception) -> dict[str, Any]:
    """The line of an entry that is refused; with the seconds of what a lower --min-sample-rate would take."""
    row = units.refusal(number, folder, entry, error)
    if isinstance(error, LowRateError):
        row["seconds"] = entry.duration or max(0.0, decoders.seconds(folder / entry.path) - entry.offset)
    return row


class _Clip(NamedTuple):
    """What an entry has become."""

    number: int
    samples: int
    records: list[bytes]
    seen: Seen


def _prepared(
    path: Path, entry: Entry, number: int, domain: str, config: PrepareConfig, refused: AudioError | None
) -> _Clip:
    """Raises DataError, AudioError for what is refused, UnreadableError for what the operating system did not give."""
    if entry.problem:
        raise DataError(entry.problem)
    if refused:
        raise refused

    def load() -> tuple[Seen, audio.Clip]:
        seen = Seen.of(path)  # before the bytes: what is replaced meanwhile is not what was seen
        return seen, audio.load(
            path, records.SAMPLE_RATE, records.PEAK, entry.offset, entry.duration, check=config.check
        )

    seen, clip = units.attempt(path, load)
    samples = np.rint(clip.samples * 32768).astype(np.int16)  # below full scale: its peak is 0.95
    encoded = []
    for start, size in records.segments(samples.size, config.segment_seconds):
        header = records.Header(entry.id, domain, start, samples.size, clip.gain, clip.sample_rate, clip.num_samples)
        encoded.append(records.encode(header, samples[start : start + size]))
    return _Clip(number, samples.size, encoded, seen)


class _Before(NamedTuple):
    """What there is of a unit already, when it is done once more for some of its entries."""

    to_do: frozenset[int]
    clips: dict[int, _Clip]
    rejects: dict[int, dict[str, Any]]
    revision: int | None
    """Of the shard; None if there is none."""

    @classmethod
    def of(cls, unit: Unit, out: Path, config: PrepareConfig, retry_rejected: bool) -> "_Before":
        everything = frozenset(range(len(unit.entries)))
        if (done := finished(unit, out)) is None:
            return cls(everything, {}, {}, None)
        shard, seen = done["shard"], done.get("clips", [])
        revision = shard.get("revision", 0)
        to_do = units.to_do(done, unit.folder, unit.entries, retry_rejected)
        path, lengths = records.shard_path(out, unit.name), tuple(shard["clips"])
        held = records.read_clips(path, lengths, config.segment_seconds) if len(seen) == len(lengths) else None
        if held is None:  # of an older version, or killed between the shard and its marker: there may be other clips
            return cls(everything, {}, {}, revision + 1)
        clips = {
            number: _Clip(number, length, clip, Seen(*stat))
            for (number, *stat), length, clip in zip(seen, lengths, held, strict=True)
        }
        return cls(frozenset(to_do), clips, {row["entry"]: row for row in done["rejects"]}, revision)


def finished(unit: Unit, out: Path) -> dict[str, Any] | None:
    """What became of a unit's files; None if it is not finished. Raises DataError if it was made of other lines."""
    shard = records.shard_path(out, unit.name)
    path = shard.with_suffix(".json")
    if not (path.is_file() and shard.is_file()):
        return None
    done = json.loads(path.read_text())
    if done["shard"]["digest"] != unit.digest:
        raise DataError(f"{path}: was made of other lines of the manifest than {unit.name} has now; use another --out")
    return done
