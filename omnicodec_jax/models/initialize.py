"""First values of a model: random parameters, and codebooks that k-means fits to real batches."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.quantize import CODEBOOKS

COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for what runs once: hundreds of random draws compile in a third of the time."""

Batch = tuple[Float[ArrayLike, "B 1 T"], Float[ArrayLike, "B S F"] | None]


def init_variables(model: nn.Module, key: PRNGKeyArray) -> dict[str, Any]:
    """{"params", "codebooks"} of a module: PyTorch's initial distributions, empty codebooks. Jit it."""
    return dict(model.init(key, *model.example_inputs()))  # type: ignore[attr-defined]


def initialize_codebooks(
    model: OmniCodec, variables: dict[str, Any], batches: Iterable[Batch], key: PRNGKeyArray
) -> dict[str, Any]:
    """Fits the semantic codebook, then layer after layer the acoustic ones, each to what is left (spec §8.4).

    The batches together should hold ten times as many frames as a codebook has entries. They may be sharded: the
    fit is over all of them.
    """

    def branches(variables: dict[str, Any], audio: jax.Array, features: jax.Array | None):
        def call(model: OmniCodec):
            latent = model.acoustic_latent(audio)
            return latent, model.semantic_frames(features, latent.shape[1])

        return nn.apply(call, model)(variables)

    def fit(variables: dict[str, Any], latent: jax.Array, hidden: jax.Array | None, key: jax.Array):
        def call(model: OmniCodec):
            semantic_key, acoustic_key = jax.random.split(key)
            codes = None
            if hidden is not None:
                model.fit_semantic(hidden, semantic_key)
                codes = model.encode_semantic(hidden)
            model.fit_acoustic(latent, codes, acoustic_key)

        return nn.apply(call, model, mutable=[CODEBOOKS])(variables)[1]

    parts = [jax.jit(branches)(variables, *batch) for batch in batches]
    latent, hidden = jax.tree.map(lambda *leaves: jnp.concatenate([_one_row(leaf) for leaf in leaves], axis=1), *parts)
    codebooks = jax.jit(fit)(variables, latent, hidden, key)[CODEBOOKS]
    # The same entries as if one batch had been seen: with the counts of many, the moving averages would hardly follow
    # the encoder for hundreds of steps, nor would any entry count as dead.
    for statistics in codebooks.values():
        statistics.update({name: statistics[name] / len(parts) for name in ("embedding_sum", "cluster_usage")})
    return {**variables, CODEBOOKS: codebooks}


def _one_row(x: Float[Array, "B N D"]) -> Float[Array, "1 M D"]:
    return x.reshape(1, -1, x.shape[-1])
