"""The paper's ablation "w/o music and general sound dataset" (Table 2): trained on speech alone."""

from omnicodec_jax.recipes.ablations.speech_only import config  # noqa: F401
