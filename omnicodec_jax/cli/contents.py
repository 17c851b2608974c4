"""`omnicodec inspect`: says in a few lines what a directory holds that one of the commands has written."""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omnicodec_jax import shipped
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.config import CodecConfig, MimiConfig, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import shards
from omnicodec_jax.data import features, records
from omnicodec_jax.data.prepare_unit import read_settings
from omnicodec_jax.errors import OmniCodecError

REPORT, JOURNAL = "report.json", "journal.jsonl"
DISTANCE = "mel_distance"
ABOUT = "about/metadata"
"""The file in the folder of a checkpoint that says what run it is of."""


def describe(path: Path) -> list[str] | None:
    """Says what a directory or a shard of tokens holds; None if no command has written it.

    Raises OmniCodecError for what is damaged.
    """
    kinds: dict[str, Callable[[Path], Iterator[str]]] = {
        "config.json": _model,
        records.SETTINGS: _prepared,
        features.SETTINGS: _features,
        "checkpoints": _run,
        REPORT: _report,
        JOURNAL: _unfinished_report,
        ABOUT: _checkpoint,
        f"*/{ABOUT}": _checkpoints,
        f"{shards.SHARDS}/*{shards.SUFFIX}": _tokens,
    }
    if path.suffix == shards.SUFFIX and path.is_file():
        return list(_token_shards(path, [path], 0))
    if not path.is_dir():
        return None
    found = (write for marker, write in kinds.items() if any(path.glob(marker)))
    write = next(found, None)
    try:
        return None if write is None else list(write(path))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise OmniCodecError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def codec(config: CodecConfig | MimiConfig) -> Iterator[str]:
    """Says what the tokens of a codec are: frame rate, bit rate and codebooks."""
    sizes = config.codebook_sizes
    rate = config.frame_rate * sum(math.log2(size) for size in sizes)
    yield f"{config.frame_rate:g} Hz, hop {config.hop_length} at {config.sample_rate} Hz, {rate:.10g} bit/s"
    yield f"{len(sizes)} codebooks of {_alike(sizes)} entries"
    if isinstance(config, CodecConfig) and config.semantic is not None:
        yield f"semantic features: {config.semantic.source}, {config.semantic.feature_dim} wide"


def _model(path: Path) -> Iterator[str]:
    import jax

    from omnicodec_jax import model_directory

    config, variables = model_directory.load(path)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    kind, hash = model_directory.model_type(config), model_directory.model_hash(config, variables)
    yield f"{path}: {kind} model {hash}, {parameters:,} parameters"
    if isinstance(config, CodecConfig | MimiConfig):
        yield from codec(config)
        yield f"hash of what makes its tokens, its decoder left out: {model_directory.tokens_hash(config, variables)}"
    if (path / "discriminators" / model_directory.CONFIG).is_file():
        yield "with its discriminators, to train on from"
    if (path / model_directory.ENCODER / model_directory.CONFIG).is_file():
        encoder = model_directory.load(path / model_directory.ENCODER)
        yield f"with the {model_directory.model_type(encoder[0])} encoder {model_directory.model_hash(*encoder)}"
    if earlier := model_directory.hash_of_0_1(config, variables):
        yield f"version 0.1 called it {earlier}"
    if (path / shipped.CARD).is_file():
        yield "its model card:\n"
        yield from (path / shipped.CARD).read_text().splitlines()


def _prepared(path: Path) -> Iterator[str]:
    index, settings = records.read_index(path), dataclasses.asdict(read_settings(path))
    clips, seconds = Counter[tuple[str, str]](), defaultdict[tuple[str, str], float](float)
    for shard in index:
        clips[shard.domain, shard.split] += len(shard.clips)
        seconds[shard.domain, shard.split] += sum(shard.clips) / records.SAMPLE_RATE
    yield (
        f"{path}: prepared audio, {_clips(sum(clips.values()), sum(seconds.values()))} in {len(index)} shards"
        + _refused(path / records.REJECTS)
    )
    for domain in sorted({shard.domain for shard in index}):
        train, held_out = ((clips[domain, split], seconds[domain, split]) for split in ("train", "validation"))
        yield f"{domain}: {_clips(*train)} to train on, {_clips(*held_out)} held out"
    yield f"made with {', '.join(f'{name} = {value}' for name, value in settings.items())}"
    yield f"fingerprint {records.fingerprint(index)}"


def _features(path: Path) -> Iterator[str]:
    format = features.read_format(path)
    assert format is not None
    files = list((path / records.SHARDS).glob(f"[!.]*{records.SUFFIX}"))
    seconds = sum(file.stat().st_size for file in files) / format.bytes_per_vector / format.vector_rate
    yield f"{path}: semantic features, about {seconds / 3600:.2f} h in {len(files)} shards"
    yield f"{format.feature_dim} wide, stored as {format.number}, computed in {format.compute} by {format.source}"
    if format.crop_samples is not None and format.stride_samples is not None:
        crop, stride = (samples / records.SAMPLE_RATE for samples in (format.crop_samples, format.stride_samples))
        yield f"of crops of {crop:g} s, {stride:g} s apart"
    yield f"encoder {format.encoder}"


