"""`omnicodec tokenize`: manifests → token shards, on one machine or many, with the same tokens wherever and whenever.

A work unit is a slice of a manifest and becomes one shard. What the shard holds depends on the manifest, the model and
the kind of device, not on who computes it beside what else; so whoever is killed and whoever comes after writes the
same bytes.

    manifest ─ units ─┬─ reader process ─┐
                      ├─ reader process ─┼─ encode_each: rows of the device, each at its own clip ─ shard, JSON file
                      └─ reader process ─┘
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from omnicodec_jax import __version__, model_directory, names
from omnicodec_jax.config import CodecConfig, MimiConfig
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.readers import Read, Readers, Request
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data import manifest, units
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.data.units import ASSUMED_SECONDS, UNIT_ENTRIES, Seen
from omnicodec_jax.errors import DataError, ModelError, UnreadableError
from omnicodec_jax.files import remove_leftovers, replacing, rewriting
from omnicodec_jax.lanes import ACCELERATOR_BLOCKS, CPU_BLOCKS, Use
from omnicodec_jax.semantic import read_encoder
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip, load_codec

PROMISE = (
    "A clip's tokens depend on its own samples, the model and the kind of device, and on nothing else: not on padding, "
    "neighbours, batches, order, workers or the number of devices. Semantic codes depend on the whole clip (range of "
    "its log-mel, eight-second windows, positions by its length), acoustic codes on the semantic ones and on the past."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A corpus, a model, and where the tokens go."""

    sources: dict[str, Path]
    """Domain → manifest; domain "" for a manifest that says it line by line."""
    out: Path
    model: str
    revision: str | None = None
    encoder: str | None = None
    shard_hours: float = 1.0
    """Audio of a shard, about."""
    skip_existing: bool = False
    """Leave out files whose content is in a shard of an earlier manifest already."""
    retry_rejected: bool = False
    """Try once more what was refused."""
    num_readers: int = os.cpu_count() or 1

    def __post_init__(self):
        if self.shard_hours <= 0 or self.num_readers < 1:
            raise DataError("--shard-hours must be above 0, --num-readers 1 or more")


class Unit(NamedTuple):
    """A slice of a manifest, and the shard that it becomes."""

    number: int
    domain: str
    folder: Path
    """Where the entries' relative paths begin."""
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """Tells it from any other slice of this or another manifest."""
        digest = hashlib.blake2b(json.dumps(self.entries).encode(), digest_size=4).hexdigest()
        return f"{self.domain or 'audio'}-{self.number:06d}-{digest}"


def plan(job: Job) -> Iterator[Unit]:
    """The units of all manifests, one after the other."""
    for domain, path in job.sources.items():
        folder, number = manifest.folder(path), 0
        entries, seconds = [], 0.0
        for entry in manifest.read(path):
            if not manifest.is_of(entry, domain):
                continue
            entries.append(entry)
            seconds += ASSUMED_SECONDS if entry.seconds is None else entry.seconds
            if seconds >= 3600 * job.shard_hours or len(entries) == UNIT_ENTRIES:
                yield Unit(number, domain, folder, tuple(entries))
                entries, seconds, number = [], 0.0, number + 1
        if entries:
            yield Unit(number, domain, folder, tuple(entries))


def to_do(job: Job, unit: Unit) -> list[int]:
    """Numbers of a unit's entries that are left to do."""
    return units.to_do(shards.finished(job.out, unit.name), unit.folder, unit.entries, job.retry_rejected)


class Existing(NamedTuple):
    """What the shards of other manifests hold."""

    sources: frozenset[str] = frozenset()
    older: bool = False
    """Whether sources of segments are among them that were hashed as they were before."""

    def __contains__(self, result: object) -> bool:
        return isinstance(result, Read) and not self.sources.isdisjoint((result.source, result.older))


NOTHING = Existing()


