"""Mimi in training: what its losses are computed from, and its first codebooks."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HOP, MIMI, normal, variables

from omnicodec_jax import losses
from omnicodec_jax.config import LossConfig
from omnicodec_jax.models.codec import CodecOutput
from omnicodec_jax.models.initialize import init_variables, initialize_codebooks
from omnicodec_jax.models.mimi import Mimi

CONFIG = dataclasses.replace(
    MIMI,
    wavlm_dim=6,
    seanet=dataclasses.replace(MIMI.seanet, ratios=(6,)),
    transformer=dataclasses.replace(MIMI.transformer, num_layers=1),
)
BATCH, FRAMES = 2, 8
AUDIO = normal(BATCH, 1, FRAMES * HOP)


def forward(**options: Any) -> CodecOutput:
    return Mimi(CONFIG).apply(variables(CONFIG), AUDIO, **options)


def test_training_forward_is_decoding_what_was_encoded_and_has_a_head_for_wavlm():
    model = Mimi(CONFIG)
    codes = model.apply(variables(CONFIG), AUDIO, method="encode")
    output = forward()
    np.testing.assert_array_equal(jnp.concatenate([output.semantic.codes, output.acoustic.codes], axis=1), codes)
    decoded = model.apply(variables(CONFIG), codes, method="decode")
    np.testing.assert_allclose(output.audio, decoded, rtol=0, atol=1e-5)
    assert output.wavlm_projection.shape == (BATCH, FRAMES, 6)


def test_clips_that_bypass_the_quantizers_are_as_before_them():
    some = forward(bypassed=jnp.asarray([True, False]))
    none = forward()
    np.testing.assert_array_equal(some.audio[1], none.audio[1])
    assert not np.array_equal(some.audio[0], none.audio[0])
    np.testing.assert_array_equal(some.acoustic.codes, none.acoustic.codes)  # codebooks learn from all clips

    def by_hand(model: Mimi) -> jax.Array:
        latent = model.acoustic_latent(AUDIO)
        quantizers = (model.semantic_quantizer, model.acoustic_quantizer)
        return model.decode_latent(sum(q.project_out(q.project_in(latent)) for q in quantizers))

    expected = Mimi(CONFIG).apply(variables(CONFIG), method=by_hand)
    np.testing.assert_allclose(some.audio[0], expected[0], rtol=0, atol=1e-5)


def test_losses_are_those_that_mimi_has():
    state = normal(BATCH, 4 * FRAMES, 6)
    config = LossConfig(semantic=0.0, self_guidance=0.0, wavlm_distillation=1.0, wavlm_distillation_kind="mimi")
    terms = losses.codec_losses(forward(), None, state, 12.5, config)
    assert terms.keys() == {"commitment_acoustic", "commitment_semantic", "wavlm_distillation"}


def test_distillation_of_mimi_is_the_cosine_of_each_frame():
    state = normal(BATCH, 4 * FRAMES, 6)
    pooled = losses.pool_to_frames(state, 12.5)
    distance = partial(losses.wavlm_distillation, hidden=state, frame_rate=12.5, kind="mimi")
    scales = jnp.arange(1.0, FRAMES + 1)[None, :, None]
    assert float(distance(pooled * scales)) == pytest.approx(0, abs=1e-5)
    assert float(distance(-pooled)) == pytest.approx(2, abs=1e-5)
    # Averages of 8 states, 4 apart: the second frame is that of the states 1 to 8.
    np.testing.assert_allclose(pooled[:, 1], state[:, 1:9].mean(1), rtol=0, atol=1e-6)


def test_every_codebook_of_mimi_is_fitted():
    drawn = jax.jit(lambda key: init_variables(Mimi(CONFIG), key))(jax.random.key(0))
    batches = [(normal(8, 1, 24 * HOP, seed=seed), None) for seed in (0, 1)]
    fitted = initialize_codebooks(Mimi(CONFIG), drawn, batches, jax.random.key(0))
    for name, layers in {"semantic_quantizer": 1, "acoustic_quantizer": 3}.items():
        books = fitted["codebooks"][name]
        assert np.asarray(books["initialized"]).tolist() == [1] * layers
        np.testing.assert_array_equal(books["cluster_usage"].sum(-1), 8 * 24)
