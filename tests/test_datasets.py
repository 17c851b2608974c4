"""Evaluation sets: each layout as it unpacks, ids that are names, and lists that promise what is not there."""

import gzip
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation import datasets
from omnicodec_jax.evaluation.datasets import EvalClip, clips

pytestmark = pytest.mark.quick


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def ids(found):
    return [clip.id for clip in found]


# -- Any set


@given(total=st.integers(1, 200), limit=st.integers(1, 250))
def test_a_limit_takes_an_even_share_of_every_stretch(total, limit):
    found = [EvalClip(str(number), "sound", Path()) for number in range(total)]
    numbers = [int(clip.id) for clip in datasets._spread(found, limit)]
    assert len(numbers) == min(total, limit)
    gaps = np.diff(numbers)
    assert (gaps > 0).all()
    assert limit >= total or gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(numbers[0] - (total - 1 - numbers[-1])) <= 1  # as far from the start as from the end


def test_a_limit_is_at_least_one(tmp_path):
    with pytest.raises(DataError, match="at least 1"):
        clips(tmp_path, "sound", 0)


def test_a_folder_gives_its_audio_sorted_by_relative_names(tmp_path):
    touch(tmp_path, "b.wav", "a/c.x.FLAC", "a/notes.txt", ".hidden.wav")
    assert clips(tmp_path, "sound", None) == [
        EvalClip("a/c.x", "sound", tmp_path / "a/c.x.FLAC"),
        EvalClip("b", "sound", tmp_path / "b.wav"),
    ]
    assert ids(clips(tmp_path, "sound", 1)) == ["b"]


def test_names_that_would_be_the_same_keep_their_extensions(tmp_path):
    touch(tmp_path, "a.wav", "a.mp3", "b.wav")
    assert ids(clips(tmp_path, "sound", None)) == ["a.mp3", "a.wav", "b"]


