"""Files that earlier versions have written, kept in tests/old_files: they are read for ever.

This program has made those of `format_1`, in an empty directory, with the checkout and its tests in PYTHONPATH and
JAX_PLATFORMS=cpu:

    import dataclasses
    import os
    import shutil
    from pathlib import Path

    import jax
    import numpy as np
    import soundfile
    import tiny
    import tiny_experiment

    from omnicodec_jax import cli, model_directory
    from omnicodec_jax.config import (
        AcousticConfig,
        CodecConfig,
        DiscriminatorConfig,
        DomainConfig,
        SEANetConfig,
        SemanticConfig,
        TransformerConfig,
    )
    from omnicodec_jax.data.prepare import PrepareConfig
    from omnicodec_jax.pretrained.whisper import WhisperConfig
    from omnicodec_jax.training import loop

    if __name__ == "__main__":
        for folder in ("format_1", "speech"):
            Path(folder).mkdir()
        out = Path("format_1")
        encoder = WhisperConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=16, window_seconds=2)
        codec = CodecConfig(
            dimension=4,
            seanet=SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1),
            transformer=TransformerConfig(num_heads=1, num_layers=1, dim_feedforward=8, context=6),
            semantic=SemanticConfig(source="whisper", feature_dim=8, codebook_size=8, codebook_dim=4),
            acoustic=AcousticConfig(num_quantizers=3, codebook_size=8, codebook_dim=4, min_quantizers=2),
            wavlm_dim=None,
        )
        model = model_directory.build(encoder)
        model_directory.save(out / "model", codec, tiny.variables(codec))
        model_directory.save(out / "model/encoder", encoder, model.init(jax.random.key(0), *model.example_inputs()))
        noise = np.random.default_rng(0).normal(size=7200) / 10
        soundfile.write("speech/a.wav", noise[:3200], 16_000)
        soundfile.write("speech/b.wav", noise, 24_000)
        cli.encode(Path("speech/a.wav"), out / "clip.safetensors", model=out / "model", precision="bfloat16")
        cli.tokenize(manifest="speech=speech", out=out / "tokens", model=out / "model", precision="bfloat16")
        cli.prepare(manifest="speech=speech", out=Path("prepared"), settings=PrepareConfig(validation=0.0))
        judges = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
        config = tiny_experiment.replaced(
            dataclasses.replace(tiny_experiment.config, codec=codec, discriminators=judges),
            data={"prepared": "prepared", "domains": (DomainConfig(name="speech"),), "batch_size": 1},
            optimizer={"total_steps": 2, "warmup_steps": 1},
            run={"encoder": "format_1/model/encoder", "validate_every": None},
        )
        loop.run(config, Path("run"))
        for folder in ("events", "checkpoints/0"):
            shutil.rmtree(Path("run") / folder)
        shutil.make_archive("format_1/run", "gztar", ".", "run")
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from safetensors import safe_open

from omnicodec_jax import cli, model_directory
from omnicodec_jax.config import Config, MeshConfig
from omnicodec_jax.corpus import TokenSource, read_tokens, shards, tokenize
from omnicodec_jax.corpus.detokenize import SETTINGS, detokenize
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import features, prepare, records
from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import CheckpointError, DataError, TokenError
from omnicodec_jax.evaluation import reconstruct
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.reconstruct import Original
from omnicodec_jax.evaluation.systems import TokenizerCodec
from omnicodec_jax.language_model.windows import ClipTable
from omnicodec_jax.origin import Origin
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import checkpoint, export, frozen
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import state_template

OLD = Path(__file__).parent / "old_files"
TOKENS = ["tokens", "tokens_0_1"]
FORMAT_1 = OLD / "format_1"
WEIGHTS = {"params": {"w": np.arange(4, dtype=np.float32)}}


def unpacked(name: str, folder: Path) -> Path:
    """A directory of old files that is kept as an archive, since it is large for what is in it."""
    shutil.unpack_archive(OLD / f"{name}.tar.gz", folder, filter="data")
    return folder / Path(name).name


@pytest.fixture(scope="module")
def tokenizer() -> OmniCodecTokenizer:
    return OmniCodecTokenizer.from_pretrained(OLD / "model")


# -- Models


@pytest.mark.parametrize("row", json.loads((OLD / "hashes.json").read_text()), ids=lambda row: row["hash"])
def test_model_has_the_hash_that_version_0_1_gave_it(row):
    config = model_directory.from_json(json.dumps(row["config"]))
    assert model_directory.hash_of_0_1(config, WEIGHTS) == row["hash"]
    assert model_directory.from_json(model_directory.to_json(config)) == config


def test_model_that_is_saved_again_is_the_same_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert "format" not in json.loads((OLD / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 1
    config, variables = model_directory.load(tmp_path)
    assert model_directory.model_hash(config, variables) == tokenizer.model_hash
    assert model_directory.hash_of_0_1(config, variables) == TokenFile.load(OLD / "clip.safetensors").model


# -- Tokens


def test_token_file_is_decoded_to_audio_of_the_length_of_the_original(tmp_path):
    assert cli.decode(OLD / "clip.safetensors", tmp_path / "clip.wav", model=OLD / "model") == 0
    audio, rate = soundfile.read(tmp_path / "clip.wav")
    assert (audio.shape, rate) == ((3200,), 16_000)
    assert np.abs(audio).max() > 0


def test_token_file_of_the_same_model_is_replaced_and_of_another_is_not(tmp_path, capsys):
    target, audio = Path(shutil.copy(OLD / "clip.safetensors", tmp_path)), tmp_path / "empty.wav"
    audio.touch()
    dataclasses.replace(TokenFile.load(target), source=Origin.of(audio, target)).save(target)
    assert cli.encode(audio, target, model=OLD / "model") == 1  # not for the tokens that are there
    assert f"error: {audio}" in capsys.readouterr().err
    dataclasses.replace(TokenFile.load(target), model="0123456789abcdef").save(target)
    with pytest.raises(TokenError, match="holds tokens of model 0123456789abcdef"):
        cli.encode(audio, target, model=OLD / "model")


def test_token_file_in_another_precision_is_not_replaced(tmp_path):
    target, audio = Path(shutil.copy(OLD / "clip.safetensors", tmp_path)), tmp_path / "empty.wav"
    audio.touch()
    dataclasses.replace(TokenFile.load(target), source=Origin.of(audio, target)).save(target)
    with pytest.raises(TokenError, match=r"clip.*: holds tokens of --precision float32, now bfloat16; choose"):
        cli.encode(audio, target, model=OLD / "model", precision="bfloat16")
    dataclasses.replace(TokenFile.load(target), precision="bfloat16", encoder_precision="bfloat16").save(target)
    assert TokenFile.load(target).precision == "bfloat16"
    with pytest.raises(TokenError, match=r"holds tokens of --precision bfloat16, now float32"):
        cli.encode(audio, target, model=OLD / "model")
    with pytest.raises(TokenError, match=r"holds tokens of --encoder-precision bfloat16, now float32"):
        cli.encode(audio, target, model=OLD / "model", precision="bfloat16")


def test_token_file_in_float32_is_one_that_version_0_1_reads(tmp_path):
    known = {"model", "frame_rate", "sample_rate", "num_samples", "gain", "source"}
    tokens = TokenFile.load(OLD / "clip.safetensors")
    for precision, new in (("float32", set()), ("bfloat16", {"precision"})):
        dataclasses.replace(tokens, precision=precision).save(tmp_path / "clip.safetensors")
        with safe_open(tmp_path / "clip.safetensors", "np") as file:
            assert set(json.loads(file.metadata()["omnicodec"])) == known | new


def test_shards_of_either_layout_hold_what_the_token_file_holds():
    codes = TokenFile.load(OLD / "clip.safetensors").codes
    for name in TOKENS:
        clips = {clip.id: clip for clip in read_tokens(OLD / name)}
        assert sorted(clips) == ["a", "b"]
        np.testing.assert_array_equal(clips["a"].codes.T, codes)


def test_shards_of_either_layout_are_decoded_to_audio_of_the_length_of_the_originals(tokenizer, tmp_path):
    for name in TOKENS:
        leftover = tmp_path / name / "speech" / f".a.{32 * '0'}.partial.wav"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half")
        done = list(detokenize(OLD / name, tmp_path / name, tokenizer, 2, ".wav", Share.parse("0/1")))
        assert not leftover.exists()
        assert [(d.path.name, d.seconds, d.error) for d in done] == [("a.wav", 0.2, None), ("b.wav", 0.3, None)]
        assert [soundfile.info(d.path).frames for d in done] == [3200, 7200]


def test_audio_that_version_0_1_has_made_of_tokens_is_gone_on_with(tokenizer, tmp_path):
    old = shards.contract(OLD / "tokens")["model"]
    for name in ("a.flac", "b.flac"):
        audio_files.save(tmp_path / "speech" / name, np.zeros(5000, np.float32), 24_000)
    for model in (old, tokenizer.model_hash):
        (tmp_path / SETTINGS).write_text(json.dumps({"model": model, "num_quantizers": 4}))
        assert list(detokenize(OLD / "tokens", tmp_path, tokenizer, None, ".flac", Share.parse("0/1"))) == []
    (tmp_path / SETTINGS).write_text(json.dumps({"model": "0123456789abcdef", "num_quantizers": 4}))
    with pytest.raises(DataError, match="made otherwise"):
        list(detokenize(OLD / "tokens", tmp_path, tokenizer, None, ".flac", Share.parse("0/1")))


@pytest.mark.parametrize("name", TOKENS)
def test_directory_of_tokens_is_gone_on_with_under_the_hash_that_it_was_begun_with(name, monkeypatch):
    job = tokenize.Job(sources={}, out=OLD / name, model=str(OLD / "model"))
    kept = shards.settings(OLD / name)
    assert kept is not None
    package, compiler = (words.split()[1] for words in kept["made_by"].split(", "))
    monkeypatch.setattr(tokenize, "__version__", package)
    monkeypatch.setattr(jax, "__version__", compiler)
    contract = tokenize.described(job)
    tokenize.check(job, contract)
    assert (contract["compute_dtype"], contract["encoder_dtype"]) == ("float32", None)
    faster = dataclasses.replace(job, precision="bfloat16")
    with pytest.raises(DataError, match=r"not be the same \(compute_dtype = 'float32', now 'bfloat16'\); use another"):
        tokenize.check(faster, tokenize.described(faster))
    assert contract["model"] == kept["model"] == TokenFile.load(OLD / "clip.safetensors").model


def test_shards_of_a_newer_format_are_refused_by_name_with_what_to_do(tmp_path, monkeypatch):
    tokens = Path(shutil.copytree(OLD / "tokens", tmp_path / "tokens"))
    shard, file = shards.shards(tokens)[0], tokens / "__omnicodec__" / "tokens.json"
    assert "format" not in json.loads(file.read_text())
    assert shards.read_contract(shard)["format"] == shards.settings(tokens)["format"] == 1
    newer = shards.read_contract(shard) | {"format": 2, "made_by": "omnicodec_jax 3.0.0"}
    shards.write(shard, list(shards.read_shard(shard)), newer)
    for read in (shards.contract, read_tokens, TokenSource):
        with pytest.raises(DataError, match=rf"{shard}: in format 2, written by omnicodec_jax 3\.0\.0; .* upgrade it"):
            list(read(tokens))
    file.write_text(json.dumps(newer))
    with pytest.raises(DataError, match=rf"{file}: in format 2, written by omnicodec_jax 3\.0\.0; .* upgrade it"):
        tokenize.check(tokenize.Job(sources={}, out=tokens, model="none"), {})


def test_a_run_on_tokens_that_gave_no_format_goes_on_once_they_do(tmp_path):
    tokens = Path(shutil.copytree(OLD / "tokens", tmp_path / "tokens"))
    before = ClipTable.read(tokens).fingerprint
    for shard in shards.shards(tokens):
        shards.write(shard, list(shards.read_shard(shard)), shards.read_contract(shard))
    assert b'"format": 1' in shard.read_bytes()
    assert ClipTable.read(tokens).fingerprint == before


def test_audio_of_tokens_with_a_field_of_a_later_version_is_refused_by_its_name(tokenizer, tmp_path):
    made = {"model": tokenizer.model_hash, "num_quantizers": 4, "dither": True}
    (tmp_path / SETTINGS).write_text(json.dumps(made))
    with pytest.raises(DataError, match=r"detokenized\.json: unknown field 'dither': a later version has written it"):
        list(detokenize(OLD / "tokens", tmp_path, tokenizer, None, ".flac", Share.parse("0/1")))


# -- Format 1


@pytest.fixture(scope="module")
def with_encoder() -> OmniCodecTokenizer:
    return OmniCodecTokenizer.from_pretrained(FORMAT_1 / "model", precision="bfloat16")


def test_model_of_format_1_keeps_its_hashes_and_its_encoder(with_encoder, tmp_path):
    assert json.loads((FORMAT_1 / "model" / "config.json").read_text())["format"] == 1
    contract = shards.contract(FORMAT_1 / "tokens")
    assert (with_encoder.model_hash, with_encoder.tokens_hash) == (contract["model"], contract["tokens_hash"])
    assert model_directory.model_hash(*model_directory.load(FORMAT_1 / "model" / "encoder")) == contract["encoder"]
    with_encoder.save_pretrained(tmp_path)
    again = OmniCodecTokenizer.from_pretrained(tmp_path)
    assert (again.model_hash, again.tokens_hash) == (with_encoder.model_hash, with_encoder.tokens_hash)


def test_tokens_of_format_1_are_those_of_its_file_and_keep_their_precision(with_encoder, tmp_path):
    tokens = TokenFile.load(FORMAT_1 / "clip.safetensors")
    assert (tokens.model, tokens.precision) == (with_encoder.model_hash, "bfloat16")
    clips = {clip.id: clip for clip in read_tokens(FORMAT_1 / "tokens")}
    assert sorted(clips) == ["a.wav", "b.wav"]
    np.testing.assert_array_equal(clips["a.wav"].codes.T, tokens.codes)
    assert shards.contract(FORMAT_1 / "tokens")["compute_dtype"] == "bfloat16"
    assert cli.decode(FORMAT_1 / "clip.safetensors", tmp_path / "clip.wav", model=FORMAT_1 / "model") == 0
    assert soundfile.info(tmp_path / "clip.wav").frames == 3200
    done = list(detokenize(FORMAT_1 / "tokens", tmp_path, with_encoder, None, ".wav", Share.parse("0/1")))
    assert [(d.path.name, d.seconds, d.error) for d in done] == [("a.wav", 0.2, None), ("b.wav", 0.3, None)]


def test_directory_of_tokens_of_format_1_is_gone_on_with(monkeypatch):
    kept = shards.settings(FORMAT_1 / "tokens")
    assert kept is not None
    package, compiler = (words.split()[1] for words in kept["made_by"].split(", "))
    monkeypatch.setattr(tokenize, "__version__", package)
    monkeypatch.setattr(jax, "__version__", compiler)
    job = tokenize.Job(sources={}, out=FORMAT_1 / "tokens", model=str(FORMAT_1 / "model"), precision="bfloat16")
    tokenize.check(job, tokenize.described(job))
    other = dataclasses.replace(job, encoder_precision="bfloat16")
    with pytest.raises(DataError, match=r"\(encoder_dtype = 'float32', now 'bfloat16'\); use another"):
        tokenize.check(other, tokenize.described(other))


def test_run_of_format_1_goes_on_from_its_checkpoint_and_is_exported(tmp_path, monkeypatch):
    run = unpacked("format_1/run", tmp_path)
    monkeypatch.chdir(OLD)  # as its paths are
    config, step = checkpoint.read(run, None)
    assert (step, config.codec) == (2, model_directory.load(FORMAT_1 / "model")[0])
    gan, variables = frozen.load(config)
    about = json.loads((run / "checkpoints" / "2" / "about" / "metadata").read_text())
    identity = {"frozen": frozen.hashes(gan, variables, checkpoint.frozen_hashes(run))}
    template = state_template(config, sharding.make_mesh(MeshConfig(), jax.local_devices()[:1]))
    with Checkpoints(run, config, about["data"], identity) as held:
        assert int(held.restore(template).step) == 2
    assert export.export_model(run, tmp_path / "model", ema=True) == 2


# -- Evaluations


def test_reconstructions_of_version_0_1_are_not_made_again(tokenizer, tmp_path):
    codec = TokenizerCodec("ours", tokenizer, (2,))
    clip = EvalClip("a", "speech", tmp_path / "a.wav")
    original = Original(clip, 0.2, "0123456789abcdef")
    for path in (reconstruct.audio_path, reconstruct.codes_path):
        (made := path(tmp_path, "ours-2L", clip)).parent.mkdir(parents=True)
        made.touch()
    old = model_directory.hash_of_0_1(tokenizer.config, tokenizer.variables)
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.add(("ours-2L", "speech", "a"), {"of": [f"{old} None", original.digest], "bits": 1.0, "seconds": 1.0})
        assert list(reconstruct.by_codec(codec, [original], tmp_path, journal)) == []
    assert made.stat().st_size == 0
    assert codec.identity(f"{old} None") == f"{old} None"
    assert codec.identity("0123456789abcdef None") == codec.identity() == f"{tokenizer.model_hash} None"


# -- Runs


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of the old run."""
    return unpacked("run", tmp_path)


