"""The state of a training run, its optimizers, and its first values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import ArrayLike, PRNGKeyArray

from omnicodec_jax import model_directory
from omnicodec_jax.config import Config, OptimizerConfig
from omnicodec_jax.discriminators import Discriminators
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.models.initialize import init_variables, preserve_variance
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.training.learning import learning
from omnicodec_jax.training.packing import Packed, Tree, pack, unpack


class TrainState(struct.PyTreeNode):
    """Everything that a training run carries from one step to the next.

    There is no state of a random number generator, since each step folds its keys from the seed and its number. The
    leaves are arrays, or what stands for arrays: shapes or shardings.
    """

    step: Any
    """The number of steps that are done: int32."""
    params: Tree
    codebooks: Tree
    discriminators: Tree
    generator_optimizer: optax.OptState
    """The moments of the codec's parameters that learn, packed."""
    discriminator_optimizer: optax.OptState
    """The moments of the discriminators' parameters, packed."""
    ema_params: Tree | None
    """The moving average of the codec's parameters; None: none is kept."""
    skipped: Any
    """The number of latest steps in a row that were not finite and so changed nothing: int32."""

    def packed(self) -> "TrainState":
        """Returns the state with packed networks, as the optimizers take them."""
        return self.replace(
            params=pack(self.params),
            discriminators=pack(self.discriminators),
            ema_params=None if self.ema_params is None else pack(self.ema_params),
        )

    def unpacked(self, like: "TrainState") -> "TrainState":
        """Returns the state with its networks unpacked to the names and shapes of `like`: the inverse of `packed`."""
        return self.replace(
            params=unpack(self.params, like.params),
            discriminators=unpack(self.discriminators, like.discriminators),
            ema_params=None if self.ema_params is None else unpack(self.ema_params, like.ema_params),
        )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from 0, then a cosine of `cosine_cycles` cycles (spec §4)."""

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
        cosine = 0.5 * (1 + jnp.cos(2 * jnp.pi * config.cosine_cycles * jnp.clip(progress, 0, 1)))
        return config.learning_rate * jnp.where(step < config.warmup_steps, step / max(1, config.warmup_steps), cosine)

    return schedule


def optimizer(config: OptimizerConfig, decayed: tuple[str, ...]) -> optax.GradientTransformation:
    """Returns AdamW after clipping by value, with weight decay of the top-level modules in `decayed`."""

    def mask(params: Tree) -> Tree:
        def same(tree: Tree, value: bool) -> Tree:
            return jax.tree.map(lambda _: value, tree)

        return {name: same(tree, name in decayed) for name, tree in params.items()}

    b1, b2 = config.betas
    adamw = optax.adamw(learning_rate(config), b1, b2, eps=config.epsilon, weight_decay=config.weight_decay, mask=mask)
    chain = optax.chain(optax.clip(config.clip_value), adamw)

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def apply_optimizer(
    optimizer: optax.GradientTransformation, gradient: Tree, optimizer_state: optax.OptState, params: Tree
) -> tuple[Tree, optax.OptState]:
    """Returns the parameters and the optimizer state after one update."""
    with jax.named_scope("optimizer"):
        update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        moved: Any = optax.apply_updates(params, update)
    return moved, optimizer_state


def check_decayed(config: OptimizerConfig, params: Tree) -> None:
    """Raises ConfigError if `weight_decay_modules` names a module that a network does not have."""
    if unknown := set(config.weight_decay_modules) - params.keys():
        raise ConfigError(
            f"optimizer.weight_decay_modules: no module {', '.join(sorted(unknown))}; there are "
            + ", ".join(sorted(params))
        )


def generator_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the codec's optimizer, with weight decay of `optimizer.weight_decay_modules` (spec §4)."""
    return optimizer(config.optimizer, config.optimizer.weight_decay_modules)


def discriminator_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of all discriminators, without weight decay (spec §4)."""
    options, rate = config.optimizer, config.train.discriminator_learning_rate
    return optimizer(options if rate is None else dataclasses.replace(options, learning_rate=rate), ())


def random_weights(config: Config, key: PRNGKeyArray) -> tuple[dict[str, Tree], Tree]:
    """Draws the codec's variables, with empty codebooks, and the discriminators' parameters."""
    codec_key, discriminator_key = jax.random.split(key)
    variables = init_variables(model_directory.build(config.codec), codec_key)
    if config.train.initialization == "variance_preserving":
        variables["params"] = preserve_variance(variables["params"])
    return variables, init_variables(Discriminators(config.discriminators), discriminator_key).get("params", {})


def init_state(config: Config, key: PRNGKeyArray) -> TrainState:
    """Makes the state before the first step from random weights."""
    return start_state(config, *random_weights(config, key))


def start_state(config: Config, variables: dict[str, Tree], discriminators: Tree) -> TrainState:
    """Makes the state before the first step from given weights."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        codebooks=variables[CODEBOOKS],
        discriminators=discriminators,
        generator_optimizer=generator_optimizer(config).init(pack(learning(config.train, params))),
        discriminator_optimizer=discriminator_optimizer(config).init(pack(discriminators)),
        ema_params=None if config.optimizer.ema_decay is None else params,
        skipped=jnp.zeros((), jnp.int32),
    )


@jax.named_scope("moving_average")
def update_ema(config: OptimizerConfig, average: Packed | None, params: Packed, step: ArrayLike) -> Packed | None:
    """Updates the moving average of the parameters `params` after step number `step`; other averages stay.

    The decay is lower at first, so that the average spans a tenth of the steps so far. With a decay of 0.999 from the
    beginning, a third of the average would still be random weights after a thousand steps.
    """
    if config.ema_decay is None or average is None:
        return None
    done = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + done) / (10 + done))
    averaged = {name: average[name] for name in params}
    return {**average, **jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, averaged, params)}
