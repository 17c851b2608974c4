"""The codec that comes with the package: the default of every command, small enough, and what its card says."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from omnicodec_jax import cli, model_directory, shipped
from omnicodec_jax.cli.options import model_name
from omnicodec_jax.codec_directory import encoder_directory
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import semantic_features
from omnicodec_jax.errors import ModelError
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import frozen

SMALL = shipped.MODELS["small"]


@pytest.fixture(autouse=True)
def no_other_default(monkeypatch):
    monkeypatch.delenv("OMNICODEC_MODEL", raising=False)


def test_speech_goes_there_and_back_with_no_option(tmp_path, monkeypatch, capsys, clips):
    (speech,) = (clip for clip in clips if clip.stem == "speech_english_class")
    (tmp_path / "speech.flac").write_bytes(speech.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert cli.encode(Path("speech.flac")) == 0
    assert cli.decode(Path("speech.safetensors")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("model: small, which comes with the package")] == lines[:1] * 2
    samples, rate = soundfile.read("speech_decoded.wav")
    info = soundfile.info("speech.flac")
    assert (rate, len(samples)) == (info.samplerate, info.frames)
    assert np.sqrt(np.mean(samples**2)) > 0.01


def test_it_is_the_codec_of_its_recipe_and_computes_its_features():
    tokenizer = OmniCodecTokenizer.from_pretrained()
    assert tokenizer.config == config_files.load("small").codec
    assert tokenizer.computes_features
    assert tokenizer.bitrate == 2000


def test_a_directory_and_a_variable_of_the_environment_go_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_directory.resolve("small") == SMALL
    (tmp_path / "small").mkdir()
    assert model_directory.resolve("small") == Path("small")
    monkeypatch.setenv("OMNICODEC_MODEL", "other")
    assert model_name(None) == "other"
    assert model_name("third") == "third"
    monkeypatch.delenv("OMNICODEC_MODEL")
    assert model_name(None) == str(SMALL)  # and not the folder that happens to be there


def test_it_fits_into_the_wheel_and_is_exact_in_float32():
    files = [path for path in SMALL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert {array.dtype.name for array in load_file(SMALL / model_directory.WEIGHTS).values()} == {"float16"}


def test_it_is_saved_with_its_encoder(tmp_path):
    codec = OmniCodecTokenizer.from_pretrained()
    codec.save_pretrained(tmp_path / "copy")
    copy = OmniCodecTokenizer.from_pretrained(tmp_path / "copy")
    assert copy.computes_features
    assert (copy.model_hash, copy.encoder_hash) == (codec.model_hash, codec.encoder_hash)


def test_its_encoder_is_had_by_its_name(tmp_path):
    assert encoder_directory("small") == encoder_directory(SMALL / "encoder") == SMALL / "encoder"
    codec = OmniCodecTokenizer.from_pretrained(SMALL, encoder="small")
    assert codec.encoder_hash == OmniCodecTokenizer.from_pretrained(SMALL).encoder_hash
    recipe = config_files.load("small")
    recipe = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, encoder="small"),
        data=dataclasses.replace(recipe.data, features=None),
    )
    gan, variables = frozen.load(recipe)
    assert frozen.hashes(gan, variables, {})["encoder"] == codec.encoder_hash
    stored = semantic_features.open_encoder("small", "float32")
    assert (stored.hash, stored.feature_dim, stored.source) == (codec.encoder_hash, 384, "whisper")
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        encoder_directory(tmp_path / "nowhere")


def test_inspect_shows_its_card(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.inspect(Path("small")) == 0
    shown = capsys.readouterr().out
    for words in ("5,867,537 parameters", "whisper encoder", "hours", "licence", "STOI", "not good for"):
        assert words in shown


def test_its_card_names_its_tokens(capsys):
    assert OmniCodecTokenizer.from_pretrained().model_hash in (SMALL / shipped.CARD).read_text()
