"""The paper's ablation "w/o self-guidance loss" (Table 2): its weight is 0.

    omnicodec train --config ablations/without_self_guidance --workdir runs/without_self_guidance \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses

from omnicodec_jax.config import Config
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, self_guidance=0.0))


config = ablate(paper_12hz.config)
