import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from deadly import Deadly

from omnicodec_jax import cli
from omnicodec_jax.data import audio, manifest, prepare, records
from omnicodec_jax.data.prepare import PrepareConfig, SplitUnit
from omnicodec_jax.data.units import Progress, Share
from omnicodec_jax.errors import DataError

RATE = 44_100
CONFIG = PrepareConfig(validation=0.25, segment_seconds=10, shard_hours=50 / 3600)
REASONS = {
    "bad/eight.wav": "8 channels",
    "bad/empty.wav": "empty file",
    "bad/header.wav": "truncated: 9999 of",
    "bad/high.wav": "192000 Hz",
    "bad/low.wav": "8000 Hz",
    "bad/nan.wav": "holds samples that are NaN",
    "bad/no_data.wav": "too short: 0 samples",
    "bad/one.wav": "too short: 1 samples",
    "bad/silent.wav": "silent",
    "bad/text.mp3": "not audio",
    "bad/cut.flac": "damaged or truncated",
    "bad/cut.ogg": "truncated: the last page",
    "bad/cut.wav": "truncated",
}


def write(path, samples, rate=RATE, **options):
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """Good files of all sorts and bad ones."""
    root = tmp_path_factory.mktemp("raw")
    for number, clip in enumerate(clips):
        shutil.copy(clip, root / f"{number}.flac")
    sound = soundfile.read(clips[0], dtype="float32", always_2d=True, stop=RATE)[0]
    write(root / "a name with ünicode, and blanks.wav", sound)
    write(root / "loud.wav", 3 * sound, subtype="FLOAT")
    write(root / "long.mp3", np.tile(sound, (25, 1)))
    shutil.copy(root / "loud.wav", os.fsencode(root) + b"/latin\xe9.wav")

    bad = root / "bad"
    write(bad / "eight.wav", np.repeat(sound[:, :1], 8, axis=1))
    write(bad / "low.wav", sound, 8000)
    write(bad / "high.wav", sound, 192_000)
    write(bad / "silent.wav", 0 * sound)
    write(bad / "one.wav", sound[:1])
    write(bad / "nan.wav", np.append(sound[:, 0], np.nan), subtype="FLOAT")
    write(bad / "no_data.wav", sound[:0])
    data = bytearray(write(bad / "header.wav", sound).read_bytes())
    at = data.index(b"data") + 4
    width = 2 * sound.shape[1]
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") + 9999 * width).to_bytes(4, "little")
    (bad / "header.wav").write_bytes(data)
    for suffix in ("wav", "flac", "ogg"):
        cut(write(bad / f"cut.{suffix}", sound))
    (bad / "text.mp3").write_text("no sound at all " * 100)
    (bad / "empty.wav").touch()
    return root


def run(source, out, config=CONFIG, num_workers=1, share=Share()):  # noqa: B008
    return prepare.run({"sound": source}, out, config, num_workers, share)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """The directory, and what the run has said."""
    out = tmp_path_factory.mktemp("prepared")
    return out, run(folder, out, num_workers=2)


def read_clips(out):
    """Header of the first segment and samples of each clip, and all starts."""
    clips = {}
    for shard in records.read_index(out):
        path = records.shard_path(out, shard.name)
        number = 0
        for length in shard.clips:
            count = records.num_segments(length, CONFIG.segment_seconds)
            segments = [records.read_record(path, number + i) for i in range(count)]
            headers = [records.read_header(segment) for segment in segments]
            number += count
            assert {header._replace(start=0) for header in headers} == {headers[0]}
            samples = [records.read_samples(segment) for segment in segments]
            pieces = [(header.start, part.size) for header, part in zip(headers, samples, strict=True)]
            assert pieces == records.segments(length, CONFIG.segment_seconds)
            assert headers[0].id not in clips
            clips[headers[0].id] = headers[0], np.concatenate(samples)
        if number:
            with pytest.raises(DataError, match="cannot be read"):
                records.read_record(path, number)
    return clips


def test_good_files_become_24_khz_mono_at_peak_095(folder, prepared):
    clips = read_clips(prepared[0])
    names = {entry.path for entry in manifest.read(folder)} - set(REASONS)
    assert set(clips) == names
    assert len(names) == 15
    for name, (header, samples) in clips.items():
        source = audio.load(folder / name, 24_000)
        assert header.domain == "sound"
        assert header.clip_samples == samples.size == source.samples.size
        assert (header.source_rate, header.source_samples) == (source.sample_rate, source.num_samples)
        assert np.abs(samples.astype(int)).max() == round(0.95 * 32_768)
        np.testing.assert_allclose(samples / 32_768, source.samples * header.gain, atol=0.6 / 32_768)
    assert clips["long.mp3"][1].size > 24 * 24_000


