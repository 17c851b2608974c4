"""One training step of the whole GAN, a pure function to be jitted: (state, batch) → (state, metrics).

    audio ─ codec ─ reconstruction ─┬─ judged beside the audio ─ discriminators updated
              │                     └─ judged by the updated ones; mel ─ gradient of the reconstruction ─┐
              └───────────────────── pull-back ──────────────────────────────────────────────────────────┘

The codec runs forward once. The sub-discriminators run one after the other, each forward and at once backward: their
feature maps are most of what a step computes, and no two hold theirs at a time. Self-guidance and the codebooks' update
are part of the codec's forward: models/codec.py, models/quantize.py. With discriminator_update="simultaneous" the codec
is judged by the discriminators as they were, and they run forward once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from omnicodec_jax import losses
from omnicodec_jax.config import Config
from omnicodec_jax.discriminators import Discriminators, Judgements, Member, members
from omnicodec_jax.discriminators.wavlm import HiddenStates
from omnicodec_jax.distributed import sharding
from omnicodec_jax.dsp import resample
from omnicodec_jax.losses import Scalar, Terms
from omnicodec_jax.models.backbone import Audio
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.quantize import CODEBOOKS, draw_num_quantizers
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import SAMPLE_RATE as WAVLM_SAMPLE_RATE
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.semantic import semantic_features
from omnicodec_jax.training.accumulation import Batch, MicroBatch, first, mean_over, split
from omnicodec_jax.training.packing import Packed, Tree, pack, unpack
from omnicodec_jax.training.state import (
    TrainState,
    discriminator_optimizer,
    generator_optimizer,
    learning_rate,
    update_ema,
)

T = TypeVar("T")

Metrics = dict[str, Array]
"""float32 scalars; what begins with "replaced" is per codebook."""

IN_LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Compiler options for rematerialisation on a CPU, where XLA computes nothing twice, and begins whatever can begin."""


class Frozen(NamedTuple):
    """Variables of the networks that are only run; None: without that one, and without the terms that need it."""

    wavlm: Tree | None = None
    encoder: Tree | None = None


class Inputs(NamedTuple):
    """What a batch gives before anything that learns has seen it."""

    audio: Audio
    features: Float[Array, "B S F"] | None
    hidden: HiddenStates | None
    """WavLM's states."""


class Forward(NamedTuple):
    """The codec's forward on one micro-batch, ready to be judged and to take the gradient back."""

    inputs: Inputs
    fake: Audio
    """The reconstruction."""
    hidden: HiddenStates | None
    """WavLM's states of it."""
    loss: Scalar
    """Of everything but the reconstruction."""
    metrics: Metrics
    codebooks: Tree
    """After they have learnt."""
    pull_back: Callable[[Audio, HiddenStates | None], Tree]
    """From the gradient of `fake` and of `hidden`, if it has one, that of the codec's parameters; `loss` included."""

    def after(self, done: Tree) -> "Forward":
        """The same audio for whoever is to wait until every array of `done` is computed.

        XLA would run what does not depend on each other side by side, with the feature maps of all in memory, and on a
        CPU it takes no notice of `optimization_barrier`. It cannot tell that this adds nothing.
        """
        nothing = 0 * sum(leaf.ravel()[0] for leaf in jax.tree.leaves(done))
        inputs = self.inputs._replace(audio=self.inputs.audio + nothing)
        return self._replace(inputs=inputs, fake=self.fake + nothing)


class Verdict(NamedTuple):
    """A sub-discriminator's forward on real audio and on its reconstruction, ready to take gradients back."""

    real: Judgements
    fake: Judgements
    pull_back_real: Callable[[Judgements], tuple[Tree]]
    """To its parameters."""
    pull_back_fake: Callable[[Judgements], tuple[Tree, Audio, HiddenStates | None]]
    """To its parameters, the reconstruction, and WavLM's states of it."""


