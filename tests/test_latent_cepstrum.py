"""The term that draws the first channels of the encoder's latent to the cepstrum of the frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn
from tiny import normal
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import losses
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.training.gan import Gan

SECONDS, RATE, HOP, FRAMES = 2.0, 24_000, 1920, 25


def clips() -> np.ndarray:
    """Two seconds of each clip that comes with the package."""
    loaded = [audio_files.load(path, RATE).samples for path in sorted(BUNDLED_CLIPS.rglob("*.flac"))]
    return np.stack([clip[: int(SECONDS * RATE)] for clip in loaded if clip.size > SECONDS * RATE])[:, None]


def cepstrum(audio: np.ndarray) -> np.ndarray:
    """The latent that has no loss, found from the gradient: the loss is a sum of squares."""
    latent = jnp.zeros((audio.shape[0], -(-audio.shape[2] // HOP), losses.CEPSTRUM_SIZE))
    gradient = jax.grad(losses.latent_cepstrum)(latent, jnp.asarray(audio), RATE, HOP)
    return np.asarray(-gradient * latent.size / 2)


def test_coefficients_are_those_of_a_cosine_transform():
    block = np.random.default_rng(0).normal(size=(losses.CEPSTRUM_SLICES, losses.CEPSTRUM_MELS))
    mine = np.einsum("sm,smc->c", block, losses.cepstral_basis())
    theirs = losses.CEPSTRUM_SCALE * dctn(block, norm="ortho")
    assert mine[0] == pytest.approx(theirs[0, 0], rel=1e-5)
    for slice, band in ((0, 1), (0, 9), (1, 0), (1, 2)):  # divided by what the square root of its deviation is
        scaled = theirs[slice, band] * np.sqrt((1 + slice) ** 2 * (1 + band))
        assert np.abs(mine - scaled).min() < 1e-5


def test_coefficients_of_real_audio_have_a_variance_of_about_one_and_the_lowest_the_most():
    deviations = cepstrum(clips()).std(axis=(0, 1))
    assert np.mean(deviations**2) == pytest.approx(1, abs=0.5)
    assert deviations[0] == deviations.max()
    assert deviations.min() > 0.3


def test_a_latent_that_says_the_cepstrum_has_no_loss_and_its_other_channels_are_free():
    audio = clips()
    latent = jnp.concatenate([cepstrum(audio), normal(len(audio), FRAMES, 3)], axis=2)
    assert losses.latent_cepstrum(latent, jnp.asarray(audio), RATE, HOP) == pytest.approx(0, abs=1e-6)
    assert losses.latent_cepstrum(jnp.zeros_like(latent), jnp.asarray(audio), RATE, HOP) > 0.5


def test_cepstrum_of_a_frame_stays_where_it_is_in_a_crop_whose_last_frame_is_cut_off():
    whole, cut_off = cepstrum(clips()), cepstrum(clips()[:, :, : (FRAMES - 1) * HOP + 1])
    shift = whole - cut_off  # the mean over all frames, which is subtracted, is another
    assert np.abs(shift[:, : FRAMES - 2] - shift[:1, :1]).max() < 1e-4


def test_term_is_there_where_it_has_a_weight_and_ends_at_its_last_step():
    def term(step: int, weight: float, until: int | None) -> dict:
        config = replaced(TINY, loss={"latent_cepstrum": weight}, train={"latent_cepstrum_until": until})
        return Gan(config).latent_cepstrum(normal(2, 3, 8), 0.1 * normal(2, 1, 5760), jnp.int32(step))

    assert term(0, 0.0, None) == {}
    assert term(9, 2.0, None)["latent_cepstrum"] > 0
    assert term(9, 2.0, 10)["latent_cepstrum"] > 0
    assert term(10, 2.0, 10)["latent_cepstrum"] == 0
