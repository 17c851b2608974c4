"""What an evaluation's page does in a browser: it opens from disk, plays, sorts, and holds a listening test."""

import contextlib
import copy
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_report
from tiny_report import HOSTILE, MISSING, QUOTED, SYSTEMS

from omnicodec_jax.evaluation import listening, page
from omnicodec_jax.evaluation.study import Curves, Study, StudyRow


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Folder of a report's files, and the report."""
    folder = tmp_path_factory.mktemp("report")
    return folder, tiny_report.build(folder)


@pytest.fixture
def folder(written) -> Path:
    return written[0]


@pytest.fixture
def report(written) -> dict[str, Any]:
    return copy.deepcopy(written[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, to drive a browser")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium or google-chrome")
    sandbox = os.geteuid() != 0  # which the superuser cannot have
    with (
        playwright.sync_playwright() as driver,
        contextlib.closing(driver.chromium.launch(executable_path=program, chromium_sandbox=sandbox)) as browser,
    ):
        yield browser


@pytest.fixture
def context(browser) -> Iterator[Any]:
    with contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 900})) as context:
        context.set_default_timeout(10_000)
        yield context


@pytest.fixture
def tab(context, report, folder) -> Iterator[Any]:
    """The page, opened from disk; whatever it complains of fails the test."""
    tab, complaints = context.new_page(), []

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page asks for another file before it has all of this one
            complaints.append(request.url)

    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", failed)
    tab.goto(page.write(report, folder).as_uri())
    yield tab
    assert complaints == []


def rows(tab, domain: str = "speech") -> list[list[str]]:
    table = tab.locator(f"[data-domain={domain}] table").first
    return table.evaluate("table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))")


def test_a_report_of_quoted_figures_alone_has_no_clips_and_no_listening_test(context, report, folder):
    report |= {"clips": [], "systems": report["systems"][2:]}
    tab, complaints = context.new_page(), []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.write(report, folder).as_uri())
    assert tab.locator("nav a").all_inner_texts() == ["Speech", "Music", "What was measured"]
    assert tab.locator("section:visible").count() == 3
    assert complaints == []


def test_clips_play_one_at_a_time(tab):
    first, second = tab.locator("details[data-domain=speech] audio").all()[:2]
    assert first.get_attribute("preload") == "none"
    first.focus()
    tab.keyboard.press("Space")
    tab.wait_for_function("document.querySelectorAll('audio')[0].currentTime > 0")
    second.evaluate("audio => { audio.loop = true; return audio.play(); }")
    tab.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0")
    assert first.evaluate("audio => audio.paused")
    tab.locator("summary", has_text="second").click()
    tab.locator("details[data-domain=speech] img").last.scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('details[open] img')].every(image => image.naturalHeight)")


def test_a_click_and_a_key_on_a_header_sort_the_table(tab):
    def sort_state() -> list[str | None]:
        table = tab.locator("[data-domain=speech] table").first
        return table.evaluate("table => [...table.tHead.rows[0].cells].map(cell => cell.ariaSort)")

    def names() -> list[str]:
        return [row[0].removesuffix("quoted") for row in rows(tab)]

    header = tab.locator("[data-domain=speech] th button", has_text="PESQ-WB")
    assert names() == SYSTEMS
    assert set(sort_state()) == {"none"}
    header.click()
    assert names() == [SYSTEMS[1], *QUOTED, SYSTEMS[0]]
    assert sort_state()[4] == "descending"
    tab.keyboard.press("Enter")  # the header keeps the focus
    assert names() == [SYSTEMS[0], *QUOTED, SYSTEMS[1]]
    assert sort_state() == ["none"] * 4 + ["ascending", "none", "none"]
    tab.locator("[data-domain=speech] th button", has_text="Mel dis.").focus()
    for direction in ("ascending", "descending"):
        tab.keyboard.press("Space")
        assert sort_state()[5] == direction
        assert names()[0] == SYSTEMS[1]  # the others have no value
    assert [row[0].removesuffix("quoted") for row in rows(tab, "music")] == SYSTEMS


