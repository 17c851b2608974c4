"""Models of 12 samples a frame with a few thousand parameters."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from omnicodec_jax.config import (
    AcousticConfig,
    CodecConfig,
    MimiConfig,
    SEANetConfig,
    SemanticConfig,
    TransformerConfig,
)
from omnicodec_jax.model_directory import build
from omnicodec_jax.models.initialize import init_variables

HOP = 12
SHARED = {
    "dimension": 16,
    "seanet": SEANetConfig(n_filters=4, ratios=(3, 2), n_residual_layers=1),
    "transformer": TransformerConfig(num_heads=2, num_layers=2, dim_feedforward=32, context=6),
}
OMNICODEC = CodecConfig(
    **SHARED,
    semantic=SemanticConfig(feature_dim=10, codebook_size=16, codebook_dim=12),
    acoustic=AcousticConfig(num_quantizers=4, codebook_size=16, codebook_dim=8, min_quantizers=2),
    wavlm_dim=6,
)
MIMI = MimiConfig(**SHARED, num_quantizers=4, codebook_size=16, codebook_dim=8)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@cache
def variables(config: CodecConfig | MimiConfig) -> dict[str, Any]:
    """Random values under which every part matters: LayerScales near 0.3, codebooks that are not empty."""
    rng = np.random.default_rng(0)

    def value(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] in ("initialized", "steps_until_check"):
            return np.full(shape, 1.0 if path[-1] == "initialized" else config.codebook.check_every)
        if path[-1] == "cluster_usage":
            return rng.uniform(0.5, 2, shape)
        if path[-1] == "embedding_sum":
            return 0.3 * rng.normal(size=shape)
        if path[-1] == "kernel":
            return rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5
        if path[-1] == "scale":
            return rng.normal(0.3 if "layer_scale" in path[-2] else 1.0, 0.05, shape)
        return 0.02 * rng.normal(size=shape)

    shapes = flatten_dict(jax.eval_shape(lambda: init_variables(build(config), jax.random.key(0))))
    with jax.ensure_compile_time_eval():  # they are kept, also where the first to ask is a function that is traced
        leaves = {path: jnp.asarray(value(path, leaf.shape), jnp.float32) for path, leaf in shapes.items()}
    return unflatten_dict(leaves)
