"""Loss terms as pure functions; their weights are in `config.LossConfig`."""

from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from omnicodec_jax.models.codec import CodecOutput

Scalar = Float[Array, ""]


def self_guidance(output: CodecOutput, norm: Literal["l1", "l2"]) -> Scalar:
    """Paper Eq. 2: how far the decoder's hidden state on codes is from that on the latent before quantization."""
    difference = output.hidden_quantized - stop_gradient(output.hidden_guide)
    return jnp.mean(jnp.abs(difference) if norm == "l1" else difference**2)


def semantic_reconstruction(output: CodecOutput, features: Float[Array, "B S F"]) -> Scalar:
    """Mean absolute error of the reconstructed semantic features (spec §3.1)."""
    if output.semantic_features is None:
        raise ValueError("this config has no semantic branch to reconstruct features with")
    return jnp.mean(jnp.abs(output.semantic_features - features))
