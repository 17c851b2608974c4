"""The paper's ablation "w/o Adapter-1" (Table 2): the semantic vector is not taken out of the acoustic latent."""

from omnicodec_jax.recipes.ablations.without_adapter_1 import config  # noqa: F401
