"""The frozen networks of a training run: WavLM, and the audio encoder where semantic features are not stored."""

import dataclasses
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from omnicodec_jax import model_directory
from omnicodec_jax.config import Config
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.semantic import load_encoder
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.packing import Tree

LOG = logging.getLogger(__name__)


def load(config: Config) -> tuple[Gan, FrozenVariables]:
    """Makes the networks of a run, and loads the variables of the frozen ones.

    If `run.wavlm` names no WavLM, the losses that need it are left out, and so `Gan.config` is then another config than
    the given one. Raises ConfigError or ModelError for a network that is missing or does not fit.
    """
    encoder = encoder_variables = wavlm = wavlm_variables = None
    if config.codec.semantic is not None and config.codec.semantic.source == "qwen3_aut":
        if config.run.encoder is None:
            raise ConfigError("run.encoder = None: must be a directory that omnicodec convert qwen3-aut has written")
        dtype = jnp.dtype(config.train.compute_dtype)
        encoder, variables = load_encoder(model_directory.resolve(config.run.encoder), config.codec.semantic)
        encoder_variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    if config.discriminators.wavlm is not None or config.loss.wavlm_distillation:
        if config.run.wavlm is not None:
            wavlm, wavlm_variables = _load_wavlm(config, config.run.wavlm)
        else:
            LOG.info("without WavLM: its discriminator, its feature matching and the distillation are left out")
            config = without_wavlm(config)
    return Gan(config, wavlm, encoder), FrozenVariables(wavlm_variables, encoder_variables)


def hashes(gan: Gan, frozen: FrozenVariables, known: Mapping[str, str]) -> dict[str, str]:
    """Hashes each frozen network: its config, and its weights as loaded. A run goes on with the same networks only.

    known: the hashes that the run's checkpoints carry; those that version 0.1 gave to the same networks are kept.
    """
    networks = {"wavlm": (gan.wavlm, frozen.wavlm), "encoder": (gan.encoder, frozen.encoder)}
    return {
        name: model_directory.model_hash(config, variables, known.get(name))
        for name, (config, variables) in networks.items()
        if config is not None
    }


def without_wavlm(config: Config) -> Config:
    """Returns the config without the losses that need WavLM."""
    return dataclasses.replace(
        config,
        discriminators=dataclasses.replace(config.discriminators, wavlm=None),
        loss=dataclasses.replace(config.loss, wavlm_distillation=0.0),
    )


def _load_wavlm(config: Config, directory: str) -> tuple[WavLMConfig, Tree]:
    wavlm, variables = model_directory.load(model_directory.resolve(directory))
    if not isinstance(wavlm, WavLMConfig):
        raise ConfigError(f"run.wavlm = {directory!r}: holds a {model_directory.model_type(wavlm)} model")
    states, width, discriminator = wavlm.num_layers + 1, wavlm.dimension, config.discriminators.wavlm
    if discriminator is not None and (discriminator.hidden_states, discriminator.hidden_size) != (states, width):
        raise ConfigError(
            f"run.wavlm = {directory!r}: has {states} hidden states of width {width}; discriminators.wavlm is for "
            f"{discriminator.hidden_states} of {discriminator.hidden_size}"
        )
    if config.loss.wavlm_distillation and config.codec.wavlm_dim != width:
        raise ConfigError(f"run.wavlm = {directory!r}: is {width} wide; codec.wavlm_dim = {config.codec.wavlm_dim}")
    return wavlm, variables
