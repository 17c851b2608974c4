"""The networks of a training run, and the gradient of each side of the GAN.

The generator is the codec. Its forward pass runs once a step (`Gan.codec_forward`), with decoupling and self-guidance
(models/codec.py) and the update of the codebooks (models/quantize.py). The sub-discriminators run one after the other,
each forward and then backward at once. Their feature maps are the largest arrays of a step. In this order, those of one
sub-discriminator alone are in memory at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from omnicodec_jax import losses, model_directory
from omnicodec_jax.config import Config
from omnicodec_jax.discriminators import DiscriminatorOutputs, Discriminators, SubDiscriminator, sub_discriminators
from omnicodec_jax.discriminators.wavlm import HiddenStates
from omnicodec_jax.dsp import resample
from omnicodec_jax.losses import Scalar, Terms
from omnicodec_jax.models.backbone import Audio, Latent
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.mimi import Mimi
from omnicodec_jax.models.quantize import CODEBOOKS, draw_num_quantizers
from omnicodec_jax.pretrained.wavlm import SAMPLE_RATE as WAVLM_SAMPLE_RATE
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.semantic import EncoderConfig, semantic_features
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.branches import branch_metrics
from omnicodec_jax.training.learning import fixed_modules, learning
from omnicodec_jax.training.packing import Tree, pack

T = TypeVar("T")

Metrics = dict[str, Array]
"""Metrics by name: float32 scalars. Those whose names begin with "replaced" are vectors, a value for each codebook."""


class FrozenVariables(NamedTuple):
    """Variables of the networks that run in training but are not trained. None: the run has no such network."""

    wavlm: Tree | None = None
    encoder: Tree | None = None
    """The audio encoder of Qwen3-Omni or of Whisper, which computes semantic features."""


class TrainInputs(NamedTuple):
    """A batch of real audio, and what the frozen networks compute from it. No gradient flows into these arrays."""

    audio: Audio
    features: Float[Array, "B S F"] | None
    """Semantic features."""
    wavlm_states: HiddenStates | None


class CodecForward(NamedTuple):
    """The result of running the codec forward on one micro-batch, from which its gradient can be computed."""

    inputs: TrainInputs
    reconstruction: Audio
    wavlm_states: HiddenStates | None
    """WavLM's hidden states of the reconstruction."""
    codec_loss: Scalar
    """Weighted sum of `losses.codec_losses`."""
    metrics: Metrics
    codebooks: Tree
    """The codebooks after their update."""
    vjp: Callable[[Audio, HiddenStates | None], Tree]
    """Maps the gradients of the reconstruction and of `wavlm_states` to that of the codec's learning parameters.

    The gradient of `codec_loss` is included."""

    def after(self, computed: Tree) -> "CodecForward":
        """Returns the same result, whose audio XLA cannot use before every array of `computed` has been computed.

        Sub-discriminators do not depend on each other. XLA would run them side by side, with the feature maps of all of
        them in memory, and on a CPU it ignores `optimization_barrier`. So a zero that depends on `computed` is added to
        the audio. XLA does not find out that it is always zero.
        """
        zero = 0 * sum(leaf.ravel()[0] for leaf in jax.tree.leaves(computed))
        inputs = self.inputs._replace(audio=self.inputs.audio + zero)
        return self._replace(inputs=inputs, reconstruction=self.reconstruction + zero)


class DiscriminatorForward(NamedTuple):
    """The result of running a sub-discriminator on real and on fake audio, from which gradients can be computed."""

    real: DiscriminatorOutputs
    fake: DiscriminatorOutputs
    """The outputs on the codec's reconstruction."""
    vjp_params: Callable[[DiscriminatorOutputs, DiscriminatorOutputs], Tree]
    """Maps the gradients of `real` and of `fake` to that of the sub-discriminator's parameters."""
    vjp_fake: Callable[[DiscriminatorOutputs], tuple[Tree, Audio, HiddenStates | None]] | None
    """Maps the gradient of `fake` to the gradients of the parameters, of the reconstruction, and of WavLM's states of
    the reconstruction; None where real and fake audio ran as one batch."""