class Worker:
    """A loaded model that turns units into shards, on all devices of this process."""

    def __init__(self, job: Job):
        """Raises ModelError, and DataError where `job.out` holds tokens of another contract."""
        self.job = job
        self.tokenizer = OmniCodecTokenizer.from_pretrained(job.model, job.revision, job.encoder, jax.local_devices())
        device, codec = jax.local_devices()[0], self.tokenizer
        self.contract = {
            **_described(codec.config, codec.model_hash, codec.encoder_hash),
            "block_frames": list(CPU_BLOCKS if device.platform == "cpu" else ACCELERATOR_BLOCKS),
            "device": device.device_kind,
        }
        """What the tokens are, and what they depend on; in the metadata of every shard."""
        check(job, self.contract)
        self._is_warm = False

    @property
    def use(self) -> Use:
        """Of the devices so far."""
        return self.tokenizer.use

    def run(self, units: Iterable[Unit], existing: Existing = NOTHING) -> Iterator[float]:
        """Tokenizes one unit after the other; the devices do not wait between them. Gives seconds of audio, a file.

        Files that are refused or skipped have 0 seconds, and come when their unit is written. existing: what is to be
        left out. Raises OSError where `out` cannot be written.
        """
        if not self._is_warm:
            keep(self.job, self.contract)
            self.tokenizer.warm_up()
            self._is_warm = True
        opened: dict[str, _Open] = {}
        rate, peak = self.tokenizer.sample_rate, self.tokenizer.config.input_peak

        def requests() -> Iterator[tuple[tuple[str, int], Request]]:
            for unit in units:
                name = unit.name
                remove_leftovers(shards.shard_path(self.job.out, name), self.job.out / shards.STATE)
                remove_leftovers(shards.marker_path(self.job.out, name))
                opened[name] = _Open(self.job, unit)
                for number in opened[name].to_do:
                    entry, kept = unit.entries[number], opened[name].clips.get(number)
                    known = None if kept is None else kept.source
                    yield (name, number), Request(unit.folder / entry.path, entry, rate, peak, known, existing.older)

        def prepare(result: Read) -> PreparedClip | None:
            return None if result.clip is None or result in existing else self.tokenizer.prepare(result.clip.samples)

        with Readers(self.job.num_readers) as readers:

            def clips() -> Iterator[tuple[tuple[str, int, Read], PreparedClip]]:
                for (name, number), result, prepared in readers.map(requests(), prepare):
                    if result is None:
                        opened[name].refuse(number, prepared)
                    elif result.clip is None:
                        opened[name].keep(number, result)
                    elif prepared is None:
                        opened[name].settle(number)
                    else:
                        yield (name, number, result), prepared

            for (name, number, result), codes in self.tokenizer.encode_each(clips()):
                opened[name].add(number, result, codes)
                yield result.clip.num_samples / result.clip.sample_rate
                yield from self._close(opened)
            yield from self._close(opened)

    def _close(self, opened: dict[str, "_Open"]) -> Iterator[float]:
        """Writes what is complete."""
        for name in [name for name, unit in opened.items() if not unit.left]:
            unit = opened.pop(name)
            unit.write(self.job.out, self.contract)
            yield from [0.0] * (len(unit.to_do) - unit.added)


