"""Metrics of a training step: each branch's share in the decoder's input, and how much the encoder's latent varies."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from omnicodec_jax.losses import Scalar, Terms
from omnicodec_jax.models.codec import CodecOutput

STILL = 1e-10
"""Share of a clip's energy below which its variance over time counts as a rounding error, and so as none."""


def branch_metrics(output: CodecOutput) -> Terms:
    """Computes each branch's share in the variance of the decoder's input, and the variation of the encoder's latent.

    Variances are taken over time within each clip, and then averaged over the clips. The share of a branch is its
    covariance with the sum of both branches, divided by the variance of the sum. The shares add up to 1, and one is
    below 0 where a branch only cancels a part of the other. The variation is the standard deviation over all channels.
    """
    metrics = {"latent_variation": jnp.mean(jnp.sqrt(jnp.mean(over_time(output.latent) ** 2, axis=(1, 2))))}
    if output.semantic_image is not None:
        branches = {"semantic": output.semantic_image, "acoustic": output.acoustic.output}
        total = output.semantic_image + output.acoustic.output
        metrics |= {f"decoder_input_{name}": share(branch, total) for name, branch in branches.items()}
    return metrics


def over_time(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Returns the deviation from each clip's mean over time."""
    return x - jnp.mean(x, axis=1, keepdims=True)


def share(part: Float[Array, "B N D"], whole: Float[Array, "B N D"]) -> Scalar:
    """Returns the share of the variance of `whole` over time that its summand `part` brings; 0 for a constant clip."""
    deviation = over_time(whole)
    covariance = jnp.sum(over_time(part) * deviation, axis=(1, 2))
    variance = jnp.sum(deviation**2, axis=(1, 2))
    moves = variance > STILL * jnp.sum(whole**2, axis=(1, 2))
    return jnp.mean(jnp.where(moves, covariance / jnp.where(moves, variance, 1.0), 0.0))
