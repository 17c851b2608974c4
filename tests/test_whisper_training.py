"""Training with Whisper's features: computed in the step, or read from disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from omnicodec_jax import model_directory
from omnicodec_jax.config import Config, SemanticConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import features
from omnicodec_jax.data.features import FeatureFormat
from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.planning import tokenization
from omnicodec_jax.planning.encoders import released_encoder
from omnicodec_jax.pretrained.whisper import SIZES, WhisperConfig
from omnicodec_jax.semantic import num_vectors, semantic_features
from omnicodec_jax.training import frozen, loop
from omnicodec_jax.training.validation import reads_features

WHISPER = WhisperConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=16, window_seconds=2)


def experiment(width: int = 8, source: str = "whisper", **replaced) -> Config:
    """The recipe demo, with features of an encoder."""
    demo = config_files.load("demo")
    semantic = SemanticConfig(source=source, feature_dim=width, codebook_size=16, codebook_dim=8)
    return dataclasses.replace(demo, codec=dataclasses.replace(demo.codec, semantic=semantic), **replaced)


def with_encoder(config: Config, directory) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, encoder=str(directory)))


def with_features(config: Config, directory) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(directory)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whisper")
    model = model_directory.build(WHISPER)
    model_directory.save(directory, WHISPER, model.init(jax.random.key(0), *model.example_inputs()))
    return directory


@pytest.fixture
def stored(tmp_path):
    """A directory of Whisper's features, 8 wide."""
    features.save_format(tmp_path, FeatureFormat(encoder="0", compute="float32", feature_dim=8, source="whisper"))
    return tmp_path


def test_encoder_is_loaded_and_its_features_are_computed_in_the_step(encoder):
    gan, variables = frozen.load(with_encoder(experiment(), encoder))
    assert gan.encoder == WHISPER
    audio = 0.1 * jax.random.normal(jax.random.key(1), (2, 1, 60_000))
    inputs = gan.inputs({"audio": audio}, variables)
    assert inputs.features.shape == (2, 32, 8)
    assert frozen.hashes(gan, variables, {})["encoder"] == model_directory.model_hash(*model_directory.load(encoder))


def test_run_without_an_encoder_is_told_which_command_makes_one():
    with pytest.raises(
        ConfigError, match=r"run\.encoder = None: must be a directory that omnicodec convert whisper has"
    ):
        frozen.load(experiment())


def test_encoder_of_another_kind_than_the_config_says_is_refused(encoder):
    with pytest.raises(ModelError, match="a whisper encoder, .*; the codec takes those of qwen3_aut"):
        frozen.load(with_encoder(experiment(source="qwen3_aut"), encoder))


@pytest.mark.parametrize("source", ["whisper", "stored"])
def test_stored_features_are_read_whichever_way_the_config_calls_them(stored, source):
    config = with_features(experiment(source=source), stored)
    assert reads_features(config)
    gan, _ = frozen.load(config)
    assert gan.encoder is None


def test_stored_features_that_the_codec_does_not_take_are_refused(stored):
    with pytest.raises(ConfigError, match=r"data\.features = .*: of whisper; codec\.semantic\.source = 'qwen3_aut'"):
        frozen.load(with_features(experiment(source="qwen3_aut"), stored))
    with pytest.raises(ConfigError, match=r"data\.features = .*: 8 wide; codec\.semantic\.feature_dim = 16"):
        frozen.load(with_features(experiment(width=16), stored))


def test_features_on_disk_from_before_whisper_are_those_of_qwen(tmp_path):
    format = FeatureFormat(encoder="0", compute="float32", feature_dim=8, crop_samples=240_000, stride_samples=1)
    fields = dataclasses.asdict(format)
    del fields["source"]
    (tmp_path / features.SETTINGS).write_text(json.dumps(fields))
    read = features.read_format(tmp_path)
    assert read == format
    assert read.num_vectors(240_000) == 130
    assert dataclasses.replace(read, source="whisper").num_vectors(240_000) == 125


def test_small_weight_of_the_semantic_loss_is_no_mistake_with_features_of_whisper(stored):
    """They are of the order of one, those of Qwen3-Omni of 0.01."""
    assert loop.weak_semantic_loss(experiment()) is None
    assert loop.weak_semantic_loss(with_features(experiment(source="stored"), stored)) is None
    assert loop.weak_semantic_loss(experiment(source="stored"))


@pytest.mark.parametrize("name", ["tiny", "small", "large-v3"])
def test_step_with_the_encoder_is_planned_with_the_released_one(name):
    assert released_encoder(SemanticConfig(source="whisper", feature_dim=SIZES[name].d_model)) == SIZES[name]
    with pytest.raises(ConfigError, match=r"feature_dim = 300: must be one of Whisper's 384, 512, 768, 1024, 1280"):
        released_encoder(SemanticConfig(source="whisper", feature_dim=300))


def test_program_of_the_encoder_is_planned_with_the_shapes_that_the_tokenizer_gives_it():
    semantic = SemanticConfig(source="whisper", feature_dim=384)
    work = tokenization.Work(dataclasses.replace(config_files.load("demo").codec, semantic=semantic), rows=2, block=6)
    program = tokenization.programs(work, jax.local_devices())["Whisper's encoder"]
    assert program.seconds == 2 * WhisperConfig().window_seconds
    assert "2x400x80xf32" in program.lower().as_text()


@pytest.mark.parametrize("samples", [600, 1920, 30_001, 48_000, 100_000])
def test_vectors_of_a_clip_are_as_many_as_frames_at_12_5_hertz(samples):
    """So a program that is exported knows its shapes, and nothing is interpolated."""
    model = model_directory.build(WHISPER)
    variables = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
    clips = jax.ShapeDtypeStruct((3, 1, samples), np.float32)
    found = jax.eval_shape(lambda x, weights: semantic_features(x, 24_000, (WHISPER, weights)), clips, variables)
    assert found.shape == (3, -(-samples // 1920), 8)
    assert num_vectors("whisper", samples, 24_000) == found.shape[1]
