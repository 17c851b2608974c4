"""The published Mimi goes on learning from audio of yours, and returns to transformers."""

from omnicodec_jax.recipes.small_fine_tune import config  # noqa: F401
