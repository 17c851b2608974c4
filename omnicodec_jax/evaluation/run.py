"""Runs an evaluation: clips → reconstructions → scores → a report. After an interruption, every stage is resumed.

OUT holds audio/, codes/, spectrograms/, journal.jsonl (the work that is done), rejects.jsonl, and the report:
index.html, tables.md, scores.csv, scores.jsonl, report.json.
"""

import csv
import dataclasses
import datetime
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.buckets import mirrored
from omnicodec_jax.data import audio
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.units import Progress
from omnicodec_jax.errors import ConfigError, DataError, ModelError
from omnicodec_jax.evaluation import datasets, page, quoted, reconstruct, summary
from omnicodec_jax.evaluation.clip_sets import frechet_means
from omnicodec_jax.evaluation.frechet import FRECHET
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.listening import REFERENCE
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.evaluation.reconstruct import ORIGINAL, Failure, Original
from omnicodec_jax.evaluation.scores import METRICS, ScoreRequest, Scores, score_all
from omnicodec_jax.evaluation.study import Study, markdown
from omnicodec_jax.evaluation.systems import Codec, Folder, System, TokenizerCodec
from omnicodec_jax.evaluation.token_studies import TokenMeasurer, TokenStudies
from omnicodec_jax.files import digest, rewriting, sweep

