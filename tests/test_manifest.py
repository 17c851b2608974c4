import gzip
import json
import logging
import os

import pytest

from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.data import discovery, manifest
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.errors import DataError

pytestmark = pytest.mark.quick

RECORDING = '{"sources": [{"type": "file", "source": "a.wav"}], "channel_ids": [0]}'
LINE = '{"audio_filepath": "a.wav"}'


def entries(path, text):
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return list(manifest.read(path))


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "M.JSONL", "M.JSONL.GZ", "nemo.json", "nemo.json.gz"])
def test_jsonl(tmp_path, name):
    rows = [
        {"id": "one", "audio_filepath": "a.wav", "duration": 2.5, "sample_rate": 44_100, "domain": "speech"},
        {"audio_filepath": "/abs/b c.flac"},
        {"id": 3, "audio_filepath": "long.flac", "offset": 60, "duration": 10},
        {"audio_filepath": "long.flac", "offset": 70.5},
        {"audio_filepath": "https://a.b/c.wav?sig=1"},
    ]
    assert entries(tmp_path / name, "\n\n".join(map(json.dumps, rows))) == [
        Entry("one", "a.wav", seconds=2.5, domain="speech"),  # the whole file, of which the length is told
        Entry("/abs/b c.flac", "/abs/b c.flac"),
        Entry("3", "long.flac", 60.0, 10, 10),
        Entry("long.flac", "long.flac", 70.5),
        Entry("https://a.b/c.wav?sig=1", "https://a.b/c.wav?sig=1"),
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
        ("m.jsonl", '{"audio_filepath": "a.wav", "domain": 5}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "id": ["a"]}'),
        ("m.jsonl", '{"audio_filepath": ""}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "shard_id": [1]}'),
        ("m.jsonl", '{"audio_filepath": "a.wav", "shard_id": "' + 300 * "x" + '"}'),
        ("m.jsonl", '{"type": "MonoCut", "id": "a", "custom": 5, "recording": ' + RECORDING + "}"),
        ("m.jsonl", '{"type": "MonoCut", "id": "a", "supervisions": 5, "recording": ' + RECORDING + "}"),
        ("m.jsonl", '{"type": "MonoCut", "id": "a", "channel": [[0]], "recording": ' + RECORDING + "}"),
        ("m.jsonl", '{"audio_filepath": "ftp://a.b/c.wav"}'),
        ("m.jsonl", '{"audio_filepath": "https://a.b"}'),
        ("m.jsonl", '{"audio_filepath": "s3://"}'),
        ("m.jsonl", RECORDING.replace("a.wav", "file:///a.wav").replace("{", '{"id": "a", ', 1)),
        ("m.scp", "utt1 ftp://a.b/c.wav"),
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


@pytest.mark.parametrize(("name", "line"), [("m.jsonl", LINE), ("m.scp", "a.wav"), ("m.jsonl.gz", LINE)])
def test_a_byte_order_mark_costs_no_line(tmp_path, name, line):
    joined = f"\ufeff{line}\n\ufeff{line}\n"  # two lists, one after the other
    assert entries(tmp_path / name, joined) == 2 * [Entry("a.wav", "a.wav")]


def test_utf16_is_told(tmp_path):
    (tmp_path / "m.jsonl").write_text(LINE, encoding="utf-16")
    with pytest.raises(DataError, match=r"m\.jsonl: written as UTF-16; save it as UTF-8"):
        list(manifest.read(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("id", ["null", '""'])
def test_a_clip_without_an_id_is_called_after_its_file(tmp_path, id):
    assert entries(tmp_path / "m.jsonl", f'{{"audio_filepath": "a.wav", "id": {id}}}') == [Entry("a.wav", "a.wav")]


def test_transcripts_come_with_their_lines(tmp_path):
    (tmp_path / "m.json").write_text(f'{{broken\n\n{LINE}\n{{"audio_filepath": "b.wav", "text": "two words"}}\n')
    assert [text for _, text in manifest.transcribed(tmp_path / "m.json")] == [None, None, "two words"]


# -- Directories


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(path):
    return [file.relative_to(path).as_posix() for file in discovery.find(path)]


def test_linked_directories_are_followed_and_loops_are_not(tmp_path):
    touch(tmp_path, "elsewhere/far.wav", "elsewhere/deep/deeper.wav", "music/a.wav", "music/album.wav/b.wav")
    music = tmp_path / "music"
    for link, target in {
        "link": tmp_path / "elsewhere",
        "loop": music,
        "up": tmp_path,
        "again": tmp_path / "elsewhere" / "deep",
        "album": music / "album.wav",
        "self": "self",
        "c.wav": music / "a.wav",
    }.items():
        (music / link).symlink_to(target)
    assert found(music) == ["a.wav", "again/deeper.wav", "album.wav/b.wav", "c.wav", "link/far.wav"]
    kind = "links to directories that are taken already"
    assert discovery.look(music).others == {kind: 5, "without a suffix": 1}
    other = tmp_path / "link"
    other.symlink_to(music)
    assert len(found(other)) == 5


def test_what_a_directory_holds_and_is_not_taken_is_counted_and_named(tmp_path, caplog):
    touch(tmp_path, "a.wav", "b.TXT", "c.txt", "notes", ".hidden.wav", "d/e.json", *(f"{n}.x{n}" for n in range(9)))
    with caplog.at_level(logging.WARNING):
        manifest.read_all({"sound": tmp_path})
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: passed over 2 .txt, ")
    assert message.endswith(" of other kinds; files taken: 1")
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match=r"lists no audio; it holds 2 \.txt"):
        manifest.read_all({"sound": tmp_path})


def test_lists_and_notes_beside_the_bundled_clips_are_not_worth_a_warning(tmp_path, caplog):
    bundled = discovery.take(BUNDLED_CLIPS)
    assert bundled.others == {".jsonl": 3, ".md": 1}
    assert caplog.messages == []
    touch(tmp_path, "a.wav", "a.jsonl", "a.lab")
    discovery.take(tmp_path)
    assert caplog.messages == [f"{tmp_path}: passed over 1 .jsonl, 1 .lab; files taken: 1"]


def test_a_manifest_stays_as_it_was_when_it_was_read(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "m.jsonl").write_text(LINE)
    directory, lines = manifest.Manifest(tmp_path), manifest.Manifest(tmp_path / "m.jsonl")
    touch(tmp_path, "0.wav")
    (tmp_path / "b.wav").unlink()
    (tmp_path / "m.jsonl").unlink()
    for _ in range(2):
        assert [entry.path for entry in directory] == ["a.wav", "b.wav"]
        assert len(list(lines)) == 1


def test_a_directory_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def scandir(path, scandir=os.scandir):  # chmod would not keep root out
        if path.name == "closed":
            raise PermissionError
        return scandir(path)

    touch(tmp_path, "a.wav", "closed/b.wav")
    monkeypatch.setattr(discovery.os, "scandir", scandir)
    assert discovery.look(tmp_path).others == {"directories that cannot be read": 1}


def test_names_that_are_not_utf8_are_found(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    open(path, "w").close()
    (entry,) = manifest.read(tmp_path)
    assert os.fsencode(tmp_path / entry.path) == path
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": entry.path}))
    (tmp_path / "m.scp").write_bytes(b"caf\xe9.wav\n")
    assert list(manifest.read(tmp_path / "m.jsonl")) == list(manifest.read(tmp_path / "m.scp")) == [entry]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:2] + b"text", lambda data: data[:20] + bytes(40)]
)
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(damage(gzip.compress("\n".join(f'{{"audio_filepath": "{i}.wav"}}' for i in range(999)).encode())))
    with pytest.raises(DataError, match=r"m\.jsonl\.gz: damaged: "):
        list(manifest.read(path))