class LossGradient(NamedTuple):
    """The gradient of a loss, with the loss terms and other metrics of the same forward pass."""

    gradient: Tree
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class Gan:
    """The networks of a training run as pure functions: codec, discriminators and frozen networks."""

    config: Config
    wavlm: WavLMConfig | None = None
    encoder: EncoderConfig | None = None

    @property
    def codec(self) -> OmniCodec | Mimi:
        """The generator."""
        train, model = self.config.train, model_directory.build(self.config.codec)
        return model.clone(dtype=jnp.dtype(train.compute_dtype), remat=train.remat, fixed=fixed_modules(train))

    # -- Frozen networks

    def inputs(self, batch: TrainBatch, frozen: FrozenVariables) -> TrainInputs:
        """Computes semantic features, unless the batch has them, and WavLM's hidden states of the real audio."""
        audio, features = batch["audio"], batch.get("features")
        if features is not None:
            features = features.astype(jnp.float32)
        elif self.config.codec.semantic is not None:
            features = stop_gradient(self.semantic_features(audio, frozen))
        return TrainInputs(audio, features, stop_gradient(self.wavlm_states(audio, frozen)))

    def semantic_features(self, audio: Audio, frozen: FrozenVariables) -> Float[Array, "B S F"]:
        """Computes semantic features of audio. The encoder's parameters are frozen, but gradients pass to the audio."""
        encoder = None if self.encoder is None else (self.encoder, frozen.encoder)
        return semantic_features(audio, self.config.codec.sample_rate, encoder)

    def wavlm_states(self, audio: Audio, frozen: FrozenVariables) -> HiddenStates | None:
        """Computes WavLM's hidden states of audio at the codec's sample rate; None without WavLM.

        WavLM's parameters are frozen, but gradients pass through it to the audio.
        """
        if self.wavlm is None:
            return None
        train = self.config.train
        resampled = resample(audio[:, 0], self.config.codec.sample_rate, WAVLM_SAMPLE_RATE)
        variables: Any = frozen.wavlm
        states: Any = WavLM(self.wavlm, jnp.dtype(train.compute_dtype), train.remat).apply(variables, resampled)
        return states

    # -- Generator

    def branches_kept(
        self, key: PRNGKeyArray, step: Int[Array, ""], clips: int
    ) -> tuple[Bool[Array, " B"] | None, Bool[Array, " B"] | None]:
        """Draws the clips that keep their semantic vectors in this step, and those that keep their acoustic vectors.

        No clip loses both. None in place of either: all clips keep them.
        """
        train, draw = self.config.train, jax.random.uniform(key, (clips,))
        semantic = draw >= train.semantic_dropout if train.semantic_dropout else None
        if semantic is not None and train.semantic_dropout_until is not None:
            semantic |= step >= train.semantic_dropout_until
        return semantic, draw < 1 - train.acoustic_dropout if train.acoustic_dropout else None

    def bypassed(self, key: PRNGKeyArray, clips: int) -> Bool[Array, " B"] | None:
        """Draws the clips whose vectors are not quantized; None: the run quantizes those of all clips."""
        share = self.config.train.quantizer_bypass
        return None if share == 0 else jax.random.bernoulli(key, share, (clips,))

    def latent_cepstrum(self, latent: Latent, audio: Audio, step: Int[Array, ""]) -> Terms:
        """Computes the term that draws the latent to the cepstrum; it is 0 from `train.latent_cepstrum_until` on."""
        if self.config.loss.latent_cepstrum == 0:
            return {}
        until = self.config.train.latent_cepstrum_until
        codec = self.config.codec
        term = losses.latent_cepstrum(latent, audio, codec.sample_rate, codec.hop_length)
        return {"latent_cepstrum": term if until is None else jnp.where(step < until, term, 0.0)}

    def semantic_perceptual(
        self, decoded: Audio, inputs: TrainInputs, are_stored: bool, frozen: FrozenVariables
    ) -> Terms:
        """Computes the perceptual loss: how far the encoder's features of decoded and of real audio are apart.

        Stored features cannot be compared, since they were computed from whole clips and depend on the audio around
        the crop.
        """
        if self.config.loss.semantic_perceptual == 0:
            return {}
        of_real = inputs.features
        if of_real is None or are_stored:
            of_real = self.semantic_features(inputs.audio, frozen)
        return {"semantic_perceptual": losses.semantic_perceptual(self.semantic_features(decoded, frozen), of_real)}

    def codec_forward(
        self,
        params: Tree,
        codebooks: Tree,
        batch: TrainBatch,
        frozen: FrozenVariables,
        key: PRNGKeyArray,
        step: Int[Array, ""],
    ) -> CodecForward:
        """Runs the codec forward on a batch. Self-guidance and the update of the codebooks are part of it."""
        inputs = self.inputs(batch, frozen)
        dropout_key, codebooks_key = jax.random.split(key)
        num_quantizers = draw_num_quantizers(dropout_key, self.config.codec.acoustic)
        clips = inputs.audio.shape[0]
        kept, acoustic_kept = self.branches_kept(jax.random.fold_in(key, 1), step, clips)
        bypassed = self.bypassed(jax.random.fold_in(key, 2), clips)

        def reconstruct(learnt: Tree) -> tuple[tuple[Audio, Scalar], tuple[Tree, Metrics]]:
            output, updated = self.codec.apply(
                {"params": {**params, **learnt}, CODEBOOKS: codebooks},
                inputs.audio,
                inputs.features,
                num_quantizers,
                kept,
                bypassed,
                acoustic_kept,
                mutable=[CODEBOOKS],
                rngs={CODEBOOKS: codebooks_key},
            )
            last = None if inputs.wavlm_states is None else inputs.wavlm_states[-1]
            terms = losses.codec_losses(output, inputs.features, last, self.config.codec.frame_rate, self.config.loss)
            terms |= self.latent_cepstrum(output.latent, inputs.audio, step)
            terms |= self.semantic_perceptual(output.audio, inputs, "features" in batch, frozen)
            metrics = {
                "num_quantizers": num_quantizers.astype(jnp.float32),
                "replaced_acoustic": output.acoustic.replaced,
                **branch_metrics(output),
            }
            if output.semantic is not None:
                metrics["replaced_semantic"] = output.semantic.replaced
            loss = losses.weighted_sum(terms, self.config.loss)
            return (output.audio, loss), (updated[CODEBOOKS], {**terms, **metrics})

        learnt = learning(self.config.train, params)
        (reconstruction, loss), codec_vjp, (codebooks, metrics) = jax.vjp(reconstruct, learnt, has_aux=True)
        wavlm_states, wavlm_vjp = jax.vjp(lambda audio: self.wavlm_states(audio, frozen), reconstruction)

        def vjp(d_reconstruction: Audio, d_wavlm_states: HiddenStates | None) -> Tree:
            if d_wavlm_states is not None:
                d_reconstruction += wavlm_vjp(d_wavlm_states)[0]
            return codec_vjp((d_reconstruction, jnp.ones(())))[0]

        return CodecForward(inputs, reconstruction, wavlm_states, loss, metrics, codebooks, vjp)

    def generator_gradient(self, forward: CodecForward, adversarial: Sequence[LossGradient]) -> LossGradient:
        """Computes the gradient of all that the codec minimises by its parameters, packed.

        Args:
            forward: The forward pass of the codec.
            adversarial: The `adversarial_gradient` of each sub-discriminator.
        """

        def loss(audio: Audio) -> tuple[Scalar, Terms]:
            terms = losses.reconstruction_losses(audio, forward.inputs.audio, self.config.codec.sample_rate)
            return losses.weighted_sum(terms, self.config.loss), terms

        d_reconstruction, terms = jax.grad(loss, has_aux=True)(forward.reconstruction)
        d_wavlm_states = None
        for (d_audio, d_states), adversarial_terms in adversarial:
            d_reconstruction += d_audio
            d_wavlm_states = d_wavlm_states if d_states is None else d_states
            terms = add_terms(terms, adversarial_terms)
        total = forward.codec_loss + losses.weighted_sum(terms, self.config.loss)
        gradient = pack(forward.vjp(d_reconstruction, d_wavlm_states))
        return LossGradient(gradient, {**forward.metrics, **terms, "total": total})

    # -- Discriminators

    def discriminate(
        self, sub: SubDiscriminator, params: Tree, audio: Audio, wavlm_states: HiddenStates | None
    ) -> DiscriminatorOutputs:
        """Applies one sub-discriminator, with its own parameters, to real or to fake audio."""
        module = Discriminators(sub.config, jnp.dtype(self.config.train.compute_dtype))
        outputs: Any = module.apply({"params": params}, audio, wavlm_states)
        return outputs

    def discriminator_forward(
        self, sub: SubDiscriminator, discriminators: Tree, forward: CodecForward
    ) -> DiscriminatorForward:
        """Runs a sub-discriminator once on the real audio and once on the reconstruction."""
        audio, params = forward.inputs.audio, sub.select(discriminators)
        real_states = fake_states = None
        if sub.takes_wavlm_states:
            real_states, fake_states = forward.inputs.wavlm_states, forward.wavlm_states
        real, vjp_real = jax.vjp(lambda params: self.discriminate(sub, params, audio, real_states), params)
        fake, vjp_fake = jax.vjp(partial(self.discriminate, sub), params, forward.reconstruction, fake_states)

        def vjp_params(d_real: DiscriminatorOutputs, d_fake: DiscriminatorOutputs) -> Tree:
            return jax.tree.map(jnp.add, vjp_real(d_real)[0], vjp_fake(d_fake)[0])

        return DiscriminatorForward(real, fake, vjp_params, vjp_fake)

    def discriminator_forward_in_one_batch(
        self, sub: SubDiscriminator, discriminators: Tree, forward: CodecForward
    ) -> DiscriminatorForward:
        """Runs a sub-discriminator once on real audio and reconstruction together, for the gradient of its parameters.

        On a TPU, one batch twice as large moves less memory than two batches. Rows of real audio and of reconstruction
        alternate, so that each row stays on the device that holds it.
        """
        states = (forward.inputs.wavlm_states, forward.wavlm_states) if sub.takes_wavlm_states else (None, None)
        audio, states = interleave((forward.inputs.audio, states[0]), (forward.reconstruction, states[1]))
        outputs, vjp = jax.vjp(lambda params: self.discriminate(sub, params, audio, states), sub.select(discriminators))

        def vjp_params(d_real: DiscriminatorOutputs, d_fake: DiscriminatorOutputs) -> Tree:
            return vjp(interleave(d_real, d_fake))[0]

        pairs = jax.tree.map(lambda rows: rows.reshape(-1, 2, *rows.shape[1:]), outputs)
        real, fake = (jax.tree.map(lambda pair, which=which: pair[:, which], pairs) for which in (0, 1))
        return DiscriminatorForward(real, fake, vjp_params, None)

    def discriminator_gradient(self, forward: DiscriminatorForward) -> LossGradient:
        """Computes the gradient of a sub-discriminator's loss by its parameters, and none by the reconstruction."""

        def loss(real: DiscriminatorOutputs, fake: DiscriminatorOutputs) -> tuple[Scalar, Terms]:
            terms = losses.discriminator_losses(real, fake)
            return sum(terms.values(), start=jnp.zeros(())), terms

        (d_real, d_fake), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(forward.real, forward.fake)
        return LossGradient(forward.vjp_params(d_real, d_fake), terms)

    def adversarial_gradient(self, forward: DiscriminatorForward) -> LossGradient:
        """Computes the gradient of the adversarial and the feature matching loss of one sub-discriminator.

        It is a pair: the gradient by the reconstruction, and the gradient by WavLM's states of the reconstruction,
        which is None if the sub-discriminator does not use them.
        """

        def loss(fake: DiscriminatorOutputs) -> tuple[Scalar, Terms]:
            terms = losses.adversarial_losses(forward.real, fake)
            return losses.weighted_sum(terms, self.config.loss), terms

        assert forward.vjp_fake is not None
        d_fake, terms = jax.grad(loss, has_aux=True)(forward.fake)
        _, d_audio, d_wavlm_states = forward.vjp_fake(d_fake)
        return LossGradient((d_audio, d_wavlm_states), terms)

    def for_each_discriminator(
        self,
        discriminators: Tree,
        forward: CodecForward,
        use: Callable[[DiscriminatorForward], T],
        in_one_batch: bool = False,
    ) -> list[T]:
        """Runs the sub-discriminators one after the other, and returns the result of `use` for each of them.

        Arrays that `use` does not return, such as feature maps, are freed before the next sub-discriminator runs.
        """
        run = self.discriminator_forward_in_one_batch if in_one_batch else self.discriminator_forward
        results: list[T] = []
        for sub in sub_discriminators(self.config.discriminators):
            if results:
                forward = forward.after(results[-1])
            results.append(use(run(sub, discriminators, forward)))
        return results


def interleave(first: T, second: T) -> T:
    """Joins two trees of batches into one whose rows come from both by turns."""

    def rows(x: Array, y: Array) -> Array:
        return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])

    return jax.tree.map(rows, first, second)


def merge_gradients(gradients: Sequence[LossGradient]) -> LossGradient:
    """Merges the gradients of all sub-discriminators into one gradient of all discriminators, packed."""
    merged: Tree = {}
    terms: Terms = {}
    for gradient, own_terms in gradients:
        merged |= {family: merged.get(family, {}) | tree for family, tree in gradient.items()}
        terms = add_terms(terms, own_terms)
    return LossGradient(pack(merged), terms)


def add_terms(total: Terms, terms: Terms) -> Terms:
    """Adds loss terms to a total by name. Each sub-discriminator adds to the terms of its family."""
    return total | {name: total[name] + term if name in total else term for name, term in terms.items()}
