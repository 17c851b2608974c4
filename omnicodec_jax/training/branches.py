"""What the decoder hears of each branch, and how much the encoder's latent says, as metrics of a training step."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from omnicodec_jax.losses import Scalar, Terms
from omnicodec_jax.models.codec import CodecOutput


def branch_metrics(output: CodecOutput) -> Terms:
    """The share that each branch has in the variance of the decoder's input, and the variation of the encoder's latent.

    All of it is over time within each clip. The shares are of the variance of all clips together, and add up to 1: a
    branch's share is its covariance with the sum of both, and so is below 0 where it only takes away from the other.
    The variation is the standard deviation, over all channels, and then the mean over the clips.
    """
    metrics = {"latent_variation": jnp.mean(jnp.sqrt(jnp.mean(over_time(output.latent) ** 2, axis=(1, 2))))}
    if output.semantic_image is not None:
        branches = {"semantic": output.semantic_image, "acoustic": output.acoustic.output}
        heard = output.semantic_image + output.acoustic.output
        metrics |= {f"decoder_input_{name}": share(branch, heard) for name, branch in branches.items()}
    return metrics


def over_time(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """The deviation from each clip's mean over time."""
    return x - jnp.mean(x, axis=1, keepdims=True)


def share(part: Float[Array, "B N D"], whole: Float[Array, "B N D"]) -> Scalar:
    """The share of the variance over time of `whole` that its summand `part` brings, all clips together; 0 of none.

    A clip whose vectors are the same all the time has rounding errors for a variance, and a share of its own would be
    a ratio of these.
    """
    deviation = over_time(whole)
    return jnp.sum(over_time(part) * deviation) / jnp.maximum(jnp.sum(deviation**2), 1e-20)