def test_a_missing_value_is_a_dash_with_its_reason_and_never_a_zero(tab):
    for row in rows(tab):
        assert re.fullmatch(rf"—\d\s*no value: {MISSING}", row[-1])
    cell = tab.locator("[data-domain=speech] tbody tr").first.locator("td").last
    assert cell.locator("[title]").get_attribute("title") == MISSING
    assert MISSING in tab.locator("[data-domain=speech] .notes").first.inner_text()
    assert MISSING in tab.locator("details[open] .notes").first.inner_text()
    assert tab.locator("td.best").all_inner_texts()[0].startswith("10.50 ± 0.10")


def test_the_original_is_no_candidate_for_the_best(context, report, folder):
    report["systems"][1]["kind"] = "original"
    tab = context.new_page()
    tab.goto(page.write(report, folder).as_uri())
    best = tab.locator("[data-domain=speech] td.best")
    assert {text.split()[0] for text in best.all_inner_texts()} == {"2.02"}


def test_quoted_figures_and_domains_can_be_hidden(tab):
    tab.get_by_label("Show quoted figures").uncheck()
    assert [row[0] for row in rows(tab)] == SYSTEMS[:2]
    tab.get_by_label("Show quoted figures").check()
    assert [row[0] for row in rows(tab)][2:] == [f"{name}quoted" for name in QUOTED]
    tab.get_by_role("radio", name="Music").check()
    shown = tab.locator("[data-domain]:visible").evaluate_all("nodes => nodes.map(node => node.dataset.domain)")
    assert shown == ["music"] * 3  # a section and two clips


def test_plots_name_every_point_without_one_name_over_another(tab):
    plot = tab.locator("[data-domain=speech] svg").first
    assert "PESQ-WB" in plot.get_attribute("aria-label")
    boxes = plot.locator("g text").evaluate_all(
        "nodes => nodes.map(node => { const b = node.getBBox(); return [node.textContent, b.x, b.y + 1, b.x + b.width,"
        " b.y + b.height - 1]; })"
    )
    assert sorted(name for name, *_ in boxes) == sorted(SYSTEMS)
    for index, (name, left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= 360, name
        for other, *box in boxes[:index]:
            assert right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top, (name, other)
    assert tab.locator("[data-domain=speech] svg").count() == 2  # one for each metric that has a value


def test_codebook_usage_is_told_in_numbers(tab):
    line = tab.locator("[data-domain=speech] .usage tbody tr").first
    assert line.locator("td").evaluate_all("cells => cells.map(cell => cell.title)") == [
        "all codebooks: 62.5 % of the entries used, perplexity 788.5",
        "codebook 0: 100.0 % of the entries used, perplexity 1,500",
        "codebook 1: 25.0 % of the entries used, perplexity 77",
    ]
    assert line.inner_text().split() == ["Codec-A", "63", "789", "100", "1500", "25", "77"]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_itself_never_scrolls_sideways(tab, width):
    tab.set_viewport_size({"width": width, "height": 740})
    fits = "document.documentElement.scrollWidth <= innerWidth"
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert tab.evaluate(fits)
    enrol(tab, "ann", "S-MOS, speech")
    assert tab.evaluate(fits)


def test_quality_is_drawn_against_the_number_of_codebooks_with_a_line_for_each_codec(context, report, folder):
    names = [f"ours-{count}L" for count in (1, 4, 16)]
    for name, count in zip(names, (1, 4, 16), strict=True):
        report["systems"].append({**report["systems"][0], "name": name, "num_codebooks": count})
        cell = {**tiny_report.figure(2.0 + count / 10), "ci95": None, "count": 3}
        report["summary"][name] = {domain: {"pesq": cell} for domain in report["domains"]}
    tab = context.new_page()
    tab.goto(page.write(report, folder).as_uri())
    headings = tab.locator("[data-domain=speech] h3").all_inner_texts()
    assert headings[:2] == ["Quality against bit rate", "Quality against the number of codebooks"]
    plot = tab.locator("[data-domain=speech] svg[aria-label*='against codebooks']")
    assert plot.count() == 1
    assert "ours-4L: 2.40 at 4 codebooks" in plot.get_attribute("aria-label")
    assert plot.locator("polyline").count() == 1
    assert plot.locator("g text").all_text_contents() == ["ours"]
    assert tab.locator("[data-domain=speech] td", has_text="2.40").first.inner_text() == "2.40 n = 3"


def test_plots_keep_to_the_range_that_a_metric_can_have(context, report, folder):
    report["metrics"][0]["range"] = [1.0, 10.6]
    cell = {**tiny_report.figure(1.2), "ci95": 2.5}
    report["summary"][SYSTEMS[0]] = {domain: {"pesq": cell} for domain in report["domains"]}
    tab = context.new_page()
    tab.goto(page.write(report, folder).as_uri())
    plot = tab.locator("[data-domain=speech] svg").first
    ticks = [float(text) for text in plot.locator(".tick[text-anchor=end]").all_text_contents()]
    assert 1.0 <= min(ticks) < max(ticks) <= 10.6
    whiskers = plot.locator(".whisker")
    ends = whiskers.evaluate_all("lines => lines.map(line => [line.y1, line.y2].map(y => y.baseVal.value))")
    assert all(12 <= y <= 208 for pair in ends for y in pair)


def test_studies_are_tables_and_curves_that_say_why_a_number_is_missing(context, report, folder):
    drift = Study(
        title="Drift",
        about="By minute.",
        domain="speech",
        columns=["first", "last"],
        rows=[StudyRow(name=HOSTILE, cells=[-1.5, 2.0]), StudyRow(name="b", cells=[None, None], why="too long")],
        notes=[f"{HOSTILE}: 3 of 4 clips"],
        curves=Curves(x="Minute", y="SI-SDR (dB)", series={HOSTILE: [(1.0, -1.5), (2.0, 2.0)]}),
    )
    probe = Study(title="Probe", about="", domain=None, columns=["all"], rows=[StudyRow(name="b", cells=[0.25])])
    report["studies"] = [dataclasses.asdict(one) for one in (drift, probe)]
    report["left_out"] = {"AUV": "not installed"}
    tab, complaints = context.new_page(), []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.write(report, folder).as_uri())
    assert "What the tokens mean" in tab.locator("nav a").all_inner_texts()
    first, second = tab.locator("#studies section").all()
    assert first.locator("h3").inner_text() == "Drift: speech"
    assert first.locator("tbody tr").first.locator("th").inner_text() == HOSTILE
    assert first.locator("tbody tr").first.locator("td").all_inner_texts() == ["−1.50", "2.00"]
    assert "too long" in first.locator(".notes").inner_text()
    assert first.locator("p").all_inner_texts() == [f"{HOSTILE}: 3 of 4 clips"]
    assert "at minute 2" in first.locator("svg").get_attribute("aria-label")
    assert second.locator("td").all_inner_texts() == ["0.25"]
    assert tab.locator("#about-text p").all_inner_texts() == ["AUV is left out: not installed"]
    tab.get_by_role("radio", name="Music").check()
    assert not first.is_visible()
    assert second.is_visible()
    assert complaints == []


