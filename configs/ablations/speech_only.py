"""The paper's ablation "w/o music and general sound dataset" (Table 2): trained on speech alone.

    python train.py --config configs/ablations/speech_only.py --workdir runs/speech_only \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses
from pathlib import Path

from omnicodec_jax import config_files
from omnicodec_jax.config import Config, DomainConfig


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, domains=(DomainConfig(name="speech"),)))


config = ablate(config_files.load(Path(__file__).parents[1] / "paper_12hz.py"))
