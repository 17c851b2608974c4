"""The perceptual loss of the frozen encoder: what it compares, what it teaches, and when the encoder runs for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_whisper_training import WHISPER, encoder, experiment, stored, with_encoder, with_features

from omnicodec_jax import losses
from omnicodec_jax.config import Config, LossConfig, MimiConfig
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.planning import programs
from omnicodec_jax.training import frozen
from omnicodec_jax.training.gan import FrozenVariables, Gan, TrainInputs

__all__ = ["encoder", "stored"]  # fixtures

LOSS = LossConfig(semantic_perceptual=3.0)


def noise(seed: int, seconds: float = 0.5) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(seed), (2, 1, round(24_000 * seconds)))


def test_it_is_the_error_as_part_of_the_size_of_what_the_real_audio_has():
    real = jnp.array([[[1.0, -3.0], [2.0, 2.0]]])
    assert losses.semantic_perceptual(real, real) == 0
    assert losses.semantic_perceptual(real + 0.5, real) == pytest.approx(0.25)
    assert losses.semantic_perceptual(8 * real + 4, 8 * real) == pytest.approx(0.25)
    assert losses.semantic_perceptual(real, 0 * real) < float("inf")
    assert not jax.grad(losses.semantic_perceptual, argnums=1)(real + 0.5, real).any()


@pytest.mark.parametrize("source", ["whisper", "log_mel"])
def test_its_gradient_brings_audio_nearer_to_what_the_encoder_hears_in_the_real_one(encoder, source):
    config = experiment(source=source, width=8 if source == "whisper" else 1024, loss=LOSS)
    gan, variables = frozen.load(with_encoder(config, encoder))
    real, decoded = noise(1), noise(2)

    def loss(audio, are_stored=False):
        inputs = gan.inputs({"audio": real}, variables)
        return gan.semantic_perceptual(audio, inputs, are_stored, variables)["semantic_perceptual"]

    assert loss(decoded) == pytest.approx(float(loss(decoded, are_stored=True)))  # which computes them anew
    assert loss(real) == 0
    before, gradient = jax.jit(jax.value_and_grad(loss))(decoded)
    step = 0.03 * gradient / jnp.sqrt(jnp.sum(gradient**2))
    assert 0 < loss(decoded - step) < before


def test_it_needs_the_encoder_even_where_the_features_of_real_audio_are_stored(encoder, stored):
    config = with_features(experiment(loss=LOSS), stored)
    with pytest.raises(ConfigError, match=r"run\.encoder = None: must be a directory that omnicodec convert whisper"):
        frozen.load(config)
    gan, variables = frozen.load(with_encoder(config, encoder))
    assert gan.encoder == WHISPER
    features = np.ones((2, 7, 8), np.float32)
    assert (gan.inputs({"audio": noise(1), "features": features}, variables).features == 1).all()
    assert programs.networks(dataclasses.replace(config, codec=wide(config)), one_device())[0].encoder is not None
    without = dataclasses.replace(config, loss=LossConfig(), codec=wide(config))
    assert programs.networks(without, one_device())[0].encoder is None


def wide(config):
    """The codec for features as wide as those of a released Whisper, which a plan takes."""
    semantic = dataclasses.replace(config.codec.semantic, feature_dim=384)
    return dataclasses.replace(config.codec, semantic=semantic)


def one_device():
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])


def test_without_its_weight_there_is_no_such_term():
    inputs = TrainInputs(noise(1), None, None)
    assert Gan(experiment()).semantic_perceptual(noise(2), inputs, False, FrozenVariables()) == {}


@pytest.mark.parametrize("codec", [experiment(source="stored").codec, MimiConfig()])
def test_it_is_refused_where_the_step_cannot_compute_features(codec):
    loss = dataclasses.replace(LOSS, semantic=0.0, self_guidance=0.0)
    with pytest.raises(ConfigError, match=r"semantic_perceptual = 3\.0: must be 0 without semantic features that"):
        Config(codec=codec, loss=loss)
