"""`omnicodec tokenize`: turns manifests into token shards, which are the same on one machine and on many.

A work unit is a slice of a manifest and becomes one shard. The content of a shard depends on the manifest, the model
and the kind of device alone, and not on the machine or on other units. So a run that goes on after another was killed
writes the same bytes.

    manifest ─ units ─┬─ reader process ─┐
                      ├─ reader process ─┼─ encode_each: rows of the device, each at its own clip ─ shard, JSON file
                      └─ reader process ─┘
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from omnicodec_jax import machine, model_directory, names
from omnicodec_jax.codec_directory import find_encoder, load_codec
from omnicodec_jax.config import CodecConfig, MimiConfig, Precision
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.readers import Read, Readers, Request
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data import attempts, units
from omnicodec_jax.data.manifest import Manifest
from omnicodec_jax.data.units import Outcomes, Slice, Unit
from omnicodec_jax.errors import DataError, ModelError
from omnicodec_jax.files import remove_leftovers, replacing, rewriting
from omnicodec_jax.lanes import ACCELERATOR_BLOCKS, CPU_BLOCKS, Use
from omnicodec_jax.semantic import read_encoder_of
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip
from omnicodec_jax.version import __version__

PROMISE = (
    "A clip's tokens depend on its own samples, the model and the kind of device, and on nothing else: not on padding, "
    "neighbours, batches, order, workers or the number of devices. Semantic codes depend on the whole clip (range of "
    "its log-mel, eight-second windows, positions by its length), acoustic codes on the semantic ones and on the past."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A corpus, a model, and where the tokens go."""

    sources: dict[str, Path]
    """Manifest or directory of each domain; the domain "" is for one that says the domain line by line."""
    out: Path
    """Directory of the token shards."""
    model: str
    """Directory or hub id of the codec."""
    revision: str | None = None
    """Revision of a hub model; None: the newest."""
    encoder: str | None = None
    """Directory of the encoder of semantic features; None for models that need none."""
    precision: Precision = "float32"
    """Number format of the codec's convolutions and matrix products."""
    encoder_precision: Precision = "float32"
    """Number format of the encoder's convolutions and matrix products."""
    shard_hours: float = 1.0
    """Approximate length of a shard, in hours of audio."""
    skip_existing: bool = False
    """Whether files are left out whose content is in a shard of another manifest already."""
    retry_rejected: bool = False
    """Whether files that were refused are tried once more."""
    num_readers: int = machine.cores()
    """Number of processes that read files ahead of the devices."""

    def __post_init__(self):
        if not 0 < self.shard_hours < float("inf") or self.num_readers < 1:
            raise DataError("--shard-hours must be a number above 0, --num-readers 1 or more")


def plan(manifests: dict[str, Manifest], shard_hours: float) -> Iterator[Unit]:
    """Yields the units of all manifests, one manifest after the other; only the unit that is being filled is held."""
    for domain, listed in manifests.items():
        gathered = Slice(shard_hours)
        for entry in listed:
            if gathered.add(entry):
                yield _unit(domain, listed.folder, gathered)
        if gathered:
            yield _unit(domain, listed.folder, gathered)


def _unit(domain: str, folder: Path, gathered: Slice) -> Unit:
    """Returns a unit whose name tells it from any other slice of this or another manifest."""
    number, entries = gathered.number, gathered.take()
    return Unit(f"{domain or 'audio'}-{number:06d}-{units.entries_digest(entries, 4)}", domain, folder, entries)


class Existing(NamedTuple):
    """The sources that the shards of other manifests hold. A `Read` is in it if its source is one of them."""

    sources: frozenset[str] = frozenset()
    """Hashes of the sources of all clips."""
    older: bool = False
    """Whether some of them are of the kind that version 0.1 gave to segments."""

    def __contains__(self, result: object) -> bool:
        return isinstance(result, Read) and not self.sources.isdisjoint((result.source, result.older))

    def source_of(self, result: Read) -> str:
        """Returns the hash by which a clip is there already."""
        return result.source if result.source in self.sources else str(result.older)


NOTHING = Existing()
GONE = (-1, -1)
"""Stands for the size and time of a file that is to be read once more: no file has these."""


def finished(out: Path, name: str, existing: Existing) -> dict[str, Any] | None:
    """Reads what became of a unit's entries; None if it is not finished.

    An entry that was left out, since a shard of another manifest held the same, is to be done if that shard holds it no
    longer: its own file may have been replaced since.
    """
    done = shards.finished(out, name)
    if done is not None and (sources := dict(done.get("sources", []))):
        gone = {number for number, source in sources.items() if source not in existing.sources}
        done["skipped"] = [[number, *(GONE if number in gone else seen)] for number, *seen in done.get("skipped", [])]
    return done


