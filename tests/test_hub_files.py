"""hf://: lists, audio and models are read where they lie on the hub (a stand-in for it); nothing is written there."""

import json
import shutil
import sys
from multiprocessing import forkserver
from pathlib import Path

import bucket_servers
import fsspec
import pytest
import soundfile
from huggingface_hub import constants

from omnicodec_jax import cli, model_directory
from omnicodec_jax.buckets import BucketError, as_path, fetch_all, on_disk, requests
from omnicodec_jax.data import prepare, records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.distributed import multihost

DATA = "hf://datasets/someone/data"


@pytest.fixture
def served(tmp_path, clips, demo_model) -> Path:
    """Folders of a data set and of a model, as the hub has them."""
    folder = tmp_path / "hub"
    data = folder / "datasets/someone/data"
    (data / "audio files").mkdir(parents=True)
    for clip in clips[:3]:
        samples, rate = soundfile.read(clip, stop=24_000)
        soundfile.write(data / "audio files" / f"{clip.stem} #1.wav", samples, rate)
    names = sorted(path.name for path in (data / "audio files").iterdir())
    rows = [{"audio_filepath": f"../audio files/{name}"} for name in [*names, "gone.wav"]]
    (data / "lists").mkdir()
    (data / "lists/speech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(demo_model, folder / "models/someone/codec")
    return folder


@pytest.fixture
def hub(served, monkeypatch):
    """The stand-in, which this process takes for the hub."""
    with bucket_servers.hub(served) as (answers, url):
        monkeypatch.setenv("FSSPEC_HF_ENDPOINT", url)
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url})  # which has read the environment before
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(requests, "PAUSES", ())
        requests.system_of.cache_clear()
        forkserver._forkserver._stop()  # it would give its children the environment of before
        yield answers
    requests.system_of.cache_clear()
    forkserver._forkserver._stop()


def run(capsys, *words: object) -> str:
    """A command that fails; returns its one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omnicodec", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_files_of_the_hub_are_read_whole_in_parts_and_listed(hub, served, tmp_path):
    folder = as_path(f"{DATA}/audio files")
    here = sorted((served / "datasets/someone/data/audio files").iterdir())
    assert [path.name for path in folder.iterdir()] == [path.name for path in here]
    assert [str(path) for path in sorted(as_path(DATA).find())] == [
        *(f"{DATA}/audio files/{path.name}" for path in here),
        f"{DATA}/lists/speech.jsonl",
    ]
    file, data = folder / here[0].name, here[0].read_bytes()
    assert [file.is_file(), file.is_dir(), folder.is_dir(), (folder / "x").exists()] == [True, False, True, False]
    assert file.read_bytes() == data
    assert file.stat().st_size == len(data)
    with on_disk(file) as copy:
        assert copy.read_bytes() == data
    hub.sent.clear()
    assert file.read_range(1000, 1100) == data[1000:1100]
    assert 100 <= sum(sent for path, sent in hub.sent if "/resolve/" in path) <= 101
    fetch_all({path: tmp_path / path.name for path in folder.iterdir()})
    assert [path.read_bytes() for path in here] == [(tmp_path / path.name).read_bytes() for path in here]


def test_audio_of_the_hub_is_prepared_as_that_of_a_disk(hub, served, tmp_path):
    lists = {"hub": as_path(f"{DATA}/lists/speech.jsonl"), "disk": served / "datasets/someone/data/lists/speech.jsonl"}
    for place, path in lists.items():
        prepare.run({"speech": path}, tmp_path / place, PrepareConfig(validation=0.4), 1, Share())
    for shard in records.read_index(tmp_path / "disk"):
        there, here = (records.shard_path(tmp_path / place, shard.name) for place in lists)
        assert there.read_bytes() == here.read_bytes()
    reasons = {place: (tmp_path / place / records.REJECTS).read_text() for place in lists}
    assert reasons["hub"] == reasons["disk"]
    assert "gone.wav" in reasons["hub"]


@pytest.mark.parametrize("url", ["hf://someone/codec", "hf://models/someone/codec", "hf://someone/codec@main"])
def test_model_on_the_hub_is_that_of_a_disk(hub, served, url):
    there, here = (model_directory.load(path) for path in (as_path(url), served / "models/someone/codec"))
    assert model_directory.model_hash(*there) == model_directory.model_hash(*here)


def test_what_is_not_on_the_hub_is_told_in_one_line(hub, tmp_path, capsys):
    for name in (f"{DATA}/gone", "hf://someone/nothing", "hf://datasets/someone/nothing/x"):
        line = run(capsys, "inspect", name)
        assert f"{name}: " in line
        assert "no such" in line
    with pytest.raises(FileNotFoundError, match="or a private one .*HF_TOKEN"):
        as_path("hf://someone/nothing/x").read_bytes()


def test_a_token_that_the_hub_does_not_know_is_told_in_one_line(hub, tmp_path):
    hub.token = "secret"
    with pytest.raises(OSError, match="HF_TOKEN"):
        as_path(f"{DATA}/lists/speech.jsonl").read_bytes()


def test_without_a_network_the_hub_is_not_asked_again_and_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(requests, "PAUSES", (60.0,))
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        as_path(f"{DATA}/lists/speech.jsonl").read_bytes()


@pytest.mark.parametrize("url", ["hf://codec", "hf://datasets/someone", "hf://models/someone"])
def test_url_without_a_repository_is_refused(url):
    with pytest.raises(BucketError, match="names no repository; must be hf://OWNER/NAME"):
        as_path(url)


def test_nothing_lies_above_a_repository():
    assert str(as_path("hf://someone/codec").parent) == "hf://someone/codec"
    assert str(as_path(f"{DATA}/a").parent.parent) == DATA


WRITERS = {
    "clips": ["clips", "OUT"],
    "prepare": ["prepare", "--manifest", "speech=CLIPS", "--out", "OUT", "--validation", "0"],
    "tokenize": ["tokenize", "--manifest", "speech=CLIPS", "--model", "MODEL", "--out", "OUT"],
    "encode": ["encode", "CLIPS", "OUT", "--model", "MODEL"],
    "evaluate": ["evaluate", "--data", "speech=CLIPS", "--model", "MODEL", "--out", "OUT"],
    "train": ["train", "--config", "demo", "--workdir", "OUT", "--data.prepared", "CLIPS"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_writing_to_the_hub_is_refused_in_one_line_before_anything_is_computed(
    hub, command, clips, demo_model, capsys, monkeypatch
):
    monkeypatch.setattr(multihost, "initialize", lambda: None)
    places = {"OUT": f"{DATA}/out", "CLIPS": clips[0].parent, "MODEL": demo_model}
    words = [str(word) for word in WRITERS[command]]
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    assert "hf:// is only read" in run(capsys, *words)
