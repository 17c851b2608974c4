"""The decoder of the bundled codec learns from audio of yours for a minute on two CPU cores."""

from omnicodec_jax.recipes.small_fine_tune import config  # noqa: F401
