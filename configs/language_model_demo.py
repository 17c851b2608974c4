"""A language model that learns a minute of tokens of `small` in half a minute on two CPU cores: 1.1 M parameters."""

from omnicodec_jax.recipes.language_model_demo import config  # noqa: F401
