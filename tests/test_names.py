"""Names of what is written: inside their folder, distinct, and no longer than file systems allow."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnicodec_jax import names
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import replacing

pytestmark = pytest.mark.quick

WHERE = Path("list.jsonl")
AUDIO = frozenset({".wav", ".flac", ".mp3"})


def distinct(*given):
    return names.distinct(WHERE, given, ".flac", AUDIO)


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["a.wav", "b/c.x.MP3", "d"], ["a.flac", "b/c.x.flac", "d.flac"]),
        (["a.wav", "a.flac", "b.wav"], ["a.wav.flac", "a.flac.flac", "b.flac"]),
        (["a.wav", "a.flac", "a.wav.mp3"], ["a.wav.flac", "a.flac.flac", "a.wav.mp3.flac"]),
        (["a", "a.wav"], ["a.flac", "a.wav.flac"]),
        (["1.5", "1.6"], ["1.5.flac", "1.6.flac"]),
        (["/abs", "../up", "..", "x//./y"], ["abs.flac", "up.flac", "clip.flac", "x/y.flac"]),
        (["nul\0", "half \ud83d"], [r"nul\x00.flac", r"half \ud83d.flac"]),
        (["caf\udce9.wav"], ["caf\udce9.flac"]),  # a file can be called so
    ],
)
def test_every_clip_keeps_a_name_of_its_own(given_names, expected):
    assert distinct(*given_names) == expected


@pytest.mark.parametrize("same", [["a.wav", "a.wav"], ["/a", "a"], ["", ".."], ["x/../y", "x/y"]])
def test_clips_that_cannot_be_told_apart_are_refused(same):
    with pytest.raises(DataError, match=r"list\.jsonl: 2 clips are called .*; give each its own `id`"):
        distinct(*same)


def test_a_file_and_a_directory_of_one_name_are_refused():
    with pytest.raises(DataError, match=r"a\.flac would be a file and a directory"):
        distinct("a", "a.flac/b")


parts = st.sampled_from(
    ["a", "A", "a.WAV", "a.wav", "a.flac", "a.wav.mp3", "..", "", "é" * 130, "é" * 131, "\ud83d", "\0"]
)


@pytest.mark.parametrize(
    "twins",
    [
        ["Ab.wav", "ab.wav"],
        ["X/a", "x/a"],
        ["caf\u00e9.wav", "cafe\u0301.wav"],
        ["STRASSE", "straße"],
        ["a.WAV", "a.wav"],
    ],
)
def test_names_that_some_disks_take_for_one_are_told_apart(twins):
    made = distinct(*twins, "other.wav")
    assert made[2] == "other.flac"
    assert len({unicodedata.normalize("NFC", name).casefold() for name in made}) == 3
    assert made == list(reversed(distinct("other.wav", *reversed(twins))))  # whatever their order


def test_a_file_and_a_directory_that_some_disks_take_for_one_are_refused():
    with pytest.raises(DataError, match=r"a\.flac would be a file and a directory"):
        distinct("a", "A.FLAC/b")


@given(given_names=st.lists(st.lists(parts, min_size=1, max_size=3).map("/".join), max_size=8))
def test_names_never_meet_nor_leave_their_folder(given_names):
    try:
        made = distinct(*given_names)
    except DataError:
        return
    assert len({names.key(name) for name in made}) == len(given_names)
    for name in made:
        assert name.endswith(".flac")
        assert not {"", ".", ".."}.intersection(name.split("/"))
        assert all(len(os.fsencode(part)) <= 255 for part in name.split("/"))


def test_long_names_are_cut_and_stay_distinct(tmp_path):
    long = ["名" * 83 + ".wav", "名" * 84 + ".wav", "名" * 80 + ".wav", "x" * 5000, "y/" * 2000 + "z", "z" * 300 + "/a"]
    made = distinct(*long)
    assert made[2] == "名" * 80 + ".flac"  # fits as it is
    assert len(set(made)) == len(made)
    for name in made:
        with replacing(tmp_path / name) as temporary:  # its name may be longer
            temporary.write_text("sound")
    assert {file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {"sound"}
    assert sum(file.is_file() for file in tmp_path.rglob("*")) == len(made)


def test_names_are_written_in_utf8():
    assert names.text("caf\udce9.wav, \ud83d, né") == r"caf\udce9.wav, \ud83d, né"


def test_shards_are_not_written_to_a_path_that_is_not_utf8():
    assert names.utf8(Path("né")) == Path("né")
    with pytest.raises(DataError, match=r"caf\\udce9: the path is not UTF-8"):
        names.utf8(Path("caf\udce9"))


def test_paths_on_a_command_line_may_hold_commas():
    assert names.assignments("speech=a,b.jsonl,music=/x=1/c,") == ["speech=a,b.jsonl", "music=/x=1/c,"]
