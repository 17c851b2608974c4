"""Tables of a listening test: what counts, who counts, and what is refused."""

import csv
import io
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from omnicodec_jax import cli
from omnicodec_jax.cli import command
from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation import listening
from omnicodec_jax.evaluation.listening import ALL_DOMAINS, REFERENCE, Rating

pytestmark = pytest.mark.quick

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
HEADER = ",".join(Rating._fields)
GOOD = "ann,c1,speech,A,N-MOS,4,2.50,2026-01-31T12:00:00.000Z"

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip())
ratings = st.builds(
    Rating,
    rater=texts,
    clip=texts,
    domain=st.sampled_from(["speech", "music"]),
    system=texts,
    scale=st.sampled_from(listening.SCALES),
    score=st.integers(1, 5),
    seconds=st.floats(0, 1e6),
    presented_at=st.datetimes(timezones=st.just(UTC)),
)


def rating(score: int, system: str = "A", rater: str = "ann", clip: str = "c1", minute: int = 0, **others) -> Rating:
    row = Rating(rater, clip, "speech", system, "N-MOS", score, 2.5, NOON + timedelta(minutes=minute))
    return row._replace(**others)


def save(path: Path, rows: list[Rating]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [Rating._fields, *(row._replace(presented_at=row.presented_at.isoformat()) for row in rows)]
        )
    return path


# -- Reading


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(ratings, max_size=5))
def test_whatever_a_csv_writer_writes_is_read_back(tmp_path_factory, rows):
    assert listening.read(save(tmp_path_factory.mktemp("csv") / "ratings.csv", rows)) == rows


def test_a_spreadsheets_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8-sig")
    assert listening.read(path) == [rating(4)]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "must begin with rater,clip"),
        (f"{HEADER.replace(',', ';')}\n", 1, "must begin with rater,clip"),
        (f"{HEADER}\n{GOOD}\nann,c1\n", 3, "2 columns where there must be 8"),
        (f"{HEADER}\n{GOOD.replace(',4,', ',6,')}\n", 2, "score '6'"),
        (f"{HEADER}\n{GOOD.replace(',4,', ',4.5,')}\n", 2, "score '4.5'"),
        (f"{HEADER}\n{GOOD.replace('N-MOS', 'MOS')}\n", 2, "scale 'MOS': must be N-MOS or S-MOS"),
        (f"{HEADER}\n{GOOD.replace('ann', ' ')}\n", 2, "no rater"),
        (f"{HEADER}\n{GOOD.replace('2.50', 'nan')}\n", 2, "seconds 'nan'"),
        (f"{HEADER}\n{GOOD.replace('2.50', '-1')}\n", 2, "seconds '-1'"),
        (f"{HEADER}\n{GOOD.replace('.000Z', '')}\n", 2, "its zone"),
        (f"{HEADER}\n{GOOD.replace('2026-01', 'soon')}\n", 2, "its zone"),
        (f'{HEADER}\n"{GOOD}\n', 2, "unexpected end of data"),
    ],
)
def test_bad_files_are_refused_with_line_and_reason(tmp_path, text, line, reason):
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        listening.read(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert reason in str(error.value)


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(f"{HEADER}\n{GOOD.replace('ann', 'Zoë')}\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        listening.read(path)


# -- What and who counts


def test_the_last_presented_of_several_ratings_counts_in_whatever_order_they_are_read():
    first, last, other = rating(2, minute=0), rating(5, minute=9), rating(1, clip="c2", minute=4)
    for rows in ([first, last, other], [last, other, first]):
        assert set(listening.latest(rows)) == {last, other}


@settings(max_examples=50, deadline=None)
@given(low=st.integers(0, 40), high=st.integers(0, 40))
def test_raters_fail_when_more_than_15_percent_of_their_hidden_references_score_below_4(low, high):
    scores = [3] * low + [4] * high
    rows = [rating(score, REFERENCE, clip=f"c{number}") for number, score in enumerate(scores)]
    fails = "ann" in listening.unreliable([*rows, rating(1), rating(5, REFERENCE, rater="bob")])
    assert fails == (not scores or 100 * low > 15 * len(scores))
    assert "bob" not in listening.unreliable([rating(5, REFERENCE, rater="bob"), *rows])


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(ratings, min_size=1, max_size=40))
def test_every_rating_is_in_its_domain_and_in_all(rows):
    table = listening.summarise(rows)
    everywhere = [row for row in table if row.domain == ALL_DOMAINS]
    apart = [row for row in table if row.domain != ALL_DOMAINS]
    for part in (everywhere, apart):
        assert sum(row.ratings for row in part) == len(rows)
        assert sum(row.mean * row.ratings for row in part) == pytest.approx(sum(row.score for row in rows))


@pytest.mark.parametrize("count", [1, 4, 5, 400])
def test_intervals_are_students(count):
    scores = np.random.default_rng(count).integers(1, 6, count)
    (row, _) = listening.summarise([rating(int(score), clip=f"c{n}") for n, score in enumerate(scores)])
    assert row.mean == pytest.approx(scores.mean())
    if count < 5:
        assert row.ci95 is None
    else:
        low, high = ttest_1samp(scores, 0).confidence_interval(0.95)
        assert row.ci95 == pytest.approx((high - low) / 2)


# -- The command


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Ratings of a rater who hears, with one rating given twice, and of one who does not hear the reference."""
    ann = [rating(5, REFERENCE), rating(3), rating(4, minute=1), rating(2, "B")]
    bob = [rating(1, REFERENCE, rater="bob"), rating(5, "B", rater="bob")]
    return [save(tmp_path / "ann.csv", ann), save(tmp_path / "bob.csv", bob)]


def test_the_command_names_and_leaves_out_raters_who_fail(files, tmp_path, capsys):
    out = tmp_path / "table.csv"
    assert cli.listening(tuple(files), out=out) == 0
    printed = capsys.readouterr().out
    assert "later rating of the same sample: 1\n" in printed
    assert "bob: scored 1 of 1 hidden references below 4, left out" in printed
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    means = [(row["system"], row["mean"], row["ratings"]) for row in rows if row["domain"] == "speech"]
    assert means == [(REFERENCE, "5.0", "1"), ("A", "4.0", "1"), ("B", "2.0", "1")]
    assert {row["ci95"] for row in rows} == {""}


def test_keep_all_keeps_all(files, capsys):
    cli.listening(tuple(files), keep_all=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["N-MOS", "speech", "B", "3.50", "—", "2", "2"] in lines  # of two ratings Student's t would say ±19.06
    assert ["N-MOS", "speech", "A", "4.00", "—", "1", "1"] in lines


@pytest.mark.parametrize(("number", "message"), [(1, "no ratings are left"), (None, "no files")])
def test_the_command_ends_with_one_line_where_nothing_can_be_said(files, monkeypatch, capsys, number, message):
    monkeypatch.setattr(sys, "argv", ["listening", *([] if number is None else [str(files[number])])])
    with pytest.raises(SystemExit) as end:
        command.run(cli.listening)
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_a_pattern_that_matches_no_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["listening", str(tmp_path / "*.csv")])
    with pytest.raises(SystemExit) as end:
        command.run(cli.listening)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / '*.csv'}: no such file; name the CSV files that raters have downloaded")
