"""A study: a table of figures about systems, with curves beside it where they help, for the page and for tables.md."""

import dataclasses
from collections.abc import Sequence

from omnicodec_jax.evaluation.summary import format_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A line of a study's table."""

    name: str
    cells: list[float | None]
    """The number of each column; None where there is no number."""
    why: str | None = None
    """The reason why numbers are missing; None if none is missing, or if the columns do not fit this system."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines of numbers over a common axis."""

    x: str
    """The title of the horizontal axis."""
    y: str
    """The title of the vertical axis."""
    series: dict[str, list[tuple[float, float]]]
    """The points (x, y) of each line, by its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A table about systems, of one domain or of all."""

    title: str
    about: str
    """The text that says what was done, and how to read the numbers."""
    domain: str | None
    """The domain of the clips; None: the clips are a set of their own."""
    columns: list[str]
    rows: list[StudyRow]
    notes: list[str] = dataclasses.field(default_factory=list)
    """Remarks on single systems, such as how many clips were measured."""
    digits: int = 2
    """The number of decimal places that are shown."""
    curves: Curves | None = None


def markdown(studies: Sequence[Study]) -> str:
    """Returns the studies as Markdown: a heading, a table and the reasons for missing numbers of each study."""
    return "".join(f"\n{_markdown(study)}" for study in studies)


def _markdown(study: Study) -> str:
    header = ["Model", *study.columns]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    lines += [
        f"| {' | '.join([row.name, *(format_number(cell, study.digits) for cell in row.cells)])} |"
        for row in study.rows
    ]
    notes = [f"- {note}" for note in study.notes] + [f"- {row.name}: {row.why}" for row in study.rows if row.why]
    title = study.title if study.domain is None else f"{study.title}: {study.domain}"
    return "\n".join([f"## {title}", "", study.about, "", *lines, "", *notes, *([""] if notes else [])])
