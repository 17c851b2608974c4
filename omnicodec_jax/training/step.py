"""One training step of the GAN, as a pure function to be jitted: (state, batch) → (state, metrics).

    audio ─ codec ─ reconstruction ─┬─ discriminators on real and fake audio ─ update of the discriminators
              │                     └─ updated discriminators; mel loss ─ gradient of the reconstruction ─┐
              └──── update of the codec ── gradient of its parameters ────────────────────────────────────┘

The gradients are computed in gan.py. With discriminator_update="simultaneous", the codec's adversarial losses come from
the discriminators before their update, so that these run forward only once. Steps before `discriminator_from` run
another program, without discriminators, on the same state.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from omnicodec_jax.distributed import sharding
from omnicodec_jax.training.accumulation import MicroBatch, TrainBatch, first, mean_over, split
from omnicodec_jax.training.gan import (
    CodecForward,
    DiscriminatorForward,
    FrozenVariables,
    Gan,
    LossGradient,
    Metrics,
    merge_gradients,
)
from omnicodec_jax.training.learning import learning
from omnicodec_jax.training.packing import Packed, Tree, unpack
from omnicodec_jax.training.state import (
    TrainState,
    apply_optimizer,
    discriminator_optimizer,
    generator_optimizer,
    learning_rate,
    update_ema,
)

LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Compiler options for `train.remat` on a CPU, which order the operations for the least memory.

On a CPU, XLA does not compute activations again, and by default it starts every operation as early as it can."""


