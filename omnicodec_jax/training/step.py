"""One training step of the whole GAN, a pure function to be jitted: (state, batch) → (state, metrics).

    audio ─ codec ─ reconstruction ─┬─ judged beside the audio ─ discriminators updated
              │                     └─ judged by the updated ones; mel ─ gradient of the reconstruction ─┐
              └───────────────────── pull-back ──────────────────────────────────────────────────────────┘

The codec runs forward once. Self-guidance and the codebooks' update are part of that forward: models/codec.py,
models/quantize.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PRNGKeyArray

from omnicodec_jax import losses
from omnicodec_jax.config import Config
from omnicodec_jax.discriminators import Discriminators, Judgements
from omnicodec_jax.discriminators.wavlm import HiddenStates
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.losses import Scalar, Terms
from omnicodec_jax.models.backbone import Audio
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.quantize import CODEBOOKS, draw_num_quantizers
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import SAMPLE_RATE as WAVLM_SAMPLE_RATE
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.semantic import semantic_features
from omnicodec_jax.signal import resample
from omnicodec_jax.training.state import (
    TrainState,
    Tree,
    discriminator_optimizer,
    generator_optimizer,
    learning_rate,
    update_ema,
)

Batch = dict[str, Array]
"""`audio` [B, 1, T]; `features` [B, S, F] where they are stored."""


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


class Learnt(NamedTuple):
    """What the codec's forward leaves beside its audio and its loss."""

    codebooks: Tree
    terms: Terms
    metrics: dict[str, Array]


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

    def generate(
        self, params: Tree, codebooks: Tree, inputs: Inputs, key: PRNGKeyArray
    ) -> tuple[tuple[Audio, Scalar], Learnt]:
        """The reconstruction, and the loss of everything but the reconstruction; the codebooks learn."""
        dropout_key, codebooks_key = jax.random.split(key)
        num_quantizers = draw_num_quantizers(dropout_key, self.config.codec.acoustic)
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
        metrics = {"num_quantizers": num_quantizers, "replaced_acoustic": output.acoustic.replaced}
        if output.semantic is not None:
            metrics["replaced_semantic"] = output.semantic.replaced
        loss = losses.weighted_sum(terms, self.config.loss)
        return (output.audio, loss), Learnt(learnt[CODEBOOKS], terms, metrics)

    def judge(self, discriminators: Tree, audio: Audio, hidden: HiddenStates | None) -> Judgements:
        """What each discriminator makes of audio, real or not."""
        train = self.config.train
        module = Discriminators(self.config.discriminators, jnp.dtype(train.compute_dtype), train.remat)
        judgements: Any = module.apply({"params": discriminators}, audio, hidden)
        return judgements

    def discriminator_loss(
        self, discriminators: Tree, inputs: Inputs, fake: Audio, hidden: HiddenStates | None
    ) -> tuple[Scalar, Terms]:
        """What the discriminators minimise."""
        real = self.judge(discriminators, inputs.audio, inputs.hidden)
        terms = losses.discriminator_losses(real, self.judge(discriminators, fake, hidden))
        return sum(terms.values(), start=jnp.zeros(())), terms

    def audio_loss(
        self, fake: Audio, hidden: HiddenStates | None, discriminators: Tree, inputs: Inputs
    ) -> tuple[Scalar, Terms]:
        """What the codec minimises of its reconstruction."""
        real = stop_gradient(self.judge(discriminators, inputs.audio, inputs.hidden))
        judged = self.judge(discriminators, fake, hidden)
        terms = losses.audio_losses(fake, inputs.audio, real, judged, self.config.codec.sample_rate)
        return losses.weighted_sum(terms, self.config.loss), terms


def train_step(state: TrainState, batch: Batch, frozen: Frozen, gan: Gan) -> tuple[TrainState, dict[str, Array]]:
    """Updates discriminators, codec and codebooks on one batch; a step that is not finite changes nothing.

    Raises ConfigError for gradient accumulation.
    """
    config = gan.config
    if config.optimizer.accumulation != 1:
        raise ConfigError(f"{config.optimizer.accumulation=}: a step takes its batch as a whole; must be 1")
    inputs = gan.inputs(batch, frozen)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    # -- Codec forward. The codebooks learn; the gradient waits for the discriminators.
    def generate(params: Tree) -> tuple[tuple[Audio, Scalar], Learnt]:
        return gan.generate(params, state.codebooks, inputs, key)

    (fake, codec_loss), pull_back, learnt = jax.vjp(generate, state.params, has_aux=True)
    hidden, pull_back_wavlm = jax.vjp(lambda audio: gan.listen(audio, frozen), fake)

    # -- Discriminators, on the detached reconstruction
    judge = jax.grad(gan.discriminator_loss, has_aux=True)
    d_gradient, d_terms = judge(state.discriminators, inputs, stop_gradient(fake), stop_gradient(hidden))
    d_update, d_optimizer = discriminator_optimizer(config).update(
        d_gradient, state.discriminator_optimizer, state.discriminators
    )
    discriminators = optax.apply_updates(state.discriminators, d_update)

    # -- Codec, against the updated discriminators
    listen = jax.value_and_grad(gan.audio_loss, argnums=(0, 1), has_aux=True)
    (audio_loss, audio_terms), (d_fake, d_hidden) = listen(fake, hidden, discriminators, inputs)
    (g_gradient,) = pull_back((d_fake + pull_back_wavlm(d_hidden)[0], jnp.ones(())))
    g_update, g_optimizer = generator_optimizer(config).update(g_gradient, state.generator_optimizer, state.params)
    params = optax.apply_updates(state.params, g_update)

    updated = TrainState(
        step=state.step,
        params=params,
        codebooks=learnt.codebooks,
        discriminators=discriminators,
        generator_optimizer=g_optimizer,
        discriminator_optimizer=d_optimizer,
        ema_params=update_ema(config.optimizer, state.ema_params, params),
        skipped=jnp.zeros_like(state.skipped),
    )
    norms = {f"grad_norm_{name}": optax.tree.norm(tree) for name, tree in d_gradient.items()}
    norms["grad_norm_codec"] = optax.tree.norm(g_gradient)
    total = codec_loss + audio_loss
    finite = jnp.isfinite(sum(norms.values(), start=total))
    unchanged = state.replace(skipped=state.skipped + 1)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
    metrics = {**learnt.terms, **audio_terms, **d_terms, **norms, **learnt.metrics, "total": total}
    metrics |= {"finite": finite, "learning_rate": learning_rate(config.optimizer)(state.step)}
    return kept.replace(step=state.step + 1), metrics
