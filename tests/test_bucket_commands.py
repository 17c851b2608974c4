"""Each command from bucket to bucket, against servers on this machine: the same bytes as on a disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from omnicodec_jax import cli, model_directory
from omnicodec_jax.buckets import BucketPath, as_path, directory_on_disk, mirror, mirrored, on_disk, requests, state_of
from omnicodec_jax.corpus import TokenSource, read_tokens, shards
from omnicodec_jax.data import lease, records, units
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation import reconstruct
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.whisper import WhisperConfig

pytestmark = pytest.mark.minutes(4)

ROOT = Path(__file__).parents[1]
BAD = {"empty.wav": "empty file", "noise.wav": "not audio", "gone.wav": "no such"}


def upload(folder: Path, to: BucketPath) -> BucketPath:
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder)).put(file)
    return to


def files(folder: Path) -> dict[str, bytes]:
    """What a directory holds; of files that tell of others, without the times of these."""
    with directory_on_disk(folder) as here:
        paths = [path for path in here.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return {path.relative_to(here).as_posix(): without_times(path) for path in sorted(paths)}


def without_times(path: Path) -> bytes:
    if path.suffix != ".json" or b'"clips": [[' not in (text := path.read_bytes()):
        return path.read_bytes()
    fields = json.loads(text)
    fields["clips"] = [[number, size] for number, size, _ in fields["clips"]]
    return json.dumps(fields).encode()


def run(*words: object, code: int = 0) -> None:
    """A command, as it is typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omnicodec", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert (ended.value.code or 0) == code


@pytest.fixture(scope="module")
def corpus(clips, tmp_path_factory) -> Path:
    """Lists of two domains: pieces of the bundled clips, files that hold no sound, one that is missing."""
    folder = tmp_path_factory.mktemp("raw")
    for domain in ("speech", "music"):
        rows = []
        for number in range(6):
            name = f"{domain}_{number}.{('wav', 'flac', 'ogg')[number % 3]}"
            samples, rate = soundfile.read(clips[number], stop=44_100)
            soundfile.write(folder / name, samples, rate)
            rows.append({"audio_filepath": name})
        rows.append({"id": "part", "audio_filepath": f"{domain}_0.wav", "offset": 0.25, "duration": 0.5})
        rows += [{"audio_filepath": name} for name in BAD] if domain == "music" else []
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.wav").touch()
    (folder / "noise.wav").write_bytes(b"no sound at all" * 100)
    return folder


def lists(folder: Path) -> str:
    return ",".join(f"{domain}={folder / domain}.jsonl" for domain in ("speech", "music"))


PREPARE = ("--validation", "0.3", "--segment-seconds", "10", "--shard-hours", "0.001", "--num-workers", "1")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "prepared"
    run("prepare", "--manifest", lists(corpus), "--out", out, *PREPARE)
    return out


# -- Objects


def test_objects_are_read_and_written_as_files_are(bucket):
    (bucket / "a.txt").write_text("hällo")
    (bucket / "sub" / "b.bin").write_bytes(bytes(range(256)) * 300)
    (bucket / "sub" / "empty").write_bytes(b"")
    assert (bucket / "a.txt").read_text() == "hällo"
    assert (bucket / "a.txt").stat().st_size == 6
    assert [(bucket / "a.txt").is_file(), bucket.is_file(), bucket.is_dir(), (bucket / "c").exists()] == [1, 0, 1, 0]
    assert [path.name for path in bucket.iterdir()] == ["a.txt", "sub"]
    assert [path.name for path in bucket.glob("*/*.bin")] == ["b.bin"]
    assert [path.name for path in bucket.rglob()] == ["a.txt", "b.bin", "empty"]
    assert (bucket / "sub" / "b.bin").read_range(250, 260) == bytes([*range(250, 256), *range(4)])
    with on_disk(bucket / "sub" / "empty") as here, (bucket / "a.txt").open() as text:
        assert (here.stat().st_size, text.read()) == (0, "hällo")
    before = state_of(str(bucket / "a.txt"))
    (bucket / "a.txt").write_text("hüllo")
    assert state_of(str(bucket / "a.txt")) != before
    with (bucket / "a.txt").open() as text:  # not the copy of before
        assert text.read() == "hüllo"
    (bucket / "a.txt").unlink()
    (bucket / "a.txt").unlink(missing_ok=True)
    assert not (bucket / "a.txt").exists()
    bucket.remove_all()
    assert not bucket.exists()
    assert list(bucket.iterdir()) == []


