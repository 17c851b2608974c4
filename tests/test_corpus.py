"""Corpora into token shards: the same tokens whoever computes them, and nothing lost or doubled whatever happens."""

import dataclasses
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from deadly import Deadly

from omnicodec_jax.cli import corpora
from omnicodec_jax.corpus import TokenSource, contract, delayed, flat, read_tokens, shards, tokenize
from omnicodec_jax.corpus.detokenize import targets
from omnicodec_jax.corpus.runners import run
from omnicodec_jax.corpus.tokenize import Job, Worker
from omnicodec_jax.data import audio, units
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.manifest import read_all
from omnicodec_jax.data.units import Share, Unit
from omnicodec_jax.errors import DataError
from omnicodec_jax.tokenizer import OmniCodecTokenizer

pytestmark = pytest.mark.minutes(5)

ROOT = Path(__file__).parents[1]
BAD = {"empty.wav": "empty file", "noise.wav": "not audio", "silent.wav": "silent", "gone.wav": "no such file"}


@pytest.fixture(scope="module")
def corpus(clips, tmp_path_factory) -> dict[str, Path]:
    """Two lists: pieces of the bundled clips of 0.1 to 3 s, some files that hold no sound, one that is missing."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for domain in ("speech", "music"):
        names = []
        for number in range(9):
            samples, rate = soundfile.read(clips[number])
            size = int(rate * (0.1, 0.7, 1.3, 2.0, 3.0)[number % 5])
            start = rng.integers(0, max(1, len(samples) - size))
            names.append(f"{domain}_{number}.{('wav', 'flac', 'ogg')[number % 3]}")
            soundfile.write(folder / names[-1], samples[start : start + size], rate)
        names += BAD if domain == "music" else []
        rows = [{"id": f"{domain}/{name}", "audio_filepath": name} for name in names]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.wav").touch()
    (folder / "noise.wav").write_bytes(b"no sound at all" * 100)
    soundfile.write(folder / "silent.wav", np.zeros(9600), 24_000)
    return {domain: folder / f"{domain}.jsonl" for domain in ("speech", "music")}


@pytest.fixture
def job(corpus, demo_model, tmp_path, monkeypatch) -> Job:
    """A job whose units have four files."""
    monkeypatch.setattr(units, "UNIT_ENTRIES", 4)
    monkeypatch.setenv("OMNICODEC_CACHE", str(ROOT / ".jax_cache"))
    return Job(sources=corpus, out=tmp_path / "tokens", model=str(demo_model), num_readers=2)


@pytest.fixture(scope="module")
def expected(corpus, demo_model, tmp_path_factory) -> dict[str, bytes]:
    """Every shard of an undisturbed run, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_ENTRIES", 4)
        out = tmp_path_factory.mktemp("expected") / "tokens"
        summary = run(Job(sources=corpus, out=out, model=str(demo_model), num_readers=2), "here", 1, Share())
        assert (summary.listed, summary.clips, summary.rejected, summary.shards) == (22, 18, 4, 7)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# -- The same tokens


def test_tokens_are_those_of_each_clip_by_itself(expected, job, corpus, demo_model):
    run(job, "here", 1, Share())
    assert files(job.out) == expected
    tokenizer = OmniCodecTokenizer.from_pretrained(demo_model)
    for clip in read_tokens(job.out):
        path = corpus["speech"].parent / clip.id.split("/")[1]
        loaded = audio.load(path, 24_000, tokenizer.config.input_peak)
        np.testing.assert_array_equal(tokenizer.encode(loaded.samples[None, None], 24_000)[0].T, clip.codes)
        assert (clip.sample_rate, clip.num_samples, clip.gain) == loaded[2:0:-1][:1] + (
            loaded.num_samples,
            loaded.gain,
        )


def test_tokens_do_not_depend_on_neighbours_order_or_devices(clips, demo_model):
    cut = random.Random(0)
    pieces = []
    for number in range(12):
        samples = audio.load(clips[number % len(clips)], 24_000, 0.95).samples
        pieces.append(samples[: cut.choice([2400, 7000, 40_000, len(samples)])])
    results = []
    for devices in (1, 2, 8):
        tokenizer = OmniCodecTokenizer.from_pretrained(demo_model, devices=jax.local_devices()[:devices])
        for _ in range(2):
            order = cut.sample(range(12), 12)
            prepared = ((number, tokenizer.prepare(pieces[number])) for number in order)
            results.append(dict(tokenizer.encode_each(prepared)))
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for number, codes in result.items():
            np.testing.assert_array_equal(codes, results[0][number])


