"""What pods meet in buckets: odd names, others' objects, the bucket itself as OUT, servers that refuse or go away."""

import os
import threading
import urllib.parse
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_bucket_commands import run, upload

from omnicodec_jax.buckets import BucketPath, as_path, requests, state_of
from omnicodec_jax.data import discovery, manifest, prepare, records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.prepare_unit import marker_path, plan, prepare_unit
from omnicodec_jax.data.units import Share

ODD = ("a b.wav", "ü.wav", "日本.wav", "a#b.wav", "a?b.wav", "a%20b.wav", "a+b.wav")
ODD += ("[1]/a*.wav", "{x}/a'b&c=d.wav", "~.wav")
"""Names that a URL, a pattern or a shell would take for something else."""
CONFIG = PrepareConfig(validation=0.4)


def forget_servers() -> None:
    """Makes the libraries, and the parent of child processes, look at their variables again."""
    import gcsfs
    import s3fs

    forkserver._forkserver._stop()
    requests.system_of.cache_clear()
    for library in (s3fs.S3FileSystem, gcsfs.GCSFileSystem):
        library.clear_instance_cache()


def write_raw(bucket: BucketPath, name: str, data: bytes = b"") -> None:
    """Writes an object by its name, whatever a path would make of it."""
    system = requests.system_of(bucket.scheme)
    inside = str(bucket).removeprefix(f"{bucket.scheme}://test/")
    if bucket.scheme == "s3":
        system.call_s3("put_object", Bucket="test", Key=f"{inside}/{name}", Body=data)
        return
    query = urllib.parse.urlencode({"uploadType": "media", "name": f"{inside}/{name}"})
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/test/o?{query}"
    urllib.request.urlopen(urllib.request.Request(url, data, method="POST"))


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 7200), 24_000)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files under odd names, on a disk."""
    for seed, name in enumerate(ODD):
        noise(tmp_path / "raw" / name, seed)
    return tmp_path / "raw"


def prepared(source: Path, out: Path) -> dict[str, bytes]:
    prepare.run({"sound": source}, out, CONFIG, 1, Share())
    return {shard.name: records.shard_path(out, shard.name).read_bytes() for shard in records.read_index(out)}


# -- Names


def test_objects_with_odd_names_are_prepared_as_the_files_of_a_disk(folder, bucket, tmp_path):
    upload(folder, bucket / "raw")
    assert prepared(bucket / "raw", bucket / "out #1") == prepared(folder, tmp_path / "out")


def test_removing_a_folder_with_a_pattern_in_its_name_removes_nothing_else(bucket):
    for name in ("a[1]/x", "a1/x", "b*/x", "bc/x"):
        (bucket / name).write_text("1")
    (bucket / "a[1]").remove_all()
    (bucket / "b*").remove_all()
    (bucket / "no such").remove_all()
    assert sorted(path.parent.name for path in bucket.find()) == ["a1", "bc"]


def test_what_consoles_leave_for_empty_folders_is_no_file(servers):
    """Only S3: the tests' server of Google's storage takes no such names."""
    bucket = as_path(f"s3://test/{uuid.uuid4().hex}")
    for name in ("raw/", "raw/sub/"):
        write_raw(bucket, name)
    (bucket / "raw/sub/a.wav").write_text("1")
    assert [str(path) for path in (bucket / "raw").find()] == [f"{bucket}/raw/sub/a.wav"]
    found = discovery.look(bucket / "raw", {".wav"})
    assert ([path.name for path in found.files], found.others.total()) == (["a.wav"], 0)
    assert [(bucket / "raw").is_dir(), (bucket / "raw").is_file()] == [True, False]


def test_names_that_no_path_can_say_are_passed_over_and_told(bucket, caplog):
    write_raw(bucket, "raw//a.wav", b"1")
    write_raw(bucket, "raw/a.wav", b"22")
    assert {path.name: path.stat().st_size for path in (bucket / "raw").find()} == {"a.wav": 2}
    assert "passed over 1 objects with //" in caplog.text


def test_an_object_may_be_called_as_a_folder(bucket):
    (bucket / "a").write_text("object")
    (bucket / "a/b").write_text("inside")
    assert {path.name for path in bucket.iterdir()} == {"a"}
    assert (bucket / "a").read_text() == "object"


# -- OUT


def test_the_bucket_itself_is_a_directory_as_others(servers, folder, tmp_path):
    """Only S3: the tests' server of Google's storage has one bucket, which all share."""
    system = requests.system_of("s3")
    system.call_s3("create_bucket", Bucket="whole")
    root = as_path("s3://whole/")
    upload(folder, root / "raw")
    expected = prepared(folder, tmp_path / "out")
    assert prepared(root / "raw", root) == prepared(root / "raw", root) == expected
    assert sorted(path.name for path in root.iterdir() if path.name != "raw") == sorted(
        path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")
    )
    (root / "list.jsonl").write_text("".join(f'{{"audio_filepath": "raw/{n}", "shard_id": 0}}\n' for n in ODD[:2]))
    assert [entry.path for entry in manifest.read(root / "list.jsonl")] == [f"raw/{name}" for name in ODD[:2]]
    root.remove_all()
    assert list(root.iterdir()) == []
    assert root.is_dir()


def test_what_else_lies_in_out_stays(folder, bucket, tmp_path):
    upload(folder, bucket)
    (bucket / "notes.txt").write_text("mine")
    before = {path: state_of(str(path)) for path in bucket.find()}
    assert prepared(bucket, bucket) == prepared(folder, tmp_path / "out")
    assert {path: state_of(str(path)) for path in before} == before


def test_a_run_with_other_options_is_refused_in_a_bucket_too(folder, bucket, capsys):
    upload(folder, bucket / "raw")
    prepared(bucket / "raw", bucket / "out")
    kept = {path: state_of(str(path)) for path in bucket.find()}
    words = ("prepare", "--manifest", f"sound={bucket / 'raw'}", "--out", bucket / "out", "--segment-seconds", "10")
    capsys.readouterr()
    run(*words, code=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{bucket / 'out'}: was prepared with other settings" in line
    assert {path: state_of(str(path)) for path in bucket.find()} == kept


# -- Objects that go, servers that go


def test_an_object_that_goes_after_it_was_listed_costs_itself(folder, bucket, tmp_path, monkeypatch):
    upload(folder, bucket / "raw")
    read_all = manifest.read_all

    def and_then_one_goes(sources: dict[str, Path]) -> dict[str, manifest.Manifest]:
        manifests = read_all(sources)
        (bucket / "raw" / ODD[0]).unlink()
        return manifests

    monkeypatch.setattr(manifest, "read_all", and_then_one_goes)
    prepared(bucket / "raw", tmp_path / "out")
    (row,) = (tmp_path / "out" / records.REJECTS).read_text().splitlines()
    assert ODD[0] in row
    assert "no such file" in row


def test_a_server_that_goes_away_in_the_middle_costs_clips_and_the_next_run_reads_them(folder, tmp_path, monkeypatch):
    pytest.importorskip("moto")
    import bucket_servers

    monkeypatch.setattr(requests, "PAUSES", (0.0,))
    port, out, source = bucket_servers.free_port(), tmp_path / "out", as_path("s3://test/raw")
    try:
        with bucket_servers.s3(port) as (process, variables):
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            forget_servers()
            upload(folder, source)
            unit = max(plan(manifest.read_all({"sound": source}), CONFIG), key=lambda unit: len(unit.entries))

            def and_then_it_dies(event: tuple[int, float | None]) -> None:
                if event[1] is not None and process.poll() is None:
                    process.kill()
                    process.wait()

            prepare_unit(unit, out, CONFIG, False, {}, and_then_it_dies)
        text = marker_path(out, unit.name).read_text()
        assert text.count("the server does not answer") == len(unit.entries) - 1
        with bucket_servers.s3(port):
            upload(folder, source)
            assert prepared(source, out) == prepared(folder, tmp_path / "of a disk")
    finally:
        monkeypatch.undo()
        forget_servers()


class Refuses(BaseHTTPRequestHandler):
    """A server that gives nothing."""

    status = 403

    def do_GET(self) -> None:
        is_s3 = "/storage/" not in self.path
        body = b"<Error><Code>AccessDenied</Code></Error>" if is_s3 else b'{"error": {"message": "no"}}'
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml" if is_s3 else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Refusal(ThreadingHTTPServer):
    """A server that says nothing of clients which hang up before they have its answer."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("scheme", "status", "message"),
    [
        ("s3", 403, "the server refuses this account"),
        ("gs", 403, "the server refuses this account"),
        ("gs", 401, "no credentials"),
    ],
)
def test_a_bucket_of_others_is_told_in_one_line_with_what_to_do(
    scheme, status, message, servers, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(Refuses, "status", status)
    with Refusal(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        forget_servers()
        try:
            run("inspect", f"{scheme}://others/run", code=1)
            run("clips", f"{scheme}://others/clips", code=1)
            run("prepare", "--manifest", f"x={scheme}://others/raw", "--out", tmp_path / "out", code=1)
            run("prepare", "--manifest", f"x={tmp_path}", "--out", f"{scheme}://others/out", code=1)
        finally:
            server.shutdown()
            monkeypatch.undo()
            forget_servers()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4, lines
    assert all(f"{scheme}://others/" in line and message in line for line in lines), lines


# -- Requests


@pytest.mark.parametrize("count", [3, 30])
def test_a_folder_is_listed_as_often_however_many_objects_it_has(servers, count):
    """Seven times: what it is (twice by a request for one object), of which kind it is (SHAR or not), what is in it."""
    root = as_path(f"s3://test/{uuid.uuid4().hex}")
    for number in range(count):
        (root / f"{number % 3}" / f"{number}.wav").write_text("1")
    lists = []
    events = requests.system_of("s3").s3.meta.events
    events.register("before-call.s3.ListObjectsV2", lambda **_: lists.append(1), unique_id=root.name)
    try:
        listed = list(manifest.Manifest(root))
    finally:
        events.unregister("before-call.s3.ListObjectsV2", unique_id=root.name)
    assert len(listed) == count
    assert len(lists) <= 7
