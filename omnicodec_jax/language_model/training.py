"""Training of the language model: its state, one step, and a run from the first step or a checkpoint to the last."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.language_model.layout import Layout
from omnicodec_jax.language_model.log import LanguageModelLog
from omnicodec_jax.language_model.model import LanguageModel
from omnicodec_jax.language_model.windows import TOKENS, TokenCorpus, batches
from omnicodec_jax.models.initialize import on_cpu
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.metrics_queue import MetricsQueue
from omnicodec_jax.training.packing import Tree
from omnicodec_jax.training.state import apply_optimizer, check_decayed, optimizer

LOG = logging.getLogger(__name__)

PAPER_SIZES = (2048,) * 8
"""The sizes of the eight codebooks that the paper evaluates."""


class LanguageModelState(NamedTuple):
    """The state that training carries from step to step: a tree of arrays, or of their shapes and shardings."""

    step: Any
    """The number of steps that are done: int32."""
    params: Tree
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A language model with its layout and its optimizer, as pure functions of a state and a batch."""

    config: PerplexityConfig
    layout: Layout

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optimizer(self.config.optimizer, self.config.optimizer.weight_decay_modules)

    @property
    def _model(self) -> LanguageModel:
        dtype = jnp.dtype(self.config.compute_dtype)
        return LanguageModel(self.config.model, self.layout.vocabulary, dtype, self.config.remat)

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """The shape of a batch: [B, T + 1, C]."""
        return self.config.batch_size, *self.layout.blanks(self.config.window_frames).shape

    def random_params(self, key: PRNGKeyArray) -> Tree:
        """Draws random parameters of the model. Call it inside `on_cpu`, which compiles it."""
        return self._model.init(key, jnp.zeros((1, 1, self.batch_shape[2]), jnp.int32))["params"]

    def start_state(self, params: Tree) -> LanguageModelState:
        """Returns the state before the first step from given parameters. It is to be jitted."""
        return LanguageModelState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    def init(self, key: PRNGKeyArray) -> LanguageModelState:
        """Returns the state before the first step from random parameters."""
        return self.start_state(self.random_params(key))

    def logits(self, params: Tree, ids: Int[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Returns for every step of a `Layout` the logits of the ids of the step after it."""
        logits: Any = self._model.apply({"params": params}, ids)
        return logits

    def evaluate(
        self, params: Tree, batch: dict[str, Int[Array, "B S C"]]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
        """Returns the `Layout.cross_entropy` of all steps but the first, each predicted from the steps before it."""
        tokens = batch[TOKENS]
        return self.layout.cross_entropy(self.logits(params, tokens[:, :-1]), tokens[:, 1:])

    def train_step(
        self, state: LanguageModelState, batch: dict[str, Int[Array, "B S C"]]
    ) -> tuple[LanguageModelState, Float[Array, ""]]:
        """Updates the parameters on one batch.

        Returns:
            The new state, and the mean cross-entropy of the batch's codes before the update, in nats.
        """

        def loss(params: Tree) -> Float[Array, ""]:
            nats, counts = self.evaluate(params, batch)
            return nats.sum() / counts.sum()

        value, gradient = jax.value_and_grad(loss)(state.params)
        params, moments = apply_optimizer(self._optimizer, gradient, state.optimizer, state.params)
        return LanguageModelState(state.step + 1, params, moments), value

    def template(self, mesh: Mesh) -> LanguageModelState:
        """Returns the shapes and shardings of the state."""
        return sharding.template(mesh, lambda: self.init(jax.random.key(0)))


def jit_step(trainer: Trainer, mesh: Mesh) -> Callable[..., tuple[LanguageModelState, Array]]:
    """Returns `Trainer.train_step`, compiled for a mesh. The state that is passed in is donated.

    Raises ConfigError for a batch that the mesh does not divide.
    """
    sharding.require_whole_rows(mesh, trainer.config.batch_size, "PerplexityConfig.batch_size")
    held = sharding.shardings(mesh, trainer.template(mesh))
    return jax.jit(
        trainer.train_step,
        in_shardings=(held, sharding.batch_sharding(mesh)),
        out_shardings=(held, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def lower_step(
    config: PerplexityConfig, mesh: Mesh, codebook_sizes: tuple[int, ...] = PAPER_SIZES
) -> jax.stages.Lowered:
    """Returns the training step, lowered from shapes alone. The devices of the mesh need not exist."""
    trainer = Trainer(config, Layout(config.layout, codebook_sizes[: config.num_codebooks]))
    batch = jax.ShapeDtypeStruct(trainer.batch_shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    step: Any = jit_step(trainer, mesh)
    return step.lower(trainer.template(mesh), {TOKENS: batch})


def first_state(trainer: Trainer, mesh: Mesh) -> LanguageModelState:
    """Returns the state before the first step, sharded over a mesh, with random weights of the config's seed.

    Raises ConfigError if a module whose weights should decay does not exist.
    """
    template = trainer.template(mesh)
    check_decayed(trainer.config.optimizer, template.params)
    held = sharding.shardings(mesh, template)
    params = on_cpu(trainer.random_params, jax.random.key(trainer.config.seed))
    return jax.jit(trainer.start_state, out_shardings=held)(sharding.to_global(params, mesh))


def train(
    trainer: Trainer,
    corpus: TokenCorpus,
    mesh: Mesh,
    checkpoints: Checkpoints | None = None,
    interruption: multihost.Interruption | None = None,
) -> Tree:
    """Trains until `optimizer.total_steps`, from the last checkpoint if there is one.

    Args:
        trainer: The model.
        corpus: The windows that the model learns from.
        mesh: The devices.
        checkpoints: Where the state is saved every `save_every` steps and at the end. None: it is not saved.
        interruption: Asked before every step whether the training ends there, with a checkpoint.

    Returns:
        The parameters after the last step.

    Raises:
        TrainingError: If the loss is not finite.
        Interrupted: With the number of the signal, if the training was ended before the last step.
    """
    config, total = trainer.config, trainer.config.optimizer.total_steps
    if checkpoints is None or checkpoints.latest is None:
        state = first_state(trainer, mesh)
    else:
        state = checkpoints.restore(trainer.template(mesh))
    start, log = int(state.step), LanguageModelLog(total)
    queue = MetricsQueue(log.add)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    LOG.info("%.1f M parameters, %d windows, %d held out", size / 1e6, len(corpus.train), len(corpus.held_out))
    if start:
        LOG.info("going on from step %d of %d", start, total)
    step, done = jit_step(trainer, mesh), start
    with closing(batches(corpus.training_order(config.seed), config, mesh, start)) as windows:
        while done < total:
            if interruption is not None and interruption.stops_before(done):
                break
            state, loss = step(state, next(windows))
            done += 1
            queue.add(done, loss)
            logs = done == total or done % config.log_every == 0
            saves = done % config.save_every == 0
            if logs or saves:
                queue.flush()
            if logs:
                log.write(done)
            if saves and checkpoints is not None:
                checkpoints.save(state)
    queue.flush()
    if checkpoints is not None:
        checkpoints.save(state)
        checkpoints.wait()
    if interruption is not None and done < total:
        raise multihost.Interrupted(interruption.signal)
    return state.params