class _Open:
    """A unit of which some clips are done: those of an earlier run, when it is open once more for what was refused."""

    def __init__(self, job: Job, unit: Unit):
        self.unit, self.added = unit, 0
        self.clips: dict[int, Clip] = {}
        self.seen: dict[int, Seen] = {}
        self.rejects: dict[int, dict[str, Any]] = {}
        finished = shards.finished(job.out, unit.name)
        self.to_do = units.to_do(finished, unit.folder, unit.entries, job.retry_rejected)
        if finished is not None and "clips" in finished:
            self._keep(finished, list(shards.read_shard(shards.shard_path(job.out, unit.name))))
        self.left = set(self.to_do)

    def _keep(self, finished: dict[str, Any], clips: list[Clip]) -> None:
        numbers = [number for number, *_ in finished["clips"]]
        if len(numbers) != len(clips):  # killed after the shard was written once more, and before its marker was
            self.to_do = list(range(len(self.unit.entries)))
            return
        self.clips = dict(zip(numbers, clips, strict=True))
        self.seen = {number: Seen(*seen) for number, *seen in finished["clips"]}
        self.rejects = {row["entry"]: row for row in finished["rejects"]}

    def add(self, number: int, result: Read, codes: np.ndarray) -> None:
        assert result.clip is not None
        entry, clip = self.unit.entries[number], result.clip
        id, domain = names.text(entry.id), names.text(entry.domain or self.unit.domain)
        tokens = codes.T.astype(np.uint16)
        self.settle(number)
        self.clips[number] = Clip(id, domain, tokens, clip.gain, clip.sample_rate, clip.num_samples, result.source)
        self.seen[number] = result.seen
        self.added += 1

    def keep(self, number: int, result: Read) -> None:
        """The tokens that are there are of the same bytes, wherever these lie now."""
        self.left.remove(number)
        self.seen[number] = result.seen

    def refuse(self, number: int, error: Exception) -> None:
        if isinstance(error, (UnreadableError, OSError)) and number in self.clips:  # what it was before is not lost
            self.left.remove(number)
            return
        self.settle(number)
        self.rejects[number] = units.refusal(number, self.unit.folder, self.unit.entries[number], error)

    def settle(self, number: int) -> None:
        """Whatever was known of an entry is of the past; without more, it is left out."""
        self.left.remove(number)
        for held in (self.clips, self.seen, self.rejects):
            held.pop(number, None)

    def write(self, out: Path, contract: dict[str, Any]) -> None:
        clips = [self.clips[number] for number in sorted(self.clips)]
        size = shards.write(shards.shard_path(out, self.unit.name), clips, contract)
        shard = {
            "name": self.unit.name,
            "domain": self.unit.domain,
            "listed": len(self.unit.entries),
            "clips": len(clips),
            "rejected": len(self.rejects),
            "skipped": len(self.unit.entries) - len(clips) - len(self.rejects),
            "frames": sum(len(clip.codes) for clip in clips),
            "seconds": sum(clip.num_samples / clip.sample_rate for clip in clips),
            "bytes": size,
        }
        rejects = [self.rejects[number] for number in sorted(self.rejects)]
        seen = [[number, *self.seen[number]] for number in sorted(self.seen)]
        with replacing(shards.marker_path(out, self.unit.name)) as temporary:
            temporary.write_text(json.dumps({"shard": shard, "rejects": rejects, "clips": seen}) + "\n")


def described(job: Job) -> dict[str, Any]:
    """What the tokens are and what they depend on, but for the device: of the files alone, for any process to ask.

    Raises ModelError, ConfigError for a model or an encoder that cannot be loaded or does not fit.
    """
    config, variables = load_codec(job.model, job.revision)
    semantic = getattr(config, "semantic", None)
    if job.encoder is None and semantic is not None and semantic.source != "log_mel":
        raise ModelError("this model needs the semantic features of each clip: give --encoder DIR")
    encoder = None if job.encoder is None else model_directory.model_hash(*read_encoder(job.encoder, semantic))
    return _described(config, model_directory.model_hash(config, variables), encoder)


def _described(config: CodecConfig | MimiConfig, model: str, encoder: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "encoder": encoder,
        "sample_rate": config.sample_rate,
        "hop_length": config.hop_length,
        "frame_rate": config.frame_rate,
        "codebook_sizes": list(config.codebook_sizes),
        "input_peak": config.input_peak,
        "compute_dtype": "float32",
        "made_by": f"omnicodec_jax {__version__}, jax {jax.__version__}",
        "promise": PROMISE,
    }


def check(job: Job, contract: dict[str, Any]) -> None:
    """Raises DataError if `job.out` holds tokens of another contract, or was cut into shards of another length."""
    if (kept := shards.settings(job.out)) is None:
        return
    hours = kept.get("shard_hours", job.shard_hours)  # absent where an older version has written
    if names := [name for name in contract if kept.get(name) != contract[name]]:
        changed = "; ".join(f"{name} = {kept.get(name)!r}, now {contract[name]!r}" for name in names)
        raise DataError(f"{job.out}: holds tokens that would not be the same ({changed}); use another --out")
    if hours != job.shard_hours:
        raise DataError(
            f"{job.out}: was cut into shards of --shard-hours {hours:g}, now {job.shard_hours:g}; use that, or another "
            "--out"
        )


def keep(job: Job, contract: dict[str, Any]) -> None:
    """Keeps the contract with the tokens."""
    with rewriting(job.out / shards.STATE / shards.SETTINGS) as temporary:
        temporary.write_text(json.dumps({**contract, "shard_hours": job.shard_hours}, indent=2) + "\n")


def collect(out: Path) -> None:
    """Joins what the units left into index.jsonl and rejects.jsonl."""
    take: dict[Path, Callable[[Any], Iterable[Any]]] = {
        out / shards.INDEX: lambda unit: [unit["shard"]],
        out / shards.REJECTS: units.listed,
    }
    units.join(out / shards.UNITS, take)
