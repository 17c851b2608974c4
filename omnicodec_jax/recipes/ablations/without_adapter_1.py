"""The paper's ablation "w/o Adapter-1" (Table 2): the semantic vector is not taken out of the acoustic latent.

    omnicodec train --config ablations/without_adapter_1 --workdir runs/without_adapter_1 \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses

from omnicodec_jax.config import Config
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, adapter_1=False))


config = ablate(paper_12hz.config)
