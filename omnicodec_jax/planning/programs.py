"""Plans the training steps of the codec and of the language model, for chips that need not exist.

omnicodec plan --config released_12hz --topology v5e:4x4 --clips-per-chip 6
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omnicodec_jax import model_directory
from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.language_model import training as language_model_training
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.planning.chips import Topology
from omnicodec_jax.planning.compiling import compile_for
from omnicodec_jax.planning.encoders import released_encoder
from omnicodec_jax.planning.step_plan import StepPlan
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.semantic import num_vectors
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import state_template
from omnicodec_jax.training.step import jit_step
from omnicodec_jax.training.validation import reads_features, runs_encoder

LOG = logging.getLogger(__name__)

FRAME_RATE = 12.5
"""The frame rate of the tokens that a language model is planned for, Hz."""


# -- The training step of the codec


def plan_training(config: Config, topology: str, clips_per_chip: int) -> StepPlan:
    """Returns the plan of the codec's training step.

    Args:
        config: The config of the run.
        topology: The chips, such as v5e:4x4 or a100:8.
        clips_per_chip: The batch is this times the number of chips.

    Raises:
        ConfigError: For a topology that does not exist, or a step that does not fit.
    """
    found = Topology.parse(topology)
    devices = found.devices
    data = dataclasses.replace(config.data, batch_size=clips_per_chip * len(devices))
    config = dataclasses.replace(config, data=data)
    LOG.info("%s on %d devices, %d clips a step", topology, len(devices), data.batch_size)
    lowered = lower_training_step(config, sharding.make_mesh(config.run.mesh, devices))
    seconds_of_audio = clips_per_chip * data.segment_samples / config.codec.sample_rate
    return StepPlan.from_program(compile_for(found.chip, lowered), found, seconds_of_audio)


def lower_training_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the codec's training step, lowered from shapes alone. The devices of the mesh need not exist."""
    gan, frozen = networks(config, mesh)
    state = state_template(config, mesh)
    return jit_step(gan, mesh, state, frozen).lower(state, batch(config, mesh), frozen)


def networks(config: Config, mesh: Mesh) -> tuple[Gan, FrozenVariables]:
    """Returns the networks of a run, and the shapes of the frozen ones: WavLM base-plus and the released encoder."""
    wavlm = encoder = wavlm_variables = encoder_variables = None
    if config.discriminators.wavlm is not None or config.loss.wavlm_distillation:
        wavlm = WavLMConfig()
        wavlm_variables = variables(WavLM(wavlm), mesh)
    semantic = config.codec.semantic
    if semantic is not None and runs_encoder(config):
        encoder = released_encoder(semantic)
        module = model_directory.build(encoder)
        encoder_variables = variables(module, mesh, jnp.dtype(config.train.compute_dtype))
    return Gan(config, wavlm, encoder), FrozenVariables(wavlm_variables, encoder_variables)


def variables(module: Any, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """Returns the shapes and shardings of a network's variables."""

    def cast() -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), init_variables(module, jax.random.key(0)))

    return sharding.template(mesh, cast)


def batch(config: Config, mesh: Mesh) -> TrainBatch:
    """Returns the shapes and shardings of a batch: audio, and features where they are stored."""
    size, samples, semantic = config.data.batch_size, config.data.segment_samples, config.codec.semantic
    held = sharding.batch_sharding(mesh)
    shapes: dict[str, Any] = {"audio": jax.ShapeDtypeStruct((size, 1, samples), jnp.float32, sharding=held)}
    if semantic is not None and reads_features(config):
        vectors = num_vectors(semantic.source, samples, config.codec.sample_rate)
        features = (size, vectors, semantic.feature_dim)
        shapes["features"] = jax.ShapeDtypeStruct(features, jnp.bfloat16, sharding=held)
    return shapes


# -- The training step of the language model


def plan_language_model(config: PerplexityConfig, topology: str) -> StepPlan:
    """Returns the plan of a language model's training step, on tokens at 12.5 Hz.

    Raises ConfigError as `plan_training` does.
    """
    found = Topology.parse(topology)
    lowered = language_model_training.lower_step(config, sharding.make_mesh(config.mesh, found.devices))
    seconds_of_audio = config.batch_size * config.window_frames / FRAME_RATE / len(found.devices)
    return StepPlan.from_program(compile_for(found.chip, lowered), found, seconds_of_audio)
