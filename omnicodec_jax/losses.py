"""The loss terms as pure functions in float32 (spec §3.1); their weights are in `config.LossConfig`.

A training step has four groups of terms, each a dict of named scalars. Three of them are minimised by the generator
(the codec): `codec_losses` needs only what the codec computes beside the audio, `reconstruction_losses` the audio that
it makes, and `adversarial_losses` the discriminators' outputs on that audio. `weighted_sum` adds them up. The fourth,
`discriminator_losses`, is minimised by the discriminators.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from omnicodec_jax.config import LossConfig
from omnicodec_jax.discriminators import DiscriminatorOutputs
from omnicodec_jax.discriminators.output import DiscriminatorOutput
from omnicodec_jax.dsp import mel_spectrogram
from omnicodec_jax.models.backbone import Audio, Latent
from omnicodec_jax.models.codec import CodecOutput

Scalar = Float[Array, ""]
Terms = dict[str, Scalar]

MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
"""The window length and the number of mel bands of each scale of the mel loss."""
WAVLM_FRAME_RATE = 50
"""The number of WavLM's hidden states a second."""
CEPSTRUM_SLICES, CEPSTRUM_MELS = 8, 80
"""The number of time slices of a codec frame, and of mel bands of a slice, that a frame's cepstrum is computed from."""
CEPSTRUM_SIZE = 64
"""The number of coefficients of a frame's cepstrum."""
CEPSTRUM_SCALE = 0.215
"""The factor that gives the cepstrum's coefficients a mean variance of 1 on speech, music and sound."""


# -- Losses of what the codec computes beside the audio


def self_guidance(output: CodecOutput, norm: Literal["l1", "l2"]) -> Scalar:
    """Computes self-guidance (paper §2.3, Eq. 2): the distance of the decoder's hidden states on codes and on latents.

    The hidden states on latents before quantization are the target and have no gradient. `OmniCodec.__call__` computes
    both.
    """
    if output.hidden_guide is None:
        raise ValueError("this codec has no self-guidance")
    difference = output.hidden_quantized - stop_gradient(output.hidden_guide)
    return jnp.mean(jnp.abs(difference) if norm == "l1" else difference**2)


def semantic_reconstruction(output: CodecOutput, features: Float[Array, "B S F"]) -> Scalar:
    """Computes the semantic loss: the mean absolute error of the reconstructed semantic features (spec §3.1)."""
    if output.semantic_features is None:
        raise ValueError("this config has no semantic branch to reconstruct features with")
    return jnp.mean(jnp.abs(output.semantic_features - features))


@jax.named_scope("semantic_perceptual")
def semantic_perceptual(of_decoded: Float[Array, "B S F"], of_real: Float[Array, "B S F"]) -> Scalar:
    """Computes the perceptual loss: the mean absolute error of the decoded audio's semantic features.

    It is divided by the mean absolute value of the real audio's features. Decoded speech that an encoder of speech
    takes for the real one is easier to understand.
    """
    target = stop_gradient(of_real)
    return jnp.mean(jnp.abs(of_decoded - target)) / jnp.maximum(jnp.mean(jnp.abs(target)), 1e-5)


def pool_to_frames(hidden: Float[Array, "B S W"], frame_rate: float) -> Float[Array, "B N W"]:
    """Averages WavLM's 50 hidden states a second over windows that are as long as two frames of the codec.

    The zeros that pad the ends count in the average. At 12.5 Hz, a window has 8 states and windows are 4 states apart,
    as in the reference. At 6.25 Hz, these numbers are 16 and 8. There, the reference keeps the windows of 12.5 Hz, and
    so compares a frame with hidden states of another time.
    """
    stride = round(WAVLM_FRAME_RATE / frame_rate)
    window, edges = (1, 2 * stride, 1), ((0, 0), (stride - 1, stride - 1), (0, 0))
    return jax.lax.reduce_window(hidden, 0.0, jax.lax.add, window, (1, stride, 1), edges) / (2 * stride)


