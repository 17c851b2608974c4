"""The paper's ablation "w/o semantic branch" (Table 2): acoustic codebooks alone, at the same bit rate."""

from omnicodec_jax.recipes.ablations.without_semantic_branch import config  # noqa: F401
