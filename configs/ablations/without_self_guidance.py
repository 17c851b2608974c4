"""The paper's ablation "w/o self-guidance loss" (Table 2): its weight is 0."""

from omnicodec_jax.recipes.ablations.without_self_guidance import config  # noqa: F401