def test_what_is_not_there_is_told_in_one_line(bucket, tmp_path, capsys, demo_model):
    nowhere = as_path(f"{bucket.scheme}://no-such-bucket-{bucket.name[:8]}")
    run("inspect", bucket / "gone", code=1)
    run("prepare", "--manifest", f"speech={nowhere / 'a.jsonl'}", "--out", tmp_path / "out", code=1)
    run("decode", bucket / "gone.safetensors", tmp_path / "a.wav", "--model", demo_model, code=1)
    run("encode", tmp_path, "--model", nowhere / "model", code=1)
    run("clips", nowhere / "clips", code=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5, lines
    assert all(line.startswith("error: ") and f"{bucket.scheme}://" in line for line in lines), lines
    assert "no such object, or no such bucket" in lines[-1]


def test_without_credentials_it_is_said_what_to_set(servers, monkeypatch, capsys):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for _ in range(2):  # before, and after, for the tests that follow
        requests.system_of.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        if "AWS_ACCESS_KEY_ID" not in os.environ:
            run("inspect", "s3://test/a", code=1)
        monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert "no credentials" in line
    assert "AWS_ACCESS_KEY_ID" in line


def test_a_server_that_does_not_answer_is_asked_again_later_and_later(servers, monkeypatch):
    waited, answers = [], iter([OSError("reset"), TimeoutError(), "at last"])
    monkeypatch.setattr(requests.time, "sleep", waited.append)

    def request(_):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    assert requests.ask("s3://test/a", request) == "at last"
    assert len(waited) == 2
    assert 0 < waited[0] < waited[1]


def test_a_server_that_goes_away_costs_one_line(servers, monkeypatch, capsys, tmp_path, demo_model):
    import bucket_servers
    import s3fs

    monkeypatch.setattr(requests, "PAUSES", (0.0,))
    with bucket_servers.s3() as (process, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        requests.system_of.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        upload(demo_model, as_path("s3://test/model"))
        process.kill()
        process.wait()
        run("encode", tmp_path, "--model", "s3://test/model", code=1)
    requests.system_of.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3://test/model: the server does not answer" in line


# -- Two runs on one directory


def test_two_runs_on_one_directory_are_refused_and_others_share_it(bucket):
    with claim(bucket, Share(0, 2)):
        with pytest.raises(DataError, match="another run is at work on this"), claim(bucket, Share(0, 4)):
            pass
        with claim(bucket, Share(1, 2)):
            pass
        assert len(list(bucket.rglob())) == 1
    assert list(bucket.rglob()) == []


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_run_of_another_machine_is_watched_for_a_while(bucket, is_alive, monkeypatch):
    other = bucket / lease.FOLDER / ".omnicodec-0-of-1.lock.other"
    owner = lease.Owner("elsewhere", 1, "1")
    numbers = iter(range(100))
    monkeypatch.setattr(lease, "LASTS", 0.2)

    def beat(_seconds: float) -> None:
        if is_alive:
            other.write_text(f"{json.dumps(owner._asdict())}\n{next(numbers)}\n")

    other.write_text(json.dumps(owner._asdict()) + "\n")
    monkeypatch.setattr(lease.time, "sleep", beat)
    if is_alive:
        with pytest.raises(DataError, match="another run"), claim(bucket):
            pass
    else:
        with claim(bucket):
            assert not other.exists()


def test_a_run_that_was_killed_on_this_machine_holds_nothing(bucket):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    began = lease._began(dead.pid)
    dead.wait()
    owner = lease.Owner.this()._replace(process=dead.pid, began=began)
    left = bucket / lease.FOLDER / ".omnicodec-0-of-1.lock.dead"
    left.write_text(json.dumps(owner._asdict()) + "\n")
    with claim(bucket):
        assert not left.exists()


# -- Prepared audio


def test_prepared_audio_is_that_of_a_disk(bucket, corpus, prepared):
    upload(corpus, bucket / "raw")
    words = ("prepare", "--manifest", lists(bucket / "raw"), "--out", bucket / "prepared", *PREPARE)
    run(*words)
    whole = files(bucket / "prepared")
    expected = files(prepared)
    for name in ("rejects.jsonl", *(name for name in expected if name.endswith(".json"))):
        whole[name] = whole[name].replace(b"no such object, or no such bucket", b"no such file")
        whole[name] = whole[name].replace(str(bucket / "raw").encode(), str(corpus.resolve()).encode())
    assert whole == expected
    # What was not finished is done again, and what is there is left alone.
    marker, shard = (
        next((bucket / "prepared/shards").glob(f"speech-train*{end}")) for end in (".json", ".array_record")
    )
    other = next((bucket / "prepared/shards").glob("music-train*.array_record"))
    kept = state_of(str(other))
    marker.unlink()
    shard.unlink()
    run(*words)
    again = files(bucket / "prepared")
    assert {name: again[name] for name in again if name.endswith(".array_record")} == {
        name: expected[name] for name in expected if name.endswith(".array_record")
    }
    assert state_of(str(other)) == kept


def test_records_are_read_one_by_one(bucket, prepared):
    upload(prepared, bucket)
    for shard in records.read_index(bucket):
        held, there = records.shard_path(prepared, shard.name), records.shard_path(bucket, shard.name)
        count = records._reader(str(held)).num_records()
        assert [records.read_record(there, n) for n in range(count)] == [
            records.read_record(held, n) for n in range(count)
        ]
        with pytest.raises(DataError, match="record 99 cannot be read"):
            records.read_record(there, 99)


# -- Tokens


@pytest.fixture(scope="module")
def tokens(corpus, demo_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_ENTRIES", 4)
        run("tokenize", "--manifest", lists(corpus), "--out", out, "--model", demo_model, "--num-readers", "1")
    return out


TOKENIZE = """
import runpy, sys
sys.path.insert(0, '.')
from omnicodec_jax.data import units
units.UNIT_ENTRIES = 4
sys.argv[0] = 'omnicodec'
from omnicodec_jax import cli
cli.main(['tokenize'])
"""


def test_tokens_are_those_of_a_disk_also_after_a_kill(bucket, corpus, demo_model, tokens, monkeypatch):
    upload(corpus, bucket / "raw")
    upload(demo_model, bucket / "model")
    out = bucket / "tokens"
    options = ["--manifest", lists(bucket / "raw"), "--out", out, "--model", bucket / "model", "--num-readers", "1"]
    environment = os.environ | {"OMNICODEC_CACHE": str(ROOT / ".jax_cache")}
    command = [sys.executable, "-c", TOKENIZE, *map(str, options)]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((out / shards.UNITS).glob("*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(units, "UNIT_ENTRIES", 4)
    run("tokenize", *options)
    held, expected = files(out), files(tokens)
    assert {name: held[name] for name in held if name.endswith(".parquet")} == {
        name: expected[name] for name in expected if name.endswith(".parquet")
    }
    assert held.keys() == expected.keys()
    assert [row.id for row in read_tokens(out)] == [row.id for row in read_tokens(tokens)]
    assert TokenSource(str(out))[3].codes.tolist() == TokenSource(tokens)[3].codes.tolist()


def test_detokenized_audio_is_that_of_a_disk(bucket, tokens, demo_model, tmp_path, capsys):
    upload(tokens, bucket / "tokens")
    here = tmp_path / "tokens"
    shutil.copytree(tokens, here)
    run("detokenize", here, tmp_path / "audio", "--model", demo_model)
    for _ in range(2):  # the second time, everything is there
        run("detokenize", bucket / "tokens", bucket / "audio", "--model", demo_model)
        assert files(bucket / "audio") == files(tmp_path / "audio")
    run("webdataset", here, tmp_path / "tars")
    run("webdataset", bucket / "tokens", bucket / "tars")
    assert files(bucket / "tars") == files(tmp_path / "tars")
    capsys.readouterr()
    for place in (bucket, tmp_path):
        run("inspect", place / "tokens")
    there, on_the_disk = (text.partition("\n")[2] for text in capsys.readouterr().out.split("/tokens: tokens")[1:])
    assert there.splitlines()[:-1] == on_the_disk.splitlines()[: len(there.splitlines()) - 1]


def test_files_are_encoded_and_decoded_from_bucket_to_bucket(bucket, corpus, demo_model, tmp_path):
    model = upload(demo_model, bucket / "model")
    good = tmp_path / "good"
    good.mkdir()
    for name in ("speech_0.wav", "music_1.flac"):
        shutil.copy(corpus / name, good / name)
    upload(good, bucket / "good")
    for root, weights in ((tmp_path, demo_model), (bucket, model)):
        run("encode", root / "good", root / "codes", "--model", weights)
        run("encode", root / "good", root / "codes", "--model", weights)  # of the same source: again
        run("decode", root / "codes", root / "decoded", "--model", weights)
    assert files(bucket / "codes") == files(tmp_path / "codes")
    assert files(bucket / "decoded") == files(tmp_path / "decoded")


def test_models_are_written_to_buckets(bucket, demo_model, tmp_path):
    config, variables = model_directory.load(demo_model)
    for place in (bucket / "model", tmp_path / "model"):
        model_directory.save(place, config, variables)
    assert files(bucket / "model") == files(tmp_path / "model")
    assert model_directory.model_hash(*model_directory.load(bucket / "model")) == model_directory.model_hash(
        config, variables
    )


# -- Features, reports


def test_models_go_to_pytorch_and_back_from_bucket_to_bucket(bucket, demo_model, tmp_path):
    upload(demo_model, bucket / "model")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from omnicodec_jax import model_directory\nfrom omnicodec_jax.config import Config\n"
        f"config = Config(codec=model_directory.load({str(demo_model)!r})[0])\n"
    )
    hash = model_directory.model_hash(*model_directory.load(demo_model))
    for name, words in (("torch", []), ("torch.safetensors", ["--config", recipe])):
        run("convert", "to-torch", "--model", bucket / "model", "--out", bucket / name)
        for _ in range(2):  # the second time, another object of the name is there
            run("convert", "from-torch", "--checkpoint", bucket / name, "--out", bucket / f"back_{name}", *words)
        assert model_directory.model_hash(*model_directory.load(bucket / f"back_{name}")) == hash


def test_semantic_features_are_those_of_a_disk(bucket, prepared, tmp_path, monkeypatch):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: one)  # as each device has a program of its own
    config = WhisperConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=16, window_seconds=2)
    model = model_directory.build(config)
    shapes, rng = jax.eval_shape(lambda: init_variables(model, jax.random.key(0))), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    options = ("--dtype", "float32", "--crop-seconds", "0.5")
    for place, audio in ((tmp_path, prepared), (bucket, upload(prepared, bucket / "prepared"))):
        model_directory.save(place / "whisper", config, variables)
        words = ("--prepared", audio, "--encoder", place / "whisper", "--out", place / "features", *options)
        run("convert", "semantic-features", *words)
        run("convert", "semantic-features", *words)  # where nothing is left to do
    assert files(bucket / "features") == files(tmp_path / "features")


def test_a_report_is_that_of_a_disk_and_a_second_run_finds_all_of_it(bucket, corpus, demo_model, tmp_path, monkeypatch):
    folder = tmp_path / "speech"
    folder.mkdir()
    shutil.copy(corpus / "speech_0.wav", folder)
    upload(folder, bucket / "speech")
    options = ("--metrics", "mel_distance", "--codebooks", "2", "--num-workers", "1")
    for place in (tmp_path, bucket):
        run("evaluate", "--data", f"speech={place / 'speech'}", "--model", demo_model, "--out", place / "out", *options)
    held, expected = files(bucket / "out"), files(tmp_path / "out")
    assert held.keys() == expected.keys()
    same = [name for name in expected if name.split("/")[0] in ("audio", "codes", "spectrograms", "scores.csv")]
    assert {name: held[name] for name in same} == {name: expected[name] for name in same}
    assert len(same) == 6
    tables = [re.sub(r"(?<=\| 25\.0 \| )[\d.]+", "its speed", text["tables.md"].decode()) for text in (held, expected)]
    assert "its speed" in tables[0]
    assert tables[0] == tables[1]

    monkeypatch.setattr(reconstruct.audio, "save", None)  # nothing is written again
    words = ("--data", f"speech={bucket / 'speech'}", "--model", demo_model, "--out", bucket / "out", *options)
    run("evaluate", *words)
    assert files(bucket / "out")["journal.jsonl"] == held["journal.jsonl"]


def test_a_journal_never_tells_of_files_that_are_not_in_the_bucket(bucket):
    with mirrored(bucket, "journal.jsonl") as here:
        kept = mirror._Mirror(here, bucket, "journal.jsonl")
        (here / "a").write_text("1")
        (here / "journal.jsonl").write_text("a\n")
        states = kept._states

        def and_then_more() -> dict:
            with (here / "journal.jsonl").open("a") as journal:
                journal.write("b\n")
            return states()

        kept._states = and_then_more
        kept.sync()
        assert (bucket / "journal.jsonl").read_text() == "a\n"
        kept._states = states
        (here / "a").unlink()
        kept.sync()
        assert [path.name for path in bucket.iterdir()] == ["journal.jsonl"]