def test_bad_files_are_refused_with_a_reason_and_counted(folder, prepared):
    out, summary = prepared
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {reject["path"] for reject in rejects} == set(REASONS)
    for reject in rejects:
        assert reject["reason"].startswith(REASONS[reject["path"]]), reject
        assert str(folder) not in reject["reason"]
    assert (summary.files, summary.rejected) == (len(rejects) + 15, len(rejects))
    assert summary.units == len(records.read_index(out)) > 3
    total = sum(sum(shard.clips) for shard in records.read_index(out))
    assert summary.seconds == pytest.approx(total / 24_000)
    assert summary.low_rate_seconds == pytest.approx(RATE / 8000)


def test_a_second_run_does_nothing(folder, prepared):
    out, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    again = run(folder, out)
    assert (again.units, again.files) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before


def test_tasks_together_make_what_one_run_makes(folder, prepared, tmp_path):
    parts = [run(folder, tmp_path, share=Share(index, 3)) for index in (2, 0, 1)]
    assert sum(part.files for part in parts) == prepared[1].files
    assert min(part.units for part in parts) > 0
    assert files(tmp_path) == files(prepared[0])


def test_the_place_of_the_corpus_and_of_the_caller_do_not_matter(folder, prepared, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert run(Path(folder.name), prepared[0]).files == 0


def test_other_settings_and_other_lines_are_refused(folder, prepared, tmp_path):
    out, _ = prepared
    before = files(out)
    with pytest.raises(DataError, match=r"other settings \(segment_seconds = 10, now 20\); use those, or another"):
        run(folder, out, dataclasses.replace(CONFIG, segment_seconds=20))
    later = tmp_path / "later"
    later.mkdir()
    (later / records.SETTINGS).write_text(json.dumps({**dataclasses.asdict(CONFIG), "loudness": -23}))
    with pytest.raises(DataError, match=r"prepared\.json: unknown field 'loudness': a later version has written it"):
        run(folder, later)
    (tmp_path / "m.scp").write_text(f"{folder / '0.flac'}\n" * 20)
    with pytest.raises(DataError, match=r"other lines of the manifest than sound-.* has now; use another --out"):
        run(tmp_path / "m.scp", out)
    assert files(out) == before


def test_domains_are_added_to_a_directory(folder, prepared, tmp_path, clips):
    shutil.copytree(prepared[0], tmp_path / "out")
    (tmp_path / "m.scp").write_text(f"bell {clips[4]}\n")
    prepare.run({"music": tmp_path / "m.scp"}, tmp_path / "out", CONFIG, 1, Share())
    before, after = files(prepared[0]), files(tmp_path / "out")
    assert {name for name, data in before.items() if after.pop(name) != data} == {"index.jsonl"}
    assert sorted(Path(name).suffix for name in after) == [".array_record", ".json"]
    assert {shard.domain for shard in records.read_index(tmp_path / "out")} == {"music", "sound"}


def test_manifest_lines_pick_parts_of_files(tmp_path, clips):
    rows = [
        {"id": "part", "audio_filepath": str(clips[0]), "offset": 1.5, "duration": 2},
        {"id": "rest", "audio_filepath": str(clips[0]), "offset": 6},
        {"id": "beyond", "audio_filepath": str(clips[0]), "offset": 6, "duration": 100},
        {"id": "nowhere", "audio_filepath": "nothing.wav"},
        {"id": "wrong", "audio_filepath": str(clips[0]), "offset": 1e308},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    summary = run(tmp_path / "m.jsonl", tmp_path / "out")
    assert (summary.files, summary.rejected) == (6, 4)
    clips_read = read_clips(tmp_path / "out")
    whole = audio.load(clips[0], 24_000).samples
    assert clips_read["part"][1].size == 48_000
    assert clips_read["rest"][1].size == pytest.approx(whole.size - 144_000, abs=1)
    _, samples = clips_read["part"]
    assert np.corrcoef(samples[100:-100], whole[36_100:83_900])[0, 1] > 0.9999
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    rejects = {reject["id"]: reject["reason"] for reject in map(json.loads, lines)}
    assert set(rejects) == {"beyond", "nowhere", "wrong", "m.jsonl:6"}
    assert "were asked for" in rejects["beyond"]
    assert rejects["nowhere"] == "no such file"
    assert rejects["m.jsonl:6"].startswith("no clip: ")


# Which clips go where; no audio is read.


def plan(path, names, **settings):
    """Units of a manifest of files with two clips each."""
    rows = [{"id": f"{name}-{i}", "audio_filepath": name, "offset": i, "duration": 1} for i in (0, 1) for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, list(prepare.plan(manifest.read_all({"sound": path}), PrepareConfig(**settings)))


def test_units_hold_every_entry_once_in_order(tmp_path):
    rows, units = plan(tmp_path / "m.jsonl", [f"{i}.wav" for i in range(500)], validation=0.1, shard_hours=100 / 3600)
    for split in ("train", "validation"):
        ids = [entry.id for unit in units if unit.split == split for entry in unit.entries]
        chosen = set(ids)
        assert ids == [row["id"] for row in rows if row["id"] in chosen]
        own = [unit for unit in units if unit.split == split]
        assert [unit.name for unit in own] == [f"sound-{split}-{i:06d}" for i in range(len(own))]
        assert [len(unit.entries) for unit in own[:-1]] == [100] * (len(own) - 1)
    assert sum(len(unit.entries) for unit in units) == len(rows)
    assert len({unit.digest for unit in units}) == len(units)


def test_train_and_validation_share_no_file_and_files_stay_on_their_side(tmp_path):
    def sides(names):
        _, units = plan(tmp_path / "m.jsonl", names, validation=0.2)
        split = {name: {unit.split for unit in units for entry in unit.entries if entry.path == name} for name in names}
        assert all(len(held) == 1 for held in split.values())
        return {name: held.pop() for name, held in split.items()}

    names = [f"{i}.wav" for i in range(1000)]
    before, after = sides(names), sides([f"new/{i}.wav" for i in range(300)] + names[::-1])
    assert before == {name: after[name] for name in names}
    assert 150 < Counter(before.values())["validation"] < 250


@pytest.mark.parametrize(
    "settings", [{"validation": 1.0}, {"validation": -0.1}, {"segment_seconds": 9}, {"shard_hours": 0.0}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(DataError, match="--"):
        PrepareConfig(**settings)


def test_tasks_are_parsed():
    assert Share.parse("2/8") == Share(2, 8)
    for wrong in ("8/8", "1", "a/b", "-1/2", "1/0", "²/8", ""):
        with pytest.raises(DataError, match="must be i/n"):
            Share.parse(wrong)


# Processes that die.


def work(folder, names, out):
    """One unit of these files, by processes of its own; its rejects and the progress."""
    entries = tuple(manifest.Entry(name, name) for name in names)
    done = Progress("prepare", len(names))
    with done.bar:
        prepare._work([SplitUnit("sound-train-000000", "sound", folder, entries, "train")], out, CONFIG, 1, done)
    finished = json.loads((out / "shards/sound-train-000000.json").read_text())
    return {reject["id"]: reject["reason"] for reject in finished["rejects"]}, done


@pytest.fixture
def deadly(folder, tmp_path):
    for name in ("a.wav", "crash.wav", "killed.wav", "z.wav"):
        shutil.copy(folder / "loud.wav", tmp_path / name)
    return Deadly(tmp_path)


def test_a_decoder_that_crashes_costs_its_file_only(deadly, tmp_path):
    rejects, done = work(deadly, ["a.wav", "crash.wav", "nothing.wav", "z.wav"], tmp_path / "out")
    assert rejects == {"crash.wav": "its decoder died with exit code -11", "nothing.wav": "no such file"}
    assert (done.units, done.rejected, done.bar.n) == (1, 2, 4)
    prepare.collect(tmp_path / "out")
    assert sorted(read_clips(tmp_path / "out")) == ["a.wav", "z.wav"]


def test_a_worker_that_is_killed_costs_nothing(deadly, tmp_path):
    names = ["a.wav", "killed.wav", "z.wav"]
    rejects, done = work(deadly, names, tmp_path / "out")
    assert (tmp_path / "killed.flag").exists()
    assert rejects == {}
    assert (done.units, done.rejected, done.bar.n) == (1, 0, 3)
    work(Path(tmp_path), names, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


SLOW = PrepareConfig(validation=0.0, shard_hours=10 / 3600)
"""A file a unit."""


@pytest.fixture(scope="module")
def slow(folder, tmp_path_factory):
    """A folder that takes seconds, and what becomes of it."""
    root, out = tmp_path_factory.mktemp("slow"), tmp_path_factory.mktemp("slow_out")
    samples = np.zeros(60 * RATE, np.float32)
    samples[::RATE] = 0.5
    for number in range(8):
        write(root / f"{number}.flac", samples)
    run(root, out, SLOW, num_workers=2)
    return root, files(out)


def start(source, out, limit=None):
    """The real command, in a process group of its own."""
    code = "import resource, sys\n"
    if limit is not None:
        code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from omnicodec_jax.cli import main\nif __name__ == '__main__':\n    main()"
    options = ["--validation", "0", "--shard-hours", str(SLOW.shard_hours), "--num-workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", code, "prepare", "--manifest", f"sound={source}", "--out", out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def messages(errors):
    """What is left of standard error without the progress bar."""
    lines = errors.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("prepare: ")]


@pytest.mark.parametrize("kind", ["interrupted", "killed"])
def test_what_is_stopped_is_finished_by_the_next_run(slow, tmp_path, kind):
    source, undisturbed = slow
    process = start(source, tmp_path)
    deadline = time.monotonic() + 60
    while not (finished := list((tmp_path / "shards").glob("[!.]*.json"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if kind == "killed":
        process.kill()  # its workers are not asked, and may still write while the next run begins
        process.communicate()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate()
        if process.returncode != 0:  # it may just have finished
            assert process.returncode == 130, errors
            assert messages(errors) == ["error: interrupted"]
        assert not list((tmp_path / "shards").glob(".*"))
    done = {path: path.stat().st_mtime_ns for path in finished}
    run(source, tmp_path, SLOW, num_workers=2)
    assert files(tmp_path) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == done


def test_a_full_disk_stops_the_job_with_one_line_and_the_next_run_completes_it(slow, tmp_path):
    source, undisturbed = slow
    smallest = min(len(data) for name, data in undisturbed.items() if name.endswith(".array_record"))
    process = start(source, tmp_path, limit=smallest - 1)
    _, errors = process.communicate()
    assert process.returncode == 1
    (message,) = messages(errors)
    assert message.startswith(f"error: {tmp_path}/shards/sound-train-0")
    assert "File too large; raise the limit" in message
    assert not list((tmp_path / "shards").iterdir())
    run(source, tmp_path, SLOW, num_workers=2)
    assert files(tmp_path) == undisturbed


def test_the_command_says_what_it_did(folder, tmp_path, capfd):
    settings = dataclasses.replace(CONFIG, shard_hours=1.0, validation=0.0)
    arguments = {"manifest": f"sound={folder / 'bad'}", "out": tmp_path / "out", "num_workers": 1, "settings": settings}
    shutil.copy(folder / "loud.wav", folder / "bad" / "good.wav")
    try:
        assert cli.prepare(**arguments) == 0
        assert cli.prepare(**arguments) == 0
    finally:
        (folder / "bad" / "good.wav").unlink()
    printed = capfd.readouterr()
    first, second = printed.out.splitlines()
    rejects = tmp_path / "out" / "rejects.jsonl"
    assert first.startswith(f"prepare: 1 of 14 files, 13 refused (see {rejects}), 0.00 h in 1 shards, ")
    assert first.endswith(" x real time; below 16000 Hz, and refused: 0.00 h in all (--min-sample-rate)")
    assert second == f"prepare: nothing left to do; what was refused is in {rejects}"
    assert messages(printed.err) == []  # decoders have remarks on bad files


def test_one_list_of_several_domains_gives_each_its_own(tmp_path):
    rows = [{"audio_filepath": f"{i}.wav", "domain": domain} for i, domain in enumerate(("speech", "music", "speech"))]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sources = dict.fromkeys(("speech", "music"), tmp_path / "all.jsonl")
    units = list(prepare.plan(manifest.read_all(sources), prepare.PrepareConfig(validation=0.0)))
    held = {unit.domain: [entry.path for entry in unit.entries] for unit in units}
    assert held == {"speech": ["0.wav", "2.wav"], "music": ["1.wav"]}
