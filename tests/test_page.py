"""The file of an evaluation's page, and its spectrograms; what it does in a browser is in test_page_browser.py."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tiny_report
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_report import HOSTILE, RATE

from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation import listening, page

pytestmark = pytest.mark.quick


@pytest.fixture
def report(tmp_path) -> dict[str, Any]:
    """With its files."""
    return tiny_report.build(tmp_path)


# -- The file


class Elements(HTMLParser):
    """Every element and its attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def test_the_page_is_one_file_that_names_no_other_place(report, tmp_path):
    path = page.write(report, tmp_path)
    assert path == tmp_path / "index.html"
    text = path.read_text()
    elements = Elements(text).elements
    resources = [attributes[name] or "" for _, attributes in elements for name in ("src", "href") if name in attributes]
    assert sorted(resources) == ["#results", "data:,"]
    assert "{{" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # the name of a namespace
    assert not re.findall(r"\bfetch\(|XMLHttpRequest|import\(|@import|url\(", text)


def test_hostile_names_stay_data(report, tmp_path):
    found = Elements(page.write(report, tmp_path).read_text())
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert json.loads(found.scripts[0])["clips"][0]["id"] == HOSTILE


def test_paths_are_urls_of_files_and_stimuli_are_the_same_sound_under_a_name_that_says_nothing(report, tmp_path):
    before = copy.deepcopy(report)
    for _ in range(2):  # the second time over the first one's files
        data = json.loads(Elements(page.write(report, tmp_path).read_text()).scripts[0])
    assert report == before
    stimuli = []
    for clip in data["clips"]:
        for take in (clip["original"], *clip["systems"].values()):
            assert not set("#? ") & set(take["audio"] + take["spectrogram"])
            assert (tmp_path / unquote(take["spectrogram"])).is_file()
            assert re.fullmatch(r"stimuli/[0-9a-f]{20}\.flac", take["stimulus"])
            assert (tmp_path / take["stimulus"]).read_bytes() == (tmp_path / unquote(take["audio"])).read_bytes()
            stimuli.append(take["stimulus"])
    assert len(set(stimuli)) == len(stimuli) == len(list((tmp_path / "stimuli").iterdir()))


def test_missing_audio_and_a_system_named_as_the_hidden_reference_are_refused(report, tmp_path):
    (tmp_path / report["clips"][0]["original"]["audio"]).unlink()
    with pytest.raises(DataError, match=r"s1 #1 100%\.flac: the report names this audio"):
        page.write(report, tmp_path)
    report["systems"][0]["name"] = listening.REFERENCE
    with pytest.raises(DataError, match="another name"):
        page.write(report, tmp_path)


# -- Spectrograms


def brightness(path: Path) -> np.ndarray:
    """Grey levels [rows, columns], the lowest frequency first."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))[::-1].astype(int)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.02, 0.98), rate=st.sampled_from([16_000, 24_000, 44_100]), seconds=st.floats(0.05, 9))
def test_a_tone_shows_at_its_height(tmp_path_factory, share, rate, seconds):
    path = tmp_path_factory.mktemp("png") / "tone.png"
    samples = 0.01 * np.sin(np.pi * share * np.arange(int(seconds * rate)))
    page.spectrogram(samples.astype(np.float32), rate, path)
    picture = brightness(path)
    assert picture.shape[0] == page.ROWS == 192
    assert picture.shape[1] <= page.COLUMNS == 900
    brightest = picture[:, picture.shape[1] // 2].argmax()
    assert abs(brightest + 0.5 - share * page.ROWS) <= 1


def test_brightness_is_level_and_place_is_time(tmp_path):
    rng, levels = np.random.default_rng(0), []
    low, high = page.DECIBELS
    for decibels in (low - 30, low, (low + high) / 2, high, high + 10):
        tone = 10 ** (decibels / 20) * np.sin(np.pi / 3 * np.arange(RATE))
        page.spectrogram(tone.astype(np.float32), RATE, tmp_path / "tone.png")
        levels.append(brightness(tmp_path / "tone.png").max())
    assert levels == sorted(levels)
    assert (levels[0], levels[1], levels[3], levels[4]) == (0, 0, 255, 255)
    assert levels[2] == pytest.approx(127.5, abs=8)
    burst = np.zeros(60 * RATE, np.float32)  # longer than there are columns
    burst[45 * RATE : 46 * RATE] = rng.normal(size=RATE)
    page.spectrogram(burst, RATE, tmp_path / "burst.png")
    columns = np.flatnonzero(brightness(tmp_path / "burst.png").max(axis=0) > 128)
    with Image.open(tmp_path / "burst.png") as image:
        assert image.width > page.COLUMNS / 2
        np.testing.assert_allclose(columns[[0, -1]] / image.width * 60, [45, 46], atol=0.2)


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_almost_no_samples_make_a_picture(tmp_path, samples):
    page.spectrogram(np.zeros(samples, np.float32), RATE, tmp_path / "short.png")
    assert not brightness(tmp_path / "short.png").any()


def test_colours_grow_brighter_all_the_way():
    grey = page.cubehelix(256) @ np.array([0.30, 0.59, 0.11])  # as the source weighs them
    assert (np.diff(grey) > 0).all()
    np.testing.assert_allclose(grey, np.arange(256), atol=1.5)
