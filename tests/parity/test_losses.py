"""Spectra and loss terms against PyTorch, librosa and the reference's own training step."""

import dataclasses
from functools import cache, partial
from typing import Any

import golden
import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import test_discriminators
import torch
import torch.nn.functional as F
from golden import ROOT, needs_golden, relative_error
from test_golden import first_training_step

from omnicodec_jax import dsp, losses
from omnicodec_jax.config import LossConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import wavlm as convert_wavlm
from omnicodec_jax.discriminators import DiscriminatorOutputs, Discriminators
from omnicodec_jax.discriminators.output import DiscriminatorOutput
from omnicodec_jax.pretrained.wavlm import WavLM


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- Spectra


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("window", "hop"), [(206, 103), (876, 219), (334, 83), (32, 8), (50, 60)])
def test_stft_is_that_of_torch(window, hop, center):
    x = normal(2, 3001)
    theirs = torch.stft(
        torch.from_numpy(x), window, hop, window=torch.hann_window(window), center=center, return_complex=True
    )
    ours = jax.jit(dsp.stft, static_argnums=(1, 2, 3))(jnp.asarray(x), window, hop, center)
    assert relative_error(ours, theirs.mT.numpy()) < 1e-5


def test_gradient_of_stft_is_that_of_torch():
    x, weights = normal(1000), normal(19, 51, seed=1)
    ours = jax.grad(lambda x: jnp.sum(jnp.abs(dsp.stft(x, 100, 50)) * weights))(jnp.asarray(x))
    audio = torch.from_numpy(x).requires_grad_()
    spectrum = torch.stft(audio, 100, 50, window=torch.hann_window(100), center=False, return_complex=True)
    (spectrum.abs().mT * torch.from_numpy(weights)).sum().backward()
    assert relative_error(ours, audio.grad.numpy()) < 1e-5


