"""Reads ratings of the page's listening test: mean opinion scores of each system, from raters who hear differences.

    omnicodec listening RESULTS.csv… [--out FILE.csv]

Intervals are 95 % by Student's t over ratings. Papers mostly give the normal interval, which differs by less than 2 %
from a hundred ratings on.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation import summary
from omnicodec_jax.files import rewriting

REFERENCE = "reference"
"""The name of the system that stands for hidden originals."""
SCALES = ("N-MOS", "S-MOS")
"""The scales: naturalness, and similarity to the original."""
ALL_DOMAINS = "all domains"
PASSING_SCORE = 4
"""The lowest score that a hidden reference should get."""
TOLERATED_SHARE = 0.15
"""The share of the hidden references that may get a lower score than `PASSING_SCORE`.

Source: ITU-R BS.1534-3 §4.1.2, where the score is 90 of 100."""


class Rating(NamedTuple):
    """One rating: a row of a file of ratings, with its columns in order."""

    rater: str
    clip: str
    domain: str
    system: str
    scale: str
    score: int
    """The score, from 1 to 5."""
    seconds: float
    """The seconds that the rater took from the presentation to the score."""
    presented_at: datetime


class Row(NamedTuple):
    """The opinion of the raters on one system and one scale."""

    scale: str
    domain: str
    """The domain, or `ALL_DOMAINS`."""
    system: str
    mean: float
    ci95: float | None
    """Half the width of the 95 % interval; None: there are fewer ratings than `summary.FEWEST`."""
    ratings: int
    raters: int


# -- Ratings


def read(path: Path) -> list[Rating]:
    """Reads a file of ratings that the page has written. Raises DataError with file, line and reason."""
    # Spreadsheet programs put a byte order mark at the beginning.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if header != list(Rating._fields):
                found = ",".join(header) or "nothing"
                raise DataError(f"must begin with {','.join(Rating._fields)}, not with {found}")
            return [_parse(row) for row in rows if row]
        except (DataError, csv.Error) as error:
            raise DataError(f"{path}:{max(1, rows.line_num)}: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{rows.line_num + 1}: not UTF-8: {error.reason}; save it as CSV UTF-8") from None


def _parse(row: list[str]) -> Rating:
    """Returns the rating in a row. Raises DataError."""
    if len(row) != len(Rating._fields):
        raise DataError(f"{len(row)} columns where there must be {len(Rating._fields)}")
    rater, clip, domain, system, scale, score, seconds, presented_at = row
    for name, value in zip(Rating._fields, row, strict=True):
        if not value.strip():
            raise DataError(f"no {name}")
    if scale not in SCALES:
        raise DataError(f"scale {scale!r}: must be {' or '.join(SCALES)}")
    if score not in ("1", "2", "3", "4", "5"):
        raise DataError(f"score {score!r}: must be a whole number from 1 to 5")
    return Rating(rater, clip, domain, system, scale, int(score), _seconds(seconds), _time(presented_at))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"seconds {text!r}: must be a number, not negative")
    return seconds


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise DataError(f"presented_at {text!r}: must be an ISO 8601 time with its zone, as 2026-01-31T12:00:00Z")
    return time


def latest(ratings: Iterable[Rating]) -> list[Rating]:
    """Returns the ratings that count. If one rater rated the same thing several times, only the last counts."""
    kept: dict[tuple[str, ...], Rating] = {}
    for rating in sorted(ratings, key=lambda rating: rating.presented_at):
        kept[rating.rater, rating.domain, rating.clip, rating.system, rating.scale] = rating
    return list(kept.values())


def unreliable(ratings: Iterable[Rating]) -> dict[str, str]:
    """Returns the raters whose ratings should not count, each with the reason.

    They have scored more than 15 % of the hidden references below 4, or have rated no hidden reference.
    """
    scores: dict[str, list[int]] = defaultdict(list)
    for rating in ratings:
        scores[rating.rater] += [rating.score] if rating.system == REFERENCE else []
    reasons = {}
    for rater, given in sorted(scores.items()):
        low = sum(score < PASSING_SCORE for score in given)
        if not given:
            reasons[rater] = "has rated no hidden reference"
        elif low > TOLERATED_SHARE * len(given):
            reasons[rater] = f"scored {low} of {len(given)} hidden references below {PASSING_SCORE}"
    return reasons


# -- The table


def summarise(ratings: Iterable[Rating]) -> list[Row]:
    """Returns a row for each scale, domain and system, with all domains together first, and the best system first."""
    groups: dict[tuple[str, str, str], list[Rating]] = defaultdict(list)
    for rating in ratings:
        for domain in (ALL_DOMAINS, rating.domain):
            groups[rating.scale, domain, rating.system].append(rating)
    rows = []
    for group, given in groups.items():
        scores = [float(rating.score) for rating in given]
        raters = {rating.rater for rating in given}
        rows.append(Row(*group, fmean(scores), summary.mean(scores).ci95, len(scores), len(raters)))
    return sorted(rows, key=lambda row: (row.scale, row.domain != ALL_DOMAINS, row.domain, -row.mean, row.system))


def _texts(rows: list[Row]) -> Iterator[list[str]]:
    """Yields the lines of the table, as a text for each column."""
    yield ["scale", "domain", "system", "mean", "95 %", "ratings", "raters"]
    for row in rows:
        interval = "—" if row.ci95 is None else f"±{row.ci95:.2f}"
        yield [row.scale, row.domain, row.system, f"{row.mean:.2f}", interval, str(row.ratings), str(row.raters)]


def table(rows: list[Row]) -> str:
    """Returns the rows as text with aligned columns."""
    lines = list(_texts(rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def write(rows: list[Row], path: Path) -> None:
    """Writes the rows as CSV with the columns of `Row`, unrounded. An interval that is not known is empty."""
    with rewriting(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
