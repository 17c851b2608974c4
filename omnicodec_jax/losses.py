"""Loss terms as pure functions, float32; their weights are in `config.LossConfig`.

A training step's terms come in four groups, each a dict of named scalars: `codec_losses` of what the generator
computes beside the audio, `audio_losses` of the audio it makes, `judged_losses` of what discriminators make of that,
`discriminator_losses` of theirs. `weighted_sum` adds up.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from omnicodec_jax.config import LossConfig
from omnicodec_jax.discriminators import Judgements
from omnicodec_jax.discriminators.conv import Judgement
from omnicodec_jax.dsp import mel_spectrogram
from omnicodec_jax.models.backbone import Audio
from omnicodec_jax.models.codec import CodecOutput

Scalar = Float[Array, ""]
Terms = dict[str, Scalar]

MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
"""Window and number of mel bands of each scale of the reconstruction loss."""
WAVLM_FRAME_RATE = 50


# -- Of what the codec computes beside the audio


def self_guidance(output: CodecOutput, norm: Literal["l1", "l2"]) -> Scalar:
    """Paper Eq. 2: how far the decoder's hidden state on codes is from that on the latent before quantization."""
    difference = output.hidden_quantized - stop_gradient(output.hidden_guide)
    return jnp.mean(jnp.abs(difference) if norm == "l1" else difference**2)


def semantic_reconstruction(output: CodecOutput, features: Float[Array, "B S F"]) -> Scalar:
    """Mean absolute error of the reconstructed semantic features (spec §3.1)."""
    if output.semantic_features is None:
        raise ValueError("this config has no semantic branch to reconstruct features with")
    return jnp.mean(jnp.abs(output.semantic_features - features))


def pool_to_frames(hidden: Float[Array, "B S W"], frame_rate: float) -> Float[Array, "B N W"]:
    """WavLM's 50 states a second, averaged over windows of two frames around each frame of the codec.

    Zeros beyond the ends count. At 12.5 Hz windows of 8, 4 apart, as in the reference; at 6.25 Hz 16 and 8, where
    the reference keeps 12.5 Hz and compares frames with states of half their time.
    """
    stride = round(WAVLM_FRAME_RATE / frame_rate)
    window, edges = (1, 2 * stride, 1), ((0, 0), (stride - 1, stride - 1), (0, 0))
    return jax.lax.reduce_window(hidden, 0.0, jax.lax.add, window, (1, stride, 1), edges) / (2 * stride)


def wavlm_distillation(projection: Float[Array, "B N W"], hidden: Float[Array, "B S W"], frame_rate: float) -> Scalar:
    """-log σ of the cosine, over time, between each channel of the projection and of WavLM's last hidden state.

    Source: SpeechTokenizer (arXiv 2308.16692 §3.3), which calls it the D-axis. The longer of both is cut.
    """
    target = pool_to_frames(hidden, frame_rate)
    steps = min(projection.shape[1], target.shape[1])
    projection, target = projection[:, :steps], target[:, :steps]

    def norm(x: Float[Array, "B N W"]) -> Float[Array, "B W"]:
        return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=1), 1e-16))

    cosine = jnp.sum(projection * target, axis=1) / (norm(projection) * norm(target))
    return -jnp.mean(jax.nn.log_sigmoid(cosine))


def codec_losses(
    output: CodecOutput,
    features: Float[Array, "B S F"] | None,
    hidden: Float[Array, "B H W"] | None,
    frame_rate: float,
    config: LossConfig,
) -> Terms:
    """Terms that need no discriminator; `hidden` is WavLM's last hidden state on the real audio.

    Semantic terms where the codec has that branch, distillation where it has the head for it.
    """
    terms = {
        "commitment_acoustic": output.acoustic.commitment,
        "self_guidance": self_guidance(output, config.self_guidance_norm),
    }
    if output.semantic is not None and features is not None:
        terms["commitment_semantic"] = output.semantic.commitment
        terms["semantic"] = semantic_reconstruction(output, features)
    if output.wavlm_projection is not None and hidden is not None:
        terms["wavlm_distillation"] = wavlm_distillation(output.wavlm_projection, hidden, frame_rate)
    return terms


# -- Of the reconstruction


def multi_scale_mel(reconstruction: Audio, audio: Audio, sample_rate: int) -> Scalar:
    """Mean absolute difference of log10-mel magnitudes, summed over seven window lengths (spec §3.1)."""

    def log_mel(audio: Audio, window: int, n_mels: int) -> Float[Array, "B 1 N M"]:
        mel = mel_spectrogram(audio, sample_rate, window, window // 4, n_mels)
        return jnp.log10(jnp.maximum(mel, 1e-5))

    return sum(
        (jnp.mean(jnp.abs(log_mel(reconstruction, *scale) - log_mel(audio, *scale))) for scale in MEL_SCALES),
        start=jnp.zeros(()),
    )


def audio_losses(reconstruction: Audio, audio: Audio, sample_rate: int) -> Terms:
    """Terms of the reconstruction alone."""
    return {"mel": multi_scale_mel(reconstruction, audio, sample_rate)}


def adversarial(fake: tuple[Judgement, ...]) -> Scalar:
    """Least squares: how far the logits of fake audio are from 1; summed over the sub-discriminators."""
    return sum((jnp.mean((1 - judgement.logits) ** 2) for judgement in fake), start=jnp.zeros(()))


def feature_matching(
    real: tuple[Judgement, ...], fake: tuple[Judgement, ...], reduction: Literal["sum", "mean"]
) -> Scalar:
    """Mean absolute difference of each feature map; sum or mean over a sub-discriminator's, and their sum."""
    total = jnp.zeros(())
    for target, judgement in zip(real, fake, strict=True):
        differences = [
            jnp.mean(jnp.abs(y.astype(jnp.float32) - stop_gradient(x).astype(jnp.float32)))
            for x, y in zip(target.feature_maps, judgement.feature_maps, strict=True)
        ]
        total += sum(differences, start=jnp.zeros(())) / (len(differences) if reduction == "mean" else 1)
    return total


FEATURE_MATCHING_REDUCTION: Mapping[str, Literal["sum", "mean"]] = {"stft": "sum", "waveform": "mean", "wavlm": "sum"}
"""As the reference has it (spec §3.1)."""


def judged_losses(real: Judgements, fake: Judgements) -> Terms:
    """Terms of what discriminators make of the reconstruction; `real`: what they make of the audio itself.

    Sums over sub-discriminators, so that some can be judged now and others later.
    """
    terms = {}
    for family, judgements in fake.items():
        terms[f"adversarial_{family}"] = adversarial(judgements)
        reduction = FEATURE_MATCHING_REDUCTION[family]
        terms[f"feature_matching_{family}"] = feature_matching(real[family], judgements, reduction)
    return terms


# -- Of the discriminators


def discriminator_losses(real: Judgements, fake: Judgements) -> Terms:
    """Least squares: logits of real audio towards 1, of fake towards 0; summed over a family's sub-discriminators."""
    return {
        f"discriminator_{family}": sum(
            (
                jnp.mean((1 - on_real.logits) ** 2) + jnp.mean(on_fake.logits**2)
                for on_real, on_fake in zip(real[family], fake[family], strict=True)
            ),
            start=jnp.zeros(()),
        )
        for family in fake
    }


def weighted_sum(terms: Terms, config: LossConfig) -> Scalar:
    """What the generator minimises: paper Eq. 1."""
    weights = {name: config.adversarial if name.startswith("adversarial") else getattr(config, name) for name in terms}
    return sum((weights[name] * term for name, term in terms.items()), start=jnp.zeros(()))
