"""The tables of the paper, each by one command: what can be measured of its rows, and the quoted figures below."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.corpus import shards
from omnicodec_jax.errors import ConfigError, OmniCodecError
from omnicodec_jax.evaluation import quoted, reconstruct, run, summary
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.peers import PEERS, PeerRequest
from omnicodec_jax.evaluation.reconstruct import ORIGINAL, RATE
from omnicodec_jax.evaluation.run import Evaluation
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS
from omnicodec_jax.evaluation.summary import format_number
from omnicodec_jax.files import rewriting
from omnicodec_jax.language_model import perplexity

LOG = logging.getLogger(__name__)

SHARD = "all-000000"
AXES = ("CE", "CU", "PC", "PQ")
UNICODEC = "it is in no library and has no licence: give its files by --reconstructions UniCodec=DIR"


class PaperRow(NamedTuple):
    """A row of a table of the paper."""

    name: str
    """What the paper calls it."""
    system: str
    """The name of the system that is measured for it."""
    quoted: tuple[str, ...]
    """The paper's cells."""
    source: str
    """How the system is given."""


class Measured(NamedTuple):
    """What a table is made of."""

    report: dict[str, Any]
    """The report of the evaluation."""
    perplexities: dict[str, perplexity.Perplexity]
    """Perplexities by the names of the systems that have them."""
    clips: dict[str, int]
    """The number of clips of each domain."""


Cell = Callable[[Measured, str], str]
"""A function that returns the text of a measured cell of a system."""


