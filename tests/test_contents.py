"""`omnicodec inspect` on everything that commands write: a few lines that say what is there."""

import dataclasses
import json
import shutil

import pytest
import tiny_experiment
import token_shards
from tiny import OMNICODEC, variables

from omnicodec_jax import cli, model_directory
from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import shards
from omnicodec_jax.data import features, records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.errors import ConfigError, OmniCodecError

pytestmark = pytest.mark.quick

HOUR = 3600 * records.SAMPLE_RATE


@pytest.fixture
def said(tmp_path, capsys):
    """What inspecting the test's directory prints, by lines."""

    def inspect(path=tmp_path) -> list[str]:
        assert cli.inspect(path) == 0
        return [line.strip() for line in capsys.readouterr().out.replace(str(tmp_path), "DIR").splitlines()]

    return inspect


def test_prepared_audio_says_clips_hours_and_what_is_held_out(tmp_path, said):
    def shard(domain: str, split: str, *clips: int) -> str:
        name = f"{domain}-{split}-000000"
        made = records.Shard(name=name, domain=domain, split=split, digest="", clips=clips, bytes=1)
        return json.dumps(dataclasses.asdict(made)) + "\n"

    rows = [shard("speech", "train", HOUR, HOUR // 2), shard("speech", "validation", HOUR // 4)]
    (tmp_path / records.INDEX).write_text("".join([*rows, shard("music", "train", 2 * HOUR)]))
    (tmp_path / records.SETTINGS).write_text(json.dumps(dataclasses.asdict(PrepareConfig())))
    (tmp_path / records.REJECTS).write_text('{"id": "a"}\n{"id": "b"}\n')
    assert said()[:4] == [
        "DIR: prepared audio, 4 clips of 3.75 h in 3 shards, 2 files refused (see DIR/rejects.jsonl)",
        "music: 1 clips of 2.00 h to train on, 0 clips of 0.00 h held out",
        "speech: 2 clips of 1.50 h to train on, 1 clips of 0.25 h held out",
        "made with validation = 0.005, segment_seconds = 30, shard_hours = 1.0, min_sample_rate = 16000, "
        "max_sample_rate = 96000, max_channels = 2",
    ]


def test_tokens_say_clips_hours_domains_and_model(tmp_path, said):
    token_shards.write(tmp_path / "tokens", {"speech": 3, "music": 2}, frames=4500)
    rejects = tmp_path / "tokens" / shards.REJECTS
    rejects.parent.mkdir(exist_ok=True)
    rejects.write_text('{"id": "a"}\n')
    about = ["music: 2 clips of 0.20 h", "speech: 3 clips of 0.30 h", "1 codebooks of 4 entries, 12.5 Hz"]
    about.append("made by model 0123456789abcdef")
    assert said(tmp_path / "tokens") == [
        "DIR/tokens: tokens, 5 clips of 0.50 h in 1 shards, 1 files refused",
        *about,
    ]
    file = shards.shard_path(tmp_path / "tokens", "all-000000")
    assert said(file) == [f"DIR/tokens/shards/{file.name}: tokens, 5 clips of 0.50 h in 1 shards", *about]


def test_a_run_says_its_step_and_how_good_it_is(tmp_path, said):
    about = {"config": dataclasses.asdict(tiny_experiment.config), "data": "f"}
    for step in (4, 6):
        folder = tmp_path / "checkpoints" / str(step)
        (folder / "about").mkdir(parents=True)
        (folder / "about" / "metadata").write_text(json.dumps(about))
    (tmp_path / "checkpoints" / "4" / "metrics").mkdir()
    (tmp_path / "checkpoints" / "4" / "metrics" / "metrics").write_text('{"mel_distance": 7.5}')
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    assert said() == [
        "DIR: training run at step 6 of 8",
        "checkpoints of steps 4, 6",
        "mel distance of held-out clips: 7.5000 at step 4",
        "12.5 Hz, hop 1920 at 24000 Hz, 150 bit/s",
        "4 codebooks of 8 entries",
        "semantic features: log_mel, 1024 wide",
        "8 clips of 0.24 s a step, from data/prepared (sound 3, speech 1)",
        "learning rate 0.0001, seed 0",
    ]
    (tmp_path / "checkpoints" / "6" / "about" / "metadata").write_text("{}")
    with pytest.raises(OmniCodecError, match="damaged"):
        cli.inspect(tmp_path)


def test_features_say_what_computed_them(tmp_path, said):
    format = features.FeatureFormat(
        encoder="fedcba9876543210",
        compute="bfloat16",
        feature_dim=8,
        crop_samples=240_000,
        stride_samples=60_000,
    )
    features.save_format(tmp_path, format)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "speech-train-000000-0.array_record").write_bytes(bytes(3600 * 13 * 16))
    assert said() == [
        "DIR: semantic features, about 1.00 h in 1 shards",
        "8 wide, stored as bfloat16, computed in bfloat16 by qwen3_aut",
        "of crops of 10 s, 2.5 s apart",
        "encoder fedcba9876543210",
    ]


def test_a_report_says_systems_and_clips(tmp_path, said):
    kinds = {"Original": "original", "A-8L": "codec", "WavTokenizer": "folder", "Paper": "quoted"}
    report = {
        "created": "2026-01-31T12:00:00+00:00",
        "domains": ["speech", "music"],
        "metrics": [{"title": "STOI"}, {"title": "MCD"}],
        "systems": [{"name": name, "kind": kind} for name, kind in kinds.items()],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    clips = [("speech", "a"), ("speech", "b"), ("music", "a")]
    rows = [{"system": name, "domain": domain, "clip": clip} for name in kinds for domain, clip in clips]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said() == [
        "DIR: report of an evaluation, 2 systems on 3 clips (speech 2, music 1)",
        "systems: A-8L, WavTokenizer",
        "metrics: STOI, MCD",
        "written 2026-01-31T12:00:00+00:00; see DIR/tables.md and DIR/index.html",
    ]


def test_a_model_says_what_its_tokens_are(tmp_path, said):
    model_directory.save(tmp_path, OMNICODEC, variables(OMNICODEC))
    first, *rest = said()
    assert first.startswith("DIR: omnicodec model ")
    assert first.endswith(" parameters")
    tokens_hash = model_directory.tokens_hash(OMNICODEC, variables(OMNICODEC))
    assert rest == [
        "2000 Hz, hop 12 at 24000 Hz, 40000 bit/s",
        "5 codebooks of 16 entries",
        "semantic features: stored, 10 wide",
        f"hash of what makes its tokens, its decoder left out: {tokens_hash}",
        f"version 0.1 called it {model_directory.hash_of_0_1(OMNICODEC, variables(OMNICODEC))}",
    ]


def test_a_directory_of_nothing_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OmniCodecError, match="holds nothing that a command of omnicodec has written, and no audio"):
        cli.inspect(tmp_path)


def checkpoint_of(config, folder):
    (folder / "about").mkdir(parents=True)
    (folder / "about" / "metadata").write_text(json.dumps({"config": config_files.to_dict(config, "run")}))


def test_a_report_that_is_not_finished_is_called_so(tmp_path, said):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.flac").touch()
    (tmp_path / "journal.jsonl").touch()
    assert said() == ["DIR: report of an evaluation, unfinished; the same omnicodec evaluate goes on with it"]


def test_folders_of_checkpoints_name_the_run_that_they_are_of(tmp_path, said):
    folder = tmp_path / "checkpoints"
    checkpoint_of(Config(), folder / "2")
    assert said(folder) == ["DIR/checkpoints: the checkpoints of the run in DIR; inspect that"]
    assert said(folder / "2") == ["DIR/checkpoints/2: a checkpoint of the run in DIR; inspect that"]


def test_a_run_whose_last_checkpoint_is_damaged_says_what_it_goes_on_from(tmp_path, said):
    folder, config = tmp_path / "checkpoints", PerplexityConfig()
    for step in (7, 14, 21, 28):
        checkpoint_of(config, folder / str(step))
    (folder / "21" / "about" / "metadata").write_text('{"config": {"mod')
    shutil.rmtree(folder / "28" / "about")
    first, second, *_ = said()
    assert first.endswith(f"at step 14 of {config.optimizer.total_steps}")
    assert second == "checkpoints of steps 7, 14, and damaged ones of steps 21, 28"
    for step in (7, 14):
        shutil.rmtree(folder / str(step))
    with pytest.raises(OmniCodecError, match="no checkpoint here can be read: 21, 28"):
        cli.inspect(tmp_path)


def test_a_workdir_of_perplexity_is_no_run_of_a_codec(tmp_path, said):
    config = PerplexityConfig()
    checkpoint_of(config, tmp_path / "checkpoints" / "7")
    assert said() == [
        f"DIR: language model of tokens (omnicodec perplexity) at step 7 of {config.optimizer.total_steps}",
        "checkpoints of steps 7",
        f"layout {config.layout}, seed {config.seed}",
    ]
    about = config_files.to_dict(config, "run")
    with pytest.raises(ConfigError, match=r"^here: of a run that learns to predict tokens \(omnicodec perplexity\)"):
        config_files.run_config(about, "here")
    with pytest.raises(ConfigError, match=r"^here: of a run that learns a codec \(omnicodec train\)"):
        config_files.run_config(config_files.to_dict(Config(), "run"), "here", PerplexityConfig)