class Gradient(NamedTuple):
    """Of one side's loss, with the terms of that loss and what else is worth knowing."""

    gradient: Tree
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class Gan:
    """The networks of a run, and the losses between them."""

    config: Config
    wavlm: WavLMConfig | None = None
    encoder: Qwen3AuTConfig | None = None

    @property
    def codec(self) -> OmniCodec:
        """The generator."""
        return OmniCodec(self.config.codec, jnp.dtype(self.config.train.compute_dtype), self.config.train.remat)

    def inputs(self, batch: Batch, frozen: Frozen) -> Inputs:
        """Semantic features and WavLM's states of the real audio; no gradient."""
        audio, features = batch["audio"], batch.get("features")
        if features is not None:
            features = features.astype(jnp.float32)
        elif self.config.codec.semantic is not None:
            encoder = None if self.encoder is None else (self.encoder, frozen.encoder)
            features = semantic_features(audio, self.config.codec.sample_rate, encoder)
        return Inputs(audio, features, stop_gradient(self.listen(audio, frozen)))

    def listen(self, audio: Audio, frozen: Frozen) -> HiddenStates | None:
        """WavLM's states of 24 kHz audio; frozen, yet gradients pass to the audio."""
        if self.wavlm is None:
            return None
        train = self.config.train
        low = resample(audio[:, 0], self.config.codec.sample_rate, WAVLM_SAMPLE_RATE)
        variables: Any = frozen.wavlm
        states: Any = WavLM(self.wavlm, jnp.dtype(train.compute_dtype), train.remat).apply(variables, low)
        return states

    def forward(self, params: Tree, codebooks: Tree, batch: Batch, frozen: Frozen, key: PRNGKeyArray) -> Forward:
        """Runs the codec once; self-guidance and the codebooks' update are part of it."""
        inputs = self.inputs(batch, frozen)
        dropout_key, codebooks_key = jax.random.split(key)
        num_quantizers = draw_num_quantizers(dropout_key, self.config.codec.acoustic)

        def generate(params: Tree) -> tuple[tuple[Audio, Scalar], tuple[Tree, Metrics]]:
            output, learnt = self.codec.apply(
                {"params": params, CODEBOOKS: codebooks},
                inputs.audio,
                inputs.features,
                num_quantizers,
                mutable=[CODEBOOKS],
                rngs={CODEBOOKS: codebooks_key},
            )
            last = None if inputs.hidden is None else inputs.hidden[-1]
            terms = losses.codec_losses(output, inputs.features, last, self.config.codec.frame_rate, self.config.loss)
            metrics = {
                "num_quantizers": num_quantizers.astype(jnp.float32),
                "replaced_acoustic": output.acoustic.replaced,
            }
            if output.semantic is not None:
                metrics["replaced_semantic"] = output.semantic.replaced
            loss = losses.weighted_sum(terms, self.config.loss)
            return (output.audio, loss), (learnt[CODEBOOKS], {**terms, **metrics})

        (fake, loss), pull_back, (codebooks, metrics) = jax.vjp(generate, params, has_aux=True)
        hidden, pull_back_wavlm = jax.vjp(lambda audio: self.listen(audio, frozen), fake)

        def pull_back_both(d_fake: Audio, d_hidden: HiddenStates | None) -> Tree:
            if d_hidden is not None:
                d_fake += pull_back_wavlm(d_hidden)[0]
            return pull_back((d_fake, jnp.ones(())))[0]

        return Forward(inputs, fake, hidden, loss, metrics, codebooks, pull_back_both)

    def judge(self, member: Member, params: Tree, audio: Audio, hidden: HiddenStates | None) -> Judgements:
        """What one sub-discriminator makes of audio, real or not."""
        module = Discriminators(member.config, jnp.dtype(self.config.train.compute_dtype))
        judgements: Any = module.apply({"params": params}, audio, hidden)
        return judgements

    def verdict(self, member: Member, discriminators: Tree, forward: Forward) -> Verdict:
        """Runs a sub-discriminator once on the real audio and once on the reconstruction."""
        inputs, own = forward.inputs, member.own(discriminators)
        real_hidden, fake_hidden = (inputs.hidden, forward.hidden) if member.hears_wavlm else (None, None)
        real, pull_back_real = jax.vjp(lambda params: self.judge(member, params, inputs.audio, real_hidden), own)
        fake, pull_back_fake = jax.vjp(partial(self.judge, member), own, forward.fake, fake_hidden)
        return Verdict(real, fake, pull_back_real, pull_back_fake)

    def teach(self, verdict: Verdict) -> Gradient:
        """Of what a sub-discriminator minimises; the reconstruction gets none."""

        def loss(real: Judgements, fake: Judgements) -> tuple[Scalar, Terms]:
            terms = losses.discriminator_losses(real, fake)
            return sum(terms.values(), start=jnp.zeros(())), terms

        (of_real, of_fake), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(verdict.real, verdict.fake)
        gradient = jax.tree.map(jnp.add, verdict.pull_back_real(of_real)[0], verdict.pull_back_fake(of_fake)[0])
        return Gradient(gradient, terms)

    def persuade(self, verdict: Verdict) -> Gradient:
        """Of what the codec minimises, judged so: to the reconstruction, and to WavLM's states of it or None."""

        def loss(fake: Judgements) -> tuple[Scalar, Terms]:
            terms = losses.judged_losses(verdict.real, fake)
            return losses.weighted_sum(terms, self.config.loss), terms

        of_fake, terms = jax.grad(loss, has_aux=True)(verdict.fake)
        _, of_audio, of_hidden = verdict.pull_back_fake(of_fake)
        return Gradient((of_audio, of_hidden), terms)

    def one_by_one(self, discriminators: Tree, forward: Forward, use: Callable[[Verdict], T]) -> list[T]:
        """`use` of each sub-discriminator's verdict; what is not in a result is forgotten before the next one runs."""
        results: list[T] = []
        for member in members(self.config.discriminators):
            if results:
                forward = forward.after(results[-1])
            results.append(use(self.verdict(member, discriminators, forward)))
        return results

    def codec_gradient(self, forward: Forward, persuaded: Sequence[Gradient]) -> Gradient:
        """Of all that the codec minimises, packed; persuaded: what `persuade` gave of each sub-discriminator."""

        def loss(audio: Audio) -> tuple[Scalar, Terms]:
            terms = losses.audio_losses(audio, forward.inputs.audio, self.config.codec.sample_rate)
            return losses.weighted_sum(terms, self.config.loss), terms

        of_audio, terms = jax.grad(loss, has_aux=True)(forward.fake)
        of_hidden = None
        for (of_judged, of_states), judged in persuaded:
            of_audio += of_judged
            of_hidden = of_hidden if of_states is None else of_states
            terms = added(terms, judged)
        total = forward.loss + losses.weighted_sum(terms, self.config.loss)
        gradient = pack(forward.pull_back(of_audio, of_hidden))
        return Gradient(gradient, {**forward.metrics, **terms, "total": total})


