"""What a run carries from step to step: a pytree and nothing else."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import ArrayLike, PRNGKeyArray

from omnicodec_jax.config import Config, OptimizerConfig
from omnicodec_jax.discriminators import Discriminators
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.training.packing import Packed, Tree, pack, unpack


class TrainState(struct.PyTreeNode):
    """Random numbers are folded from the seed and the step, so there is no generator to carry.

    A tree of arrays, or of what stands for them: shapes, shardings.
    """

    step: Any
    """int32: steps done."""
    params: Tree
    codebooks: Tree
    discriminators: Tree
    generator_optimizer: optax.OptState
    """Moments of the packed parameters."""
    discriminator_optimizer: optax.OptState
    ema_params: Tree | None
    """Moving average of the parameters; None: not kept."""
    skipped: Any
    """int32: steps in a row that were not finite and changed nothing."""

    def packed(self) -> "TrainState":
        """With its networks as the optimizers take them."""
        return self.replace(**{name: pack(network) for name, network in self._networks()})

    def unpacked(self, like: "TrainState") -> "TrainState":
        """With its networks as those of `like`."""
        return self.replace(**{name: unpack(getattr(self, name), network) for name, network in like._networks()})

    def _networks(self) -> Iterator[tuple[str, Tree]]:
        names = ("params", "discriminators", "ema_params")
        return ((name, getattr(self, name)) for name in names if getattr(self, name) is not None)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine of `cosine_cycles` cycles (spec §4)."""

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
        cosine = 0.5 * (1 + jnp.cos(2 * jnp.pi * config.cosine_cycles * jnp.clip(progress, 0, 1)))
        return config.learning_rate * jnp.where(step < config.warmup_steps, step / max(1, config.warmup_steps), cosine)

    return schedule


def optimizer(config: OptimizerConfig, decayed: tuple[str, ...]) -> optax.GradientTransformation:
    """AdamW after clipping by value; `decayed`: the top-level modules whose parameters decay."""

    def mask(params: Tree) -> Tree:
        return {name: jax.tree.map(lambda _, decays=name in decayed: decays, tree) for name, tree in params.items()}

    adamw = optax.adamw(
        learning_rate(config), *config.betas, eps=config.epsilon, weight_decay=config.weight_decay, mask=mask
    )
    chain = optax.chain(optax.clip(config.clip_value), adamw)

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def generator_optimizer(config: Config) -> optax.GradientTransformation:
    """Of the codec."""
    return optimizer(config.optimizer, config.optimizer.weight_decay_modules)


def discriminator_optimizer(config: Config) -> optax.GradientTransformation:
    """Of all discriminators; nothing decays (spec §4)."""
    return optimizer(config.optimizer, ())


def init_state(config: Config, key: PRNGKeyArray) -> TrainState:
    """The state before the first step: PyTorch's initial distributions, empty codebooks. Jit it."""
    codec_key, discriminator_key = jax.random.split(key)
    variables = init_variables(OmniCodec(config.codec), codec_key)
    discriminators = init_variables(Discriminators(config.discriminators), discriminator_key).get("params", {})
    return start_state(config, variables, discriminators)


def start_state(config: Config, variables: dict[str, Tree], discriminators: Tree) -> TrainState:
    """The state before the first step, from given weights."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        codebooks=variables[CODEBOOKS],
        discriminators=discriminators,
        generator_optimizer=generator_optimizer(config).init(pack(params)),
        discriminator_optimizer=discriminator_optimizer(config).init(pack(discriminators)),
        ema_params=None if config.optimizer.ema_decay is None else params,
        skipped=jnp.zeros((), jnp.int32),
    )


def update_ema(config: OptimizerConfig, average: Packed | None, params: Packed, step: ArrayLike) -> Packed | None:
    """The moving average after a step, of which `step` came before it.

    At first it spans a tenth of the steps there were: with a decay of 0.999 from the beginning, a third of it would
    still be random weights after a thousand steps.
    """
    if config.ema_decay is None:
        return None
    done = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
