"""The tables of the paper: their rows with the quoted figures, and a function that measures the cell of each column."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.evaluation import quoted
from omnicodec_jax.evaluation.reconstruct import ORIGINAL
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS
from omnicodec_jax.evaluation.summary import format_number
from omnicodec_jax.language_model import perplexity

AXES = ("CE", "CU", "PC", "PQ")
UNICODEC = "it is in no library and has no licence: give its files by --reconstructions UniCodec=DIR"


class PaperRow(NamedTuple):
    """A row of a table of the paper."""

    name: str
    """The name of the row in the paper."""
    system: str
    """The name of the system that is measured for the row."""
    quoted: tuple[str, ...]
    """The paper's cells of the row."""
    source: str
    """The text that says how the system is given to the command."""


class Measured(NamedTuple):
    """The measurements that a table is made of."""

    report: dict[str, Any]
    """The report of the evaluation."""
    perplexities: dict[str, perplexity.Perplexity]
    """The perplexities by the names of the systems that have some."""
    clips: dict[str, int]
    """The number of clips of each domain."""
    models: dict[str, str]
    """The directories or hub ids of the models that were given, by name."""


Cell = Callable[[Measured, str], str]
"""A function that returns the text of a measured cell of a system."""


class PaperTable(NamedTuple):
    """A table of the paper, and the metrics and systems that have to be run for it."""

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
    """Returns a dash, as opinions of listeners cannot be measured."""
    return "–"


def _about(field: str, digits: int) -> Cell:
    """Returns the cell of a figure that describes a system."""

    def cell(measured: Measured, system: str) -> str:
        row = next(row for row in measured.report["systems"] if row["name"] == system)
        return format_number(row[field], digits)

    return cell


def _means(metric: str, domains: Sequence[str]) -> Cell:
    """Returns the cell of the means of a metric, with slashes between the domains."""

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
    """Returns the cell of the share of the codebooks' entries that the clips use."""
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
