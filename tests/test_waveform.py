"""What the waveform family of discriminators does to audio before its networks."""

import jax
import numpy as np
import pytest

from omnicodec_jax.discriminators.waveform import deinterleave

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("period", [2, 3, 5, 7, 11])
def test_rows_of_a_period_are_its_samples_to_the_last_bit(period):
    x = np.random.default_rng(period).normal(size=(2, period * 301)).astype(np.float32)
    rows = jax.jit(deinterleave, static_argnums=1)(x, period)
    np.testing.assert_array_equal(rows, x.reshape(2, -1, period).swapaxes(1, 2))
