"""Resampling inside a jitted function against torchaudio's output, and against soxr."""

from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import needs_golden, relative_error

from omnicodec_jax import dsp
from omnicodec_jax.data import audio as audio_files

RATES = [(24_000, 16_000), (16_000, 24_000), (48_000, 16_000), (44_100, 16_000)]

resample = jax.jit(dsp.resample, static_argnums=(1, 2))
as_soxr = jax.jit(dsp.resample_as_soxr, static_argnums=(1, 2))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@needs_golden
def test_24_to_16_khz_is_what_torchaudio_gives():
    arrays = golden.load().arrays
    assert relative_error(resample(jnp.asarray(arrays["audio"]), 24_000, 16_000), arrays["wavlm.audio_16k"]) < 1e-5


@pytest.mark.parametrize(("source", "target"), RATES)
@pytest.mark.parametrize("shape", [(1,), (2, 5), (47,), (3, 1, 4801)])
def test_length_is_that_of_the_clip_at_the_new_rate_rounded_up(shape, source, target):
    resampled = jax.eval_shape(partial(dsp.resample, source=source, target=target), normal(*shape))
    assert resampled.shape == (*shape[:-1], -(-shape[-1] * target // source))
    assert resampled.dtype == jnp.float32


def test_same_rate_changes_nothing():
    np.testing.assert_array_equal(dsp.resample(normal(2, 7), 16_000, 16_000), normal(2, 7))


@pytest.mark.parametrize(("source", "target"), RATES)
@pytest.mark.parametrize("frequency", [0, 50, 440, 3000, 5000])
def test_sine_stays_the_same_sine(frequency, source, target):
    def sine(rate: int) -> np.ndarray:
        return np.cos(2 * np.pi * frequency * np.arange(rate // 4) / rate + 0.3).astype(np.float32)

    resampled = np.asarray(resample(jnp.asarray(sine(source)), source, target))
    inner = slice(100, -100)  # beyond the clip's ends there is silence
    assert np.abs(resampled - sine(target))[inner].max() < 1e-2


def test_what_the_new_rate_cannot_hold_is_gone():
    tone = np.sin(2 * np.pi * 10_500 * np.arange(6000) / 24_000).astype(np.float32)
    assert np.abs(resample(jnp.asarray(tone), 24_000, 16_000))[100:-100].max() < 1e-2


@pytest.mark.parametrize(("source", "target"), RATES)
def test_any_part_of_a_clip_is_resampled_alike(source, target):
    """No seams between the steps of the convolution: an impulse's echo does not depend on where it stands."""
    period = source // np.gcd(source, target)
    clips = np.zeros((40, 50 * period), np.float32)
    clips[np.arange(40), np.arange(40) * period] = 1
    echoes = np.asarray(resample(jnp.asarray(clips), source, target))
    step, reach = target // np.gcd(source, target), 40
    padded = np.pad(echoes, ((0, 0), (reach, 0)))
    windows = np.stack([padded[i, i * step :][: reach + step] for i in range(40)])
    late = windows[20]
    assert late.max() > 0.6 * min(1, target / source)
    np.testing.assert_allclose(windows[20:], np.broadcast_to(late, windows[20:].shape), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("source", "target"), [*RATES, (32_000, 16_000)])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_what_soxr_makes_of_audio(clips, source, target, more):
    samples = audio_files.load(clips[more], source).samples[: 2 * source + more]
    ours = np.asarray(as_soxr(jnp.asarray(samples), source, target))
    theirs = audio_files.resample(samples, source, target)
    assert ours.shape == theirs.shape
    # Where the rates are no simple ratio, soxr begins a little differently.
    inner = slice(2 if source == 44_100 else 0, None)
    assert np.abs(ours - theirs)[inner].max() < 2e-6 * np.abs(theirs).max()


def test_resampling_is_linear_and_keeps_batch_entries_apart():
    a, b = normal(2, 1, 999), normal(2, 1, 999, seed=1)
    whole = resample(2 * a - 3 * b, 24_000, 16_000)
    np.testing.assert_allclose(
        whole, 2 * resample(a, 24_000, 16_000) - 3 * resample(b, 24_000, 16_000), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(whole[1, 0], resample((2 * a - 3 * b)[1, 0], 24_000, 16_000), rtol=0, atol=1e-5)


def test_gradient_is_the_transpose():
    x, direction = normal(2, 500), normal(2, 500, seed=1)
    weight = normal(2, -(-500 * 2 // 3), seed=2)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weight * dsp.resample(x, 24_000, 16_000))))(x)
    expected = jnp.sum(weight * resample(direction, 24_000, 16_000))
    assert float(jnp.sum(gradient * direction)) == pytest.approx(float(expected), rel=1e-4)
