"""The frozen networks of a training run: WavLM, and the audio encoder where semantic features are not stored."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from omnicodec_jax import model_directory
from omnicodec_jax.buckets import as_path
from omnicodec_jax.codec_directory import encoder_directory
from omnicodec_jax.config import Config
from omnicodec_jax.data import features
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.semantic import load_encoder
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.packing import Tree
from omnicodec_jax.training.validation import reads_features, runs_encoder

LOG = logging.getLogger(__name__)


def load(config: Config) -> tuple[Gan, FrozenVariables]:
    """Makes the networks of a run, and loads the variables of the frozen ones.

    If `run.wavlm` names no WavLM, the losses that need it are left out, and `Gan.config` then differs from the given
    config. Raises ConfigError or ModelError for a network that is missing or does not fit.
    """
    encoder = encoder_variables = wavlm = wavlm_variables = None
    if reads_features(config):
        _check_stored(config)
    if config.codec.semantic is not None and runs_encoder(config):
        if config.run.encoder is None:
            command = f"omnicodec convert {config.codec.semantic.source.replace('_', '-')}"
            raise ConfigError(f"run.encoder = None: must be a directory that {command} has written")
        dtype = jnp.dtype(config.train.compute_dtype)
        encoder, variables = load_encoder(encoder_directory(config.run.encoder), config.codec.semantic)
        encoder_variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    if config.discriminators.wavlm is not None or config.loss.wavlm_distillation:
        if config.run.wavlm is not None:
            wavlm, wavlm_variables = _load_wavlm(config, config.run.wavlm)
        else:
            LOG.info("without WavLM: its discriminator, its feature matching and the distillation are left out")
            config = without_wavlm(config)
    return Gan(config, wavlm, encoder), FrozenVariables(wavlm_variables, encoder_variables)


def unused_paths(config: Config) -> Iterator[str]:
    """Yields a warning for each path that is given and that nothing of the config uses.

    A warning and no error, since ablations of one experiment take the options of all of it, and a run that was begun
    with such an option goes on with it.
    """
    semantic = config.codec.semantic
    with_wavlm = config.discriminators.wavlm is not None or config.loss.wavlm_distillation > 0
    source = "no semantic branch" if semantic is None else f"codec.semantic.source = {semantic.source!r}"
    features = "features are read from data.features" if reads_features(config) else source
    uses = (
        ("run.wavlm", config.run.wavlm, with_wavlm, "no discriminator and no loss of it"),
        ("run.encoder", config.run.encoder, runs_encoder(config), features),
        ("data.features", config.data.features, reads_features(config), source),
    )
    for name, path, is_used, reason in uses:
        if path is not None and not is_used:
            yield f"{name} = {path!r}: passed over, since this config has no use for it ({reason})"


def _check_stored(config: Config) -> None:
    """Raises ConfigError if the stored features are of another source or width than the codec takes."""
    semantic, directory = config.codec.semantic, config.data.features
    stored = None if directory is None else features.read_format(as_path(directory))
    if semantic is None or stored is None:
        return
    if semantic.source not in ("stored", stored.source):
        raise ConfigError(
            f"data.features = {directory!r}: of {stored.source}; codec.semantic.source = {semantic.source!r}"
        )
    if semantic.feature_dim != stored.feature_dim:
        raise ConfigError(
            f"data.features = {directory!r}: {stored.feature_dim} wide; "
            f"codec.semantic.feature_dim = {semantic.feature_dim}"
        )


def hashes(gan: Gan, frozen: FrozenVariables, known: Mapping[str, str]) -> dict[str, str]:
    """Hashes the config and the loaded weights of each frozen network. A run goes on with the same networks only.

    Args:
        gan: The networks of the run.
        frozen: The variables of the frozen networks.
        known: The hashes in the run's checkpoints. Those that version 0.1 gave to the same networks are returned as
            they are.
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
    wavlm, variables = model_directory.load(model_directory.resolve(directory), model_directory.WAVLM)
    states, width, discriminator = wavlm.num_layers + 1, wavlm.dimension, config.discriminators.wavlm
    if discriminator is not None and (discriminator.hidden_states, discriminator.hidden_size) != (states, width):
        raise ConfigError(
            f"run.wavlm = {directory!r}: has {states} hidden states of width {width}; discriminators.wavlm is for "
            f"{discriminator.hidden_states} of {discriminator.hidden_size}"
        )
    if config.loss.wavlm_distillation and config.codec.wavlm_dim != width:
        raise ConfigError(f"run.wavlm = {directory!r}: is {width} wide; codec.wavlm_dim = {config.codec.wavlm_dim}")
    return wavlm, variables
