"""Evaluations from clips to a report: every system in its line, every failure with its reason, nothing done twice."""

import csv
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from tiny import MIMI, OMNICODEC, variables

from omnicodec_jax import cli, shipped
from omnicodec_jax.cli.options import named
from omnicodec_jax.data import audio
from omnicodec_jax.errors import AudioError, ConfigError, DataError, ModelError
from omnicodec_jax.evaluation import frechet, quoted, reconstruct, run, scores, summary
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.datasets import clips as clips_of
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.metrics import Metric, Pair
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.evaluation.run import Evaluation
from omnicodec_jax.evaluation.scores import ScoreRequest, score_all
from omnicodec_jax.evaluation.systems import Folder, Opus, Output, System, TokenizerCodec
from omnicodec_jax.lanes import CPU_BLOCKS, ContinuousBatcher
from omnicodec_jax.tokenizer import OmniCodecTokenizer

pytestmark = pytest.mark.minutes(1)

METRICS = ("stoi", "mel_distance", "mcd")
COUNTS = (2, 9)


@pytest.fixture(scope="module")
def data(clips, tmp_path_factory) -> dict[str, Path]:
    """Two clips of two domains each, and a file that is none."""
    folder = tmp_path_factory.mktemp("data")
    for domain in ("speech", "music"):
        (folder / domain).mkdir()
        for path in [path for path in clips if path.name.startswith(domain)][:2]:
            samples, rate = soundfile.read(path, stop=2 * soundfile.info(path).samplerate)
            soundfile.write(folder / domain / path.name, samples, rate)
    (folder / "speech" / "text.wav").write_text("no sound at all")
    return {domain: folder / domain for domain in ("speech", "music")}


@pytest.fixture(scope="module")
def evaluation(data, demo_model, tmp_path_factory) -> Evaluation:
    """A codec, Opus, a folder with a reconstruction that is too short, and a peer that cannot be loaded."""
    out, other = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("other")
    for number, path in enumerate(sorted(data["music"].iterdir())):
        samples, rate = soundfile.read(path)
        soundfile.write(other / f"{path.stem}.wav", samples[: None if number else rate], rate)
    return Evaluation(
        data=data,
        out=out,
        models={"ours": str(demo_model)},
        peers=(PeerRequest.parse("opus=6000+24000"), PeerRequest.parse(f"mimi={other}")),
        reconstructions={"other": other},
        codebooks=COUNTS,
        metrics=(*METRICS, "frechet"),
        quoted=True,
        num_workers=2,
        shown=1,
    )


