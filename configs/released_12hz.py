"""OmniCodec at 12.5 Hz as the authors' released code trains it: 1 + 32 codebooks, 4537.5 bit/s, 137.7 M parameters."""

from omnicodec_jax.recipes.released_12hz import config  # noqa: F401
