"""https://: lists, tars and audio of web servers are read where they lie, each file by its name."""

import gzip
import json
import os
import shutil
import tarfile
import tempfile
from multiprocessing import forkserver

import bucket_servers
import pytest
import soundfile

from omnicodec_jax import cli
from omnicodec_jax.buckets import BucketError, as_path, joined, on_disk, requests
from omnicodec_jax.corpus.readers import Readers, Request
from omnicodec_jax.data import audio, manifest, prepare, records
from omnicodec_jax.data.attempts import Seen
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share


@pytest.fixture
def folder(tmp_path, clips):
    """Two tars of two clips each, and a list of clips."""
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard 0{number}.tar", "w") as tar:
            for clip in clips[2 * number : 2 * number + 2]:
                file = folder / f"{clip.stem}.wav"
                samples, rate = soundfile.read(clip, stop=24_000)
                soundfile.write(file, samples, rate)
                tar.add(file, file.name)
    rows = [{"audio_filepath": file.name} for file in sorted(folder.glob("*.wav"))]
    (folder / "speech.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"audio_filepath": "gone.wav"}])
    )
    return folder


@pytest.fixture
def web(folder, monkeypatch):
    monkeypatch.setattr(requests, "PAUSES", (0.0, 0.0, 0.0))
    requests.system_of.cache_clear()
    with bucket_servers.web(folder) as (answers, url):
        yield answers, url
    requests.system_of.cache_clear()


def prepared(source, out):
    prepare.run({"speech": as_path(source)}, out, PrepareConfig(validation=0.4), 1, Share())
    lines = [json.loads(line) for line in (out / records.REJECTS).read_text().splitlines()]
    shards = {shard.name: records.shard_path(out, shard.name).read_bytes() for shard in records.read_index(out)}
    return shards, [(line["path"].rpartition("/")[2], line["reason"]) for line in lines]


@pytest.mark.parametrize("has_ranges", [True, False], ids=["with ranges", "whole files alone"])
@pytest.mark.parametrize("name", ["shard 0{0..1}.tar", "speech.jsonl"])
def test_audio_of_a_web_server_is_prepared_as_that_of_a_disk(web, folder, tmp_path, name, has_ranges):
    answers, url = web
    answers.has_ranges = has_ranges
    there, rejects = prepared(f"{url}/{name}", tmp_path / "there")
    here, expected = prepared(folder / name, tmp_path / "here")
    assert list(there.values()) == list(here.values())
    assert [name for name, _ in rejects] == [name for name, _ in expected]


def test_a_server_that_fails_for_a_while_costs_nothing(web, folder):
    answers, url = web
    answers.failures[:] = [503, 503, 429]
    assert as_path(f"{url}/speech.jsonl").read_bytes() == (folder / "speech.jsonl").read_bytes()
    answers.failures[:] = [503] * 9
    with pytest.raises(OSError, match=r"does not answer as it should \(503.*speech.jsonl"):
        as_path(f"{url}/speech.jsonl").stat()


def test_a_server_that_is_gone_is_not_taken_for_one_without_the_file(folder, monkeypatch):
    monkeypatch.setattr(requests, "PAUSES", (0.0,))
    with bucket_servers.web(folder) as (_, url):
        pass
    with pytest.raises(OSError, match="does not answer as it should") as error:
        as_path(f"{url}/speech.jsonl").exists()
    assert not isinstance(error.value, FileNotFoundError)


def test_what_is_not_on_the_server_is_told(web):
    answers, url = web
    assert not as_path(f"{url}/gone.wav").exists()
    with pytest.raises(FileNotFoundError, match="no such file on the server"):
        as_path(f"{url}/gone.wav").read_bytes()
    answers.failures[:] = [401]
    with pytest.raises(PermissionError, match="netrc"):
        as_path(f"{url}/speech.jsonl").read_bytes()


def test_a_query_is_sent_and_is_no_part_of_the_suffix(web, folder):
    answers, url = web
    path = as_path(f"{url}/speech.jsonl?token=a%2Fb")
    assert (path.suffix, path.read_bytes()) == (".jsonl", (folder / "speech.jsonl").read_bytes())
    assert answers.sent[-1][0] == "/speech.jsonl?token=a/b"
    with on_disk(path) as copy:
        assert copy.read_bytes() == path.read_bytes()


def test_a_signed_url_of_any_length_is_read_and_its_suffix_counts(web, folder, clips):
    _, url = web
    (folder / "speech.jsonl.gz").write_bytes(gzip.compress((folder / "speech.jsonl").read_bytes()))
    signed = f"?X-Amz-Date=20261127.5&X-Amz-Signature={'a' * 400}"
    lines = list(manifest.read(folder / "speech.jsonl"))
    assert list(manifest.read(as_path(f"{url}/speech.jsonl.gz{signed}"))) == lines
    assert [entry for entry, _ in manifest.labelled(as_path(f"{url}/speech.jsonl{signed}"), "audio_filepath")] == lines
    clip = f"{clips[0].stem}.wav"
    there = audio.load(as_path(f"{url}/{clip}{signed}"), 24_000)
    assert there.num_samples == audio.load(folder / clip, 24_000).num_samples
    assert as_path(f"{url}/{clip}{signed}").stem == clips[0].stem


