"""OmniCodec-F at 6.25 Hz as the paper describes it: strides [12, 8, 5, 4], 1 + 31 codebooks, 2200 bit/s."""

from omnicodec_jax.recipes.paper_6hz import config  # noqa: F401