def merged(taught: Sequence[Gradient]) -> Gradient:
    """What `Gan.teach` gave of each sub-discriminator, as one tree, packed."""
    gradient: Tree = {}
    terms: Terms = {}
    for own, judged in taught:
        gradient |= {family: gradient.get(family, {}) | tree for family, tree in own.items()}
        terms = added(terms, judged)
    return Gradient(pack(gradient), terms)


def added(total: Terms, terms: Terms) -> Terms:
    """Terms of sub-discriminators, summed by name."""
    return total | {name: total[name] + term if name in total else term for name, term in terms.items()}


def jit_step(gan: Gan, mesh: Mesh, state: TrainState, frozen: Frozen) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step` over a mesh: (state, batch, frozen) → (state, metrics). The state that goes in is given away."""
    state_sharding, frozen_sharding = sharding.shardings(mesh, (state, frozen))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        partial(train_step, gan=gan, mesh=mesh),
        in_shardings=(state_sharding, sharding.batch_sharding(mesh), frozen_sharding),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=IN_LITTLE_MEMORY if on_cpu and gan.config.train.remat else None,
    )


def train_step(
    state: TrainState, batch: Batch, frozen: Frozen, gan: Gan, mesh: Mesh | None = None
) -> tuple[TrainState, Metrics]:
    """Updates discriminators, codec and codebooks on one batch; a step that is not finite changes nothing.

    Among the metrics are loss terms before their weights and norms of gradients before clipping. mesh: where the state
    is shared out; None: one device.
    """
    config, count = gan.config, gan.config.optimizer.accumulation
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    old, frozen = state.packed(), sharding.gather(mesh, frozen)
    codec, judges = sharding.gather(mesh, (state.params, state.discriminators))

    def forward(codebooks: Tree, micro: MicroBatch) -> Forward:
        return gan.forward(codec, codebooks, micro.batch, frozen, jax.random.fold_in(key, micro.number))

    def judge(made: Forward) -> Gradient:
        return merged(gan.one_by_one(judges, made, gan.teach))

    def update_discriminators(judged: Gradient) -> tuple[Packed, optax.OptState]:
        gradient = sharding.share_out(mesh, judged.gradient)
        return updated(discriminator_optimizer(config), gradient, old.discriminator_optimizer, old.discriminators)

    def learn(made: Forward, discriminators: Packed) -> Gradient:
        opponents = sharding.gather(mesh, unpack(discriminators, judges))
        return gan.codec_gradient(made, gan.one_by_one(opponents, made, gan.persuade))

    def judge_and_learn(made: Forward) -> tuple[Gradient, Gradient]:
        pairs = gan.one_by_one(judges, made, lambda verdict: (gan.teach(verdict), gan.persuade(verdict)))
        return merged([taught for taught, _ in pairs]), gan.codec_gradient(made, [persuaded for _, persuaded in pairs])

    # Whole batches run the codec once, and it waits until the discriminators have learnt. Micro-batches that must wait
    # for all others run it a second time, since keeping every forward is what accumulation avoids.
    micro_batches = split(batch, count)
    if config.train.discriminator_update == "simultaneous":
        codebooks, (judged, learnt) = mean_over(micro_batches, forward, judge_and_learn, state.codebooks)
        discriminators, d_optimizer = update_discriminators(judged)
    elif count == 1:
        made = forward(state.codebooks, first(micro_batches))
        judged = judge(made)
        discriminators, d_optimizer = update_discriminators(judged)
        codebooks, learnt = made.codebooks, learn(made, discriminators)
    else:
        _, judged = mean_over(micro_batches, forward, judge, state.codebooks)
        discriminators, d_optimizer = update_discriminators(judged)
        learn_from_them = partial(learn, discriminators=discriminators)
        codebooks, learnt = mean_over(micro_batches, forward, learn_from_them, state.codebooks)
    gradient = sharding.share_out(mesh, learnt.gradient)
    params, g_optimizer = updated(generator_optimizer(config), gradient, old.generator_optimizer, old.params)

    new = TrainState(
        step=state.step,
        params=params,
        codebooks=codebooks,
        discriminators=discriminators,
        generator_optimizer=g_optimizer,
        discriminator_optimizer=d_optimizer,
        ema_params=update_ema(config.optimizer, old.ema_params, params, state.step),
        skipped=jnp.zeros_like(state.skipped),
    )
    norms = {f"grad_norm_{name}": optax.tree.norm(tree) for name, tree in judged.gradient.items()}
    norms["grad_norm_codec"] = optax.tree.norm(learnt.gradient)
    finite = jnp.isfinite(sum(norms.values(), start=learnt.metrics["total"]))
    unchanged = old.replace(skipped=state.skipped + 1)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, unchanged)
    metrics = {
        **judged.metrics,
        **learnt.metrics,
        **norms,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer)(state.step)),
        "skipped": kept.skipped.astype(jnp.float32),
    }
    if "replaced" in batch:
        metrics["unreadable_clips"] = batch["replaced"].sum().astype(jnp.float32)
    return kept.unpacked(state).replace(step=state.step + 1), metrics


def updated(
    optimizer: optax.GradientTransformation, gradient: Packed, moments: optax.OptState, params: Packed
) -> tuple[Packed, optax.OptState]:
    """Parameters and moments after a step of the optimizer."""
    update, moments = optimizer.update(gradient, moments, params)
    moved: Any = optax.apply_updates(params, update)
    return moved, moments