LOG = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
"""The name of the list of the work that is done."""
Scored = dict[tuple[str, str, str], Scores]
"""The scores by system, domain and clip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The options of an evaluation: which systems are compared, on which clips, by which metrics."""

    data: dict[str, Path]
    """The manifest or folder of each domain, which `datasets.clips` can read."""
    out: Path
    """The folder of the report."""
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    """Model directories or hub ids, by their names in the tables."""
    peers: tuple[PeerRequest, ...] = ()
    """Other codecs to compare with."""
    reconstructions: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Folders with reconstructions of other systems, by the names of the systems."""
    codebooks: tuple[int, ...] = (8, 16, 32)
    """The numbers of codebooks to decode from."""
    metrics: tuple[str, ...]
    """The names of the metrics."""
    encoder: Path | None = None
    """Model directory of the encoder of semantic features, for models that need one."""
    limit: int | None = None
    """The largest number of clips of a domain that are evaluated; None: all."""
    shown: int = 30
    """The number of clips of a domain that the page has players for."""
    quoted: bool = False
    """Whether the report shows the paper's figures, too."""
    num_workers: int = 1
    """The number of processes that compute metrics."""
    tokens: TokenStudies = dataclasses.field(default_factory=TokenStudies)
    """The studies of the codecs' tokens."""

    def __post_init__(self):
        if not self.codebooks or min(self.codebooks) < 1:
            raise ConfigError(f"--codebooks {self.codebooks}: must be numbers of codebooks, 1 or more")
        for name, least in {"limit": 1, "shown": 0, "num_workers": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
        for option, given in (("--model", list(self.models)), ("--peers", [peer.name for peer in self.peers])):
            if twice := [name for name, count in Counter(map(names.key, given)).items() if count > 1]:
                raise ConfigError(f"{option}: {twice[0]} is there twice, but systems are told apart by their names")
        for name, folder in self.reconstructions.items():
            if name.casefold() in (ORIGINAL.casefold(), REFERENCE.casefold()):
                raise ConfigError(f"--reconstructions {name}: stands for the clips themselves; give it another name")
            if (self.out / "audio" / name).resolve() in (folder.resolve(), *folder.resolve().parents):
                raise ConfigError(
                    f"--reconstructions {name}: {folder} is where the report's own files of {name} go, which would be "
                    "lost; give another name, or another --out"
                )

    @property
    def metrics_of_clips(self) -> list[str]:
        """The names of the metrics that score single clips."""
        return [name for name in self.metrics if name != FRECHET.name]

    def codecs(self) -> Iterator[tuple[str, Callable[[], Codec]]]:
        """Yields the name of each codec with a function that loads it, since memory may not hold all codecs at once."""
        for name, source in self.models.items():
            yield name, partial(self._load_model, name, source)
        for peer in self.peers:
            yield peer.name, partial(peer.load, self.codebooks)

    def _load_model(self, name: str, source: str) -> Codec:
        from omnicodec_jax.tokenizer import OmniCodecTokenizer

        return TokenizerCodec(name, OmniCodecTokenizer.from_pretrained(source, encoder=self.encoder), self.codebooks)


def run(evaluation: Evaluation, needs_codec: bool = True) -> int:
    """Runs an evaluation and writes its report.

    Args:
        evaluation: The options of the evaluation.
        needs_codec: Whether it is an error if no system could be loaded. Otherwise the clips alone are scored.

    Returns:
        The exit code: 0, or 1 if a codec could not be loaded, which the report then leaves out, or if a system has no
        reconstruction of any clip.

    Raises:
        DataError: If no clip can be used.
        ConfigError: If two systems have the same name.
        ModelError: If no system could be loaded, and `needs_codec`.
    """
    with claim(evaluation.out), mirrored(evaluation.out, JOURNAL) as here:
        return _run(dataclasses.replace(evaluation, out=here), evaluation.out, needs_codec)


def _run(evaluation: Evaluation, place: Path, needs_codec: bool) -> int:
    """Runs an evaluation on this machine's disk. `place` is where the user finds the report."""
    out, failures = evaluation.out, []
    folders = [Folder(name, path) for name, path in evaluation.reconstructions.items()]
    clips = [c for domain, path in evaluation.data.items() for c in datasets.clips(path, domain, evaluation.limit)]
    with Journal(out / JOURNAL) as journal:
        reconstruct.check_same_sources(clips, place, journal)
        sweep(out)
        found = list(reconstruct.originals(clips, out, journal))
        originals = [clip for clip in found if isinstance(clip, Original)]
        rejected = [failure for failure in found if isinstance(failure, Failure)]
        _write_lines(
            out / "rejects.jsonl",
            ({"domain": f.clip.domain, "id": f.clip.id, "why": names.text(f.why)} for f in rejected),
        )
        if rejected:
            LOG.warning("%d of %d clips are refused: see %s", len(rejected), len(clips), place / "rejects.jsonl")
        if not originals:
            raise DataError(f"none of {len(clips)} clips can be used: see {place / 'rejects.jsonl'}")
        lines, left_out = [System(ORIGINAL, "the clips themselves")], dict[str, str]()
        taken = {names.key(name) for name in (ORIGINAL, *evaluation.reconstructions)}
        measurer = TokenMeasurer(evaluation.tokens, originals, out, journal)
        for name, load in evaluation.codecs():
            try:
                codec = load()
            except (ModelError, ConfigError) as error:
                LOG.error("%s is left out: %s", name, names.text(str(error)))
                left_out[name] = str(error)
                continue
            added = {names.key(system.name) for system in codec.systems}
            if taken & added:
                raise ConfigError(f"{name}: there is a system of that name already; give it another")
            taken |= added
            failures += reconstruct.by_codec(codec, originals, out, journal)
            measurer.measure(codec)
            lines += codec.systems
        for folder in folders:
            failures += reconstruct.by_folder(folder, originals, out, journal)
            lines.append(folder.system)
        if needs_codec and left_out and len(lines) == 1:
            raise ModelError(f"no system to compare: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
        failed = Counter(failure.system for failure in failures)
        empty = [name for name, count in failed.items() if count == len(originals)]
        for name in empty:
            why = summary.most_common([failure.why for failure in failures if failure.system == name])
            LOG.error("%s: no reconstruction of any of %d clips: %s", name, len(originals), names.text(str(why)))
        scored = score(evaluation, lines, originals, failures, journal)
        studies = measurer.studies()
        found = report(evaluation, lines, originals, scored, journal, studies)
        write(evaluation, {**found, "left_out": left_out}, scored, studies)
    return int(bool(left_out or empty))


def score(
    evaluation: Evaluation,
    systems: Sequence[System],
    originals: Sequence[Original],
    failures: Iterable[Failure],
    journal: Journal,
) -> Scored:
    """Returns the scores of all systems and clips by all metrics. Scores in the journal are not computed again."""
    failed = {(f.system, f.clip.domain, f.clip.id): f.why for f in failures}
    metrics = evaluation.metrics_of_clips
    scored: Scored = {}
    tasks, digests = [], {}
    for system in systems:
        for original in originals:
            clip, key = original.clip, (system.name, original.clip.domain, original.clip.id)
            if key in failed:
                scored[key] = Scores({}, dict.fromkeys(metrics, failed[key]))
                continue
            path = reconstruct.audio_path(evaluation.out, system.name, clip)
            digests[key] = [original.digest, digest(path), clip.transcript]
            row = journal.get("scores", *key)
            known = _still_valid(row) if row is not None and row["of"] == digests[key] else {}
            scored[key] = Scores(known, {})
            if left := tuple(name for name in metrics if name not in known):
                reference = reconstruct.audio_path(evaluation.out, ORIGINAL, clip)
                tasks.append((original.seconds, ScoreRequest(key, reference, path, clip.transcript, left)))
    progress, seconds = Progress("score", len(tasks)), {task.key: length for length, task in tasks}
    for task, result in score_all((task for _, task in tasks), evaluation.num_workers):
        values = scored[task.key].values | result.values
        scored[task.key] = Scores(values, result.why)
        row = {
            "of": digests[task.key],
            "values": values,
            "set_to": {name: METRICS[name].set_to() for name in values},
            "versions": {name: METRICS[name].version for name in values},
        }
        journal.add(("scores", *task.key), row)
        progress.add(seconds[task.key])
    progress.bar.close()
    return scored


def _still_valid(row: dict[str, Any]) -> dict[str, float]:
    """Returns the scores in a row of the journal, without those that the metrics of today would not give."""
    set_to, versions = row.get("set_to", {}), row.get("versions", {})  # version 0.1 did not keep these
    return {
        name: value
        for name, value in row["values"].items()
        if (metric := METRICS.get(name))
        and (set_to.get(name), versions.get(name, 1)) == (metric.set_to(), metric.version)
    }


def report(
    evaluation: Evaluation,
    systems: Sequence[System],
    originals: Sequence[Original],
    scored: Scored,
    journal: Journal,
    studies: Sequence[Study] = (),
) -> dict[str, Any]:
    """Returns the report, in the form that page.py describes, with each system's own means beside the compared ones."""
    domains, metrics = list(evaluation.data), evaluation.metrics
    by_domain = {d: [original for original in originals if original.clip.domain == d] for d in domains}

    def column(domain: str, metric: str) -> dict[str, summary.Column]:
        clips = [original.clip.id for original in by_domain[domain]]
        rows = {s.name: [scored[s.name, domain, clip] for clip in clips] for s in systems}
        return {
            name: summary.Column(
                [row.values.get(metric) for row in found], [row.why[metric] for row in found if metric in row.why]
            )
            for name, found in rows.items()
        }

    names_of = [system.name for system in systems]
    distances = {
        d: frechet_means(names_of, clips, evaluation.out, journal) if FRECHET.name in metrics else {}
        for d, clips in by_domain.items()
    }

    def means(take: Callable[[dict[str, summary.Column]], dict[str, summary.Mean]]) -> dict[str, Any]:
        table = {(d, m): take(column(d, m)) for d in domains for m in metrics if m != FRECHET.name}
        table |= {(d, FRECHET.name): distances[d] for d in domains if FRECHET.name in metrics}
        measured = {s.name: {d: {m: table[d, m][s.name]._asdict() for m in metrics} for d in domains} for s in systems}
        papers = quoted.systems() if evaluation.quoted else []
        return measured | {row["name"]: quoted.means(row["name"], domains, metrics) for row in papers}

    rows = [_system(evaluation, system, by_domain, journal) for system in systems]
    rows += quoted.systems() if evaluation.quoted else []
    shown = [original for d in domains for original in by_domain[d][: evaluation.shown]]
    return {
        "title": "Audio codecs compared",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "domains": domains,
        "metrics": [_metric(name, [row.why.get(name) for row in scored.values()]) for name in metrics],
        "systems": rows,
        "summary": means(summary.own_means),
        "compared": means(summary.compared_means),
        "clips": [_clip(evaluation.out, original, systems, scored) for original in shown],
        "studies": [dataclasses.asdict(study) for study in studies],
    }


def _metric(name: str, why: Sequence[str | None]) -> dict[str, Any]:
    """Returns the row of a metric. `why` has the reason for every score that is missing, and None for the others."""
    metric = METRICS[name]
    reason = None if None in why else summary.most_common([text for text in why if text])
    return {
        "name": name,
        "title": metric.title,
        "better": metric.better,
        "about": metric.about,
        "unavailable": reason,
        "range": metric.range,
    }


def _system(
    evaluation: Evaluation, system: System, by_domain: dict[str, list[Original]], journal: Journal
) -> dict[str, Any]:
    """Returns the row of a system."""
    clips = [original for originals in by_domain.values() for original in originals]
    there = (o for o in clips if reconstruct.audio_path(evaluation.out, system.name, o.clip).is_file())
    made = [(o, journal.get(system.name, o.clip.domain, o.clip.id)) for o in there]
    known = [(o.seconds, row) for o, row in made if row is not None and "bits" in row]
    seconds = sum(length for length, _ in known)
    count = len(system.codebook_sizes)
    rate = system.bits_per_frame * system.frame_rate if system.frame_rate else None
    found = {d: _codebook_use(evaluation.out, system, clips) for d, clips in by_domain.items()}
    use = {domain: figures for domain, figures in found.items() if figures is not None}
    kind = "folder" if system.name in evaluation.reconstructions else "original" if system.name == ORIGINAL else "codec"
    return {
        "name": system.name,
        "kind": kind,
        "about": system.about,
        "codebook_size": max(system.codebook_sizes, default=None),
        "codebook_sizes": system.codebook_sizes,
        "num_codebooks": count or None,
        "bits_per_second": rate or (sum(row["bits"] for _, row in known) / seconds if known else None),
        "tokens_per_second": system.frame_rate * count if system.frame_rate else None,
        "real_time_factor": seconds / sum(row["seconds"] for _, row in known) if known else None,
        "usage": {d: u.usage for d, u in use.items()} or None,
        "perplexity": {d: u.perplexity for d, u in use.items()} or None,
    }


def _codebook_use(out: Path, system: System, clips: Sequence[Original]) -> summary.CodebookUse | None:
    """Returns how a system uses its codebooks on some clips, or None if it has no codes."""
    paths = [reconstruct.codes_path(out, system.name, original.clip) for original in clips]
    codes = [np.load(path) for path in paths if path.is_file()]
    return summary.codebook_use(codes, system.codebook_sizes) if codes else None


def _clip(out: Path, original: Original, systems: Sequence[System], scored: Scored) -> dict[str, Any]:
    """Returns the row of a clip, and writes the spectrograms of its reconstructions."""
    clip = original.clip

    def files(system: str) -> dict[str, str]:
        sound = reconstruct.audio_path(out, system, clip)
        picture = out / "spectrograms" / system / clip.domain / f"{clip.id}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.spectrogram(audio.decode(sound)[0][:, 0], reconstruct.RATE, picture)
        return {"audio": sound.relative_to(out).as_posix(), "spectrogram": picture.relative_to(out).as_posix()}

    def scores(system: str) -> dict[str, Any]:
        values, why = scored[system, clip.domain, clip.id]
        return {name: {"value": values.get(name), "why": why.get(name)} for name in values | why}

    reconstructed = {
        system.name: {**files(system.name), "scores": scores(system.name)}
        for system in systems
        if system.name != ORIGINAL and reconstruct.audio_path(out, system.name, clip).is_file()
    }
    about = {"id": clip.id, "domain": clip.domain, "seconds": original.seconds}
    return {**about, "original": files(ORIGINAL), "systems": reconstructed}


def write(evaluation: Evaluation, report: dict[str, Any], scored: Scored, studies: Sequence[Study] = ()) -> None:
    """Writes the files of the report."""
    out, metrics = evaluation.out, evaluation.metrics_of_clips
    keys = ("system", "domain", "clip")
    rows = [dict(zip(keys, key, strict=True)) | {"values": s.values, "why": s.why} for key, s in scored.items()]
    _write_lines(out / "scores.jsonl", rows)
    with rewriting(out / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*keys, *metrics])
        table.writerows([*key, *(s.values.get(name, "") for name in metrics)] for key, s in scored.items())
    for name, text in (
        ("tables.md", summary.table(report) + markdown(studies)),
        ("report.json", json.dumps(report, indent=1)),
    ):
        with rewriting(out / name) as temporary:
            temporary.write_text(names.text(text))  # reasons may name files whose names are not UTF-8
    page.write({**report, "summary": report["compared"]}, out)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with rewriting(path) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
