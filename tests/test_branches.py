"""The metrics that say which branch the decoder hears."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from omnicodec_jax.models.codec import CodecOutput
from omnicodec_jax.models.quantize import Quantized
from omnicodec_jax.training.branches import branch_metrics

SEMANTIC, ACOUSTIC = normal(2, 50, 16, seed=1), 0.5 * normal(2, 50, 16, seed=2)


def metrics(semantic: Any, acoustic: Any, latent: Any = ACOUSTIC) -> dict[str, float]:
    unused: Any = None
    quantized = Quantized(acoustic, unused, unused, unused, unused)
    output = CodecOutput(unused, latent, quantized, unused, semantic, unused, unused, unused, unused)
    return {name: float(value) for name, value in branch_metrics(output).items()}


def test_shares_of_the_decoders_input_are_those_of_its_variance():
    found = metrics(SEMANTIC, ACOUSTIC)
    assert found["decoder_input_semantic"] == pytest.approx(1 / 1.25, abs=0.05)
    assert found["decoder_input_semantic"] + found["decoder_input_acoustic"] == pytest.approx(1, abs=1e-6)


def test_a_branch_that_says_the_same_all_the_time_has_no_share():
    constant = jnp.broadcast_to(100.0 * ACOUSTIC[:, :1], ACOUSTIC.shape)
    assert metrics(SEMANTIC, constant)["decoder_input_acoustic"] == pytest.approx(0, abs=1e-3)
    assert metrics(constant, ACOUSTIC)["decoder_input_acoustic"] == pytest.approx(1, abs=1e-3)


def test_a_clip_that_stays_the_same_but_for_rounding_has_no_share():
    still = jnp.broadcast_to(100.0 * SEMANTIC[:, :1], SEMANTIC.shape)
    found = metrics(still * (1 + 1e-7 * normal(2, 50, 16, seed=3)), still * (1 + 1e-7 * normal(2, 50, 16, seed=4)))
    assert found["decoder_input_semantic"] == pytest.approx(0, abs=1e-3)


def test_silence_of_both_branches_is_no_share_rather_than_not_a_number():
    found = metrics(jnp.zeros_like(SEMANTIC), jnp.zeros_like(ACOUSTIC))
    assert found["decoder_input_semantic"] == found["decoder_input_acoustic"] == 0


def test_variation_of_the_latent_is_over_time():
    assert metrics(SEMANTIC, ACOUSTIC)["latent_variation"] == pytest.approx(0.5, rel=0.05)
    assert metrics(SEMANTIC, ACOUSTIC, ACOUSTIC + 100)["latent_variation"] == pytest.approx(0.5, rel=0.05)
    assert metrics(SEMANTIC, ACOUSTIC, np.float32(0) * ACOUSTIC)["latent_variation"] == 0


def test_without_a_semantic_branch_there_are_no_shares():
    assert metrics(None, ACOUSTIC).keys() == {"latent_variation"}
