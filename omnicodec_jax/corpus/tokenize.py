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

from omnicodec_jax import __version__, names
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.readers import Read, Readers, Request
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data import manifest
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.data.units import ASSUMED_SECONDS, UNIT_ENTRIES, join, refusal, remove_leftovers
from omnicodec_jax.errors import DataError, ModelError
from omnicodec_jax.files import replacing
from omnicodec_jax.lanes import ACCELERATOR_BLOCKS, CPU_BLOCKS, Use
from omnicodec_jax.tokenizer import Heard, OmniCodecTokenizer

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


class Worker:
    """A loaded model that turns units into shards, on all devices of this process."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer = OmniCodecTokenizer.from_pretrained(job.model, job.revision, job.encoder, jax.local_devices())
        if not self.tokenizer.computes_features:
            raise ModelError("this model needs the semantic features of each clip: give --encoder DIR")
        self.tokenizer.warm_up()
        self.contract = contract(self.tokenizer, job)
        settle(job.out, self.contract)

    @property
    def use(self) -> Use:
        """Of the devices so far."""
        return self.tokenizer.use

    def run(self, units: Iterable[Unit], existing: frozenset[str] = frozenset()) -> Iterator[float]:
        """Tokenizes one unit after the other; the devices do not wait between them. Gives seconds of audio, a file.

        Files that are refused or skipped have 0 seconds, and come when their unit is written. existing: hashes of what
        is to be left out. Raises OSError where `out` cannot be written.
        """
        opened: dict[str, _Open] = {}
        rate, peak = self.tokenizer.sample_rate, self.tokenizer.config.input_peak

        def requests() -> Iterator[tuple[tuple[str, int], Request]]:
            for unit in units:
                name = unit.name
                remove_leftovers(shards.shard_path(self.job.out, name))
                opened[name] = _Open(unit)
                for number, entry in enumerate(unit.entries):
                    path = unit.folder / entry.path
                    yield (name, number), Request(path, entry, rate, peak)

        def hear(result: Read) -> Heard | None:
            return None if result.source in existing else self.tokenizer.hear(result.clip.samples)

        with Readers(self.job.num_readers) as readers:

            def clips() -> Iterator[tuple[tuple[str, int, Read], Heard]]:
                for (name, number), result, heard in readers.map(requests(), hear):
                    if result is None:
                        opened[name].refuse(number, heard)
                    elif heard is None:
                        opened[name].skipped += 1
                    else:
                        yield (name, number, result), heard

            for (name, number, result), codes in self.tokenizer.encode_each(clips()):
                opened[name].add(number, result, codes)
                yield result.clip.num_samples / result.clip.sample_rate
                yield from self._close(opened)
            yield from self._close(opened)

    def _close(self, opened: dict[str, "_Open"]) -> Iterator[float]:
        """Writes what is complete."""
        for name in [name for name, unit in opened.items() if unit.is_complete]:
            unit = opened.pop(name)
            unit.write(self.job.out, self.contract)
            yield from [0.0] * (len(unit.rejects) + unit.skipped)


class _Open:
    """A unit of which some clips are done."""

    def __init__(self, unit: Unit):
        self.unit, self.skipped = unit, 0
        self.clips: dict[int, Clip] = {}
        self.rejects: dict[int, dict[str, str]] = {}

    @property
    def is_complete(self) -> bool:
        return len(self.clips) + len(self.rejects) + self.skipped == len(self.unit.entries)

    def add(self, number: int, result: Read, codes: np.ndarray) -> None:
        entry, clip = self.unit.entries[number], result.clip
        id, domain = names.text(entry.id), names.text(entry.domain or self.unit.domain)
        tokens = codes.T.astype(np.uint16)
        self.clips[number] = Clip(id, domain, tokens, clip.gain, clip.sample_rate, clip.num_samples, result.source)

    def refuse(self, number: int, error: Exception) -> None:
        self.rejects[number] = refusal(self.unit.folder, self.unit.entries[number], error)

    def write(self, out: Path, contract: dict[str, Any]) -> None:
        path = shards.shard_path(out, self.unit.name)
        clips = [self.clips[number] for number in sorted(self.clips)]
        size = shards.write(path, clips, contract)
        shard = {
            "name": self.unit.name,
            "domain": self.unit.domain,
            "listed": len(self.unit.entries),
            "clips": len(clips),
            "rejected": len(self.rejects),
            "skipped": self.skipped,
            "frames": sum(len(clip.codes) for clip in clips),
            "seconds": sum(clip.num_samples / clip.sample_rate for clip in clips),
            "bytes": size,
        }
        rejects = [self.rejects[number] for number in sorted(self.rejects)]
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({"shard": shard, "rejects": rejects}) + "\n")


def contract(tokenizer: OmniCodecTokenizer, job: Job) -> dict[str, Any]:
    """What the tokens are, and what they depend on; in the metadata of every shard."""
    config, device = tokenizer.config, jax.local_devices()[0]
    return {
        "model": tokenizer.model_hash,
        "encoder": tokenizer.encoder_hash,
        "sample_rate": tokenizer.sample_rate,
        "hop_length": tokenizer.hop_length,
        "frame_rate": tokenizer.frame_rate,
        "codebook_sizes": list(config.codebook_sizes),
        "input_peak": config.input_peak,
        "compute_dtype": "float32",
        "block_frames": list(CPU_BLOCKS if device.platform == "cpu" else ACCELERATOR_BLOCKS),
        "device": device.device_kind,
        "made_by": f"omnicodec_jax {__version__}, jax {jax.__version__}",
        "promise": PROMISE,
    }


def settle(out: Path, contract: dict[str, Any]) -> None:
    """Keeps the contract with the tokens. Raises DataError if there are tokens of another one."""
    path, text = out / shards.SETTINGS, json.dumps(contract, indent=2) + "\n"
    if path.is_file() and (kept := json.loads(path.read_text())) != contract:
        names = [name for name in contract if kept.get(name) != contract[name]]
        changed = "; ".join(f"{name} = {kept.get(name)!r}, now {contract[name]!r}" for name in names)
        raise DataError(f"{out}: holds tokens that would not be the same ({changed}); use another --out")
    with replacing(path) as temporary:
        temporary.write_text(text)


def collect(out: Path) -> None:
    """Joins what the units left into index.jsonl and rejects.jsonl."""
    take: dict[Path, Callable[[Any], Iterable[Any]]] = {
        out / shards.INDEX: lambda unit: [unit["shard"]],
        out / shards.REJECTS: lambda unit: unit["rejects"],
    }
    join(out / shards.SHARDS, take)