@pytest.mark.parametrize("runner", ["processes", "ray"])
def test_runners_give_the_same_files(expected, job, runner):
    if runner == "ray":
        pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    summary = run(job, runner, 2, Share())
    assert summary.listed == summary.clips + summary.rejected + summary.skipped == 22
    assert files(job.out) == expected


def test_tasks_share_the_work_without_talking(expected, job):
    shares = [run(job, "here", 1, Share(index, 3)) for index in range(3)]
    assert sum(share.listed for share in shares) == 22
    assert all(share.shards for share in shares)
    assert files(job.out) == expected


def test_processes_of_a_cluster_share_the_work_by_themselves(expected, job):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    started = [
        subprocess.Popen(
            command(job), env=environment() | cluster | {"JAX_PROCESS_ID": str(number)}, stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    said = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    listed = [int(re.search(r"of (\d+) files", text)[1]) for text in said]
    assert sum(listed) == 22
    assert min(listed) > 0
    assert files(job.out) == expected


# -- What is written


def test_a_stranger_reads_shards_with_pyarrow_alone(job):
    run(job, "here", 1, Share())
    tables = [pq.read_table(path) for path in sorted((job.out / "shards").glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == 18
    held = json.loads(tables[0].schema.metadata[b"omnicodec"])
    assert held["codebook_sizes"] == [256] * 9
    assert held["frame_rate"] == 12.5
    assert "neighbours" in held["promise"]
    for table in tables:
        for row in table.to_pylist():
            assert len(row["codes"]) == row["frames"] == -(-round(row["duration"] * 24_000) // 1920)
            assert {len(frame) for frame in row["codes"]} == {9}
            assert row["domain"] in row["id"]


def test_every_file_is_accounted_for(job):
    summary = run(job, "here", 1, Share())
    assert summary.listed == summary.clips + summary.rejected + summary.skipped
    index = [json.loads(line) for line in (job.out / shards.INDEX).read_text().splitlines()]
    assert sum(row["listed"] for row in index) == summary.listed
    rejects = [json.loads(line) for line in (job.out / shards.REJECTS).read_text().splitlines()]
    assert {reject["path"] for reject in rejects} == set(BAD)
    for reject in rejects:
        assert BAD[reject["path"]] in reject["reason"]
    again = run(job, "here", 1, Share())
    assert (again.clips, again.rejected, again.computed) == (18, 4, 0)


def test_use_of_the_devices_is_reported(demo_model, corpus, tmp_path):
    worker = Worker(Job(sources=corpus, out=tmp_path, model=str(demo_model), num_readers=1))
    unit = next(tokenize.plan(read_all(corpus), shard_hours=1.0))
    seconds = sum(worker.run([unit]))
    use, tokenizer = worker.use, worker.tokenizer
    assert use.valid * 1920 / 24_000 == pytest.approx(seconds, rel=1e-3)
    assert use.valid <= use.frames
    assert 0 <= use.idle < use.seconds
    assert tokenizer.use == use


# -- What goes wrong


def command(job: Job, *options: str) -> list[str]:
    manifest = ",".join(f"{domain}={path}" for domain, path in job.sources.items())
    code = "from omnicodec_jax.data import units as u; u.UNIT_ENTRIES = 4; from omnicodec_jax import cli; cli.main()"
    arguments = ["tokenize", "--manifest", manifest, "--out", str(job.out), "--model", job.model, "--num-readers", "1"]
    return [sys.executable, "-c", code, *arguments, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMNICODEC_CACHE": str(ROOT / ".jax_cache")}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_result(expected, job, kills):
    moments, killed = random.Random(0), 0
    start = time.perf_counter()
    assert subprocess.run(command(job), env=environment()).returncode == 0
    whole = time.perf_counter() - start
    while killed < kills:
        there = sorted([*job.out.glob("shards/*"), *job.out.glob(f"{shards.UNITS}/*")])
        for path in moments.sample(there, min(6, len(there))):  # so that there is something left to do
            path.unlink()
        process = subprocess.Popen(command(job), env=environment(), stderr=subprocess.DEVNULL)
        start = time.perf_counter()
        try:
            process.wait(moments.uniform(0.3, 1) * whole)
            whole = time.perf_counter() - start  # the first one had more to do, and compiled
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    assert subprocess.run(command(job), env=environment()).returncode == 0
    assert files(job.out) == expected


def workers(process: subprocess.Popen, runner: str) -> list[int]:
    """Processes that a runner has started to tokenize."""
    if runner == "ray":
        found = {path.parent: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
        return [int(path.name) for path, line in found.items() if line.startswith(b"ray::_run_unit")]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("runner", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_worker_killed_in_the_middle_costs_its_unit_only(expected, job, runner):
    if runner == "ray":
        pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    process = subprocess.Popen(command(job, "--runner", runner, "--num-workers", "2"), env=environment())
    while not (list(job.out.glob(f"{shards.UNITS}/*.json")) and workers(process, runner)):
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(workers(process, runner)[0], signal.SIGKILL)
    assert process.wait() == 0
    assert files(job.out) == expected


def test_a_file_that_kills_its_decoder_is_refused(corpus, demo_model, tmp_path):
    folder = corpus["speech"].parent
    names = ["speech_1.flac", "crash.wav", "killed.wav", "speech_2.ogg"]
    (folder / "killed.wav").write_bytes((folder / "speech_0.wav").read_bytes())
    unit = Unit("speech-000000", "speech", Deadly(folder), tuple(Entry(name, name) for name in names))
    worker = Worker(Job(sources=corpus, out=tmp_path, model=str(demo_model), num_readers=2))
    assert sum(seconds > 0 for seconds in worker.run([unit])) == 3
    (marker,) = tmp_path.glob(f"{shards.UNITS}/*.json")
    (reject,) = json.loads(marker.read_text())["rejects"]
    assert reject["path"] == "crash.wav"
    assert "its decoder died with exit code -11" in reject["reason"]


def test_another_model_is_refused(job):
    run(job, "here", 1, Share())
    other = dataclasses.replace(job, model=str(job.out.parent / "other"))
    tokenizer = OmniCodecTokenizer.from_pretrained(job.model)
    tokenizer.variables["params"]["encoder"]["conv_in"]["bias"] += 1e-6
    tokenizer.save_pretrained(other.model)
    next(job.out.glob(f"{shards.UNITS}/*.json")).unlink()
    with pytest.raises(DataError, match=r"would not be the same \(model = "):
        run(other, "here", 1, Share())


def test_another_manifest_adds_only_what_is_new(job, corpus):
    run(job, "here", 1, Share())
    folder = corpus["speech"].parent
    names = ["speech_3.wav", "new.wav", "speech_0.wav"]
    soundfile.write(folder / "new.wav", np.sin(np.arange(9000)), 24_000)
    more = folder / "more.scp"
    more.write_text("".join(f"{name}\n" for name in names))
    other = dataclasses.replace(job, sources={"speech": more})
    with pytest.raises(DataError, match="holds shards of another manifest"):
        run(other, "here", 1, Share())
    adding = dataclasses.replace(other, skip_existing=True)
    summary = run(adding, "here", 1, Share())
    assert (summary.listed, summary.clips, summary.skipped) == (3, 1, 2)
    assert len(list(read_tokens(job.out))) == 19
    again = run(adding, "here", 1, Share())
    assert again[:6] == summary[:6]
    assert again.computed == 0


# -- Reading


@pytest.fixture(scope="module")
def tokens(corpus, demo_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokens")
    run(Job(sources=corpus, out=out, model=str(demo_model), num_readers=2), "here", 1, Share())
    return out


def test_clips_by_number_are_those_in_order(tokens, monkeypatch):
    in_order, source = list(read_tokens(tokens)), TokenSource(tokens)
    assert len(source) == len(in_order) == 18
    for number in (0, 17, 3, -1):
        assert source[number].id == in_order[number].id
        np.testing.assert_array_equal(source[number].codes, in_order[number].codes)
    with pytest.raises(IndexError):
        source[18]
    shuffled = grain.MapDataset.source(source).shuffle(seed=0).map(lambda clip: flat(clip.codes, [256] * 9))
    assert sum(len(shuffled[i]) for i in range(18)) == sum(clip.codes.size for clip in in_order)
    for number in (1.5, "1", slice(2)):
        with pytest.raises(TypeError):
            source[number]
    assert {clip.domain for clip in read_tokens(tokens, "music")} == {"music"}


@pytest.mark.parametrize("domain", ["Music", ""])
def test_clips_of_a_domain_that_is_not_there_are_not_none_without_a_word(tokens, domain):
    domains = ", ".join(sorted({clip.domain for clip in read_tokens(tokens)}))
    with pytest.raises(DataError, match=f"holds no clip of the domain '{domain}'; it has {domains}$"):
        list(read_tokens(tokens, domain))


@pytest.mark.parametrize(("marker", "held"), [("prepared.json", "prepared audio"), ("features.json", "semantic feat")])
def test_what_another_command_has_made_is_not_read_as_tokens(tmp_path, marker, held):
    (tmp_path / "shards").mkdir()
    (tmp_path / marker).write_text("{}")
    (tmp_path / "shards" / "speech-000000.json").write_text("{}")  # where version 0.1 put those of tokens
    for read in (TokenSource, lambda out: list(read_tokens(out))):
        with pytest.raises(DataError, match=f"{tmp_path}: holds {held}.*, and no tokens"):
            read(tmp_path)


def test_layouts_for_language_models():
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.uint16)
    np.testing.assert_array_equal(flat(codes, [10, 20, 30]), [1, 12, 33, 4, 15, 36])
    np.testing.assert_array_equal(delayed(codes, -1), [[1, -1, -1], [4, 2, -1], [-1, 5, 3], [-1, -1, 6]])


def test_webdataset_holds_the_same(tokens, tmp_path):
    assert corpora.webdataset(tokens, tmp_path) == 0
    clips = {clip.id: clip for clip in read_tokens(tokens)}
    seen = 0
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            for codes, fields in zip(names[::2], names[1::2], strict=True):
                clip = clips[json.load(archive.extractfile(fields))["id"]]
                np.testing.assert_array_equal(np.load(io.BytesIO(archive.extractfile(codes).read())), clip.codes)
                seen += 1
    assert seen == 18


def test_no_shards_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no finished token shards"):
        contract(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.json").touch()
    (tmp_path / "shards" / "a.parquet").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not a shard of omnicodec tokenize"):
        contract(tmp_path)


def test_detokenized_audio_has_the_rate_and_length_of_the_original(tokens, corpus, demo_model, tmp_path, capsys):
    assert corpora.detokenize(tokens, tmp_path, str(demo_model), num_quantizers=4) == 0
    assert "18 of 18 files" in capsys.readouterr().out
    for clip in read_tokens(tokens):
        original = soundfile.info(corpus["speech"].parent / clip.id.split("/")[1])
        made = soundfile.info(tmp_path / clip.domain / Path(clip.id).with_suffix(".flac"))
        assert (made.samplerate, made.frames) == (original.samplerate, original.frames)
    assert corpora.detokenize(tokens, tmp_path, str(demo_model), num_quantizers=4) == 0
    assert "0 of 0 files" in capsys.readouterr().out


def write_tokens(out: Path, held: dict, *shards_of_ids: list[tuple[str, str]]) -> Path:
    """Shards of clips of one frame with domains and ids as given."""
    for number, ids in enumerate(shards_of_ids):
        codes = np.full((1, len(held["codebook_sizes"])), number, np.uint16)
        clips = [shards.Clip(id, domain, codes, 1.0, 24_000, 1000, "") for domain, id in ids]
        path = shards.shard_path(out, f"speech-{number:06d}")
        shards.write(path, clips, held)
        path.with_suffix(".json").write_text(json.dumps({"shard": {}, "rejects": []}))
    return out


@pytest.mark.parametrize(
    ("ids", "paths"),
    [
        ([("speech", "a/b.wav"), ("", "c")], ["speech/a/b.flac", "c.flac"]),
        ([("speech", "../../etc/passwd"), ("speech", "/abs")], ["speech/etc/passwd.flac", "speech/abs.flac"]),
        ([("speech", "1.5"), ("speech", "..")], ["speech/1.5.flac", "speech/clip.flac"]),
        (
            [("/abs", "a"), ("../up", "a"), ("..", "b"), ("x\0", "c")],
            ["abs/a.flac", "up/a.flac", "b.flac", r"x\x00/c.flac"],
        ),
        ([("s", "a.wav"), ("s", "a.flac"), ("s", "a.wav.mp3")], ["s/a.wav.flac", "s/a.flac.flac", "s/a.wav.mp3.flac"]),
    ],
)
def test_every_clip_keeps_a_name_of_its_own_inside_the_directory(tmp_path, ids, paths):
    written = write_tokens(tmp_path, {"codebook_sizes": [9]}, *([each] for each in ids))  # each in a shard of its own
    made = [target.path for held in targets(written, ".flac").values() for target in held]
    assert made == paths


def test_clips_of_one_name_are_refused_before_anything_is_written(tmp_path, tokens, demo_model):
    held = contract(tokens)
    doubled = write_tokens(tmp_path / "tokens", held, [("music", "x"), ("speech", "a")], [("speech", "a")])
    with pytest.raises(DataError, match=r"tokens: 2 clips are called speech/a; give each its own `id`"):
        corpora.detokenize(doubled, tmp_path / "out", str(demo_model))
    assert not (tmp_path / "out").exists()


def test_detokenize_writes_every_clip(tmp_path, tokens, demo_model, capsys):
    ids = [("/speech", "a.wav"), ("../speech", "a.flac"), ("speech", "名" * 90)]
    written = write_tokens(tmp_path / "tokens", contract(tokens), ids)
    assert corpora.detokenize(written, tmp_path / "out", str(demo_model)) == 0
    assert "3 of 3 files" in capsys.readouterr().out
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.flac"))
    assert made[:2] == ["speech/a.flac.flac", "speech/a.wav.flac"]
    assert len(made) == 3


def test_a_bad_line_of_a_manifest_costs_itself_only(corpus, demo_model, tmp_path):
    folder = corpus["speech"].parent
    sound = (folder / "speech_1.flac").read_bytes()
    with open(os.fsencode(folder) + b"/caf\xe9.flac", "wb") as file:
        file.write(sound)
    lines = [
        '\ufeff{"audio_filepath": "speech_1.flac"}',
        '{"audio_filepath": "caf\\udce9.flac"}',
        '{"audio_filepath": "speech_1.flac", "id": "half \\ud83d", "domain": "d\\ud83d"}',
        '{"audio_filepath": "speech_1.flac", "id": null, "offset": 0.1}',
        '{"audio_filepath": "speech_1.flac", "domain": 5}',
        '{"audio_filepath": "gone \\ud83d.flac"}',
        '{"audio_filepath": "nul\\u0000.flac"}',
        "{broken",
    ]
    (folder / "lines.json").write_text("\n".join(lines))
    job = Job(sources={"": folder / "lines.json"}, out=tmp_path, model=str(demo_model), num_readers=1)
    summary = run(job, "here", 1, Share())
    assert (summary.listed, summary.clips, summary.rejected) == (8, 4, 4)
    ids = ["speech_1.flac", r"caf\udce9.flac", r"half \ud83d", "speech_1.flac"]
    assert [clip.id for clip in read_tokens(tmp_path)] == ids
    rejects = [json.loads(line) for line in (tmp_path / shards.REJECTS).read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == ["lines.json:5", r"gone \ud83d.flac", "nul\0.flac", "lines.json:8"]
    reasons = [reject["reason"] for reject in rejects]
    assert reasons[0] == "no clip: domain = 5: must be a text"
    assert reasons[1:3] == ["no such file"] * 2
    assert reasons[3].startswith("no clip: ")
    assert all(reject[name].encode() for reject in rejects for name in ("id", "path", "reason"))
    assert run(job, "here", 1, Share()).computed == 0


def test_command_says_what_was_done(corpus, demo_model, tmp_path, capsys):
    manifest = str(corpus["music"])
    assert corpora.tokenize(manifest=manifest, out=tmp_path, model=str(demo_model), num_readers=1) == 0
    assert "tokenize: 9 of 13 files, 4 refused" in (said := capsys.readouterr().out)
    assert "padding" in said
    assert corpora.tokenize(manifest=manifest, out=tmp_path, model=str(demo_model), num_readers=1) == 0
    assert "nothing left to do" not in capsys.readouterr().out  # the missing file is tried again
    (corpus["music"].parent / "whole.jsonl").write_text(corpus["music"].read_text().splitlines()[0])
    for said in (" 1 of 1 files", "nothing left to do"):
        whole = str(corpus["music"].parent / "whole.jsonl")
        assert corpora.tokenize(manifest=whole, out=tmp_path / "whole", model=str(demo_model), num_readers=1) == 0
        assert said in capsys.readouterr().out
