"""Jobs over many files: run again, run twice at once, run on disks that come and go, and read by others."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import soundfile

from omnicodec_jax import cli
from omnicodec_jax.cli import contents, corpora
from omnicodec_jax.cli.train import train
from omnicodec_jax.config import Config
from omnicodec_jax.corpus import TokenSource, read_tokens, readers, runners, shards, tokenize
from omnicodec_jax.corpus import detokenize as detokenization
from omnicodec_jax.corpus.detokenize import detokenize
from omnicodec_jax.corpus.readers import Request
from omnicodec_jax.corpus.tokenize import Job
from omnicodec_jax.corpus.webdataset import convert
from omnicodec_jax.data import attempts, features, prepare, records, units
from omnicodec_jax.data.attempts import Seen
from omnicodec_jax.data.claim import MARKERS, claim
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.distributed import multihost
from omnicodec_jax.errors import AudioError, DataError, ModelError, UnreadableError
from omnicodec_jax.evaluation import run as evaluation
from omnicodec_jax.language_model.windows import ClipTable
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip

NAMES = ("a.wav", "b.wav", "c.wav", "d.wav")


class Quick(OmniCodecTokenizer):
    """Compiles nothing: a clip's codes are its loudness."""

    encoded = 0

    def warm_up(self) -> None:
        pass

    def prepare(self, samples, features=None):
        return PreparedClip(samples)

    def encode_each(self, clips):
        for key, clip in clips:
            Quick.encoded += 1
            code = int(np.abs(clip.samples).sum()) % 256
            yield key, np.full((self.num_quantizers, self.num_frames(clip.samples.size)), code, np.int32)


def sound(path: Path, seed: int, seconds: float = 0.3) -> Path:
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, round(24_000 * seconds))
    soundfile.write(path, noise, 24_000, subtype="PCM_16")
    return path


