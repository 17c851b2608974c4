"""The paper's OmniCodec-FT (Table 4): a trained model goes on with speech alone."""

from omnicodec_jax.recipes.ablations.fine_tuned import config  # noqa: F401