def wavlm_distillation(
    projection: Float[Array, "B N W"],
    hidden: Float[Array, "B S W"],
    frame_rate: float,
    kind: Literal["speechtokenizer", "mimi"] = "speechtokenizer",
) -> Scalar:
    """Computes the WavLM distillation loss, from the cosine between the projection and WavLM's hidden states.

    `speechtokenizer`: -log σ(cosine) between the same channels of both, over time ("D-axis" distillation, arXiv
    2308.16692 §3.3). `mimi`: 1 - cosine between the same frames of both, over channels (arXiv 2410.00037 §3.3). The
    longer of the two sequences is cut.
    """
    target = pool_to_frames(hidden, frame_rate)
    steps = min(projection.shape[1], target.shape[1])
    projection, target = projection[:, :steps], target[:, :steps]
    axis = 1 if kind == "speechtokenizer" else 2

    def norm(x: Float[Array, "B N W"]) -> Float[Array, "B _"]:
        return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=axis), 1e-16))

    cosine = jnp.sum(projection * target, axis=axis) / (norm(projection) * norm(target))
    return jnp.mean(1 - cosine) if kind == "mimi" else -jnp.mean(jax.nn.log_sigmoid(cosine))


@lru_cache
def cepstral_basis() -> Float[np.ndarray, "S M C"]:
    """Returns the basis of a two-dimensional cosine transform over time slices and mel bands, the lowest orders first.

    In audio, the standard deviation of coefficient (t, m) is about 1 / ((1 + m)·(1 + t)²) times that of coefficient
    (0, 0). Each coefficient is divided by the square root of this factor. Low coefficients then still vary more than
    the others, but no longer outweigh them.
    """

    def cosines(size: int) -> np.ndarray:
        order, place = np.arange(size)[:, None], np.arange(size) + 0.5
        return np.cos(np.pi / size * order * place) * np.sqrt(np.where(order == 0, 1, 2) / size)

    slices, mels = np.arange(CEPSTRUM_SLICES), np.arange(CEPSTRUM_MELS)
    deviation = 1 / ((1 + slices[:, None]) ** 2 * (1 + mels))
    lowest = np.argsort(-deviation, axis=None, kind="stable")[:CEPSTRUM_SIZE]
    products = np.einsum("ts,mn->tmsn", cosines(CEPSTRUM_SLICES), cosines(CEPSTRUM_MELS))
    basis = products.reshape(-1, CEPSTRUM_SLICES, CEPSTRUM_MELS)[lowest] / deviation.ravel()[lowest, None, None] ** 0.5
    return np.moveaxis(CEPSTRUM_SCALE * basis, 0, 2).astype(np.float32)


@jax.named_scope("latent_cepstrum")
def latent_cepstrum(latent: Latent, audio: Audio, sample_rate: int, hop_length: int) -> Scalar:
    """Computes the mean squared distance of the first channels of the unquantized latent from the frames' cepstrum.

    The latent of a new encoder tells hardly more than the loudness, so that further codebooks do not help the decoder.
    With this term, it tells the shape of the spectrum within hundreds of steps (docs/training.md).
    """
    frames, size = latent.shape[1], min(CEPSTRUM_SIZE, latent.shape[2])
    hop = hop_length // CEPSTRUM_SLICES
    whole = jnp.pad(audio[:, 0], ((0, 0), (0, frames * hop_length - audio.shape[2])))  # the last frame may be cut off
    mel = mel_spectrogram(whole, sample_rate, 4 * hop, hop, CEPSTRUM_MELS)[:, : frames * CEPSTRUM_SLICES]
    slices = jnp.log10(jnp.maximum(mel, 1e-3)).reshape(-1, frames, CEPSTRUM_SLICES, CEPSTRUM_MELS)
    cepstrum = jnp.einsum("bnsm,smc->bnc", slices, cepstral_basis())[:, :, :size]
    target = stop_gradient(cepstrum - cepstrum.mean(axis=(0, 1), keepdims=True))
    return jnp.mean((latent[:, :, :size] - target) ** 2)


def codec_losses(
    output: CodecOutput,
    features: Float[Array, "B S F"] | None,
    wavlm_state: Float[Array, "B H W"] | None,
    frame_rate: float,
    config: LossConfig,
) -> Terms:
    """Computes the generator's terms that need neither the reconstructed audio nor a discriminator.

    `wavlm_state` is WavLM's last hidden state on the real audio. A term is left out if the codec lacks the part for it:
    self-guidance, a semantic codebook, a branch for semantic features, or a WavLM head.
    """
    terms = {"commitment_acoustic": output.acoustic.commitment}
    if output.hidden_guide is not None:
        terms["self_guidance"] = self_guidance(output, config.self_guidance_norm)
    if output.semantic is not None:
        terms["commitment_semantic"] = output.semantic.commitment
    if output.semantic_features is not None and features is not None:
        terms["semantic"] = semantic_reconstruction(output, features)
    if output.wavlm_projection is not None and wavlm_state is not None:
        projection, kind = output.wavlm_projection, config.wavlm_distillation_kind
        terms["wavlm_distillation"] = wavlm_distillation(projection, wavlm_state, frame_rate, kind)
    return terms


