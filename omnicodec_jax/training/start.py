"""The first state of a run: random weights or those of a model, and codebooks that k-means fits to the data."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from omnicodec_jax import codec_directory, model_directory
from omnicodec_jax.config import Config
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.models.initialize import initialize_codebooks, on_cpu
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.training import state
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.packing import Tree
from omnicodec_jax.training.state import TrainState

LOG = logging.getLogger(__name__)

VECTORS_PER_ENTRY = 10
"""The least number of vectors that k-means is given for each entry of a codebook (spec §8.4)."""


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """A context that logs a part of a run's start: what begins, and at the end how long it took."""
    LOG.info("start: %s …", what)
    began = time.perf_counter()
    yield
    LOG.info("start: %s: %.1f s", what, time.perf_counter() - began)


def state_template(config: Config, mesh: Mesh) -> TrainState:
    """Returns the shapes and shardings of a run's state. Nothing is computed."""
    return sharding.template(mesh, lambda: state.init_state(config, jax.random.key(0)))


def first_state(gan: Gan, frozen: FrozenVariables, mesh: Mesh, samples: Samples) -> TrainState:
    """Makes the state before the first step: weights, and codebooks that k-means fits to the first batches.

    Codebooks of a model that the run starts from stay as they are. Raises ConfigError or ModelError if `run.start_from`
    does not fit the config, if it is missing where parts of the codec are frozen, and if a module whose weights should
    decay does not exist.
    """
    if gan.config.train.freeze and gan.config.run.start_from is None:
        raise ConfigError(
            f"train.freeze = {gan.config.train.freeze!r}: random weights would be kept as they are; name the model "
            "that they come from with --run.start-from"
        )
    state.check_decayed(gan.config.optimizer, state_template(gan.config, mesh).params)
    # The keys of a step are folded from its number. No step has this number.
    key = jax.random.fold_in(jax.random.key(gan.config.seed), 2**32 - 1)
    weights_key, codebooks_key = jax.random.split(key)
    first = _first_weights(gan.config, mesh, weights_key)
    if all(collection["initialized"].all() for collection in first.codebooks.values()):
        return first
    return _fit_codebooks(first, gan, frozen, mesh, samples, codebooks_key)


def _first_weights(config: Config, mesh: Mesh, key: PRNGKeyArray) -> TrainState:
    """Draws random weights, or takes those of the model that `run.start_from` names and draws what it does not have."""
    template = state_template(config, mesh)
    if config.run.start_from is None:
        with stage("weights at random"):
            variables, discriminators = on_cpu(partial(state.random_weights, config), key)
    else:
        with stage(f"weights of {config.run.start_from}"):
            files = (model_directory.CONFIG, model_directory.WEIGHTS, *codec_directory.FOR_TRAINING)
            directory = model_directory.resolve(config.run.start_from, files=files)
            variables, discriminators = _load(config, directory)
        # The model may lack heads that the config describes, or have heads that it does not: only training needs them.
        params = {name: tree for name, tree in variables["params"].items() if name in template.params}
        missing = [name for name in template.params if name not in params]

        def draw_missing(key: PRNGKeyArray) -> tuple[Tree, Tree]:
            drawn, others = state.random_weights(config, key)
            return {name: drawn["params"][name] for name in missing}, others if discriminators is None else {}

        if missing or (discriminators is None and template.discriminators):
            with stage("weights at random of what the model does not have"):
                drawn, others = on_cpu(draw_missing, key)
            params, discriminators = {**params, **drawn}, discriminators or others
        variables = {**variables, "params": params}
    start = jax.jit(
        partial(state.start_state, config), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template)
    )
    return jax.block_until_ready(start(*sharding.to_global((variables, discriminators or {}), mesh)))


def _fit_codebooks(
    first: TrainState, gan: Gan, frozen: FrozenVariables, mesh: Mesh, samples: Samples, key: PRNGKeyArray
) -> TrainState:
    """Fits the codebooks of a state to the run's first batches by k-means."""
    config = gan.config
    count, size = config.codec.num_quantizers, max(config.codec.codebook_sizes)
    vectors = _num_batches(config) * _frames_per_batch(config)
    held = jax.tree.map(lambda leaf: leaf.sharding, first.codebooks)
    with stage(f"k-means of {count} codebooks of up to {size} entries on {vectors} vectors"):
        variables = initialize_codebooks(
            gan.codec.clone(dtype=jnp.float32),
            {"params": first.params, CODEBOOKS: first.codebooks},
            _first_batches(gan, frozen, mesh, samples),
            key,
        )
        codebooks = jax.jit(lambda tree: tree, out_shardings=held)(variables[CODEBOOKS])
    return first.replace(codebooks=codebooks)


def _frames_per_batch(config: Config) -> int:
    return config.data.batch_size * -(-config.data.segment_samples // config.codec.hop_length)


def _num_batches(config: Config) -> int:
    """Returns the number of batches that k-means needs."""
    return math.ceil(VECTORS_PER_ENTRY * max(config.codec.codebook_sizes) / _frames_per_batch(config))


def _first_batches(
    gan: Gan, frozen: FrozenVariables, mesh: Mesh, samples: Samples
) -> Iterator[tuple[jax.Array, jax.Array | None]]:
    """Yields audio and semantic features of the run's first batches, as many as k-means needs."""

    @jax.jit
    def features(batch: TrainBatch, frozen: FrozenVariables) -> jax.Array | None:
        with sharding.in_force(mesh):
            return gan.inputs(batch, frozen).features

    data, held = gan.config.data, sharding.batch_sharding(mesh)
    with contextlib.closing(Batches(samples, data.batch_size, data.num_workers, held)) as batches:
        for _ in range(_num_batches(gan.config)):
            batch = next(batches)
            yield batch["audio"], features(batch, frozen)


def _load(config: Config, directory: Path) -> tuple[Tree, Tree | None]:
    """Loads the variables of a codec, and those of its discriminators if the directory has them (else None).

    A run without discriminators loads none. Raises ConfigError if either network is not what the config describes;
    options that only training reads may differ.
    """
    codec, variables = model_directory.load(directory, model_directory.CODEC)
    if not model_directory.compute_alike(codec, config.codec):
        raise ConfigError(f"run.start_from = {str(directory)!r}: holds another codec than the config describes")
    wanted = any(dataclasses.asdict(config.discriminators).values())
    beside = directory / model_directory.DISCRIMINATORS
    if not (wanted and (beside / model_directory.CONFIG).is_file()):
        return variables, None
    discriminators, weights = model_directory.load(beside)
    if discriminators != config.discriminators:
        raise ConfigError(f"run.start_from = {str(directory)!r}: has other discriminators than the config describes")
    return variables, weights["params"]
