"""The semantic front end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from omnicodec_jax import dsp
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import AudioError
from omnicodec_jax.semantic import FeatureExtractor

log_mel = jax.jit(dsp.log_mel)


@pytest.mark.parametrize("index", range(11))
def test_log_mel_is_that_of_whisper(clips, index):
    samples = audio_files.load(clips[index], 16_000).samples[: 3 * 16_000 + 77 * index]
    whisper = WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000, chunk_length=300)
    theirs = whisper(samples, sampling_rate=16_000, padding=False, truncation=False, return_tensors="np")
    theirs = theirs.input_features[0].T
    ours = log_mel(jnp.asarray(samples))
    assert ours.shape == theirs.shape == (samples.size // 160, 128)
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.fixture(scope="module")
def extract() -> FeatureExtractor:
    """Without an encoder: stacked log-mel frames."""
    return FeatureExtractor(None, jax.local_devices()[:1])


@pytest.mark.parametrize("samples", [600, 77_777, 240_000, 240_240, 305_003, 480_239])
def test_features_from_blocks_are_those_of_the_whole_clip(clips, extract, samples):
    audio = np.concatenate([audio_files.load(clip, 24_000).samples for clip in clips[:3]])[:samples]
    assert audio.size == samples
    whole = np.asarray(log_mel(jnp.asarray(audio_files.resample(audio, 24_000, 16_000))))
    features = extract(audio, 24_000)
    assert features.shape == (-(-samples // 1920), 1024) or samples == 600
    np.testing.assert_allclose(features, dsp.stack_frames(whole), rtol=0, atol=1e-5)


def test_log_mel_does_not_wait_behind_the_steps_of_a_device(extract, monkeypatch):
    compute, used = extract._log10_mel, []

    def note(block):
        used.append(block.devices())
        return compute(block)

    monkeypatch.setattr(extract, "_log10_mel", note)
    with jax.default_device(jax.local_devices()[1]):
        extract(np.ones(24_000, np.float32), 24_000)
    assert used == [{jax.local_devices(backend="cpu")[0]}]


def test_clip_below_one_window_has_no_features(extract):
    with pytest.raises(AudioError, match="598 samples"):
        extract(np.ones(598, np.float32), 24_000)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_frames_are_stacked_in_order_with_the_last_one_repeated(count):
    mel = np.random.default_rng(0).normal(size=(count, 128)).astype(np.float32)
    stacked = dsp.stack_frames(mel)
    assert stacked.shape == (-(-count // 8), 1024)
    frames = stacked.reshape(-1, 128)
    np.testing.assert_array_equal(frames[:count], mel)
    np.testing.assert_array_equal(frames[count:], np.broadcast_to(mel[-1], frames[count:].shape))


@pytest.mark.parametrize("window", [206, 876, 2296])
def test_product_with_cosines_and_sines_is_the_fourier_transform(window):
    frames = np.random.default_rng(0).normal(size=(2, 5, window)).astype(np.float32)
    expected = np.fft.rfft(frames.astype(np.float64))
    np.testing.assert_allclose(dsp.dft(jnp.asarray(frames)), expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("steps", "size"), [(13, 25), (25, 13), (12, 12), (13, 1)])
def test_a_part_of_a_sequence_is_interpolated_as_in_the_whole(steps, size):
    """A live stream holds a part of the semantic branch; offline all of it is there."""
    seconds, first = 5, 2 * steps
    whole = np.random.default_rng(0).standard_normal((1, seconds * steps, 3), np.float32)
    expected = dsp.interpolate(whole, seconds * size)
    places = np.arange(3 * size, seconds * size)
    part = dsp.interpolate_part(whole[:, first:], first, places, steps, size)
    np.testing.assert_array_equal(part, expected[:, places])
