"""A codec that two CPU cores can train: 12.5 Hz, 1 + 15 codebooks of 1024 entries, 2 kbit/s, 5.9 M parameters."""

from omnicodec_jax.recipes.small import config  # noqa: F401
