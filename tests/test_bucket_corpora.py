"""Corpora of all formats in buckets: what is read, prepared and tokenized there is what it is on a disk."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from tar_files import tar_of
from test_bucket_commands import upload
from test_jobs import Quick

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.cli import corpora
from omnicodec_jax.corpus import runners, shards, tokenize
from omnicodec_jax.corpus.tokenize import Job
from omnicodec_jax.data import audio, manifest, prepare, records
from omnicodec_jax.data.listings import tars
from omnicodec_jax.data.members import Member
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import DataError

RATE = 24_000
NAMES = ("a.wav", "b c.flac", "c/d#1.wav", "c/é.wav")


def sound(seed: int, suffix: str = ".wav") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, 7200), RATE, format=suffix[1:])
    return file.getvalue()


SOUNDS = {name: sound(seed, Path(name).suffix) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files, as they lie on a disk."""
    for name, data in SOUNDS.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture
def parts(tmp_path, bucket) -> BucketPath:
    """A folder in a bucket with two tars of the files."""
    for number in range(2):
        own = NAMES[2 * number : 2 * number + 2]
        tar_of(tmp_path / "tars" / f"part-{number:02d}.tar", {name: SOUNDS[name] for name in own})
    return upload(tmp_path / "tars", bucket / "tars")


SOURCES = {"braces": "part-{00..01}.tar", "folder": ""}
"""Names by which two tars in a bucket are given."""


@pytest.mark.parametrize("source", SOURCES)
def test_tars_in_a_bucket_are_prepared_as_the_folder_on_a_disk_that_they_were_made_of(
    source, parts, folder, bucket, tmp_path
):
    ((_, path),) = manifest.parse_sources(f"sound={parts / SOURCES[source]}").items()
    for place, out in ((folder, tmp_path / "prepared"), (path, bucket / "prepared")):
        prepare.run({"sound": place}, out, PrepareConfig(validation=0.5), 1, Share())
    held = [shard.name for shard in records.read_index(tmp_path / "prepared")]
    assert [shard.name for shard in records.read_index(bucket / "prepared")] == held
    assert len(held) == 2
    for name in held:
        here, there = (records.shard_path(place / "prepared", name) for place in (tmp_path, bucket))
        assert there.read_bytes() == here.read_bytes()
    assert (bucket / "prepared" / records.REJECTS).read_text() == ""


@pytest.mark.parametrize("source", SOURCES)
def test_tars_in_a_bucket_are_tokenized_as_the_folder_on_a_disk_that_they_were_made_of(
    source, parts, folder, bucket, tmp_path, demo_model, monkeypatch
):
    monkeypatch.setattr(tokenize, "OmniCodecTokenizer", Quick)
    monkeypatch.setattr(corpora, "_share_of_this_host", Share)
    made = {}
    for place, out in ((folder, tmp_path / "tokens"), (parts / SOURCES[source], bucket / "tokens")):
        runners.run(Job(sources={"sound": place}, out=out, model=str(demo_model), num_readers=1), "here", 1, Share())
        made[out] = {path.name: path.read_bytes() for path in shards.shards(out)}
    here, there = made.values()
    assert there == here
    assert here


def test_a_tar_that_is_not_in_the_bucket_is_named(parts):
    with pytest.raises(DataError, match=r"part-02.tar: no such file"):
        manifest.parse_sources(f"sound={parts}/part-{{00..02}}.tar")


def test_notes_beside_the_audio_of_a_tar_cost_no_request_each(bucket, tmp_path, monkeypatch):
    notes = {f"{number}.json": json.dumps({"id": f"clip {number}"}).encode() for number in range(5)}
    tar = tar_of(tmp_path / "x.tar", notes | {f"{number}.wav": sound(number) for number in range(5)})
    (bucket / "x.tar").put(tar)
    monkeypatch.setattr(BucketPath, "read_range", None)
    assert [entry.id for entry, _ in tars.entries([bucket / "x.tar"], bucket)] == [f"clip {n}" for n in range(5)]


def recording(path: str) -> dict:
    source = {"type": "file", "channels": [0], "source": path}
    return {"id": "rec", "sources": [source], "sampling_rate": RATE, "duration": 0.3, "channel_ids": [0]}


def cut(id: str, **fields) -> dict:
    return {"id": id, "start": 0.0, "duration": 0.3, "channel": 0, "type": "MonoCut", "supervisions": [], **fields}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(folder: Path, kind: str) -> str:
    """Writes a corpus of a kind into the folder of the files. Returns the name of its list."""
    if kind == "parquet":
        rows = [{"id": name, "audio": {"bytes": data, "path": name}} for name, data in SOUNDS.items()]
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=2)
        return "train.parquet"
    if kind == "cuts":
        write(folder / "cuts.jsonl", [cut(name, start=0.1, duration=0.1, recording=recording(name)) for name in NAMES])
        return "cuts.jsonl"
    if kind == "shar":
        tar_of(folder / "shar/recording.000000.tar", {f"{n}.wav": sound(n) for n in range(3)})
        write(folder / "shar/cuts.000000.jsonl", [cut(str(number)) for number in range(3)])
        return "shar"
    if kind == "nemo":
        tar_of(folder / "audio_0.tar", {f"{n}.wav": sound(n) for n in range(3)})
        (folder / "manifests").mkdir()
        rows = [{"audio_filepath": f"{n}.wav", "duration": 0.3, "shard_id": 0} for n in range(3)]
        write(folder / "manifests/manifest_0.json", rows)
        return "manifests/manifest_{0..0}.json"
    (folder / "wav.scp").write_text("first a.wav\nsecond c/d#1.wav\n")
    (folder / "segments").write_text("one first 0.05 0.2\ntwo second 0.1 -1\n")
    return "wav.scp"


@pytest.mark.parametrize("kind", ["parquet", "cuts", "shar", "nemo", "kaldi"])
def test_each_kind_of_corpus_is_read_in_a_bucket_as_on_a_disk(kind, folder, bucket):
    name = written(folder, kind)
    upload(folder, bucket)
    lists = [folder / name, bucket / name]
    here, there = ([entry.identity for entry in manifest.read(path)] for path in lists)
    assert there == here
    heard = [[_heard(entry.file(manifest.folder(path)), entry) for entry in manifest.read(path)] for path in lists]
    for one, other in zip(*heard, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(heard[0]) > 1


def _heard(file: Path | Member, entry) -> np.ndarray:
    return audio.load(file, RATE, offset=entry.offset, duration=entry.duration).samples
