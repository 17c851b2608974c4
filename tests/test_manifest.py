import gzip
import json

import pytest

from omnicodec_jax.data import manifest
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.errors import DataError

LINE = '{"audio_filepath": "a.wav"}'


def entries(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return list(manifest.read(path))


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_jsonl(tmp_path, name):
    rows = [
        {"id": "one", "audio_filepath": "a.wav", "duration": 2.5, "sample_rate": 44_100, "domain": "speech"},
        {"audio_filepath": "/abs/b c.flac"},
        {"id": 3, "audio_filepath": "long.flac", "offset": 60, "duration": 10},
        {"audio_filepath": "long.flac", "offset": 70.5},
    ]
    assert entries(tmp_path / name, "\n\n".join(map(json.dumps, rows))) == [
        Entry("one", "a.wav", seconds=2.5, domain="speech"),  # the whole file, of which the length is told
        Entry("/abs/b c.flac", "/abs/b c.flac"),
        Entry("3", "long.flac", 60.0, 10, 10),
        Entry("long.flac", "long.flac", 70.5),
    ]


@pytest.mark.parametrize("name", ["wav.scp", "wav.scp.gz"])
def test_scp(tmp_path, name):
    assert entries(tmp_path / name, "utt1 a/b.wav\n/c/d.flac\r\n\n") == [
        Entry("utt1", "a/b.wav"),
        Entry("/c/d.flac", "/c/d.flac"),
    ]


def test_a_directory_lists_its_audio_by_relative_name(tmp_path):
    for name in ("b.wav", "a/c.FLAC", "a/notes.txt", ".hidden.wav", ".git/d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(manifest.read(tmp_path)) == [Entry("a/c.FLAC", "a/c.FLAC"), Entry("b.wav", "b.wav")]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("m.jsonl", "{broken"),
        ("m.jsonl", '["a.wav"]'),
        ("m.jsonl", '{"audio": "a.wav"}'),
        ("m.jsonl", '{"audio_filepath": 7}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "offset": -1}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "offset": "1"}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "duration": NaN}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "duration": true}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "duration": 1' + 400 * "0" + "}"),
        ("m.jsonl", 200_000 * "["),
        ("m.scp", "utt1 a.wav 3.2"),
        ("m.scp", "utt1 sox a.wav -t wav - |"),
    ],
)
def test_a_malformed_line_says_why_and_stops_nothing(tmp_path, name, line):
    good = LINE if name.endswith("jsonl") else "a.wav"
    before, bad, after = entries(tmp_path / name, f"{good}\n{line}\n{good}\n")
    assert before == after == Entry("a.wav", "a.wav")
    assert (bad.id, bad.path) == (f"{name}:2", name)
    assert bad.problem is not None
    assert bad.problem.startswith("no clip: ")


def test_a_line_that_is_not_utf8_stops_nothing(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(LINE.encode() + b'\n{"audio_filepath": "\xe9"}\n' + LINE.encode())
    assert [entry.problem is None for entry in manifest.read(tmp_path / "m.jsonl")] == [True, False, True]


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"text", lambda data: data[:20] + bytes(40)])
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(damage(gzip.compress("\n".join(f'{{"audio_filepath": "{i}.wav"}}' for i in range(999)).encode())))
    with pytest.raises(DataError, match=r"m\.jsonl\.gz: damaged: "):
        list(manifest.read(path))


def test_sources(tmp_path):
    (tmp_path / "m.jsonl").write_text(LINE)
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "a.wav").touch()
    speech, music = tmp_path / "m.jsonl", tmp_path / "music"
    assert manifest.parse_sources(f"speech={speech},music={music}") == {"speech": speech, "music": music}
    assert (manifest.folder(speech), manifest.folder(music)) == (tmp_path, music)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tmp}/m.jsonl", "must be DOMAIN=PATH"),
        ("speech={tmp}/m.jsonl,", "must be DOMAIN=PATH"),
        ("a/b={tmp}/m.jsonl", "must be DOMAIN=PATH"),
        ("speech={tmp}/m.jsonl,speech={tmp}/m.jsonl", "speech is given twice"),
        ("speech={tmp}/nothing", "nothing: no such file or directory"),
        ("speech={tmp}/m.txt", r"m\.txt: must be a directory, or end in"),
        ("speech={tmp}/empty.jsonl", r"speech: .*empty\.jsonl: lists no audio"),
        ("speech={tmp}", "lists no audio"),
    ],
)
def test_wrong_sources_are_refused(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(LINE)
    (tmp_path / "m.txt").write_text("a.wav")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=message):
        manifest.parse_sources(text.format(tmp=tmp_path))
