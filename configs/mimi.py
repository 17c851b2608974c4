"""Mimi (moshi paper, arXiv 2410.00037 §3.3) from random weights: 1 + 31 codebooks at 12.5 Hz, 4400 bit/s."""

from omnicodec_jax.recipes.mimi import config  # noqa: F401
