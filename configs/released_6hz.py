"""OmniCodec at 6.25 Hz in the manner of the released code: 1 + 32 codebooks, 2268.75 bit/s, 147.1 M parameters."""

from omnicodec_jax.recipes.released_6hz import config  # noqa: F401