def test_a_list_that_the_server_sends_as_packed_content_is_read(web, folder, monkeypatch):
    answers, url = web
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "speech.jsonl").read_bytes()))

    def end_headers(self, end=answers.end_headers):
        self.send_header("Content-Encoding", "gzip")
        end(self)

    monkeypatch.setattr(answers, "end_headers", end_headers)
    listed = [entry.path for entry in manifest.read(as_path(f"{url}/packed.jsonl.gz"))]
    assert listed == [entry.path for entry in manifest.read(folder / "speech.jsonl")]


@pytest.mark.parametrize("name", ["what is it?.wav", "100% of it.wav", "a%20b.wav", "#5?a=1.wav"])
def test_names_in_lists_are_names_of_files_and_not_urls(web, folder, clips, name):
    _, url = web
    (folder / f"{clips[0].stem}.wav").rename(folder / name)
    (folder / "names.jsonl").write_text(json.dumps({"audio_filepath": name}))
    (entry,) = manifest.read(as_path(f"{url}/names.jsonl"))
    there = audio.load(entry.file(as_path(f"{url}/names.jsonl").parent), 24_000)
    assert there.num_samples == audio.load(folder / name, 24_000).num_samples


def test_tars_whose_url_is_quoted_are_read(web, folder):
    _, url = web
    first, *_ = manifest.read(as_path(f"{url}/shard%2000.tar"))
    assert audio.load(first.file(as_path(url + "/x").parent), 24_000).num_samples


def test_a_name_with_a_number_sign_is_asked_for_as_a_whole(web, folder):
    _, url = web
    (folder / "étude #5.txt").write_text("five")
    (folder / "étude ").write_text("none")
    assert joined(as_path(f"{url}/list.jsonl").parent, "étude #5.txt").read_text() == "five"
    assert as_path(f"{url}/étude #5.txt?a=1").read_text() == "five"


def test_a_file_that_is_replaced_by_one_of_its_size_is_another(web, folder):
    _, url = web
    file = folder / "clip.wav"
    file.write_bytes(b"old")
    os.utime(file, (1e9, 1e9))
    path = as_path(f"{url}/clip.wav")
    before = Seen.of(path)
    assert path.open("rb").read() == b"old"
    assert Seen.of(path) == before
    file.write_bytes(b"new")
    assert Seen.of(path) != before
    assert path.open("rb").read() == b"new"


def test_inspect_tells_of_a_file(web, folder, clips, capsys):
    _, url = web
    assert cli.inspect(as_path(f"{url}/{clips[0].stem}.wav?a=1")) == 0
    assert f"{clips[0].stem}.wav?a=1: audio, " in capsys.readouterr().out


def test_stream_decode_refuses_to_write_there_before_it_decodes(web):
    _, url = web
    with pytest.raises(BucketError, match="http:// is only read here"):
        cli.stream_decode(as_path(f"{url}/tokens.safetensors"), as_path(f"{url}/gone.raw"), model="gone")


def test_processes_that_read_leave_no_copies(web, clips, tmp_path, monkeypatch):
    _, url = web
    copies = tmp_path / "c"  # Unix sockets below it must have short names
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    monkeypatch.setenv("TMPDIR", str(copies))
    forkserver._forkserver._stop()  # it would give its children the environment of before
    try:
        with Readers(2) as readers:
            files = [f"{clip.stem}.wav" for clip in clips[:4]]
            requests = [(name, Request(as_path(f"{url}/{name}"), Entry(name, name), 24_000, None)) for name in files]
            assert all(read.clip is not None for _, read, _ in readers.map(requests, lambda read: None) if read)
            assert list(copies.glob("*/*.wav"))
        assert not list(copies.glob("*/*.wav"))
        prepared(f"{url}/speech.jsonl", tmp_path / "out")
        assert not list(copies.glob("*/*.wav"))
    finally:
        forkserver._forkserver._stop()


def test_nothing_is_written_to_a_web_server_and_no_folder_is_listed(web, folder, tmp_path):
    _, url = web
    with pytest.raises(BucketError, match="http:// is only read here; write to gs://"):
        as_path(f"{url}/x").write_bytes(b"")
    with pytest.raises(BucketError, match="a web server does not say what a folder holds; name each file"):
        list(as_path(f"{url}/folder").iterdir())
    shutil.rmtree(folder)


@pytest.mark.parametrize("url", ["https://", "https://host", "https:///file"])
def test_url_without_a_file_is_refused(url):
    with pytest.raises(BucketError, match="names no file; must be https://HOST/NAME"):
        as_path(url)