def opened(run: Path, config: Config) -> Checkpoints:
    """The checkpoints of the run when it goes on with that config, the same data and the same networks."""
    about = json.loads((run / "checkpoints" / "2" / "about" / "metadata").read_text())
    return Checkpoints(run, config, about["data"], {name: about[name] for name in ("frozen", "features")})


def test_run_goes_on_from_its_checkpoint(run):
    config, step = checkpoint.read(run, None)
    template = state_template(config, sharding.make_mesh(MeshConfig(), jax.local_devices()[:1]))
    with opened(run, config) as held:
        assert held.latest == step == 2
        state = held.restore(template)
    assert int(state.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_run_from_before_an_option_was_added_goes_on_with_its_default_and_no_other_value(run):
    config, _ = checkpoint.read(run, None)
    file = run / "checkpoints" / "2" / "about" / "metadata"
    about = json.loads(file.read_text())
    del about["config"]["optimizer"]["accumulation"], about["config"]["train"]["discriminator_update"]
    file.write_text(json.dumps(about))
    assert checkpoint.read(run, None)[0] == config
    with opened(run, config):
        pass
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, discriminator_update="simultaneous"))
    with pytest.raises(CheckpointError, match=r'update: "alternating" in the checkpoint, "simultaneous" now'):
        opened(run, other)