def jit_step(
    gan: Gan, mesh: Mesh, state: TrainState, frozen: FrozenVariables, with_discriminators: bool = True
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles `train_step` for a mesh: (state, batch, frozen) → (state, metrics).

    The state that is passed to the step is donated: its memory is used for the new state. Of `state` and `frozen` only
    the shapes are used here. `with_discriminators` says whether the discriminators run and learn.
    """
    state_sharding, frozen_sharding = sharding.shardings(mesh, (state, frozen))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        partial(train_step, gan=gan, mesh=mesh, with_discriminators=with_discriminators),
        in_shardings=(state_sharding, sharding.batch_sharding(mesh), frozen_sharding),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=LEAST_MEMORY if on_cpu and gan.config.train.remat else None,
    )


def train_step(
    state: TrainState,
    batch: TrainBatch,
    frozen: FrozenVariables,
    gan: Gan,
    mesh: Mesh | None = None,
    with_discriminators: bool = True,
) -> tuple[TrainState, Metrics]:
    """Updates discriminators, codec and codebooks on one batch. A step that is not finite changes nothing.

    Args:
        state: The state before the step.
        batch: A batch of `data.pipeline.Batches`.
        frozen: Variables of WavLM and of the audio encoder.
        gan: The networks and their config.
        mesh: The devices that the state is sharded over; None: one device.
        with_discriminators: Whether the discriminators run and learn. Otherwise they stay as they are.

    Returns:
        The state after the step, and metrics: loss terms before they are weighted, norms of gradients before clipping.
    """
    with sharding.in_force(mesh):
        return _train_step(state, batch, frozen, gan, mesh, with_discriminators)


def _train_step(
    state: TrainState,
    batch: TrainBatch,
    frozen: FrozenVariables,
    gan: Gan,
    mesh: Mesh | None,
    with_discriminators: bool,
) -> tuple[TrainState, Metrics]:
    config = gan.config
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    old, frozen = state.packed(), sharding.gather(mesh, frozen)
    step = gradients_and_discriminator_update(gan, mesh, state, old, batch, frozen, key, with_discriminators)
    gradient = sharding.shard(mesh, step.generator.gradient)
    params, optimizer_state = apply_optimizer(
        generator_optimizer(config), gradient, old.generator_optimizer, learning(config.train, old.params)
    )
    new = TrainState(
        step=state.step,
        params={**old.params, **params},
        codebooks=step.codebooks,
        discriminators=step.discriminators,
        generator_optimizer=optimizer_state,
        discriminator_optimizer=step.discriminator_optimizer,
        ema_params=update_ema(config.optimizer, old.ema_params, params, state.step),
        skipped=jnp.zeros_like(state.skipped),
    )
    norms = {f"grad_norm_{name}": optax.tree.norm(tree) for name, tree in step.discriminator.gradient.items()}
    norms["grad_norm_codec"] = optax.tree.norm(step.generator.gradient)
    finite = jnp.isfinite(sum(norms.values(), start=step.generator.metrics["total"]))
    unchanged = old.replace(skipped=state.skipped + 1)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, unchanged)
    metrics = {
        **step.discriminator.metrics,
        **step.generator.metrics,
        **norms,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer)(state.step)),
        "skipped": kept.skipped.astype(jnp.float32),
    }
    if "replaced" in batch:
        metrics["unreadable_clips"] = batch["replaced"].sum().astype(jnp.float32)
    return kept.unpacked(state).replace(step=state.step + 1), metrics


class StepGradients(NamedTuple):
    """The gradients of both sides, with the updated codebooks, discriminators and discriminator optimizer."""

    discriminator: LossGradient
    generator: LossGradient
    codebooks: Tree
    discriminators: Packed
    discriminator_optimizer: optax.OptState


def gradients_and_discriminator_update(
    gan: Gan,
    mesh: Mesh | None,
    state: TrainState,
    old: TrainState,
    batch: TrainBatch,
    frozen: FrozenVariables,
    key: PRNGKeyArray,
    with_discriminators: bool,
) -> StepGradients:
    """Computes the gradients of both sides of the GAN, and updates the discriminators and the codebooks.

    `old` must be `state.packed()`.
    """
    config, count = gan.config, gan.config.optimizer.accumulation
    codec_params, discriminator_params = sharding.gather(mesh, (state.params, state.discriminators))

    def run_codec(codebooks: Tree, micro: MicroBatch) -> CodecForward:
        micro_key = jax.random.fold_in(key, micro.number)
        return gan.codec_forward(codec_params, codebooks, micro.batch, frozen, micro_key, state.step)

    def discriminator_gradient(forward: CodecForward) -> LossGradient:
        gradients = gan.for_each_discriminator(
            discriminator_params, forward, gan.discriminator_gradient, in_one_batch=True
        )
        return merge_gradients(gradients)

    def update_discriminators(gradient: LossGradient) -> tuple[Packed, optax.OptState]:
        sharded = sharding.shard(mesh, gradient.gradient)
        return apply_optimizer(
            discriminator_optimizer(config), sharded, old.discriminator_optimizer, old.discriminators
        )

    def generator_gradient(forward: CodecForward, discriminators: Packed) -> LossGradient:
        updated = sharding.gather(mesh, unpack(discriminators, discriminator_params))
        adversarial = gan.for_each_discriminator(updated, forward, gan.adversarial_gradient)
        return gan.generator_gradient(forward, adversarial)

    def both_gradients(forward: CodecForward) -> tuple[LossGradient, LossGradient]:
        def both(sub: DiscriminatorForward) -> tuple[LossGradient, LossGradient]:
            return gan.discriminator_gradient(sub), gan.adversarial_gradient(sub)

        pairs = gan.for_each_discriminator(discriminator_params, forward, both)
        adversarial = [pair[1] for pair in pairs]
        return merge_gradients([pair[0] for pair in pairs]), gan.generator_gradient(forward, adversarial)

    micro_batches = split(batch, count)
    if not with_discriminators:
        codec_gradient = partial(gan.generator_gradient, adversarial=())
        codebooks, g_gradient = mean_over(micro_batches, run_codec, codec_gradient, state.codebooks)
        d_gradient = merge_gradients(())
        discriminators, d_optimizer = old.discriminators, old.discriminator_optimizer
    elif config.train.discriminator_update == "simultaneous":
        codebooks, (d_gradient, g_gradient) = mean_over(micro_batches, run_codec, both_gradients, state.codebooks)
        discriminators, d_optimizer = update_discriminators(d_gradient)
    elif count == 1:
        # The whole batch: the codec's forward is kept until the discriminators are updated.
        forward = run_codec(state.codebooks, first(micro_batches))
        d_gradient = discriminator_gradient(forward)
        discriminators, d_optimizer = update_discriminators(d_gradient)
        codebooks, g_gradient = forward.codebooks, generator_gradient(forward, discriminators)
    else:
        # The discriminators are updated once all micro-batches have run. Then the codec runs a second time on each
        # micro-batch, since accumulation must not keep the forward passes of all of them in memory.
        _, d_gradient = mean_over(micro_batches, run_codec, discriminator_gradient, state.codebooks)
        discriminators, d_optimizer = update_discriminators(d_gradient)
        against_updated = partial(generator_gradient, discriminators=discriminators)
        codebooks, g_gradient = mean_over(micro_batches, run_codec, against_updated, state.codebooks)
    return StepGradients(d_gradient, g_gradient, codebooks, discriminators, d_optimizer)