def test_a_pipe_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(DataError, match=r"m\.jsonl: a directory, a pipe or a device; only files are read"):
        manifest.parse_sources(f"speech={tmp_path / 'm.jsonl'}")


def test_sources(tmp_path):
    (tmp_path / "m.jsonl").write_text(LINE)
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "a.wav").touch()
    speech, music = tmp_path / "m.jsonl", tmp_path / "music"
    assert manifest.parse_sources(f"speech={speech},music={music}") == {"speech": speech, "music": music}
    assert (manifest.folder(speech), manifest.folder(music)) == (tmp_path, music)


def test_paths_may_hold_commas_and_equals_signs(tmp_path):
    comma, equals = tmp_path / "a,b.jsonl", tmp_path / "lang=de.jsonl"
    for path in (comma, equals):
        path.write_text(LINE)
        assert manifest.parse_sources(str(path), unnamed=True) == {"": path}
    both = f"speech={comma},music={equals}"
    assert manifest.parse_sources(both) == {"speech": comma, "music": equals}


def test_domains_that_are_there_are_named_when_none_fits(tmp_path):
    lines = [{"audio_filepath": "a.wav", "domain": domain} for domain in ("Speech", "Speech", "\ud83d")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"no audio of the domain speech; its clips are of Speech \(2\), \\ud83d \(1\)"):
        manifest.read_all({"speech": tmp_path / "m.jsonl"})
    assert len(list(manifest.Manifest(tmp_path / "m.jsonl"))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tmp}/m.jsonl", "must be DOMAIN=PATH"),
        ("speech={tmp}/m.jsonl,", "must be DOMAIN=PATH"),
        ("a/b={tmp}/m.jsonl", "must be DOMAIN=PATH"),
        ("speech={tmp}/m.jsonl,speech={tmp}/m.jsonl", "speech is given twice; join the two lists"),
        ("speech={tmp}/m.jsonl,Speech={tmp}/m.jsonl", "Speech is given twice; to some disks speech is the same name"),
        ("speech={tmp}/nothing", "nothing: no such file or directory"),
        ("{tmp}/m.jsonl,{tmp}/m.jsonl", "must be DOMAIN=PATH"),
        ("speech={tmp}/m.jsonl,{tmp}/m.jsonl", "no such file or directory; several lists must be DOMAIN=PATH,DOMAIN"),
        ("", "--manifest is empty"),
        ("speech=", "--manifest speech: must be followed by a path"),
        ("speech={tmp}/array.json", r"array\.json: lists no audio; array\.json:1: no clip: a JSON array; each of its"),
        ("speech={tmp}/one_line.json", "no clip: a JSON array; each of its objects must stand on a line of its own"),
        ("speech={tmp}/packed.jsonl", "compressed with gzip; its name must end in .gz"),
        ("speech={tmp}/m.txt", r"m\.txt: must be a directory, or end in"),
        ("speech={tmp}/empty.jsonl", r"speech: .*empty\.jsonl: lists no audio"),
        ("speech={tmp}", r"lists no audio; it holds 3 \.jsonl"),
    ],
)
def test_wrong_sources_are_refused(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(LINE)
    (tmp_path / "m.txt").write_text("a.wav")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "array.json").write_text(json.dumps([json.loads(LINE)], indent=1))
    (tmp_path / "one_line.json").write_text(json.dumps([json.loads(LINE)]))
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(LINE.encode()))
    with pytest.raises(DataError, match=message):
        manifest.read_all(manifest.parse_sources(text.format(tmp=tmp_path)))
