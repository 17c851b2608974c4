"""A codec small enough for two CPU cores: 12.5 Hz, 1 + 8 codebooks of 256 entries, 900 bit/s, 1.0 M parameters."""

from omnicodec_jax.recipes.demo import config  # noqa: F401