def bands(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """An embedding of each second that needs no weights."""
    seconds = samples[: samples.size // sample_rate * sample_rate].reshape(-1, sample_rate)
    power = np.abs(np.fft.rfft(seconds))[:, : sample_rate // 2].reshape(len(seconds), 8, -1).mean(2)
    return np.log(power + 1e-3)


@pytest.fixture(scope="module")
def done(evaluation) -> dict:
    """What the report says, after a first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "load", lambda: bands)
        assert run.run(evaluation) == 1  # for the peer without weights
    return json.loads((evaluation.out / "report.json").read_text())


def test_every_system_has_a_line_with_its_bit_rate(done):
    rates = {system["name"]: system["bits_per_second"] for system in done["systems"] if system["kind"] != "quoted"}
    assert rates.pop("Opus-6k") == pytest.approx(6000, rel=0.4)
    assert rates.pop("Opus-24k") == pytest.approx(24_000, rel=0.2)
    assert rates == {"Original": None, "ours-2L": 200.0, "ours-9L": 900.0, "other": None}
    ours = next(system for system in done["systems"] if system["name"] == "ours-9L")
    assert (ours["codebook_size"], ours["num_codebooks"], ours["tokens_per_second"]) == (256, 9, 112.5)
    assert all(len(use) == 9 and all(0 < share <= 50 / 256 for share in use) for use in ours["usage"].values())
    assert ours["real_time_factor"] > 0


def test_scores_are_in_the_order_that_ears_would_give(done):
    for domain in done["domains"]:
        distance = {name: cells[domain]["mel_distance"]["mean"] for name, cells in done["summary"].items()}
        assert distance["Original"] == 0 < distance["Opus-24k"] < distance["Opus-6k"] < distance["ours-9L"]


def test_sets_of_clips_have_a_distance_that_no_clip_has(done, evaluation):
    for domain in done["domains"]:
        distance = {name: cells[domain]["frechet"]["mean"] for name, cells in done["compared"].items()}
        assert distance["Original"] == pytest.approx(0, abs=1e-6)
        assert distance["Opus-24k"] < distance["ours-9L"]
    assert done["compared"]["other"]["speech"]["frechet"]["why"] == "no clips"
    assert done["compared"]["Opus-6k"]["music"]["frechet"]["count"] == 1
    assert "frechet" not in (evaluation.out / "scores.csv").read_text()
    ranges = {metric["name"]: metric["range"] for metric in done["metrics"]}
    assert ranges["stoi"] == [-1, 1]


def test_what_has_no_score_says_why_everywhere(done, evaluation):
    cell = done["summary"]["other"]["speech"]["stoi"]
    assert (cell["mean"], cell["why"]) == (None, "the folder holds no reconstruction of this clip")
    assert done["summary"]["other"]["music"]["stoi"]["count"] == 1
    rows = [json.loads(line) for line in (evaluation.out / "scores.jsonl").open()]
    assert [row["why"]["mcd"] for row in rows if "lasts 1.00 s, the original 2.00 s" in str(row["why"])]
    with open(evaluation.out / "scores.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 4 * 6
    assert {row["stoi"] for row in table if row["system"] == "other" and row["domain"] == "speech"} == {""}
    notes = [line for line in (evaluation.out / "tables.md").read_text().splitlines() if line.startswith("- ")]
    assert "- the folder holds no reconstruction of this clip: STOI, Mel dis., MCD (other: speech)" in notes
    assert "- 1 of 2 clips have a value; the others: lasts 1.00 s" in "\n".join(notes)
    assert len(notes) == len({note.partition(":")[0] for note in notes})
    assert "| STOI (n = 2 / 1) |" in (evaluation.out / "tables.md").read_text()
    assert done["summary"]["Original"]["music"]["stoi"]["count"] == 2
    counts = {name: cells["music"]["stoi"]["count"] for name, cells in done["compared"].items()}
    assert {count for name, count in counts.items() if not name.endswith("paper")} == {1}


def test_eighty_footnotes_of_one_cause_are_one_line():
    missing, systems, domains = "speechmos is not installed", ("A", "B", "C"), ("speech", "music")
    metrics = [{"name": f"dnsmos_{n}", "title": f"DNSMOS {n}"} for n in range(13)] + [{"name": "wer", "title": "WER"}]

    def cell(system: str, domain: str, metric: str) -> dict:
        if metric.startswith("dnsmos"):
            return {"mean": None, "why": missing}
        if domain == "music":
            return {"mean": None, "why": "no transcript"}
        return {"mean": None, "why": "too long"} if system == "B" else {"mean": 0.5, "why": None}

    cells = {s: {d: {m["name"]: cell(s, d, m["name"]) for m in metrics} for d in domains} for s in systems}
    report = {"systems": [{"name": s} for s in systems], "domains": domains, "metrics": metrics, "compared": cells}
    assert summary.notes(report) == [
        "- no transcript: WER (A, B, C: music)",
        f"- speechmos is not installed: {', '.join(m['title'] for m in metrics[:-1])} (all systems)",
        "- too long: WER (B: speech)",
    ]


def test_the_default_model_is_scored_where_no_other_system_is_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run", lambda evaluation: asked.append(evaluation) or 0)
    (tmp_path / "tables.md").touch()
    monkeypatch.setenv("OMNICODEC_MODEL", "some/model")
    cli.evaluate(out=tmp_path)
    cli.evaluate(out=tmp_path, peers="opus")
    monkeypatch.delenv("OMNICODEC_MODEL")
    cli.evaluate(out=tmp_path)
    shipped_model = {"OmniCodec": str(shipped.MODELS["small"])}
    assert [evaluation.models for evaluation in asked] == [{"OmniCodec": "some/model"}, {}, shipped_model]


def test_refused_clips_are_listed_and_the_others_go_on(evaluation, done):
    (row,) = (json.loads(line) for line in (evaluation.out / "rejects.jsonl").open())
    assert (row["id"], row["domain"]) == ("text", "speech")
    assert "not audio" in row["why"]


def test_the_page_has_players_for_what_is_shown(evaluation, done):
    assert [clip["domain"] for clip in done["clips"]] == ["speech", "music"]
    for clip in done["clips"]:
        for files in (clip["original"], *clip["systems"].values()):
            assert (evaluation.out / files["audio"]).is_file()
            assert (evaluation.out / files["spectrogram"]).is_file()
    assert (evaluation.out / "index.html").is_file()


def test_a_second_run_computes_nothing_and_says_the_same(evaluation, done, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(TokenizerCodec, "reconstruct", never)
    monkeypatch.setattr(Opus, "reconstruct", never)
    seen = []
    monkeypatch.setattr(run, "score_all", lambda tasks, _: seen.extend(tasks) or [])
    assert run.run(evaluation) == 1
    again = json.loads((evaluation.out / "report.json").read_text())
    assert {task.key[0] for task in seen} == set()
    assert {**again, "created": done["created"]} == done


def test_another_model_of_the_same_name_is_reconstructed_anew(evaluation, done, tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        clip = EvalClip("a", "speech", evaluation.data["speech"] / "speech_english_class.flac")
        (original,) = reconstruct.originals([clip], tmp_path, journal)
        for rate in (6000, 6000, 9000):
            opus = Opus([rate])
            opus.systems = [opus.systems[0]._replace(name="opus")]
            assert list(reconstruct.by_codec(opus, [original], tmp_path, journal)) == []
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [row["key"][0] for row in rows] == ["Original", "opus", "opus"]


def test_reconstructions_keep_level_length_and_time(data, demo_model):
    samples = 0.2 * audio.load(next(data["music"].iterdir()), 24_000).samples
    (output,) = Opus([64_000]).reconstruct(samples)
    error = samples - output.samples[: samples.size]
    assert abs(output.samples.size - samples.size) < 24
    assert 10 * np.log10(np.mean(samples**2) / np.mean(error**2)) > 15  # one sample late would be enough to fail
    codec = TokenizerCodec("ours", OmniCodecTokenizer.from_pretrained(demo_model), (9,))
    (loud,), (quiet,) = (list(codec.reconstruct(gain * samples)) for gain in (1.0, 0.1))
    np.testing.assert_allclose(quiet.samples, 0.1 * loud.samples, atol=1e-5)
    assert loud.samples.size == samples.size
    assert loud.bits == loud.codes.size * 8


class Quick(OmniCodecTokenizer):
    """Compiles nothing: codes follow from the audio, and audio from the codes."""

    def encode_each(self, clips):
        for key, clip in clips:
            frames = np.resize(clip.samples, (self.num_quantizers, self.num_frames(clip.samples.size)))
            yield key, np.int32(100 * np.abs(frames)) % 16

    def decode_each(self, tokens):
        for key, codes in tokens:
            yield key, np.repeat(np.float32(codes.sum(0)), self.hop_length)[None]


@pytest.mark.parametrize("rate", [12.5, 6.25])
def test_no_clip_is_charged_for_the_compilation_of_a_program(rate: float):
    """Whatever blocks its frames and its semantic features are cut into, there were some of that length before."""

    def blocks(seconds: float, rate: float) -> set[int]:
        left, found = math.ceil(seconds * rate), set[int]()
        while left > 0:
            size = ContinuousBatcher._block_size(SimpleNamespace(_blocks=CPU_BLOCKS), left)
            found, left = found | {size}, left - size
        return found

    for longest in np.arange(0.1, 30, 0.7):
        lengths = reconstruct.warm_up_lengths(longest, rate)
        for each in (rate, 12.5, 13.0):
            compiled = set[int]().union(*(blocks(seconds, each) for seconds in lengths))
            assert all(blocks(seconds, each) <= compiled for seconds in np.arange(0.1, longest + 0.05, 0.7))
    assert reconstruct.warm_up_lengths(1.0, None) == [1.0]


def test_mimi_in_our_own_blocks_is_a_peer_too():
    tokenizer = Quick(MIMI, variables(MIMI))
    codec = TokenizerCodec("mimi", tokenizer, (2, 8))
    assert [system.name for system in codec.systems] == ["mimi-2L", "mimi-4L"]  # it has no more
    assert codec.systems[0].about.startswith("Mimi")
    samples = np.random.default_rng(0).normal(0, 0.1, 2405).astype(np.float32)
    codes = tokenizer.encode(samples[None, None], 24_000)
    for system, output in zip(codec.systems, codec.reconstruct(samples), strict=True):
        count = len(system.codebook_sizes)
        np.testing.assert_array_equal(output.codes, codes[0, :count])
        np.testing.assert_array_equal(output.samples, tokenizer.decode(codes[:, :count])[0, 0, :2405])
        assert output.bits == 201 * 4 * count  # 16 entries each


def test_the_weights_are_hashed_once_and_not_for_every_clip(monkeypatch):
    hashed = []
    monkeypatch.setattr(Quick, "encoder_hash_as", lambda self, known: hashed.append(known) or known)
    codec = TokenizerCodec("mimi", Quick(MIMI, variables(MIMI)), (4,))
    first = codec.identity()
    assert codec.identity() == first
    assert codec.identity(f"{first.split()[0]} old") == codec.identity(f"{first.split()[0]} old")
    assert hashed == [None, "old"]


class Refuses:
    """A codec whose model has become another one, which fails."""

    systems = (System("ours", "", (256, 256), 12.5),)
    sample_rate = 24_000
    any_length = True

    def identity(self, known: str | None = None) -> str:
        return "another"

    def encode(self, samples: np.ndarray) -> np.ndarray | None:
        return None

    def reconstruct(self, samples: np.ndarray, systems=None) -> Iterator[Output]:
        if samples.max() > 0.99 and samples.size == 24_000:  # what it is compiled with
            return
        raise RuntimeError("out of memory")
        yield


def test_what_an_earlier_model_left_is_not_shown_for_a_clip_that_fails(data, tmp_path):
    clip = EvalClip("a", "music", next(data["music"].iterdir()))
    stale = [path(tmp_path, "ours", clip) for path in (reconstruct.audio_path, reconstruct.codes_path)]
    for path in stale:
        path.parent.mkdir(parents=True)
        path.touch()
    with Journal(tmp_path / "journal.jsonl") as journal:
        (original,) = reconstruct.originals([clip], tmp_path, journal)
        (failure,) = reconstruct.by_codec(Refuses(), [original], tmp_path, journal)
    assert "out of memory" in failure.why
    assert not any(map(Path.exists, stale))


def test_a_folder_and_a_codec_of_one_name_are_not_taken_for_one_another(data, tmp_path):
    """Both can have one name in evaluations of one folder, one after the other."""
    clips, folder = {"music": data["music"]}, tmp_path / "folder"
    folder.mkdir()
    for path in data["music"].iterdir():
        samples, rate = soundfile.read(path)
        soundfile.write(folder / f"{path.stem}.wav", 0.1 * samples, rate)
    rows = []
    for systems in (
        {"peers": (PeerRequest.parse("opus=6000"),)},
        {"reconstructions": {"Opus-6k": folder}},
        {"peers": (PeerRequest.parse("opus=6000"),)},
    ):
        assert run.run(Evaluation(data=clips, out=tmp_path / "out", metrics=("si_sdr",), shown=0, **systems)) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        system = report["systems"][-1]
        rows.append((system["bits_per_second"], report["summary"][system["name"]]["music"]["si_sdr"]["mean"]))
    assert rows[0] == rows[2]
    assert rows[1][0] is None
    assert rows[1][1] > rows[0][1]


class Breaks(Refuses):
    """A codec of somebody else, which raises what no one expects, also for what it is compiled with."""

    def reconstruct(self, samples: np.ndarray, systems=None) -> Iterator[Output]:
        raise IndexError("pad of an empty tensor")
        yield


def test_whatever_a_codec_raises_costs_its_own_clips_alone(data, tmp_path):
    clip = EvalClip("a", "music", next(data["music"].iterdir()))
    with Journal(tmp_path / "journal.jsonl") as journal:
        (original,) = reconstruct.originals([clip], tmp_path, journal)
        (failure,) = reconstruct.by_codec(Breaks(), [original], tmp_path, journal)
    assert failure.why == "IndexError: pad of an empty tensor"


def test_a_system_without_a_single_clip_is_an_error(data, tmp_path, caplog):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "of_another_name.wav").touch()
    what = Evaluation(
        data={"music": data["music"]},
        out=tmp_path / "out",
        reconstructions={"other": tmp_path / "others"},
        metrics=("mcd",),
        limit=1,
    )
    assert run.run(what) == 1
    assert "other: no reconstruction of any of 1 clips: the folder holds no reconstruction of this clip" in caplog.text
    report = json.loads((what.out / "report.json").read_text())
    assert report["summary"]["other"]["music"]["mcd"]["mean"] is None


def test_a_name_that_is_not_utf_8_is_written_out_where_the_report_gives_it_as_a_reason(data, tmp_path, caplog):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for path in data["music"].iterdir():
        (folder / f"{path.stem}.wav").write_text("no sound")
    what = Evaluation(
        data={"music": data["music"]},
        out=tmp_path / "out",
        reconstructions={"other": folder},
        metrics=("mel_distance",),
        shown=0,
    )
    assert run.run(what) == 1
    assert "caf\\udce9/" in (what.out / "tables.md").read_text()
    assert "caf\\udce9/" in caplog.text.encode().decode()  # a log goes to files of UTF-8, too


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_none_and_says_so(data, monkeypatch, value):
    path = next(data["music"].iterdir())
    metric = Metric(f"odd {value}", "Odd", "higher", "", lambda: lambda pair: value)
    monkeypatch.setitem(scores.METRICS, metric.name, metric)
    found = scores.score(ScoreRequest(("a", "music", "b"), path, path, None, (metric.name, "si_sdr")))
    assert found.why == {metric.name: f"Odd: the score is {value}"}
    assert found.values == {"si_sdr": 100.0}


def test_scores_of_an_earlier_way_to_compute_a_metric_are_computed_again():
    values = {"stoi": 0.9, "f0_error": 3036.0}
    assert run._still_valid({"values": values, "set_to": {}}) == {"stoi": 0.9}  # hum in pauses was a voice then
    assert run._still_valid({"values": values, "set_to": {}, "versions": {"stoi": 1, "f0_error": 2}}) == values


def test_scores_by_other_weights_are_not_taken_for_those_that_are_named_now(monkeypatch):
    values = {"wer": 0.5, "stoi": 0.9, "gone": 1.0}
    row = {"values": values, "set_to": {"wer": None, "stoi": None}}
    monkeypatch.delenv("OMNICODEC_WHISPER", raising=False)
    assert run._still_valid(row) == {"wer": 0.5, "stoi": 0.9}
    monkeypatch.setenv("OMNICODEC_WHISPER", "models/whisper_base")
    assert run._still_valid(row) == run._still_valid({"values": values}) == {"stoi": 0.9}
    assert run._still_valid({"values": values, "set_to": {"wer": "models/whisper_base"}}) == {"wer": 0.5, "stoi": 0.9}
    assert {name for name, metric in scores.METRICS.items() if metric.setting} == {
        *("wer", "utmos", "audiobox_ce", "audiobox_cu", "audiobox_pc", "audiobox_pq")
    }


def test_systems_of_one_name_are_refused_before_anything_is_done(data, tmp_path):
    twice = tuple(map(PeerRequest.parse, ("mimi=a", "opus", "mimi=b")))
    with pytest.raises(ConfigError, match="--peers: mimi is there twice"):
        Evaluation(data=data, out=tmp_path, peers=twice, metrics=METRICS)
    with pytest.raises(ConfigError, match="--model: ours is there twice"):
        Evaluation(data=data, out=tmp_path, models={"ours": "a", "Ours": "b"}, metrics=METRICS)


def test_a_domain_without_a_usable_clip_has_a_report_all_the_same(data, demo_model, tmp_path):
    for made in ("audio/ours-2L/music/a.flac", "codes/ours-2L/music/a.npy", "spectrograms/ours-2L/music/a.png"):
        (path := tmp_path / "out" / made).parent.mkdir(parents=True)  # what killed runs have left
        path.with_name(f".{path.stem}.{32 * '0'}.partial{path.suffix}").touch()
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "text.wav").write_text("no sound at all")
    sets = {"music": data["music"], "sound": tmp_path / "sound"}
    models = {"ours": str(demo_model)}
    what = Evaluation(data=sets, out=tmp_path / "out", models=models, codebooks=(2,), metrics=("stoi",), limit=1)
    assert run.run(what) == 0
    assert not list((tmp_path / "out").rglob("*.partial*"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["ours-2L"]["sound"]["stoi"]["why"] == "no clips"
    assert list(report["systems"][1]["usage"]) == ["music"]


@pytest.mark.parametrize("name", ["Original", "original", "reference"])
def test_names_of_the_clips_themselves_are_refused_before_anything_is_touched(name, data, tmp_path):
    with pytest.raises(ConfigError, match="stands for the clips themselves"):
        Evaluation(data=data, out=tmp_path, reconstructions={name: tmp_path}, metrics=METRICS)


def test_the_reports_own_audio_is_not_removed_to_be_read_again(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "report")
    for folder in ("report/audio/ours", "link/audio/ours/music"):
        with pytest.raises(ConfigError, match=f"--reconstructions ours: {folder} is where .* another --out"):
            Evaluation(data=data, out=Path("report"), reconstructions={"ours": Path(folder)}, metrics=METRICS)
    Evaluation(data=data, out=Path("report"), reconstructions={"theirs": Path("report/audio/ours")}, metrics=METRICS)


def test_a_folder_can_say_what_its_tokens_cost(tmp_path):
    (tmp_path / "system.json").write_text('{"about": "WavTokenizer", "codebook_sizes": [4096], "frame_rate": 75}')
    system = Folder("w", tmp_path).system
    assert (system.name, system.about) == ("w", "WavTokenizer")
    assert system.frame_rate * system.bits_per_frame == 900
    for wrong in ("[]", "{", '{"codebook_size": 4096}', '{"frame_rate": "75"}', '{"codebook_sizes": [0]}'):
        (tmp_path / "system.json").write_text(wrong)
        with pytest.raises(ModelError, match=r"system\.json: must be an object with some of about, codebook_sizes"):
            Folder("w", tmp_path)


def test_reconstructions_of_one_name_are_not_mixed_up(tmp_path):
    for name in ("a.wav", "a.flac", "b.wav", "x/c.mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "w").close()
    folder = Folder("other", tmp_path)
    for clip, file in {"a.wav": "a.wav", "a.flac": "a.flac", "y/b": "b.wav", "c": None, "x/c": "x/c.mp3"}.items():
        for _ in range(2):
            assert folder.file(clip, "speech") == (None if file is None else tmp_path / file)
    assert folder.file(r"caf\udce9", "speech") is not None
    with pytest.raises(AudioError, match=r"several files of this name: a\.flac, a\.wav; remove all but one"):
        folder.file("a", "speech")


def test_systems_are_compared_on_the_clips_that_all_have():
    values = {
        "Original": [0.0, 0.0, 0.0],
        "good": [1.0, 2.0, 9.0],
        "half": [3.0, 5.0, None],
        "none": [None, None, None],
    }
    why = {"Original": [], "good": [], "half": ["too short"], "none": 3 * ["no such package"]}
    columns = {name: summary.Column(found, why[name]) for name, found in values.items()}
    means = summary.compared_means(columns)
    assert [(cell.mean, cell.count) for cell in means.values()] == [(0.0, 2), (1.5, 2), (4.0, 2), (None, 0)]
    assert means["good"].why is None
    assert means["half"].why == "2 of 3 clips have a value; the others: too short"
    assert means["none"].why == "no such package"
    assert [cell.count for cell in summary.own_means(columns).values()] == [3, 3, 2, 0]
    apart = summary.compared_means({"a": summary.Column([1.0, None], ["x"]), "b": summary.Column([None, 2.0], ["y"])})
    assert [cell.mean for cell in apart.values()] == [None, None]


def test_a_bad_line_of_a_list_is_a_refused_clip_and_no_more(data, tmp_path):
    path = next(data["music"].iterdir())
    lines = ["{broken", json.dumps({"audio_filepath": str(path)}), '{"audio_filepath": "gone \\ud83d.wav"}']
    (tmp_path / "list.json").write_text("\n".join(lines))
    with Journal(tmp_path / "journal.jsonl") as journal:
        given = clips_of(tmp_path / "list.json", "music", None)
        first, *others = reconstruct.originals(given, tmp_path / "out", journal)
    assert isinstance(first, reconstruct.Original)
    assert first.clip.path == path
    assert [(failure.clip.id, failure.why.split(":")[0]) for failure in others] == [
        (r"gone \ud83d", "no such file"),
        ("list.json:1", "no clip"),
    ]


def test_audio_of_another_rate_is_brought_back_to_24_khz():
    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    fitted = reconstruct.fit(tone, 16_000, 24_010)
    assert fitted.size == 24_010
    expected = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    np.testing.assert_allclose(fitted[500:23_500], expected[500:23_500], atol=1e-2)


def test_a_model_without_its_features_is_refused(data):
    with pytest.raises(ModelError, match="--encoder DIR"):
        TokenizerCodec("tiny", OmniCodecTokenizer(OMNICODEC, variables(OMNICODEC)), (2,))


def test_a_mistyped_model_is_an_error_and_not_a_report_of_the_clips_alone(data, tmp_path):
    mistyped = run.Evaluation(data=data, out=tmp_path / "report", models={"ours": "./modles"}, metrics=("mcd",))
    with pytest.raises(ModelError, match=r"no system to compare: ours: \./modles: no such model directory"):
        run.run(mistyped)
    assert not (tmp_path / "report" / "tables.md").exists()


def test_a_model_whose_config_cannot_be_read_costs_no_other_system_its_line(data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "omni')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    out, opus = tmp_path / "report", PeerRequest.parse("opus=12000")
    models = {"ours": str(tmp_path / "model")}
    assert run.run(run.Evaluation(data=data, out=out, models=models, peers=(opus,), metrics=("mcd",), limit=1)) == 1
    table = (out / "tables.md").read_text()
    assert "| Opus-12k |" in table
    assert "- ours is left out: " in table
    assert "not JSON" in table


def test_a_cut_off_journal_goes_on(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add(("a", "b"), {"x": 1})
        journal.add(("a", "c"), {"x": 2})
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'3\n["key"]\n{"key": 3}\n' + path.read_bytes()[:-7])
    with Journal(path) as journal:
        assert (journal.get("a", "b"), journal.get("a", "c")) == ({"x": 1}, None)
        journal.add(("a", "c"), {"x": 3})
    with Journal(path) as journal:
        assert journal.get("a", "c") == {"x": 3}


def _deadly() -> object:
    def scorer(pair: Pair) -> float:
        if pair.transcript == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if pair.transcript == "raise":
            raise ZeroDivisionError("a fault of the package")
        return 1.0

    return scorer


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_metric_that_kills_its_process_costs_its_own_score_only(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros(2400), 24_000)
    monkeypatch.setitem(scores.METRICS, "deadly", Metric("deadly", "Deadly", "higher", "", _deadly))
    # Forked, so that the processes know of it.
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: multiprocessing.context.ForkContext())
    what = ("fine", "kill", "raise", "fine", "fine")
    path = tmp_path / "a.flac"
    tasks = [
        ScoreRequest(("s", "d", str(n)), path, path, text, ("deadly", "mel_distance")) for n, text in enumerate(what)
    ]
    result = {int(task.key[2]): scored for task, scored in score_all(tasks, 2)}
    assert sorted(result) == [0, 1, 2, 3, 4]
    assert all(scored.values["mel_distance"] == 0 for scored in result.values())
    assert "died" in result[1].why["deadly"]
    assert "ZeroDivisionError: a fault of the package" in result[2].why["deadly"]
    assert all(result[n].values["deadly"] == 1.0 for n in (0, 3, 4))


def test_metrics_by_name():
    assert scores.choose_metrics("core") == ["pesq_wb", "pesq_nb", "stoi", "mel_distance", "mcd"]
    assert scores.choose_metrics("mcd,dnsmos") == ["mcd", "dnsmos"]
    with pytest.raises(ConfigError, match="--metrics mdc: must be of core, all, pesq_wb"):
        scores.choose_metrics("mdc")


def test_quoted_figures_are_the_papers():
    cells = quoted.means("OmniCodec-32L, paper", ["speech", "sound"], ["stoi", "mcd", "dnsmos"])
    assert (cells["speech"]["stoi"]["mean"], cells["sound"]["mcd"]["mean"]) == (0.96, 2.74)
    assert cells["speech"]["dnsmos"] == {"mean": None, "ci95": None, "count": 0, "why": "not in the paper"}
    assert quoted.means("Mimi-16L, paper", ["music"], ["audiobox_pq"])["music"]["audiobox_pq"]["mean"] == 7.06


def test_a_command_line_that_cannot_be_is_refused(tmp_path, data):
    assert named("a=x,b=y", "--data") == {"a": "x", "b": "y"}
    assert named("some/dir", "--model", "OmniCodec") == {"OmniCodec": "some/dir"}
    for text in ("a=x,a=y", "../a=x", "a=", "x"):
        with pytest.raises(ConfigError, match="must be NAME=PATH"):
            named(text, "--data")
    with pytest.raises(ConfigError, match="--codebooks"):
        cli.evaluate(codebooks="8,x", out=tmp_path)
    for option in ("limit", "num_workers"):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} 0: must be 1 or more"):
            cli.evaluate(out=tmp_path, **{option: 0})
    with pytest.raises(ConfigError, match="opus, mimi, dac"):
        PeerRequest.parse("opuss")
    for rates in ("fast", "0", "499", "256001", "6000+"):
        with pytest.raises(ConfigError, match=r"bit/s from 500 to 256000, such as 6000\+12000"):
            PeerRequest.parse(f"opus={rates}")
    assert [system.name for system in PeerRequest.parse("opus=9000+6000+6000").load(()).systems] == [
        "Opus-6k",
        "Opus-9k",
    ]
    with pytest.raises(DataError, match="no such"):
        run.run(Evaluation(data={"speech": tmp_path / "none"}, out=tmp_path, metrics=METRICS))