# -- The listening test


def enrol(tab, rater: str, part: str) -> None:
    tab.get_by_label("Your name or number").fill(rater)
    options = tab.locator("select[name=part] option").all_inner_texts()
    tab.get_by_label("Part").select_option(index=[option.startswith(part) for option in options].index(True))
    tab.get_by_role("button", name="Start").click()


def rate(tab, score: int, similarity: bool = False) -> None:
    """One trial, by keyboard."""
    place = tab.locator("#trial-count").inner_text()
    for key in ("r", " ") if similarity else (" ",):
        before = tab.evaluate("run.unheard.size")
        tab.keyboard.press(key)
        tab.wait_for_function("before => run.unheard.size < before", arg=before)
    tab.keyboard.press(str(score))
    tab.keyboard.press("Enter")
    tab.wait_for_function("place => document.getElementById('trial-count').textContent !== place || "
                          "document.getElementById('trial-sheet').hidden", arg=place)  # fmt: skip


def downloaded(tab, path: Path) -> list[listening.Rating]:
    with tab.expect_download() as download:
        tab.locator("button:visible", has_text="Download ratings").click()
    download.value.save_as(path)
    return listening.read(path)


def test_a_whole_listening_test_by_keyboard(tab, tmp_path):
    rater = 'Zoë "Z", 1'
    enrol(tab, rater, "N-MOS, speech")
    seen = []
    for number in range(6):  # two clips, by two codecs and as they are
        seen.append(tab.locator("body").inner_text())
        if number == 3:
            tab.reload()
            assert tab.get_by_label("Your name or number").input_value() == rater
            enrol(tab, rater, "N-MOS, speech")
            assert tab.locator("#trial-count").inner_text() == "4 of 6"
        rate(tab, 1 + number % 5)
    assert "This part is done" in tab.locator("#trial-end").inner_text()
    for text in seen:
        assert not re.search(r"Codec|reference|second|script|audio/|\.flac", text)
    tab.get_by_role("button", name="Leave the test").click()
    enrol(tab, rater, "S-MOS, music")
    for number in range(6):
        rate(tab, 5 - number % 5, similarity=True)
    ratings = downloaded(tab, tmp_path / "ratings.csv")
    clips = {"speech": {HOSTILE, "second"}, "music": {"third", "fourth"}}
    expected = {
        (clip, domain, name, scale)
        for domain, scale in (("speech", "N-MOS"), ("music", "S-MOS"))
        for clip in clips[domain]
        for name in (*SYSTEMS[:2], listening.REFERENCE)
    }
    assert {(r.clip, r.domain, r.system, r.scale) for r in ratings} == expected
    assert len(ratings) == 12
    assert [r.score for r in ratings] == [1, 2, 3, 4, 5, 1, 5, 4, 3, 2, 1, 5]
    assert all(r.rater == rater and 0.2 < r.seconds < 60 for r in ratings)
    assert [r.presented_at for r in ratings] == sorted(r.presented_at for r in ratings)