@pytest.fixture
def disk(tmp_path) -> Path:
    """A corpus of four files, two to a unit, on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        sound(folder / name, seed)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"audio_filepath": f"disk/{n}"}) + "\n" for n in NAMES))
    return folder


class Tokens:
    """`omnicodec tokenize` on the corpus."""

    rejects, makes = shards.REJECTS, "tokens"

    def __init__(self, disk: Path, model: Path):
        self.sources = {"sound": disk.parent / "all.jsonl"}
        self.out, self.model = disk.parent / "tokens", str(model)

    def job(self, **options) -> Job:
        given = {"sources": self.sources, "out": self.out, "model": self.model, "num_readers": 1} | options
        return Job(**given)

    def run(self, share: Share = Share(), **options):  # noqa: B008
        return runners.run(self.job(**options), "here", 1, share)

    def command(self, **options) -> int:
        manifest = ",".join(f"{domain}={path}" for domain, path in self.sources.items())
        return corpora.tokenize(manifest=manifest, out=self.out, model=self.model, num_readers=1, **options)

    def held(self) -> set[str]:
        return {Path(clip.id).name for clip in read_tokens(self.out)}


class Prepared:
    """`omnicodec prepare` on the corpus."""

    rejects, makes = records.REJECTS, "prepared audio"

    def __init__(self, disk: Path, model: Path):
        self.source, self.out = disk.parent / "all.jsonl", disk.parent / "prepared"
        self.config = PrepareConfig(validation=0.0)

    def run(self, share: Share = Share(), retry_rejected: bool = False):  # noqa: B008
        return prepare.run({"sound": self.source}, self.out, self.config, 1, share, retry_rejected)

    def command(self, **options) -> int:
        return cli.prepare(
            manifest=f"sound={self.source}", out=self.out, num_workers=1, settings=self.config, **options
        )

    def held(self) -> set[str]:
        found = set()
        for shard in records.read_index(self.out):
            for number in range(len(shard.clips)):
                record = records.read_record(records.shard_path(self.out, shard.name), number)
                found.add(Path(records.read_header(record).id).name)
        return found


@pytest.fixture
def tokens(disk, demo_model, monkeypatch) -> Tokens:
    monkeypatch.setattr(units, "UNIT_ENTRIES", 2)
    monkeypatch.setattr(tokenize, "OmniCodecTokenizer", Quick)
    monkeypatch.setattr(Quick, "encoded", 0)
    monkeypatch.setattr(corpora, "_share_of_this_host", Share)
    return Tokens(disk, demo_model)


@pytest.fixture(params=[Tokens, Prepared])
def job(request, tokens, disk, demo_model):
    """Both jobs that keep what they refuse."""
    return request.param(disk, demo_model)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def rejects(job) -> dict[str, dict]:
    rows = [json.loads(line) for line in (job.out / job.rejects).read_text().splitlines()]
    return {Path(row["path"]).name: row for row in rows}


# -- What is finished, under other circumstances


def test_a_finished_directory_does_not_hide_another_model_or_none(tokens, tmp_path):
    tokens.run()
    with pytest.raises(ModelError, match="no such model directory"):
        tokens.run(model=str(tmp_path / "gone"))
    other = OmniCodecTokenizer.from_pretrained(tokens.model)
    other.variables["params"]["encoder"]["conv_in"]["bias"] += 1e-6
    other.save_pretrained(tmp_path / "other")
    for runner in ("here", "processes"):
        with pytest.raises(DataError, match=r"would not be the same \(model = "):
            runners.run(tokens.job(model=str(tmp_path / "other")), runner, 1, Share())
    tokens.sources["sound"].write_text(tokens.sources["sound"].read_text() + '{"audio_filepath": "more.wav"}\n')
    with pytest.raises(DataError, match=r"model = "):  # and not "another manifest"
        tokens.run(model=str(tmp_path / "other"))
    with pytest.raises(ModelError, match="gone: no such model directory"):
        tokens.run(encoder=str(tmp_path / "gone"))


def test_other_shard_hours_are_called_so(tokens):
    tokens.run()
    with pytest.raises(DataError, match="--shard-hours 1, now 0.5"):
        tokens.run(shard_hours=0.5)


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_that_are_no_number_of_hours_are_refused(tmp_path, hours):
    with pytest.raises(DataError, match="--shard-hours"):
        Job(sources={}, out=tmp_path, model="none", shard_hours=hours)
    with pytest.raises(DataError, match="--shard-hours"):
        PrepareConfig(shard_hours=hours)


def test_audio_made_with_other_options_is_not_taken_for_what_is_asked(tokens, tmp_path):
    tokens.run()
    audio = tmp_path / "audio"
    audio.mkdir()
    (audio / "detokenized.json").write_text('{"model": "another", "num_quantizers": 9}')
    codec = OmniCodecTokenizer.from_pretrained(tokens.model)
    with pytest.raises(DataError, match=r"made otherwise \(model = 'another'.*num_quantizers = 9, now 4"):
        next(detokenize(tokens.out, audio, codec, 4, ".flac", Share()))
    (audio / "detokenized.json").write_text(f'{{"model": "{codec.model_hash}", "num_quantizers": 9}}')
    with pytest.raises(DataError, match=r"made otherwise \(num_quantizers = 9, now 4\)"):
        next(detokenize(tokens.out, audio, codec, 4, ".flac", Share()))


def test_audio_replaced_under_the_same_name_is_done_again(job, disk):
    job.run()
    before = files(job.out)
    job.run()
    assert files(job.out) == before
    sound(disk / "c.wav", seed=99)  # as long as before
    os.utime(disk / "c.wav", ns=(1, 1))
    job.run()
    after = files(job.out)
    changed = {name for name in before if after[name] != before[name] and "shards/" in name and ".json" not in name}
    assert len(changed) == 1
    assert job.held() == set(NAMES)
    job.run()
    assert files(job.out) == after


def test_clips_of_a_folder_are_not_lost_to_files_of_the_same_names_in_another(job, disk, tmp_path):
    job.run()
    before, other = files(job.out), tmp_path / "other"
    for folder in (other, other / "disk"):
        folder.mkdir()
    listed = shutil.copy(tmp_path / "all.jsonl", other / "all.jsonl")
    job.source, job.sources = listed, {"sound": listed}
    for name in NAMES[1:]:
        shutil.copyfile(disk / name, other / "disk" / name)
    for first in (lambda path: sound(path, seed=99), lambda path: path.write_text("no sound")):
        first(other / "disk" / NAMES[0])
        with pytest.raises(DataError, match=r"the clip of .*tmp.*/disk/a\.wav is there already, .*other/disk/a\.wav;"):
            job.run()
        assert {name: data for name, data in files(job.out).items() if "shards" in name} == {
            name: data for name, data in before.items() if "shards" in name
        }
    shutil.copyfile(disk / NAMES[0], other / "disk" / NAMES[0])  # the corpus has moved
    job.run()
    assert job.held() == set(NAMES)
    sound(other / "disk" / NAMES[0], seed=99)  # and a file of it is replaced there
    job.run()
    assert job.held() == set(NAMES)


def test_a_source_that_is_opened_anew_reads_what_has_been_done_again(tokens, disk):
    tokens.run()
    before = [clip.codes for clip in TokenSource(tokens.out)]
    sound(disk / NAMES[0], 7)
    tokens.run()
    now = [clip.codes for clip in TokenSource(tokens.out)]
    assert [bool((a != b).any()) for a, b in zip(before, now, strict=True)] == [True, False, False, False]


def test_files_that_were_only_touched_are_not_encoded_again(tokens, disk):
    tokens.run()
    before = {name: data for name, data in files(tokens.out).items() if name.endswith(".parquet")}
    for name in NAMES:
        os.utime(disk / name, ns=(1, 1))
    assert tokens.run().tried == 4
    assert Quick.encoded == 4
    assert tokens.run().tried == 0
    assert before == {name: data for name, data in files(tokens.out).items() if name.endswith(".parquet")}


def test_audio_that_is_gone_later_keeps_its_tokens(tokens, disk):
    tokens.run()
    disk.rename(disk.with_name("unmounted"))
    assert tokens.run().tried == 0
    assert tokens.held() == set(NAMES)


def test_features_of_a_shard_are_not_those_of_what_it_held_before(disk, demo_model, tokens):
    job = Prepared(disk, demo_model)
    (disk / "b.wav").write_text("no sound")
    job.run()
    before = {shard.name: shard.content for shard in records.read_index(job.out)}
    fingerprint = records.fingerprint(records.read_index(job.out))
    sound(disk / "b.wav", 1)
    job.run(retry_rejected=True)
    after = {shard.name: shard.content for shard in records.read_index(job.out)}
    assert [after[name] != before[name] for name in sorted(before)] == [True, False]
    assert records.fingerprint(records.read_index(job.out)) != fingerprint


def test_features_of_a_folder_are_not_those_of_another_with_files_of_the_same_names(disk, demo_model, tokens):
    one = Prepared(disk, demo_model)
    one.run()
    for seed, name in enumerate(NAMES):
        sound(disk / name, seed + 10)  # as long, and called the same
    other = Prepared(disk, demo_model)
    other.out = disk.parent / "other"
    other.run()
    again = Prepared(disk, demo_model)
    again.out = disk.parent / "again"
    again.run()
    held = [records.read_index(job.out) for job in (one, other, again)]
    paths = [{features.shard_path(disk, shard) for shard in shards} for shards in held]
    assert paths[0].isdisjoint(paths[1])
    assert paths[1] == paths[2]  # and the same audio has its features wherever it was prepared
    assert records.fingerprint(held[0]) != records.fingerprint(held[1]) == records.fingerprint(held[2])


def test_a_shard_that_an_earlier_version_has_prepared_keeps_its_features(disk, demo_model, tokens):
    job = Prepared(disk, demo_model)
    (disk / "b.wav").write_text("no sound")
    job.run()
    for marker in (job.out / "shards").glob("*.json"):
        said = json.loads(marker.read_text())
        del said["shard"]["audio"]
        marker.write_text(json.dumps(said))
    prepare.collect(job.out)
    before = records.read_index(job.out)
    assert job.run(retry_rejected=True).rejected == 1
    assert records.read_index(job.out) == before
    sound(disk / "b.wav", 1)
    job.run(retry_rejected=True)
    assert [shard.audio is None for shard in records.read_index(job.out)] == [False, True]


# -- What the operating system does not give


def test_an_unmounted_disk_refuses_nothing_for_good(job, disk, tmp_path, capsys):
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    assert job.command() == 1
    said = capsys.readouterr()
    assert "4 refused" in said.out
    assert "nothing left to do" not in said.out
    assert said.err.splitlines()[-1].startswith("error: none of 4 files could be used: see ")
    assert {name: row["again"] for name, row in rejects(job).items()} == dict.fromkeys(NAMES, True)
    disk.rmdir()
    (tmp_path / "unmounted").rename(disk)
    assert job.command() == 0
    assert job.held() == set(NAMES)
    assert rejects(job) == {}
    undisturbed = type(job)(disk, Path(getattr(job, "model", "")))
    undisturbed.out = tmp_path / "undisturbed"
    undisturbed.run()
    kept = {n: d for n, d in files(job.out).items() if n.endswith((".parquet", ".array_record"))}
    assert kept == {n: d for n, d in files(undisturbed.out).items() if n in kept}


def test_one_file_that_is_missing_is_tried_by_every_run_and_nothing_else_is(job, disk):
    data = (disk / "b.wav").read_bytes()
    (disk / "b.wav").unlink()
    job.run()
    assert rejects(job)["b.wav"]["reason"] == "no such file"
    assert job.command() == 0
    (disk / "b.wav").write_bytes(data)
    job.run()
    assert job.held() == set(NAMES)
    assert Quick.encoded in (0, 4)


@pytest.mark.parametrize("code", ["ENOENT", "EIO", "EACCES", "ESTALE", "ENOSPC", "ENOMEM", "ETIMEDOUT", "EMFILE"])
def test_errors_of_the_operating_system_are_no_verdicts(code, tmp_path):
    path, error = sound(tmp_path / "a.wav", 0), OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def fail():
        raise error

    with pytest.raises(UnreadableError, match=f"{path}: ") as caught:
        attempts.attempt(path, fail)
    assert attempts.refusal(0, tmp_path, Entry("a", "a.wav"), caught.value)["again"]


def test_a_decoder_that_blames_the_file_for_the_disk_is_not_believed(tmp_path, monkeypatch):
    path = sound(tmp_path / "a.wav", 0)

    def refuse():
        raise AudioError(f"{path}: not audio that libsndfile or FFmpeg can decode")

    with pytest.raises(AudioError, match="not audio") as caught:
        attempts.attempt(path, refuse)
    assert "again" not in attempts.refusal(0, tmp_path, Entry("a", "a.wav"), caught.value)
    os.mkfifo(tmp_path / "pipe")  # is not waited for
    with pytest.raises(AudioError, match="not audio"):
        attempts.attempt(tmp_path / "pipe", refuse)
    with pytest.raises(AudioError, match="only files are read"):  # before its bytes are hashed
        attempts.Seen.of(tmp_path / "pipe")
    with pytest.raises(UnreadableError, match="out of memory"):
        attempts.attempt(path, lambda: np.zeros(1 << 50))

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(UnreadableError, match="Input/output error"):
        attempts.attempt(path, refuse)


def test_a_decoder_that_crashes_is_a_verdict_and_one_that_is_killed_is_none():
    assert isinstance(attempts.death(-9), UnreadableError)
    assert not isinstance(attempts.death(-11), UnreadableError)


def test_nothing_but_refused_files_is_an_error(job, disk, capsys):
    for name in NAMES:
        (disk / name).write_text("no sound")
    assert job.command() == 1
    said = capsys.readouterr()
    assert "nothing left to do" not in said.out
    assert "--retry-rejected" in said.err
    assert "again" not in rejects(job)["a.wav"]
    assert job.command() == 1
    assert "nothing left to do" in capsys.readouterr().out


def test_retry_rejected_tries_what_was_refused_and_nothing_else(job, disk):
    (disk / "b.wav").write_text("no sound")
    job.run()
    before = files(job.out)
    sound(disk / "b.wav", 1)
    job.run()
    assert files(job.out) == before
    assert job.command(retry_rejected=True) == 0
    assert job.held() == set(NAMES)
    assert rejects(job) == {}
    assert Quick.encoded in (0, 4)
    untouched = [name for name in before if name.endswith((".parquet", ".array_record")) and "000001" in name]
    assert [files(job.out)[name] == before[name] for name in untouched] == [True]


# -- Sources


def test_segments_without_a_duration_are_told_apart(tmp_path):
    path = sound(tmp_path / "a.wav", 0, 2)
    parts = [
        Entry("a", "a.wav"),
        Entry("a", "a.wav", 1.0),
        Entry("a", "a.wav", 0.0, 1.0),
        Entry("a", "a.wav", 1.0, 1.0),
    ]
    hashes = [readers.read(Request(path, part, 24_000, 0.95)).source for part in parts]
    assert len(set(hashes)) == 4
    assert hashes[0] == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()  # as it has always been


def test_a_source_is_hashed_once_for_all_its_segments(tmp_path, monkeypatch):
    path, read, hashed = sound(tmp_path / "a.wav", 0, 2), readers._hash, []
    monkeypatch.setattr(readers, "_hash", lambda *given: hashed.append(given) or read(*given))
    for number in range(5):
        readers.read(Request(path, Entry(str(number), "a.wav", 0.2 * number, 0.2), 24_000, 0.95))
    assert len(hashed) == 1
    before = readers.source_hash(path, Entry("a", "a.wav"), Seen.of(path))
    sound(path, 1, 2)
    os.utime(path, ns=(1, 1))
    assert readers.source_hash(path, Entry("a", "a.wav"), Seen.of(path)) != before


# -- Others who read the directory


def test_readers_of_whole_directories_see_nothing_but_shards(tokens):
    tokens.run()
    for path in (tokens.out, tokens.out / "shards"):
        assert pq.read_table(path).num_rows == 4
        assert pyarrow.dataset.dataset(path).count_rows() == 4
    assert {path.suffix for path in (tokens.out / "shards").iterdir()} == {".parquet"}


def test_pandas_reads_it(tokens):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    tokens.run()
    for path in (tokens.out, tokens.out / "shards"):
        assert len(pandas.read_parquet(path)) == 4


def test_polars_reads_it(tokens):
    polars = pytest.importorskip("polars", reason="needs polars")
    tokens.run()
    assert polars.read_parquet(tokens.out / "shards").height == 4


def test_duckdb_reads_it(tokens):
    duckdb = pytest.importorskip("duckdb", reason="needs DuckDB")
    tokens.run()
    assert len(duckdb.sql(f"select id, codes from '{tokens.out}/shards/*.parquet'").fetchall()) == 4


def test_datasets_reads_it(tokens, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    tokens.run()
    for path in (tokens.out, tokens.out / "shards"):
        assert datasets.load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache")).num_rows == 4


def test_spark_reads_it(tokens):
    sql = pytest.importorskip("pyspark.sql", reason="needs Spark")
    tokens.run()
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    assert spark.read.parquet(str(tokens.out / "shards")).count() == 4


def as_before(out: Path) -> None:
    """Makes of a directory what version 0.1 has left: JSON beside the shards, without what became of every entry."""
    for path in (out / shards.UNITS).iterdir():
        unit = json.loads(path.read_text())
        del unit["clips"]
        unit["rejects"] = units.listed(unit)
        (out / shards.SHARDS / path.name).write_text(json.dumps(unit))
    for name in ("index.jsonl", "rejects.jsonl"):
        (out / shards.STATE / name).rename(out / name)
    settings = json.loads((out / shards.STATE / shards.SETTINGS).read_text())
    del settings["shard_hours"]
    (out / shards.SETTINGS).write_text(json.dumps(settings))
    shutil.rmtree(out / shards.STATE)


def test_tokens_of_before_are_read_and_continued(tokens, disk):
    (disk / "b.wav").write_text("no sound")
    tokens.run()
    expected = {name: data for name, data in files(tokens.out).items() if name.endswith(".parquet")}
    as_before(tokens.out)
    assert tokens.held() == {"a.wav", "c.wav", "d.wav"}
    assert tokens.run().tried == 0
    assert pyarrow.dataset.dataset(tokens.out).count_rows() == 3
    next((tokens.out / shards.UNITS).glob("*-000001-*.json")).unlink()
    assert tokens.run().tried == 2
    assert {name: data for name, data in files(tokens.out).items() if name.endswith(".parquet")} == expected
    sound(disk / "b.wav", 1)
    assert tokens.run(retry_rejected=True).clips == 4


def test_segments_hashed_as_before_are_known_to_be_there(tokens, disk):
    rows = [{"audio_filepath": "disk/a.wav", "offset": offset, "duration": 0.1} for offset in (0.0, 0.1)]
    tokens.sources["sound"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens.run()
    (path,) = (tokens.out / "shards").iterdir()
    data, table = (disk / "a.wav").read_bytes(), pq.read_table(path)
    older = [hashlib.blake2b(f"{r['offset']}:{r['duration']}".encode() + data, digest_size=16) for r in rows]
    column = table.schema.get_field_index("source")
    table = table.set_column(column, "source", pa.array([digest.hexdigest() for digest in older]))
    pq.write_table(table, path)
    as_before(tokens.out)
    more = disk.parent / "more.jsonl"
    more.write_text("".join(json.dumps({**row, "id": "other"}) + "\n" for row in rows))
    summary = tokens.run(sources={"sound": more}, skip_existing=True)
    assert (summary.listed, summary.skipped, summary.clips) == (2, 2, 0)


def test_a_file_that_was_left_out_is_tokenized_when_another_takes_its_place(tokens, disk):
    tokens.run()
    more = disk.parent / "more.scp"
    more.write_text("disk/a.wav\ndisk/c.wav\n")
    for clips, skipped, tried in ((0, 2, 2), (0, 2, 0)):
        done = tokens.run(sources={"sound": more}, skip_existing=True)
        assert (done.clips, done.skipped, done.tried) == (clips, skipped, tried)
    sound(disk / "c.wav", 9)
    for tried in (1, 0):
        done = tokens.run(sources={"sound": more}, skip_existing=True)
        assert (done.clips, done.skipped, done.tried) == (1, 1, tried)


def test_a_file_that_was_left_out_is_tokenized_when_what_was_there_is_replaced(tokens, disk):
    tokens.run()
    (disk.parent / "copies").mkdir()
    shutil.copy(disk / "c.wav", disk.parent / "copies")
    more = {"sound": disk.parent / "more.scp"}
    more["sound"].write_text("copies/c.wav\ndisk/a.wav\n")
    assert tokens.run(sources=more, skip_existing=True).skipped == 2
    lost = {clip.source for clip in read_tokens(tokens.out)}
    sound(disk / "c.wav", 9)
    tokens.run(skip_existing=True)
    lost -= {clip.source for clip in read_tokens(tokens.out)}
    assert len(lost) == 1
    for tried in (1, 0):
        done = tokens.run(sources=more, skip_existing=True)
        assert (done.clips, done.skipped, done.tried) == (1, 1, tried)
    assert lost <= {clip.source for clip in read_tokens(tokens.out)}


# -- Directories that change while a job runs


def test_files_that_appear_or_vanish_while_a_job_runs_change_none_of_its_units(job, disk, monkeypatch):
    if isinstance(job, Tokens):
        job.sources = {"sound": disk}
    else:
        job.source = disk
    job.run(Share(1, 2))

    settle = units.to_do

    def to_do(*arguments):  # the manifest has been read by then
        sound(disk / "0.wav", 9)
        (disk / "b.wav").unlink(missing_ok=True)
        return settle(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(units, "to_do", to_do)
        done = job.run()
    assert (done.listed, done.clips, done.rejected) == (4, 3, 1)
    assert job.held() == {"a.wav", "c.wav", "d.wav"}
    assert rejects(job)["b.wav"]["reason"] == "no such file"
    with pytest.raises(DataError, match="use another --out|or another --out"):
        job.run()


# -- Two runs at once


def test_whatever_a_killed_run_has_left_half_written_is_cleared_by_the_next(job):
    job.run()
    written = [path for path in job.out.rglob("*") if path.is_file()]
    assert {"index.jsonl", "rejects.jsonl"} < {path.name for path in written}
    for path in written:
        path.unlink()
        folder = job.out / shards.STATE if path.suffix == ".parquet" else path.parent  # where its temporary lies
        (folder / f".{path.stem}.{32 * '0'}.partial{path.suffix}").touch()
    job.run()
    assert sorted(path for path in job.out.rglob("*") if path.is_file()) == sorted(written)


@pytest.mark.parametrize("kind", ["shard", "marker"])
@pytest.mark.parametrize("size", [0, 40])
def test_what_a_power_failure_has_left_empty_or_cut_off_is_made_again(job, kind, size):
    job.run()
    before = {path: path.read_bytes() for path in job.out.rglob("*") if path.is_file()}
    suffixes = {".json"} if kind == "marker" else {".parquet", records.SUFFIX}
    (damaged, *_) = sorted(path for path in before if "-0" in path.name and path.suffix in suffixes)
    os.truncate(damaged, size)
    job.run(Share(1, 2))  # another share's are left alone, and do not stop it
    job.run()
    assert damaged.read_bytes() == before[damaged]
    assert job.held() == set(NAMES)


def test_a_damaged_shard_is_named_and_is_made_again_when_its_unit_is_done(tokens, disk):
    tokens.run()
    path = shards.shards(tokens.out)[1]
    data = path.read_bytes()
    path.write_bytes(b"x" * len(data))
    for read in (lambda out: list(read_tokens(out)), contents.describe, ClipTable.read, TokenSource):
        with pytest.raises(DataError, match=f"{path.name}: damaged: .*; remove it, and tokenize again"):
            read(tokens.out)
    os.utime(disk / NAMES[2])
    tokens.run()
    assert path.read_bytes() == data


def test_settings_that_are_cut_off_are_named(job, tmp_path):
    job.run()
    (path,) = [path for name in MARKERS if (path := job.out / name).is_file()]
    os.truncate(path, 40)
    with pytest.raises(DataError, match=f"{path.name}: damaged: .*; use another directory"):
        job.run()


def test_two_runs_on_one_directory_are_refused_in_one_line(job, disk):
    job.out.mkdir()
    with claim(job.out):
        for share in (Share(), Share(1, 2)):
            with pytest.raises(DataError, match="another run is at work on this .*--task i/n") as caught:
                job.run(share)
            assert "\n" not in str(caught.value)
    job.run()
    assert job.held() == set(NAMES)
    assert not list(job.out.glob(".*"))


def test_every_job_that_fills_a_directory_refuses_a_second_run(tokens, tmp_path, monkeypatch):
    tokens.run()
    monkeypatch.setattr(multihost, "initialize", lambda: None)
    codec = OmniCodecTokenizer.from_pretrained(tokens.model)
    jobs = [
        lambda: list(detokenize(tokens.out, tmp_path / "out", codec, None, ".flac", Share())),
        lambda: convert(tokens.out, tmp_path / "out"),
        lambda: evaluation.run(evaluation.Evaluation(data=tokens.sources, out=tmp_path / "out", metrics=())),
        lambda: train(config="demo", workdir=tmp_path / "out", settings=Config()),
    ]
    for start in jobs:
        with claim(tmp_path / "out"), pytest.raises(DataError, match="another run is at work"):
            start()


def test_two_kinds_of_jobs_do_not_share_a_directory(job, tmp_path):
    for number, (marker, held) in enumerate(MARKERS.items()):
        if held != job.makes:
            job.out = tmp_path / str(number)
            (job.out / marker).parent.mkdir(parents=True)
            (job.out / marker).write_text("{}")
            with pytest.raises(DataError, match=f"holds {held} .*use another directory"):
                job.run()
            assert files(job.out) == {marker: b"{}"}


def test_what_another_run_has_made_meanwhile_is_not_mixed_with_what_this_one_makes(tokens, tmp_path, monkeypatch):
    codec, (out, tars, others) = Quick.from_pretrained(tokens.model), (tmp_path / name for name in "abc")
    tokens.run()
    shards.write(shards.shard_path(others, "a"), read_tokens(tokens.out), shards.contract(tokens.out) | {"model": "x"})
    shards.marker_path(others, "a").parent.mkdir(parents=True)
    shards.marker_path(others, "a").touch()
    decode, job = partial(detokenize, tokens.out, out, codec), Prepared(tmp_path / "disk", tokens.model)

    def meanwhile(module: ModuleType, name: str, other: Callable[[], object], run: Callable[[], object]) -> str:
        before = getattr(module, name)

        def read(*given: Any) -> Any:
            monkeypatch.setattr(module, name, before)
            found = before(*given)
            other()
            return found

        monkeypatch.setattr(module, name, read)
        with pytest.raises(DataError) as caught:
            run()
        assert getattr(module, name) is before
        return str(caught.value)

    twenty = PrepareConfig(validation=0.0, segment_seconds=20)
    prepared = partial(prepare.run, {"sound": job.source}, job.out, twenty, 1, Share())
    assert "other settings" in meanwhile(prepare.manifest, "read_all", prepared, job.run)
    of_three, of_four = (lambda count=count: list(decode(count, ".flac", Share())) for count in (3, 4))
    assert "another run is at work" in meanwhile(detokenization, "targets", of_three, of_four)
    theirs, ours = (partial(convert, made, tars) for made in (others, tokens.out))
    assert "another run is at work" in meanwhile(shards, "settings", theirs, ours)


def test_shares_that_do_not_overlap_are_at_work_together(tmp_path):
    with claim(tmp_path, Share(0, 2)), claim(tmp_path, Share(1, 2)):
        for share in (Share(0, 1), Share(0, 2), Share(3, 4), Share(2, 3)):
            with pytest.raises(DataError), claim(tmp_path, share):
                pass
    with claim(tmp_path, Share(0, 2)), claim(tmp_path, Share(1, 4)), claim(tmp_path, Share(3, 4)):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_is_nobodys(tmp_path):
    (tmp_path / ".omnicodec-0-of-1.lock").touch()
    with claim(tmp_path, Share(1, 2)):
        pass
    assert not list(tmp_path.iterdir())
