"""What is said where few clips leave nothing to validate on: at once, with the number that changes it."""

import dataclasses
import json
import logging
import re

import pytest
import token_shards

from omnicodec_jax import cli
from omnicodec_jax.config import Config, DataConfig, DomainConfig, PerplexityConfig
from omnicodec_jax.data import prepare, records
from omnicodec_jax.data.manifest import read_all
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import DataError
from omnicodec_jax.language_model.windows import TokenCorpus
from omnicodec_jax.training.gan import Gan
from omnicodec_jax.training.validation import Validator


def manifest(path, count):
    path.write_text("".join(json.dumps({"audio_filepath": f"{n}.wav"}) + "\n" for n in range(count)))
    return path


def held_out(path, config):
    return [
        entry
        for unit in prepare.plan(read_all({"speech": path}), config)
        if unit.split == "validation"
        for entry in unit.entries
    ]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_prepare_names_the_share_that_holds_out_one_of_few_files(count, tmp_path):
    path, default = manifest(tmp_path / "m.jsonl", count), PrepareConfig()
    assert not held_out(path, default)
    (note,) = prepare.nothing_held_out(read_all({"speech": path}), default)
    assert f"of the {count} file(s) of speech, none is held out with --validation 0.005" in note
    share = float(re.findall(r"--validation ([\d.]+) and another --out", note)[0])
    enough = PrepareConfig(validation=share)
    assert len(held_out(path, enough)) == 1
    assert not list(prepare.nothing_held_out(read_all({"speech": path}), enough))


@pytest.mark.parametrize(("share", "said"), [(0.005, "it takes two files or more"), (0.0, "")])
def test_prepare_says_so_before_it_reads_any_audio_unless_asked_for(share, said, tmp_path, monkeypatch, caplog):
    def work(*_: object) -> None:
        raise DataError("here it begins to read")

    monkeypatch.setattr(prepare, "_work", work)
    path = manifest(tmp_path / "m.jsonl", 1)
    with pytest.raises(DataError, match="begins to read"):
        cli.prepare(manifest=f"speech={path}", out=tmp_path / "out", settings=PrepareConfig(validation=share))
    assert said in caplog.text
    assert ("none is held out" in caplog.text) == bool(said)


def index(folder, *names):
    shard = records.Shard(name="", domain="", split="train", digest="", clips=(24_000,), bytes=1)
    rows = [dict(zip(("name", "domain", "split"), (name, *name.split("-")), strict=True)) for name in names]
    folder.mkdir()
    lines = [json.dumps(dataclasses.asdict(shard) | row) + "\n" for row in rows]
    (folder / records.INDEX).write_text("".join(lines))


def test_training_says_at_its_start_which_domains_it_cannot_validate(tmp_path, caplog):
    index(tmp_path / "none", "speech-train", "music-train")
    data = DataConfig(
        prepared=str(tmp_path / "none"), domains=(DomainConfig(name="speech"), DomainConfig(name="music"))
    )
    with caplog.at_level(logging.WARNING):
        assert Validator.open(Gan(Config(data=data), None, None), sharding.make_mesh(Config().run.mesh)) is None
    (line,) = caplog.messages
    assert "no clip of speech or music is held out, so there is no validation at all; prepare it again" in line
    assert "with a larger --validation: 0.5 is enough for" in line
    assert "--validation" in line


def test_perplexity_names_the_share_that_holds_out_one_of_few_clips(tmp_path):
    folder = token_shards.write(tmp_path / "tokens", {"speech": 8})
    config = PerplexityConfig(num_codebooks=1, held_out=1e-6)
    with pytest.raises(DataError, match=r"of its 8 clips none is held out .* would hold out one") as caught:
        TokenCorpus.open(folder, config)
    share = float(re.findall(r"--held-out ([\d.]+)", str(caught.value))[0])
    corpus = TokenCorpus.open(folder, dataclasses.replace(config, held_out=share))
    assert (len(corpus.held_out), len(corpus.train)) == (1, 7)
    with pytest.raises(DataError, match="two clips or more are needed"):
        TokenCorpus.open(token_shards.write(tmp_path / "one", {"speech": 1}), config)
