"""A language model small enough to learn a minute of tokens in half a minute on two CPU cores: 0.1 M parameters."""

from omnicodec_jax.recipes.language_model_demo import config  # noqa: F401
