"""First codebooks from several batches, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import HOP, OMNICODEC, normal, variables

from omnicodec_jax.config import CodebookConfig
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.conv import CausalConv1d, Dense
from omnicodec_jax.models.initialize import AUDIO_RMS, initialize_codebooks, on_cpu, preserve_variance
from omnicodec_jax.models.seanet import SEANetEncoder

FRAMES = 24
CONFIG = dataclasses.replace(OMNICODEC, codebook=CodebookConfig(kmeans_iterations=5))
ACOUSTIC_ONLY = dataclasses.replace(CONFIG, semantic=None, wavlm_dim=None)


def initialized(config, place=lambda x: x):
    batches = []
    for seed in (0, 1):
        audio = place(normal(8, 1, FRAMES * HOP, seed=seed))
        features = None if config.semantic is None else place(normal(8, FRAMES, 10, seed=seed + 2))
        batches.append((audio, features))
    return initialize_codebooks(OmniCodec(config), variables(config), batches, jax.random.key(0))


@pytest.mark.parametrize("config", [CONFIG, ACOUSTIC_ONLY], ids=["complete", "without semantic branch"])
def test_every_codebook_is_fitted_and_nothing_else_changes(config):
    before, after = variables(config), initialized(config)
    jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
    assert before["codebooks"].keys() == after["codebooks"].keys()
    for state in after["codebooks"].values():
        assert np.asarray(state["initialized"]).all()
        assert np.linalg.norm(state["embedding_sum"], axis=-1).min() > 0
        np.testing.assert_array_equal(state["cluster_usage"].sum(-1), 8 * FRAMES)  # of one batch, not of both


def test_sharded_batches_give_the_codebooks_of_one_device():
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    alone, sharded = initialized(CONFIG), initialized(CONFIG, lambda x: jax.device_put(x, sharding))
    for name, state in alone["codebooks"].items():
        for field, value in state.items():
            np.testing.assert_allclose(sharded["codebooks"][name][field], value, rtol=1e-4, atol=1e-4)


def test_kernels_that_preserve_the_variance_are_wider_and_nothing_else_changes():
    drawn = jax.jit(Dense(512).init)(jax.random.key(0), jnp.zeros((1, 256)))["params"]
    wide, x = preserve_variance(drawn), normal(1000, 256)
    kept = np.var(np.asarray(x @ wide["kernel"])) / np.var(np.asarray(x))
    assert kept == pytest.approx(1, rel=0.05)
    assert np.var(np.asarray(x @ drawn["kernel"])) / np.var(np.asarray(x)) == pytest.approx(1 / 3, rel=0.05)
    np.testing.assert_array_equal(wide["bias"], drawn["bias"])


def test_first_convolution_brings_audio_to_a_variance_of_one():
    encoder = SEANetEncoder(OMNICODEC.seanet, OMNICODEC.dimension)
    audio = AUDIO_RMS * normal(4, 20 * HOP, 1)
    drawn = jax.jit(encoder.init)(jax.random.key(0), audio)["params"]
    wide = preserve_variance({"encoder": drawn})["encoder"]
    conv_in = CausalConv1d(OMNICODEC.seanet.n_filters, OMNICODEC.seanet.kernel_size)
    narrow, brought = (jnp.var(conv_in.apply({"params": params["conv_in"]}, audio)) for params in (drawn, wide))
    assert narrow < 0.1
    assert brought == pytest.approx(1, abs=0.7)  # there are few channels, with random biases


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device():
    used = []

    def draw(key):
        used.append(jax.config.jax_default_device)
        return {"kernel": jax.random.normal(key, (3,))}

    with jax.default_device(jax.devices()[1]):
        drawn = on_cpu(draw, jax.random.key(1))
    assert used == [jax.local_devices(backend="cpu")[0]]
    assert isinstance(drawn["kernel"], np.ndarray)
    np.testing.assert_array_equal(drawn["kernel"], jax.jit(draw)(jax.random.key(1))["kernel"])


def test_weights_are_drawn_where_jax_may_not_use_the_cpu(monkeypatch):
    def refuse(backend):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", refuse)
    assert on_cpu(lambda key: jax.random.normal(key, (3,)), jax.random.key(1)).shape == (3,)
