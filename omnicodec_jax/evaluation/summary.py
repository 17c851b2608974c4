"""Computes figures of systems from the scores of clips: means with intervals, use of codebooks, tables."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEWEST = 5
"""The least number of clips for which a mean has an interval. The interval of three is so wide that it says nothing."""


class Mean(NamedTuple):
    """The mean score of a system, which is a cell of the tables."""

    mean: float | None
    ci95: float | None
    """Half the 95 % confidence interval (Student's t); None: there are fewer than `FEWEST` clips."""
    count: int
    """The number of clips that the mean is taken over."""
    why: str | None = None
    """The reason why there is no mean, or why some clips are left out; None: all clips count."""


def mean(values: Sequence[float], why: Sequence[str] = ()) -> Mean:
    """Returns the mean of values with its interval. `why` has the reasons why other clips have no value."""
    if not values:
        return Mean(None, None, 0, most_common(why) or "no clips")
    if len(values) < FEWEST:
        return Mean(float(np.mean(values)), None, len(values))
    from scipy.stats import t

    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Mean(float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * error), len(values))


class Column(NamedTuple):
    """The scores of one system by one metric on the clips of a domain."""

    values: list[float | None]
    """The score of each clip; None: there is none."""
    why: list[str]
    """The reason for each clip without a score."""


def own_means(columns: dict[str, Column]) -> dict[str, Mean]:
    """Returns for each system the mean over all clips for which this system has a score."""
    return {name: mean([v for v in column.values if v is not None], column.why) for name, column in columns.items()}


def compared_means(columns: dict[str, Column]) -> dict[str, Mean]:
    """Returns means that can be compared, over the clips for which all systems have a score.

    Systems without any score are not counted among them, and have no mean.
    """
    having = [column.values for column in columns.values() if any(value is not None for value in column.values)]
    shared = [number for number, clip in enumerate(zip(*having, strict=True)) if None not in clip]
    means = {}
    for name, (values, why) in columns.items():
        means[name] = mean([value for number in shared if (value := values[number]) is not None], why)
        count = sum(value is not None for value in values)
        if 0 < count < len(values):
            reason = f"{count} of {len(values)} clips have a value; the others: {most_common(why)}"
            means[name] = means[name]._replace(why=reason)
        elif count and not shared:
            means[name] = means[name]._replace(why="there is no clip of which every system has a value")
    return means


def most_common(why: Sequence[str]) -> str | None:
    """Returns the reason that occurs most often, or None if there is none."""
    return Counter(why).most_common(1)[0][0] if why else None


class CodebookUse(NamedTuple):
    """The use of each codebook of a system on the clips of a domain."""

    usage: list[float]
    """The share of the entries that occur. It is at most frames / entries, so only hours of audio can show full use."""
    perplexity: list[float]
    """The exponential of the entropy of the entries: the number of equally frequent entries with the same entropy."""


def codebook_use(codes: Sequence[np.ndarray], sizes: Sequence[int]) -> CodebookUse:
    """Returns the use of codebooks. `codes` has an array [K, N] for each clip, and at least one clip."""
    usage, perplexity = [], []
    for number, size in enumerate(sizes):
        counts = np.bincount(np.concatenate([clip[number] for clip in codes]), minlength=size)
        share = counts[counts > 0] / counts.sum()
        usage.append(float(share.size / size))
        perplexity.append(float(np.exp(-np.sum(share * np.log(share)))))
    return CodebookUse(usage, perplexity)


def table(report: dict[str, Any]) -> str:
    """Returns a Markdown table in the form of the paper's Table 1: a row per system, with slashes between domains.

    Systems are compared on the clips that all of them have. The title of each metric has their number n by domain.
    """
    domains, metrics = report["domains"], report["metrics"]
    measured = [report["compared"][system["name"]] for system in report["systems"] if system["kind"] != "quoted"]

    def title(metric: dict[str, Any]) -> str:
        counts = [max(cells[domain][metric["name"]]["count"] for cells in measured) for domain in domains]
        return f"{metric['title']} (n = {' / '.join(map(str, counts))})"

    header = ["Model", "Codebook size", "Bitrate (bps)", "TPS", "× real time", *map(title, metrics)]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for system in report["systems"]:
        cells = report["compared"][system["name"]]
        figures = (system[key] for key in ("codebook_size", "bits_per_second", "tokens_per_second", "real_time_factor"))
        row = [system["name"] + (" (quoted)" if system["kind"] == "quoted" else "")]
        row += [format_number(figure, digits) for figure, digits in zip(figures, (0, 0, 1, 1), strict=True)]
        row += [" / ".join(_cell(cells[domain][metric["name"]]) for domain in domains) for metric in metrics]
        lines.append(f"| {' | '.join(row)} |")
    about = (
        f"{' / '.join(domains)}; mean ± half the 95 % interval (from {FEWEST} clips on), "
        "of the n clips that all systems have"
    )
    return "\n".join([about, "", *lines, "", *notes(report)]) + "\n"


def notes(report: dict[str, Any]) -> list[str]:
    """Returns lines that say why cells of the table have no mean, or a mean of fewer clips.

    There is a line for each reason: `- reason: metrics (systems, domains)`.
    """
    systems, domains = [system["name"] for system in report["systems"]], report["domains"]
    titles = {metric["name"]: metric["title"] for metric in report["metrics"]}
    reasons: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for system, domain, metric in itertools.product(systems, domains, titles):
        cell = report["compared"][system][domain][metric]
        if cell["why"]:
            reasons.setdefault(cell["why"], {}).setdefault(titles[metric], []).append((system, domain))
    lines = [f"- {name} is left out: {why}" for name, why in report.get("left_out", {}).items()]
    for reason, cells in sorted(reasons.items()):
        places = _grouped({title: _places(found, systems, domains) for title, found in cells.items()})
        lines.append(f"- {reason}: " + "; ".join(f"{', '.join(names)} ({where})" for where, names in places.items()))
    return lines


def _places(cells: Sequence[tuple[str, str]], systems: Sequence[str], domains: Sequence[str]) -> str:
    """Returns the names of cells, such as "A, B: speech; C: speech / music"."""
    if len(cells) == len(systems) * len(domains):
        return "all systems"
    found: dict[str, list[str]] = {}
    for system, domain in cells:
        found.setdefault(system, []).append(domain)
    return "; ".join(
        ", ".join(names) + ("" if where == " / ".join(domains) else f": {where}")
        for where, names in _grouped({system: " / ".join(of) for system, of in found.items()}).items()
    )


def _grouped(values: dict[str, str]) -> dict[str, list[str]]:
    """Returns the names that share a value, for each value."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups


def _cell(cell: dict[str, Any]) -> str:
    """Returns the text of a mean with its interval."""
    if cell["mean"] is None:
        return "–"
    return format_number(cell["mean"], 2) + ("" if cell["ci95"] is None else f" ± {cell['ci95']:.2f}")


def format_number(value: float | int | None, digits: int) -> str:
    """Returns the text of a number with a number of decimal places; a dash where there is no number."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.00
