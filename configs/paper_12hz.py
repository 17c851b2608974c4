"""OmniCodec at 12.5 Hz as the paper describes it: 1 + 31 codebooks, 4400 bit/s, 133.1 M parameters."""

from omnicodec_jax.recipes.paper_12hz import config  # noqa: F401
