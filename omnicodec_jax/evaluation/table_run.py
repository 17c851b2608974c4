"""Measures the rows of a table of the paper that can be measured, and writes the table."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.corpus import shards
from omnicodec_jax.errors import ConfigError, OmniCodecError
from omnicodec_jax.evaluation import quoted, reconstruct, run, summary
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.paper_tables import TABLES, Measured, PaperRow, PaperTable
from omnicodec_jax.evaluation.peers import PEERS, PeerRequest
from omnicodec_jax.evaluation.reconstruct import ORIGINAL, RATE
from omnicodec_jax.evaluation.run import Evaluation
from omnicodec_jax.files import digest, rewriting
from omnicodec_jax.language_model import perplexity

LOG = logging.getLogger(__name__)

SHARD = "all-000000"
"""The name of the token shard that holds the codes of all clips of a system."""


def run_table(number: int, evaluation: Evaluation, language_model: PerplexityConfig) -> int:
    """Measures the rows of a table that can be measured, and writes OUT/table_NUMBER.md.

    Args:
        number: The number of the table in the paper.
        evaluation: The clips, models, folders and other codecs at hand. The table sets the metrics and the numbers of
            codebooks. For other codecs of the table, the default sources are tried.
        language_model: The options of the language model that gives the perplexities of Tables 2 and 4.

    Returns:
        The exit code: 0, or 1 if a codec that was given could not be loaded, if a row that was run has no figure, or if
        no row was run.

    Raises:
        ConfigError: If there is no table of that number, if the paper does not have a domain, and if the data has no
            domain of the table.
        DataError: If no clip can be used.
    """
    if number not in TABLES:
        raise ConfigError(f"--table {number}: must be one of {', '.join(map(str, TABLES))}")
    if unknown := [domain for domain in evaluation.data if domain not in quoted.DOMAINS]:
        raise ConfigError(f"--data {unknown[0]}: the paper's tables have the domains {', '.join(quoted.DOMAINS)}")
    table = TABLES[number]()
    data = {domain: evaluation.data[domain] for domain in table.domains if domain in evaluation.data}
    if not data:
        raise ConfigError(f"--data: Table {number} is of {', '.join(table.domains)}; none of these domains is given")
    given = {*evaluation.models, *(peer.name for peer in evaluation.peers)}
    added = tuple(PeerRequest(name, "") for name in table.peers if not {name, _title(name)} & given)
    asked = dataclasses.replace(
        evaluation, data=data, peers=(*evaluation.peers, *added), codebooks=table.codebooks, metrics=table.metrics
    )
    run.run(asked, needs_codec=False)
    report = json.loads((asked.out / "report.json").read_text())
    perplexities, why = _perplexities(asked, table, report, language_model) if table.has_perplexity else ({}, {})
    clips = Counter(clip.domain for clip in _clips(asked.out, ORIGINAL))
    measured = Measured(report, perplexities, dict(clips), evaluation.models)
    with rewriting(asked.out / f"table_{number}.md") as temporary:
        temporary.write_text(names.text(layout(table, measured, why)))
    there = {system["name"] for system in report["systems"]} - {ORIGINAL}
    has_figures = [_has_figures(measured, row.system) for row in table.rows if row.system in there]
    return int(not has_figures or not all(has_figures) or bool(given & report["left_out"].keys()))


def _title(peer: str) -> str:
    """Returns the name of the systems of a peer."""
    return PEERS[peer].title if peer in PEERS else peer.upper()


def layout(table: PaperTable, measured: Measured, why: dict[str, str]) -> str:
    """Returns a table as Markdown, with the paper's row below each measured one.

    Args:
        table: The table.
        measured: The measurements.
        why: The reasons why systems have no perplexities.
    """
    report = measured.report
    there = {system["name"] for system in report["systems"]}
    lines, notes = [], []
    for row in table.rows:
        if row.system in there:
            cells = [cell(measured, row.system) for _, cell in table.columns]
        else:
            cells = ["–"] * len(table.columns)
            notes.append(f"- {row.name}: not run; {_reason(row, there, report['left_out'])}")
        if row.system in why:
            notes.append(f"- {row.name}: {why[row.system]}")
        lines += [[row.name, *cells], [f"{row.name}, {quoted.SOURCE}", *row.quoted]]
    notes += summary.notes({**report, "left_out": {}})  # the rows already say which clips are left out
    notes += [
        f"- {domain}: no clips; give some by --data {domain}=PATH"
        for domain in table.domains
        if domain not in report["domains"]
    ]
    notes += [f"- {name}: the model is {source}" for name, source in measured.models.items()]
    if others := sorted(there - {ORIGINAL, *(row.system for row in table.rows)}):
        notes.append(f"- {', '.join(others)}: no row of the paper's table; see tables.md")
    header = [table.first, *(title for title, _ in table.columns)]
    clips = ", ".join(f"{count} of {domain}" for domain, count in measured.clips.items())
    marks = "|" + " --- |" * len(header)
    rows = [f"| {' | '.join(line)} |" for line in (header, *lines)]
    about = f"{table.title}. Measured on {clips}; the paper's figures are of its own test sets."
    return "\n".join([about, "", rows[0], marks, *rows[1:], "", *notes]) + "\n"


def _has_figures(measured: Measured, system: str) -> bool:
    """Returns whether a system has a mean by any metric, or a perplexity."""
    means = (cell["mean"] for cells in measured.report["compared"][system].values() for cell in cells.values())
    return system in measured.perplexities or any(mean is not None for mean in means)


def _reason(row: PaperRow, there: set[str], left_out: dict[str, str]) -> str:
    """Returns why a row was not run."""
    family = row.system.rpartition("-")[0] or row.system
    for name, reason in left_out.items():
        if _title(name) in (row.system, family):
            return f"{reason}; {row.source}"
    if sizes := sorted(name for name in there if name.rpartition("-")[0] == family):
        return f"the codec at hand has other numbers of codebooks: {', '.join(sizes)}"
    return row.source


def _clips(out: Path, system: str) -> list[EvalClip]:
    """Returns the clips of an evaluation that a system was given."""
    rows = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
    return [EvalClip(row["clip"], row["domain"], Path()) for row in rows if row["system"] == system]


def _perplexities(
    evaluation: Evaluation, table: PaperTable, report: dict[str, Any], config: PerplexityConfig
) -> tuple[dict[str, perplexity.Perplexity], dict[str, str]]:
    """Returns the perplexity of each system with a row in the table, and the reasons why others have none."""
    found, why = {}, {}
    rows = {row.system for row in table.rows}
    for system in (system for system in report["systems"] if system["name"] in rows):
        name = system["name"]
        try:
            if (tokens := _shards(evaluation.out, system)) is not None:
                LOG.info("%s: a language model learns its tokens", name)
                of = _digest(tokens, config)  # since an earlier run may have learnt others with the same name
                found[name] = perplexity.measure(tokens, config, evaluation.out / "language_models" / name / of)
        except OmniCodecError as error:
            why[name] = f"no perplexity: {error}"
    return found, why


def _digest(tokens: Path, config: PerplexityConfig) -> str:
    """Returns a hash of the tokens that a language model learns, and of its options."""
    about = json.dumps([digest(shards.shard_path(tokens, SHARD)), dataclasses.asdict(config)])
    return hashlib.blake2b(about.encode(), digest_size=8).hexdigest()


def _shards(out: Path, system: dict[str, Any]) -> Path | None:
    """Writes a system's codes of the clips as token shards, and returns their directory; None if there are no codes."""
    name = system["name"]
    paths = {clip: reconstruct.codes_path(out, name, clip) for clip in _clips(out, name)}
    codes = {clip: np.load(path).T for clip, path in paths.items() if path.is_file()}
    if not codes:
        return None
    sizes = system["codebook_sizes"]
    rate = system["tokens_per_second"] / len(sizes)
    rows = [
        shards.Clip(f"{clip.domain}/{clip.id}", clip.domain, of, 1.0, RATE, round(len(of) / rate * RATE), "")
        for clip, of in codes.items()
    ]
    contract = {"codebook_sizes": sizes, "frame_rate": rate, "model": name, "encoder": None, "format": shards.FORMAT}
    tokens = out / "tokens" / name
    shards.write(shards.shard_path(tokens, SHARD), rows, contract)
    with rewriting(shards.marker_path(tokens, SHARD)) as temporary:
        temporary.write_text('{"shard": {}, "rejects": []}\n')
    return tokens
