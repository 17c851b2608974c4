"""First codebooks from several batches, on one device and on eight."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import HOP, OMNICODEC, normal, variables

from omnicodec_jax.config import CodebookConfig
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import initialize_codebooks

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
