"""The language model of the semantic evaluation at the paper's size: 100.7 M parameters for 8 codebooks of 2048."""

from omnicodec_jax.recipes.language_model import config  # noqa: F401