def _run(path: Path) -> Iterator[str]:
    found = [folder for folder in (path / "checkpoints").iterdir() if folder.name.isdecimal()]
    if isinstance(path, BucketPath):  # there, checkpoints that are not complete have the names of steps, too
        found = [folder for folder in found if (folder / "commit_success.txt").is_file()]
    folders = {int(folder.name): folder for folder in found}
    if not folders:
        yield f"{path}: training run without a checkpoint"
        return
    abouts = {step: about for step, folder in sorted(folders.items()) if (about := _json(folder / ABOUT)) is not None}
    damaged = sorted(folders.keys() - abouts.keys())
    if not abouts:
        raise OmniCodecError(f"{path}: no checkpoint here can be read: {', '.join(map(str, damaged))}")
    last = max(abouts)
    about, kept = abouts[last], f"checkpoints of steps {', '.join(map(str, abouts))}"
    kept += f", and damaged ones of steps {', '.join(map(str, damaged))}" if damaged else ""
    if "model" in about["config"]:
        model = config_files.run_config(about["config"], str(folders[last]), PerplexityConfig)
        yield f"{path}: language model of tokens (omnicodec perplexity) at step {last} of {model.optimizer.total_steps}"
        yield kept
        yield f"layout {model.layout}, seed {model.seed}"
        return
    config = config_files.run_config(about["config"], str(folders[last]))
    yield f"{path}: training run at step {last} of {config.optimizer.total_steps}"
    yield kept
    measured = {step: _json(folders[step] / "metrics" / "metrics") for step in abouts}
    distances = {step: metrics[DISTANCE] for step, metrics in measured.items() if metrics is not None}
    if distances:
        yield "mel distance of held-out clips: " + ", ".join(f"{d:.4f} at step {step}" for step, d in distances.items())
    yield from codec(config.codec)
    length = config.data.segment_samples / config.codec.sample_rate
    domains = ", ".join(f"{domain.name} {domain.weight:g}" for domain in config.data.domains)
    yield f"{config.data.batch_size} clips of {length:g} s a step, from {config.data.prepared} ({domains})"
    yield f"learning rate {config.optimizer.learning_rate:g}, seed {config.seed}"


def _json(path: Path) -> Any:
    """Reads a file of JSON; None if it is not there, or is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _checkpoints(path: Path) -> Iterator[str]:
    yield f"{path}: the checkpoints of the run in {path.absolute().parent}; inspect that"


def _checkpoint(path: Path) -> Iterator[str]:
    yield f"{path}: a checkpoint of the run in {path.absolute().parents[1]}; inspect that"


def _unfinished_report(path: Path) -> Iterator[str]:
    yield f"{path}: report of an evaluation, unfinished; the same omnicodec evaluate goes on with it"


def _report(path: Path) -> Iterator[str]:
    report = json.loads((path / REPORT).read_text())
    rows = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    clips = Counter(domain for domain, _ in {(row["domain"], row["clip"]) for row in rows})
    systems = [system["name"] for system in report["systems"] if system["kind"] not in ("original", "quoted")]
    numbers = ", ".join(f"{domain} {clips[domain]}" for domain in report["domains"])
    yield (
        f"{path}: report of an evaluation, {len(systems)} systems on {clips.total()} clips ({numbers})"
        + _refused(path / "rejects.jsonl")
    )
    yield f"systems: {', '.join(systems)}"
    yield f"metrics: {', '.join(metric['title'] for metric in report['metrics'])}"
    yield f"written {report['created']}; see {path / 'tables.md'} and {path / 'index.html'}"


def _tokens(path: Path) -> Iterator[str]:
    yield from _token_shards(path, shards.shards(path), _lines(shards.rejects_path(path)))


def _token_shards(path: Path, files: list[Path], refused: int) -> Iterator[str]:
    import pyarrow as pa

    contract = shards.read_contract(files[0])
    rows = pa.concat_tables([shards.read_columns(file, ["domain", "duration"]) for file in files])
    each = rows.group_by("domain").aggregate([("duration", "count"), ("duration", "sum")]).sort_by("domain").to_pylist()
    clips, seconds = (sum(row[f"duration_{what}"] or 0 for row in each) for what in ("count", "sum"))
    lost = f", {refused} files refused" if refused else ""
    yield f"{path}: tokens, {_clips(clips, seconds)} in {len(files)} shards{lost}"
    for row in each:
        yield f"{row['domain'] or 'no domain'}: {_clips(row['duration_count'], row['duration_sum'])}"
    sizes = contract["codebook_sizes"]
    yield f"{len(sizes)} codebooks of {_alike(sizes)} entries, {contract['frame_rate']:g} Hz"
    yield f"made by model {contract['model']}" + (f", encoder {contract['encoder']}" if contract["encoder"] else "")


def _clips(count: int, seconds: float) -> str:
    return f"{count} clips of {seconds / 3600:.2f} h"


def _refused(path: Path) -> str:
    number = _lines(path)
    return f", {number} files refused (see {path})" if number else ""


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _alike(sizes: Any) -> str:
    return " or ".join(map(str, sorted(set(sizes))))