def test_a_missing_and_an_empty_folder_say_what_to_give(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        clips(tmp_path / "gone", "music", None)
    touch(tmp_path, "readme.txt")
    with pytest.raises(DataError, match=r"no audio of the domain music; it must be a manifest, .* a folder of audio"):
        clips(tmp_path, "music", None)


# -- Manifests


@pytest.mark.parametrize("name", ["list.jsonl", "list.jsonl.gz"])
def test_a_manifest_gives_parts_and_transcripts_of_its_domain(tmp_path, name):
    touch(tmp_path, "data/a.wav", "data/b.wav")
    rows = [
        {"audio_filepath": "data/a.wav", "text": "two words"},
        {"id": "x/late", "audio_filepath": "data/a.wav", "offset": 1.5, "duration": 2, "domain": "speech"},
        {"audio_filepath": "data/b.wav", "domain": "music"},
        {"audio_filepath": str(tmp_path / "data/b.wav")},
    ]
    text = "\n\n".join(map(json.dumps, rows)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert clips(tmp_path / name, "speech", None) == [
        EvalClip("data/a", "speech", tmp_path / "data/a.wav", "two words"),
        EvalClip("x/late", "speech", tmp_path / "data/a.wav", None, 1.5, 2),
        EvalClip(f"{tmp_path}/data/b".lstrip("/"), "speech", tmp_path / "data/b.wav"),
    ]


def test_an_scp_list_has_no_transcripts(tmp_path):
    touch(tmp_path, "a.wav")
    (tmp_path / "wav.scp").write_text("one a.wav\n")
    assert clips(tmp_path / "wav.scp", "speech", None) == [EvalClip("one", "speech", tmp_path / "a.wav")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{broken", r"list.jsonl: lists no audio; list.jsonl:1: no clip"),
        (
            '{"audio_filepath": "a.wav"}\n{"audio_filepath": "a.wav", "offset": 1}',
            r"2 clips are called a.wav; give each",
        ),
        ('{"audio_filepath": "a.wav", "domain": "Speech"}', r"no audio of the domain speech; .* are of Speech \(1\)"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, lines, message):
    touch(tmp_path, "a.wav")
    (tmp_path / "list.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        clips(tmp_path / "list.jsonl", "speech", None)


def test_a_bad_line_costs_itself_only(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    lines = [
        '\ufeff{"audio_filepath": "a.wav", "text": "two words"}',
        "{broken",
        '{"audio_filepath": "b.wav", "domain": 5}',
        '{"audio_filepath": "b.wav"}',
        '{"audio_filepath": "gone.wav"}',
    ]
    (tmp_path / "list.json").write_text("\n".join(lines))
    found = clips(tmp_path / "list.json", "speech", None)
    assert [(clip.id, clip.transcript, clip.problem is None) for clip in found] == [
        ("a", "two words", True),
        ("b", None, True),
        ("gone", None, True),  # whoever reads it says so
        ("list.json:2", None, False),
        ("list.json:3", None, False),
    ]
    assert len(clips(tmp_path / "list.json", "speech", 1)) == 3


def test_ids_are_utf8_whatever_files_are_called(tmp_path):
    open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "w").close()
    assert ids(clips(tmp_path, "speech", None)) == [r"caf\udce9"]
    (tmp_path / "list.jsonl").write_text('{"audio_filepath": "a.wav", "id": "../half \\ud83d.wav"}')
    assert ids(clips(tmp_path / "list.jsonl", "speech", None)) == [r"half \ud83d"]


# -- LibriSpeech


@pytest.fixture
def librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    touch(root, "test-clean/61/7/61-7-0001.flac", "test-clean/61/7/61-7-0000.flac", "dev-clean/8/9/8-9-0000.flac")
    (root / "test-clean/61/7/61-7.trans.txt").write_text("61-7-0000 HE HOPED\n61-7-0001 STUFF IT\n")
    (root / "dev-clean/8/9/8-9.trans.txt").write_text("8-9-0000 NO\n")
    return root


@pytest.mark.parametrize("given_folder", ["", "test-clean"])
def test_librispeech_is_test_clean_with_transcripts(librispeech, given_folder):
    path = librispeech / "test-clean/61/7"
    assert clips(librispeech / given_folder, "speech", None) == [
        EvalClip("61/7/61-7-0000", "speech", path / "61-7-0000.flac", "HE HOPED"),
        EvalClip("61/7/61-7-0001", "speech", path / "61-7-0001.flac", "STUFF IT"),
    ]


def test_librispeech_that_was_not_unpacked_to_the_end(librispeech):
    (librispeech / "test-clean/61/7/61-7-0001.flac").unlink()
    with pytest.raises(DataError, match=r"61-7-0001.flac is not beside it; unpack"):
        clips(librispeech, "speech", None)


# -- GTZAN


@pytest.fixture
def gtzan(tmp_path):
    root = tmp_path / "gtzan"
    touch(root, "genres/jazz/jazz.00054.wav", "genres/jazz/jazz.00001.wav", "genres/blues/blues.00000.au", "README.txt")
    return root


@pytest.mark.parametrize("given_folder", ["", "genres"])
def test_gtzan_without_the_damaged_track(gtzan, given_folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert ids(clips(gtzan / given_folder, "music", None)) == ["blues/blues.00000", "jazz/jazz.00001"]
    assert [record.message for record in caplog.records if "jazz.00054" in record.message]


@pytest.mark.parametrize("place", ["", "genres"])
@pytest.mark.parametrize("given_folder", ["", "genres"])
def test_gtzan_of_a_list(gtzan, place, given_folder):
    (gtzan / place / "mine.txt").write_text("jazz/jazz.00001.wav\n")
    assert ids(clips(gtzan / given_folder, "music", None)) == ["jazz/jazz.00001"]
    (gtzan / place / "test_filtered.txt").write_text("blues/blues.00000.wav\n")  # the archive has it as .au
    assert ids(clips(gtzan / given_folder, "music", None)) == ["blues/blues.00000"]


def test_gtzan_lists_that_cannot_be_used(gtzan):
    (gtzan / "one.txt").write_text("blues/blues.00000.wav\nrock/rock.00099.wav\n")
    with pytest.raises(DataError, match=r"1 of its tracks are not in .*, rock.00099 for one; unpack"):
        clips(gtzan, "music", None)
    (gtzan / "two.txt").write_text("jazz/jazz.00001.wav\n")
    with pytest.raises(DataError, match="one.txt, two.txt: several lists"):
        clips(gtzan, "music", None)


# -- AudioSet

SEGMENTS = """# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=4
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"
Ybcdefghij_, 30.000, 40.000, "/m/03v3yw"
-BfyqZoedlk, 2.000, 3.000, "/m/03v3yw"
kbcdefghijk, 2.000, 3.000, "/m/03v3yw"
absent_____, 2.000, 3.000, "/m/03v3yw"
"""


@pytest.fixture
def audioset(tmp_path):
    (tmp_path / "eval/wav").mkdir(parents=True)
    (tmp_path / "eval_segments.csv").write_text(SEGMENTS)
    seconds = {"Y--4gqARaEJE": 10.2, "Ybcdefghij__30.000_40.000": 10, "-BfyqZoedlk": 6, "kbcdefghijk": 2.75}
    for name, length in (seconds | {"unlisted": 1}).items():
        soundfile.write(tmp_path / f"eval/wav/{name}.wav", np.zeros(round(length * 8000)), 8000)
    return tmp_path


def test_audioset_cuts_only_whole_recordings(audioset, caplog):
    with caplog.at_level(logging.INFO):
        found = clips(audioset, "sound", None)
    assert "audio of 4 of 5 segments" in caplog.text
    assert [(clip.id, clip.offset, clip.duration) for clip in found] == [
        ("eval/wav/-BfyqZoedlk", 2.0, 1.0),
        ("eval/wav/Y--4gqARaEJE", 0.0, None),
        ("eval/wav/Ybcdefghij__30.000_40.000", 0.0, None),
        ("eval/wav/kbcdefghijk", 2.0, 0.75),  # ends before its segment does
    ]
    assert found[0].path == audioset / "eval/wav/-BfyqZoedlk.wav"


def test_audioset_that_cannot_be_used(audioset):
    path = audioset / "eval/wav/kbcdefghijk.wav"
    soundfile.write(path, np.zeros(round(1.9 * 8000)), 8000)
    with pytest.raises(DataError, match=r"1.9 s are more than its segment, and end before that begins, at 2 s"):
        clips(audioset, "sound", None)
    for file in (audioset / "eval/wav").glob("*.wav"):
        file.unlink()
    with pytest.raises(DataError, match=r"none of its segments; files must be called YTID"):
        clips(audioset, "sound", None)
    (audioset / "eval_segments.csv").write_text("# a comment\n--4gqARaEJE, zero, 10, x\n")
    with pytest.raises(DataError, match="row 1: could not convert"):
        clips(audioset, "sound", None)


def test_audioset_leaves_damaged_files_to_whoever_loads_them(audioset):
    (audioset / "eval/wav/kbcdefghijk.wav").write_bytes(b"no sound" * 99)
    assert [clip.duration for clip in clips(audioset, "sound", None) if "kbc" in clip.id] == [None]