class PaperTable(NamedTuple):
    """A table of the paper, and what has to be run for it."""

    title: str
    first: str
    """The title of the first column."""
    columns: tuple[tuple[str, Cell], ...]
    rows: tuple[PaperRow, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    peers: tuple[str, ...]
    codebooks: tuple[int, ...]
    has_perplexity: bool = False


# -- Cells


def _unmeasured(measured: Measured, system: str) -> str:
    """Returns a dash: nobody is there to listen."""
    return "–"


def _about(field: str, digits: int) -> Cell:
    """Returns the cell of a figure that describes a system."""

    def cell(measured: Measured, system: str) -> str:
        row = next(row for row in measured.report["systems"] if row["name"] == system)
        return format_number(row[field], digits)

    return cell


def _means(metric: str, domains: Sequence[str]) -> Cell:
    """Returns the cell of the means of a metric, domains between slashes."""

    def cell(measured: Measured, system: str) -> str:
        cells = measured.report["compared"][system]
        return " / ".join(format_number(cells[d][metric]["mean"] if d in cells else None, 2) for d in domains)

    return cell


def _perplexity(take: Callable[[perplexity.Perplexity], Sequence[float]], domain: str) -> Cell:
    """Returns the cell of perplexities of the tokens of a domain."""

    def cell(measured: Measured, system: str) -> str:
        found = measured.perplexities.get(system)
        each = found.domains.get(domain) if found is not None else None
        return "–" if each is None else " / ".join(format_number(value, 2) for value in take(each))

    return cell


def _utilization(measured: Measured, system: str) -> str:
    """Returns the share of the entries of the codebooks that the clips use."""
    use = next(row["usage"] for row in measured.report["systems"] if row["name"] == system)
    return "–" if use is None else format_number(float(np.mean([np.mean(shares) for shares in use.values()])), 3)


def _core(domains: Sequence[str]) -> tuple[tuple[str, Cell], ...]:
    return tuple((metric.title, _means(name, domains)) for name, metric in SIGNAL_METRICS.items())


# -- Rows


def _own(name: str) -> str:
    return f"give its model directory by --model {name}=DIR"


def _peer(name: str) -> str:
    return f"give it by --peers {name}=DIR"


_MOS = {  # N-MOS, S-MOS
    "WavTokenizer": ("3.02 ± 0.11", "3.11 ± 0.13"),
    "UniCodec": ("3.20 ± 0.10", "3.31 ± 0.16"),
    "AUV": ("3.15 ± 0.17", "3.23 ± 0.08"),
    "X-Codec-8L": ("3.56 ± 0.07", "3.67 ± 0.13"),
    "Mimi-16L": ("3.42 ± 0.09", "3.51 ± 0.18"),
    "OmniCodec-32L": ("3.63 ± 0.13", "3.73 ± 0.06"),
    "OmniCodec-16L": ("3.45 ± 0.05", "3.50 ± 0.09"),
    "OmniCodec-8L": ("3.26 ± 0.06", "3.29 ± 0.16"),
    "OmniCodec-F-32L": ("3.41 ± 0.11", "3.47 ± 0.07"),
    "OmniCodec-F-16L": ("3.21 ± 0.04", "3.27 ± 0.14"),
}
_SOURCES = {"WavTokenizer": _peer("wavtokenizer"), "UniCodec": UNICODEC, "AUV": _peer("auv"), "Mimi-16L": _peer("mimi")}


def _table_1() -> PaperTable:
    domains = quoted.DOMAINS
    rows = []
    for about in quoted.systems():
        name = about["name"].removesuffix(", paper")
        cells = quoted.means(about["name"], domains, tuple(SIGNAL_METRICS))
        figures = [about[key] for key in ("codebook_size", "bits_per_second", "tokens_per_second")]
        scores = [" / ".join(format_number(cells[d][m]["mean"], 2) for d in domains) for m in SIGNAL_METRICS]
        source = _SOURCES.get(name, _peer("xcodec") if name.startswith("X-") else _own(name.rpartition("-")[0]))
        text = (*(format_number(figure, 0) for figure in figures), *scores, *_MOS[name])
        rows.append(PaperRow(name, name, text, source))
    columns = (
        ("Codebook size", _about("codebook_size", 0)),
        ("Bitrate (bps)", _about("bits_per_second", 0)),
        ("TPS", _about("tokens_per_second", 0)),
        *_core(domains),
        ("N-MOS", _unmeasured),
        ("S-MOS", _unmeasured),
    )
    return PaperTable(
        "Table 1: reconstruction of speech / music / sound",
        "Model",
        columns,
        tuple(rows),
        domains,
        tuple(SIGNAL_METRICS),
        ("wavtokenizer", "auv", "xcodec", "mimi"),
        (8, 16, 32),
    )


_TABLE_2 = (
    ("OmniCodec-16L", "OmniCodec", "2.76 3.41 0.94 0.81 3.05 10.02 116.94 0.982", "3.62 ± 0.12", "3.47 ± 0.18"),
    (
        "w/o Semantic branch",
        "without_semantic_branch",
        "2.81 3.45 0.94 0.79 3.01 18.44 207.21 0.981",
        "3.65 ± 0.14",
        "3.50 ± 0.19",
    ),
    (
        "w/o Self-guidance loss",
        "without_self_guidance",
        "2.75 3.38 0.94 0.82 3.07 10.89 117.51 0.974",
        "3.60 ± 0.09",
        "3.45 ± 0.13",
    ),
    ("w/o Adapter-1", "without_adapter_1", "2.61 3.29 0.94 0.76 3.05 11.13 119.80 0.980", "3.59 ± 0.07", "3.43 ± 0.10"),
    (
        "w/o music and general sound dataset",
        "speech_only",
        "2.90 3.51 0.95 0.71 2.79 8.03 94.53 0.969",
        "3.78 ± 0.15",
        "3.54 ± 0.16",
    ),
)


def _table_2() -> PaperTable:
    rows = [
        PaperRow(name, f"{model}-16L", (*figures.split(), *opinions), _own(model))
        for name, model, figures, *opinions in _TABLE_2
    ]
    columns = (
        *_core(("speech",)),
        ("PPL0", _perplexity(lambda found: [found.ppl0], "speech")),
        ("PPL mean", _perplexity(lambda found: [found.ppl_mean], "speech")),
        ("Codebook Utilization", _utilization),
        ("N-MOS", _unmeasured),
        ("S-MOS", _unmeasured),
    )
    return PaperTable(
        "Table 2: ablations, on speech",
        "Ablation Study",
        columns,
        tuple(rows),
        ("speech",),
        tuple(SIGNAL_METRICS),
        (),
        (16,),
        has_perplexity=True,
    )


_TABLE_3 = (
    ("Ground Truth", ORIGINAL, "7.44 7.41 6.40 7.52 4.03 5.62 3.71 6.10", ""),
    ("Mimi codec-16L", "Mimi-16L", "6.85 6.84 6.30 7.06 3.72 5.10 3.92 5.82", _peer("mimi")),
    ("OmniCodec-16L", "OmniCodec-16L", "7.17 7.13 6.41 7.24 3.85 5.37 3.81 5.88", _own("OmniCodec")),
)


def _table_3() -> PaperTable:
    sets = (("GTZAN testset", "music"), ("AudioSet eval", "sound"))
    metrics = tuple(f"audiobox_{axis.lower()}" for axis in AXES)
    return PaperTable(
        "Table 3: Audiobox Aesthetics of music and sound",
        "Model",
        tuple(
            (f"{name} {axis}", _means(metric, (domain,)))
            for name, domain in sets
            for axis, metric in zip(AXES, metrics, strict=True)
        ),
        tuple(PaperRow(name, system, tuple(text.split()), source) for name, system, text, source in _TABLE_3),
        ("music", "sound"),
        metrics,
        ("mimi",),
        (16,),
    )


_TABLE_4 = (
    ("DAC-8L", "DAC-8L", ("19.84 / 237.26", "8.54 / 113.09", "4.60 / 67.96"), _peer("dac")),
    ("Mimi codec-8L", "Mimi-8L", ("8.73 / 102.70", "4.43 / 51.08", "3.74 / 42.33"), _peer("mimi")),
    ("OmniCodec-8L", "OmniCodec-8L", ("10.02 / 116.94", "4.14 / 48.92", "3.32 / 37.01"), _own("OmniCodec")),
    ("OmniCodec-8L-FT", "OmniCodec-FT-8L", ("8.42 / 97.94", "4.78 / 59.23", "3.81 / 46.56"), _own("OmniCodec-FT")),
)


def _table_4() -> PaperTable:
    return PaperTable(
        "Table 4: perplexity of tokens, PPL0 / PPL mean",
        "Model",
        tuple(
            (domain.capitalize(), _perplexity(lambda found: [found.ppl0, found.ppl_mean], domain))
            for domain in quoted.DOMAINS
        ),
        tuple(PaperRow(*row) for row in _TABLE_4),
        quoted.DOMAINS,
        (),
        ("dac", "mimi"),
        (8,),
        has_perplexity=True,
    )


TABLES = {1: _table_1, 2: _table_2, 3: _table_3, 4: _table_4}
"""The tables of the paper by their numbers."""


# -- Running


def run_table(number: int, evaluation: Evaluation, language_model: PerplexityConfig) -> int:
    """Measures the rows of a table that can be measured, and writes OUT/table_NUMBER.md.

    Args:
        number: The number of the table in the paper.
        evaluation: The clips, models, folders and other codecs at hand. Which metrics and how many codebooks are
            measured is the table's to say. Of the other codecs of the table, the default sources are tried.
        language_model: The language model whose perplexities Tables 2 and 4 have.

    Returns:
        The exit code: 0, or 1 if a codec that was given could not be loaded, or no row could be measured.

    Raises:
        ConfigError: For a number that no table has, and for data without any domain of the table.
        DataError: If no clip can be used.
    """
    if number not in TABLES:
        raise ConfigError(f"--table {number}: must be one of {', '.join(map(str, TABLES))}")
    table = TABLES[number]()
    data = {domain: evaluation.data[domain] for domain in table.domains if domain in evaluation.data}
    if not data:
        raise ConfigError(f"--data: Table {number} is of {', '.join(table.domains)}; none of these domains is given")
    given = {*evaluation.models, *(peer.name for peer in evaluation.peers)}
    added = tuple(PeerRequest(name, "") for name in table.peers if not {name, _title(name)} & given)
    asked = dataclasses.replace(
        evaluation, data=data, peers=(*evaluation.peers, *added), codebooks=table.codebooks, metrics=table.metrics
    )
    run.run(asked)
    report = json.loads((asked.out / "report.json").read_text())
    perplexities, why = _perplexities(asked, report, language_model) if table.has_perplexity else ({}, {})
    clips = Counter(clip.domain for clip in _clips(asked.out, ORIGINAL))
    text, count = layout(table, Measured(report, perplexities, dict(clips)), why)
    with rewriting(asked.out / f"table_{number}.md") as temporary:
        temporary.write_text(text)
    return int(count == 0 or bool(given & report["left_out"].keys()))


def _title(peer: str) -> str:
    """Returns the name of the systems of a peer."""
    return PEERS[peer].title if peer in PEERS else peer.upper()


def layout(table: PaperTable, measured: Measured, why: dict[str, str]) -> tuple[str, int]:
    """Returns a table as Markdown, with the paper's row below each measured one, and the number of measured rows.

    Args:
        table: The table.
        measured: What was measured.
        why: Why systems have no perplexities.
    """
    report = measured.report
    there = {system["name"] for system in report["systems"]}
    lines, notes, count = [], [], 0
    for row in table.rows:
        if row.system in there:
            cells = [cell(measured, row.system) for _, cell in table.columns]
            count += row.system != ORIGINAL
        else:
            cells = ["–"] * len(table.columns)
            notes.append(f"- {row.name}: not run; {_reason(row, there, report['left_out'])}")
        if row.system in why:
            notes.append(f"- {row.name}: {why[row.system]}")
        lines += [[row.name, *cells], [f"{row.name}, {quoted.SOURCE}", *row.quoted]]
    notes += summary.notes({**report, "left_out": {}})  # of which the rows have said it
    notes += [
        f"- {domain}: no clips; give some by --data {domain}=PATH"
        for domain in table.domains
        if domain not in report["domains"]
    ]
    header = [table.first, *(title for title, _ in table.columns)]
    clips = ", ".join(f"{count} of {domain}" for domain, count in measured.clips.items())
    marks = "|" + " --- |" * len(header)
    rows = [f"| {' | '.join(line)} |" for line in (header, *lines)]
    about = f"{table.title}. Measured on {clips}; the paper's figures are of its own test sets."
    return "\n".join([about, "", rows[0], marks, *rows[1:], "", *notes]) + "\n", count


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
    evaluation: Evaluation, report: dict[str, Any], config: PerplexityConfig
) -> tuple[dict[str, perplexity.Perplexity], dict[str, str]]:
    """Returns the perplexity of the codes of each system that has some, and why others have none."""
    found, why = {}, {}
    for system in report["systems"]:
        name = system["name"]
        try:
            if (tokens := _shards(evaluation.out, system)) is not None:
                LOG.info("%s: a language model learns its tokens", name)
                found[name] = perplexity.measure(tokens, config, evaluation.out / "language_models" / name)
        except OmniCodecError as error:
            why[name] = f"no perplexity: {error}"
    return found, why


def _shards(out: Path, system: dict[str, Any]) -> Path | None:
    """Writes the codes that a system has of the clips of an evaluation as token shards; None if it has none."""
    name = system["name"]
    paths = {clip: reconstruct.codes_path(out, name, clip) for clip in _clips(out, name)}
    codes = {clip: np.load(path).T for clip, path in paths.items() if path.is_file()}
    if not codes:
        return None
    sizes = [system["codebook_size"]] * system["num_codebooks"]
    rate = system["tokens_per_second"] / system["num_codebooks"]
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