def test_the_order_depends_on_the_rater_alone(tab):
    order = "([rater, scale]) => plan(rater, {scale, domain: 'speech'}).map(trial => trial.key)"
    first = {rater: tab.evaluate(order, [rater, "N-MOS"]) for rater in "abcdefgh"}
    tab.reload()
    assert {rater: tab.evaluate(order, [rater, "N-MOS"]) for rater in "abcdefgh"} == first
    assert len({tuple(keys) for keys in first.values()}) > 4
    assert {frozenset(keys) for keys in first.values()} == {frozenset(first["a"])}
    draws = tab.evaluate("() => { const random = randomFrom('x'); return Array.from({length: 20000}, random); }")
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # χ² of 19 degrees of freedom: 1 in 7000


def test_more_clips_than_thirty_are_drawn_from(context, report, folder):
    report["clips"] = [{**report["clips"][0], "id": f"c{number}"} for number in range(40)]
    tab = context.new_page()
    tab.goto(page.write(report, folder).as_uri())
    keys = tab.evaluate("plan('ann', {scale: 'N-MOS', domain: 'speech'}).map(trial => JSON.parse(trial.key)[0])")
    assert len(keys) == 90
    assert len(set(keys)) == 30


def test_a_score_needs_hearing_and_can_be_taken_back(tab, tmp_path):
    enrol(tab, "ann", "N-MOS, speech")
    tab.keyboard.press("Enter")
    assert tab.locator("#trial-note").inner_text() == "Listen to the end first."
    rate(tab, 2)
    tab.keyboard.press("Backspace")
    assert tab.get_by_label("Poor").is_checked()
    tab.keyboard.press("5")
    tab.keyboard.press("Enter")
    assert [one.score for one in downloaded(tab, tmp_path / "ratings.csv")] == [5]


def test_it_works_where_the_browser_keeps_nothing(context, report, folder, tmp_path):
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('', 'SecurityError'); } });"
    )
    tab = context.new_page()
    tab.goto(page.write(report, folder).as_uri())
    enrol(tab, "ann", "N-MOS, speech")
    assert "keeps nothing" in tab.locator("#trial-note").inner_text()
    rate(tab, 4)
    assert len(downloaded(tab, tmp_path / "ratings.csv")) == 1


def test_a_file_that_cannot_be_played_is_passed_over(context, report, folder):
    tab = context.new_page()
    path = page.write(report, folder)
    for stimulus in (folder / "stimuli").iterdir():
        stimulus.unlink()
    tab.goto(path.as_uri())
    enrol(tab, "ann", "N-MOS, speech")
    tab.wait_for_function("run.broken")
    assert "cannot be played" in tab.locator("#trial-note").inner_text()
    tab.keyboard.press("Enter")
    assert tab.locator("#trial-count").inner_text() == "2 of 6"