class Worker:
    """A loaded model that turns units into shards, on all devices of this process."""

    def __init__(self, job: Job):
        """Loads the model. Raises ModelError, and DataError if `job.out` holds tokens of another contract."""
        self.job = job
        self.tokenizer = OmniCodecTokenizer.from_pretrained(
            job.model, job.revision, job.encoder, jax.local_devices(), job.precision, job.encoder_precision
        )
        device, codec, kept = jax.local_devices()[0], self.tokenizer, shards.settings(job.out) or {}
        model = codec.model_hash_as(kept.get("model"), kept.get("tokens_hash"))
        self.contract = {
            **_described(job, codec.config, model, codec.tokens_hash, codec.encoder_hash_as(kept.get("encoder"))),
            "block_frames": list(CPU_BLOCKS if device.platform == "cpu" else ACCELERATOR_BLOCKS),
            "device": device.device_kind,
        }
        """The description of the tokens and of all that they depend on. The metadata of every shard have it."""
        check(job, self.contract)
        self._is_warm = False

    @property
    def use(self) -> Use:
        """The work of the devices so far."""
        return self.tokenizer.use

    def run(self, units: Iterable[Unit], existing: Existing = NOTHING) -> Iterator[float]:
        """Tokenizes one unit after the other. The devices do not wait between them.

        Args:
            units: The units.
            existing: What is left out, because shards of other manifests hold it.

        Yields:
            Seconds of audio of each file. Files that are refused or skipped have 0 seconds, and come when their unit is
            written.

        Raises:
            OSError: If `out` cannot be written.
            DataError: If tokens would be lost to those of files of the same names in another folder.
        """
        if not self._is_warm:
            keep(self.job, self.contract)
            self.tokenizer.warm_up()
            self._is_warm = True
        opened: dict[str, _OpenUnit] = {}
        rate, peak = self.tokenizer.sample_rate, self.tokenizer.config.input_peak

        def requests() -> Iterator[tuple[tuple[str, int], Request]]:
            for unit in units:
                name = unit.name
                remove_leftovers(shards.shard_path(self.job.out, name), folder=self.job.out / shards.STATE)
                remove_leftovers(shards.marker_path(self.job.out, name))
                opened[name] = _OpenUnit(self.job, unit, existing)
                outcomes = opened[name].outcomes
                for number in outcomes.to_do:
                    entry, kept = unit.entries[number], outcomes.clips.get(number)
                    known = None if kept is None else kept.source
                    path = entry.file(unit.folder)
                    yield (name, number), Request(path, entry, rate, peak, known, existing.older)

        def prepare(result: Read) -> PreparedClip | None:
            return None if result.clip is None or result in existing else self.tokenizer.prepare(result.clip.samples)

        with Readers(self.job.num_readers) as readers:

            def clips() -> Iterator[tuple[tuple[str, int, Read], PreparedClip]]:
                for (name, number), result, prepared in readers.map(requests(), prepare):
                    if result is None:
                        opened[name].refuse(number, prepared)
                        continue
                    outcomes = opened[name].outcomes
                    if result.clip is None:
                        outcomes.keep(number, result.seen)
                        continue
                    outcomes.check_place(number)
                    if prepared is None:
                        outcomes.leave_out(number, result.seen)
                        opened[name].sources[number] = existing.source_of(result)
                    else:
                        yield (name, number, result), prepared

            for (name, number, result), codes in self.tokenizer.encode_each(clips()):
                yield opened[name].add(number, result, codes)
                yield from self._close(opened)
            yield from self._close(opened)

    def _close(self, opened: dict[str, "_OpenUnit"]) -> Iterator[float]:
        """Writes the units that are complete, and yields 0 seconds for each of their files that was not encoded."""
        for name in [name for name, unit in opened.items() if unit.outcomes.is_complete]:
            unit = opened.pop(name)
            unit.write(self.job.out, self.contract)
            yield from [0.0] * (len(unit.outcomes.to_do) - unit.num_encoded)