def test_run_of_a_newer_format_is_refused_in_one_line(run):
    config, _ = checkpoint.read(run, None)
    file = run / "checkpoints" / "2" / "about" / "metadata"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"config": {"format": 2, "made_by": "omnicodec_jax 3.0.0"}}))
    for read in (lambda: checkpoint.read(run, None), lambda: opened(run, config)):
        with pytest.raises(ValueError, match=r"2: in format 2, written by omnicodec_jax 3\.0\.0; .* upgrade it"):
            read()


@pytest.mark.parametrize("ema", [False, True])
def test_model_is_exported_from_a_run(run, tmp_path, ema):
    assert export.export_model(run, tmp_path / "model", ema=ema) == 2
    config, _ = model_directory.load(tmp_path / "model")
    assert config == checkpoint.read(run, None)[0].codec


def test_run_goes_on_with_the_frozen_networks_that_version_0_1_named(run):
    wavlm = WavLMConfig(num_layers=2)
    old = model_directory.hash_of_0_1(wavlm, WEIGHTS)
    file = run / "checkpoints" / "2" / "about" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"frozen": {"wavlm": old}}))
    gan, variables = Gan(Config(), wavlm, None), FrozenVariables(WEIGHTS, None)
    assert frozen.hashes(gan, variables, checkpoint.frozen_hashes(run)) == {"wavlm": old}
    new = {"wavlm": model_directory.model_hash(wavlm, WEIGHTS)}
    for known in ({}, {"wavlm": "0123456789abcdef"}):
        assert frozen.hashes(gan, variables, known) == new
    file.write_text("cut off")
    assert checkpoint.frozen_hashes(run) == {}


