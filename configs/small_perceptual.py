"""A codec of the recipe `small` goes on with a perceptual loss, so that words are understood."""

from omnicodec_jax.recipes.small_perceptual import config  # noqa: F401