class _OpenUnit:
    """A unit that is being tokenized."""

    def __init__(self, job: Job, unit: Unit, existing: Existing):
        self.unit = unit
        kept, clips = finished(job.out, unit.name, existing), None
        if kept is not None:
            with contextlib.suppress(DataError):  # a damaged shard is made anew
                clips = list(shards.read_shard(shards.shard_path(job.out, unit.name)))
        self.outcomes = Outcomes(unit, kept, clips, job.retry_rejected)
        self.sources: dict[int, str] = dict((kept or {}).get("sources", []))
        """Hashes of the sources of entries that were left out, by which shards of other manifests hold them."""
        self.num_encoded = 0
        """Number of clips that this run has encoded."""

    def add(self, number: int, result: Read, codes: np.ndarray) -> float:
        """Keeps the codes [K, N] of an entry that has been read and encoded; returns its seconds of audio."""
        assert result.clip is not None
        entry, clip = self.unit.entries[number], result.clip
        id, domain = names.text(entry.id), names.text(entry.domain or self.unit.domain)
        tokens = codes.T.astype(np.uint16)
        row = Clip(id, domain, tokens, clip.gain, clip.sample_rate, clip.num_samples, result.source)
        self.outcomes.add(number, row, result.seen)
        self.num_encoded += 1
        return clip.num_samples / clip.sample_rate

    def refuse(self, number: int, error: Exception) -> None:
        """Refuses an entry."""
        row = attempts.refusal(number, self.unit.folder, self.unit.entries[number], error)
        self.outcomes.refuse(number, row)

    def write(self, out: Path, contract: dict[str, Any]) -> None:
        """Writes the shard, and the JSON file that marks the unit as finished."""
        clips = [self.outcomes.clips[number] for number in sorted(self.outcomes.clips)]
        size = shards.write(shards.shard_path(out, self.unit.name), clips, contract)
        shard = {
            "name": self.unit.name,
            "domain": self.unit.domain,
            "listed": len(self.unit.entries),
            "clips": len(clips),
            "rejected": self.outcomes.num_rejects,
            "skipped": len(self.unit.entries) - len(clips) - self.outcomes.num_rejects,
            "frames": sum(len(clip.codes) for clip in clips),
            "seconds": sum(clip.num_samples / clip.sample_rate for clip in clips),
            "bytes": size,
        }
        with replacing(shards.marker_path(out, self.unit.name)) as temporary:
            sources = {"sources": sorted(self.sources.items())} if self.sources else {}
            temporary.write_text(self.outcomes.to_json(shard, **sources))


def described(job: Job) -> dict[str, Any]:
    """Returns what the tokens of a job are and what they depend on, apart from the device. It needs no device itself.

    A directory that version 0.1 has begun keeps the hashes that it carries, if they are of this model and encoder.
    Raises ModelError, ConfigError for a model or an encoder that cannot be loaded or does not fit.
    """
    kept = shards.settings(job.out) or {}
    config, variables = load_codec(job.model, job.revision)
    semantic = getattr(config, "semantic", None)
    directory = find_encoder(job.model, job.revision, job.encoder)
    if directory is None and semantic is not None and semantic.source != "log_mel":
        raise ModelError("this model needs the semantic features of each clip: give --encoder DIR")
    encoder = None
    if directory is not None:
        encoder = model_directory.model_hash(*read_encoder_of(directory, semantic), known=kept.get("encoder"))
    model = model_directory.model_hash(config, variables, kept.get("model"), kept.get("tokens_hash"))
    return _described(job, config, model, model_directory.tokens_hash(config, variables), encoder)


def _described(
    job: Job, config: CodecConfig | MimiConfig, model: str, tokens_hash: str, encoder: str | None
) -> dict[str, Any]:
    return {
        "format": shards.FORMAT,
        "model": model,
        "tokens_hash": tokens_hash,
        "encoder": encoder,
        "sample_rate": config.sample_rate,
        "hop_length": config.hop_length,
        "frame_rate": config.frame_rate,
        "codebook_sizes": list(config.codebook_sizes),
        "input_peak": config.input_peak,
        "compute_dtype": job.precision,
        "encoder_dtype": None if encoder is None else job.encoder_precision,
        "made_by": f"omnicodec_jax {__version__}, jax {jax.__version__}",
        "promise": PROMISE,
    }


def check(job: Job, contract: dict[str, Any]) -> None:
    """Raises DataError if `job.out` holds tokens of another contract, or was cut into shards of another length."""
    if (kept := shards.settings(job.out)) is None:
        return
    # Before the contract said so, encoders computed in float32, and tokens were of one model alone.
    kept.setdefault("encoder_dtype", None if kept.get("encoder") is None else "float32")
    kept.setdefault("tokens_hash", contract.get("tokens_hash"))
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
    """Writes the contract to the directory of the tokens."""
    with rewriting(job.out / shards.STATE / shards.SETTINGS) as temporary:
        temporary.write_text(json.dumps({**contract, "shard_hours": job.shard_hours}, indent=2) + "\n")


def collect(out: Path) -> None:
    """Joins the JSON files of finished units into index.jsonl and rejects.jsonl."""
    units.collect(out / shards.UNITS, out / shards.INDEX, out / shards.REJECTS)