# -- Data


def test_prepared_audio_and_stored_features_are_learnt_from(run, tmp_path):
    config, _ = checkpoint.read(run, None)
    prepared, stored = (unpacked(name, tmp_path) for name in ("prepared", "features"))
    data = dataclasses.replace(config.data, prepared=str(prepared), features=str(stored))
    samples = Samples.open(data, 0, "train", stored_features=True)
    about = json.loads((run / "checkpoints" / "2" / "about" / "metadata").read_text())
    assert samples.fingerprint == about["data"]
    assert features.identity(stored) == about["features"]
    assert samples[0]["audio"].shape[-1] == 5760
    assert samples[0]["features"].shape[-1] == 2


def test_features_from_before_an_option_was_added_are_added_to_and_stay_as_they_are_called(tmp_path):
    format = features.read_format(unpacked("features", tmp_path))
    assert format is not None
    text = json.dumps({name: value for name, value in dataclasses.asdict(format).items() if name != "number"})
    (tmp_path / features.SETTINGS).write_text(text)
    features.save_format(tmp_path, format)
    assert (tmp_path / features.SETTINGS).read_text() == text
    with pytest.raises(DataError, match="features of another encoder"):
        features.save_format(tmp_path, dataclasses.replace(format, encoder="0123456789abcdef"))


def test_prepared_audio_from_before_an_option_was_added_is_gone_on_with(tmp_path):
    prepared = unpacked("prepared", tmp_path)
    settings = json.loads((prepared / records.SETTINGS).read_text())
    del settings["max_channels"]
    (prepared / records.SETTINGS).write_text(json.dumps(settings))
    go_on = partial(prepare.run, {}, prepared, num_workers=1, share=Share.parse("0/1"))
    with pytest.raises(DataError, match="max_channels = 2, now 1"):
        go_on(config=PrepareConfig(validation=0.0, max_channels=1))
    assert go_on(config=PrepareConfig(validation=0.0)).files == 0


# -- All


@pytest.mark.parametrize(
    "name",
    ["model", "tokens", "tokens_0_1", "prepared", "features", "run"]
    + [f"format_1/{name}" for name in ("model", "tokens", "run")],
)
def test_inspect_says_what_is_there(name, tmp_path, capsys):
    path = OLD / name if (OLD / name).is_dir() else unpacked(name, tmp_path)
    assert cli.inspect(path) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