@pytest.mark.parametrize(("window", "bands"), losses.MEL_SCALES)
def test_mel_spectrogram_is_that_of_librosa(window, bands):
    x = normal(2, 5000)
    options = {"n_fft": window, "hop_length": window // 4, "n_mels": bands, "power": 1, "pad_mode": "reflect"}
    theirs = librosa.feature.melspectrogram(y=x, sr=24_000, **options).swapaxes(1, 2)
    ours = dsp.mel_spectrogram(jnp.asarray(x), 24_000, window, window // 4, bands)
    assert relative_error(ours, theirs) < 1e-5


def test_mel_loss_has_finite_gradients_in_silence():
    audio = jnp.asarray(normal(1, 1, 4096))
    gradient = jax.jit(jax.grad(partial(losses.multi_scale_mel, sample_rate=24_000)))(jnp.zeros_like(audio), audio)
    assert bool(jnp.isfinite(gradient).all())


# -- Forms


def outputs(seed: int, dtype: Any = jnp.float32) -> DiscriminatorOutputs:
    """Two sub-discriminators of three and one feature maps."""

    def output(seed: int, maps: int) -> DiscriminatorOutput:
        shapes = [(2, 5, 3), (2, 4), (2, 3, 2, 2)]
        feature_maps = tuple(jnp.asarray(normal(*shapes[i], seed=seed + i), dtype) for i in range(maps))
        return DiscriminatorOutput(jnp.asarray(normal(2, 7, seed=seed + 9)), feature_maps)

    return {family: (output(seed, 3), output(seed + 20, 1)) for family in ("stft", "waveform", "wavlm")}


def test_adversarial_terms_are_least_squares_and_sums_over_the_sub_discriminators():
    real, fake = outputs(0), outputs(50)
    terms = losses.adversarial_losses(real, fake)
    discriminator = losses.discriminator_losses(real, fake)
    assert terms.keys() == {f"{term}_{f}" for term in ("adversarial", "feature_matching") for f in fake}
    for family in fake:
        on_real, on_fake = ([np.asarray(j.logits) for j in side[family]] for side in (real, fake))
        generator = sum(((1 - x) ** 2).mean() for x in on_fake)
        assert float(terms[f"adversarial_{family}"]) == pytest.approx(generator, rel=1e-5)
        both = sum(((1 - x) ** 2).mean() + (y**2).mean() for x, y in zip(on_real, on_fake, strict=True))
        assert float(discriminator[f"discriminator_{family}"]) == pytest.approx(both, rel=1e-5)
        differences = [
            [np.abs(np.asarray(x) - np.asarray(y)).mean() for x, y in zip(a.feature_maps, b.feature_maps, strict=True)]
            for a, b in zip(real[family], fake[family], strict=True)
        ]
        reduce = np.mean if family == "waveform" else np.sum
        expected = sum(reduce(layer) for layer in differences)
        assert float(terms[f"feature_matching_{family}"]) == pytest.approx(expected, rel=1e-5)


def test_losses_of_bfloat16_feature_maps_are_float32_and_pull_on_the_fake_ones_only():
    real, fake = outputs(0, jnp.bfloat16)["stft"], outputs(50, jnp.bfloat16)["stft"]
    matching = partial(losses.feature_matching, reduction="sum")
    assert matching(real, fake).dtype == jnp.float32
    on_real, on_fake = jax.grad(matching, argnums=(0, 1))(real, fake)
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(on_real))
    assert all(bool(leaf.any()) for output in on_fake for leaf in output.feature_maps)


@pytest.mark.parametrize(
    ("frame_rate", "kernel", "stride", "padding", "frames"), [(12.5, 8, 4, 3, 125), (6.25, 16, 8, 7, 63)]
)
def test_pooling_of_wavlm_is_torch_pooling_at_the_frame_rate_of_the_codec(frame_rate, kernel, stride, padding, frames):
    hidden = normal(2, 499, 3)
    theirs = F.avg_pool1d(torch.from_numpy(hidden).mT, kernel, stride, padding).mT.numpy()
    ours = losses.pool_to_frames(jnp.asarray(hidden), frame_rate)
    assert ours.shape == (2, frames, 3)
    assert relative_error(ours, theirs) < 1e-5


def test_distillation_of_what_is_already_equal_is_at_its_floor():
    hidden = jnp.asarray(normal(2, 499, 3))
    projection = 3 * losses.pool_to_frames(hidden, 12.5)
    assert float(losses.wavlm_distillation(projection, hidden, 12.5)) == pytest.approx(0.31326, abs=1e-4)
    assert float(losses.wavlm_distillation(-projection, hidden, 12.5)) == pytest.approx(1.31326, abs=1e-4)


def test_weights_are_those_of_the_config():
    names = [field.name for field in dataclasses.fields(LossConfig) if isinstance(field.default, float)]
    config = LossConfig(**{name: float(2**i) for i, name in enumerate(names)})
    families = [f"adversarial_{family}" for family in ("stft", "waveform", "wavlm")]
    for term in [name for name in names if name != "adversarial"] + families:
        weight = config.adversarial if term in families else getattr(config, term)
        assert float(losses.weighted_sum({term: jnp.float32(3.0)}, config)) == 3 * weight


# -- The reference's first training step


@cache
def hidden_states(audio: str) -> tuple[jax.Array, ...]:
    state_dict, described = test_discriminators.golden_weights("wavlm")
    config = convert_wavlm.config_from_transformers(described["wavlm_config"])
    variables = jax.tree.map(jnp.asarray, convert_wavlm.from_state_dict(state_dict, config))
    resampled = dsp.resample(jnp.asarray(golden.load().arrays[audio][:, 0]), 24_000, 16_000)
    return jax.jit(WavLM(config).apply)(variables, resampled)


@cache
def golden_inputs() -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Two real clips and their two reconstructions, as one batch, and WavLM's hidden states of them."""
    names = ("audio", "train.reconstruction")
    audio = jnp.asarray(np.concatenate([golden.load().arrays[name] for name in names]))
    return audio, jax.tree.map(lambda *x: jnp.concatenate(x), *[hidden_states(name) for name in names])


@cache
def discriminator_terms() -> dict[str, float]:
    """The losses of the initial discriminators."""

    def terms(params, inputs):
        both = Discriminators(test_discriminators.GOLDEN).apply({"params": params}, *inputs)
        return losses.discriminator_losses(jax.tree.map(lambda x: x[:2], both), jax.tree.map(lambda x: x[2:], both))

    computed = jax.jit(terms)(test_discriminators.golden_variables()["params"], golden_inputs())
    return {name: float(term) for name, term in computed.items()}


@cache
def generator_terms() -> dict[str, float]:
    """Terms of the generator that need no discriminator; test_golden_steps.py has those that need an updated one."""
    output, data = first_training_step()[0], golden.load()
    released = config_files.load(ROOT / "configs/released_12hz.py").loss

    def terms(inputs):
        audio, hidden = inputs
        codec = losses.codec_losses(output, data.inputs()[1], hidden[-1][:2], data.config.frame_rate, released)
        real, fake = (
            (DiscriminatorOutput(jnp.zeros((2, 1)), tuple(x[part] for x in hidden)),) for part in (np.s_[:2], np.s_[2:])
        )
        matching = losses.feature_matching(real, fake, losses.FEATURE_MATCHING_REDUCTION["wavlm"])
        mel = losses.multi_scale_mel(audio[2:], audio[:2], data.config.sample_rate)
        return {**codec, "mel": mel, "feature_matching_wavlm": matching}

    return {name: float(term) for name, term in jax.jit(terms)(golden_inputs()).items()}


@needs_golden
@pytest.mark.parametrize(("family", "theirs"), [("stft", "stft"), ("waveform", "dacd"), ("wavlm", "wavlm")])
def test_discriminator_losses_of_the_first_step_are_those_of_the_reference(family, theirs):
    expected = golden.load().steps[0][f"{theirs}_disc"]
    assert discriminator_terms()[f"discriminator_{family}"] == pytest.approx(expected, rel=1e-4)


@needs_golden
@pytest.mark.parametrize(
    ("name", "theirs", "weight"),
    [("mel", "msspec", 15), ("wavlm_distillation", "wavlm_distill", 50), ("self_guidance", "self_guidance", 1)]
    + [("semantic", "semantic", 1), ("commitment_acoustic", "commit_acoustic", 1)]
    + [("commitment_semantic", "commit_semantic", 1), ("feature_matching_wavlm", "wavlm_fm", 1)],
)
def test_generator_losses_of_the_first_step_are_those_of_the_reference(name, theirs, weight):
    """Some of the reference's terms have their weight in them."""
    assert weight * generator_terms()[name] == pytest.approx(golden.load().steps[0][theirs], rel=1e-4)