# -- Losses of the reconstructed audio


@jax.named_scope("mel_loss")
def multi_scale_mel(reconstruction: Audio, audio: Audio, sample_rate: int) -> Scalar:
    """Computes the multi-scale mel loss: mean absolute differences of log10-mel magnitudes, summed over seven scales.

    See spec §3.1.
    """

    def log_mel(audio: Audio, window: int, n_mels: int) -> Float[Array, "B 1 N M"]:
        mel = mel_spectrogram(audio, sample_rate, window, window // 4, n_mels)
        return jnp.log10(jnp.maximum(mel, 1e-5))

    return sum(
        (jnp.mean(jnp.abs(log_mel(reconstruction, *scale) - log_mel(audio, *scale))) for scale in MEL_SCALES),
        start=jnp.zeros(()),
    )


def reconstruction_losses(reconstruction: Audio, audio: Audio, sample_rate: int) -> Terms:
    """Computes the generator's terms that compare the reconstructed audio with the real audio."""
    return {"mel": multi_scale_mel(reconstruction, audio, sample_rate)}


def adversarial(fake: tuple[DiscriminatorOutput, ...]) -> Scalar:
    """Computes the least-squares adversarial loss: mean (1 - logits)² on fake audio, summed over sub-discriminators."""
    return sum((jnp.mean((1 - output.logits) ** 2) for output in fake), start=jnp.zeros(()))


@jax.named_scope("feature_matching")
def feature_matching(
    real: tuple[DiscriminatorOutput, ...], fake: tuple[DiscriminatorOutput, ...], reduction: Literal["sum", "mean"]
) -> Scalar:
    """Computes the feature matching loss: mean absolute differences of the feature maps on real and on fake audio.

    The differences of one sub-discriminator's feature maps are added up or averaged, as `reduction` says, and the
    results are added up over the sub-discriminators. The feature maps on real audio have no gradient.
    """
    total = jnp.zeros(())
    for real_output, fake_output in zip(real, fake, strict=True):
        differences = [
            jnp.sum(jnp.abs(y.astype(jnp.float32) - stop_gradient(x).astype(jnp.float32))) / float(size)
            for x, y, size in zip(real_output.stored_maps, fake_output.stored_maps, fake_output.sizes, strict=True)
        ]
        total += sum(differences, start=jnp.zeros(())) / (len(differences) if reduction == "mean" else 1)
    return total


FEATURE_MATCHING_REDUCTION: Mapping[str, Literal["sum", "mean"]] = {"stft": "sum", "waveform": "mean", "wavlm": "sum"}
"""The way in which `feature_matching` reduces the feature maps of each family, as in the authors' code (spec §3.1)."""


def adversarial_losses(real: DiscriminatorOutputs, fake: DiscriminatorOutputs) -> Terms:
    """Computes the generator's terms for each family of discriminators: adversarial and feature matching loss.

    Each term is a sum over the sub-discriminators in `real` and `fake`, so that the terms of single sub-discriminators
    can be added up.
    """
    terms = {}
    for family, fake_outputs in fake.items():
        terms[f"adversarial_{family}"] = adversarial(fake_outputs)
        reduction = FEATURE_MATCHING_REDUCTION[family]
        terms[f"feature_matching_{family}"] = feature_matching(real[family], fake_outputs, reduction)
    return terms


# -- Losses of the discriminators


def discriminator_losses(real: DiscriminatorOutputs, fake: DiscriminatorOutputs) -> Terms:
    """Computes the discriminators' least-squares loss: mean (1 - logits)² on real plus mean logits² on fake audio.

    The term of each family is a sum over its sub-discriminators.
    """
    return {
        f"discriminator_{family}": sum(
            (
                jnp.mean((1 - real_output.logits) ** 2) + jnp.mean(fake_output.logits**2)
                for real_output, fake_output in zip(real[family], fake[family], strict=True)
            ),
            start=jnp.zeros(()),
        )
        for family in fake
    }


def weighted_sum(terms: Terms, config: LossConfig) -> Scalar:
    """Returns the sum of the generator's terms times their weights (paper Eq. 1; spec §3.2)."""
    weights = {name: config.adversarial if name.startswith("adversarial") else getattr(config, name) for name in terms}
    return sum((weights[name] * term for name, term in terms.items()), start=jnp.zeros(()))
