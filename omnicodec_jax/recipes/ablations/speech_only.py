"""The paper's ablation "w/o music and general sound dataset" (Table 2): trained on speech alone.

    omnicodec train --config ablations/speech_only --workdir runs/speech_only \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses

from omnicodec_jax.config import Config, DomainConfig
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, domains=(DomainConfig(name="speech"),)))


config = ablate(paper_12hz.config)
