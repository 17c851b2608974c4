"""An ablation that the paper does not have: the semantic features are stacked log-mel frames, of no trained encoder."""

from omnicodec_jax.recipes.ablations.log_mel_source import config  # noqa: F401
