"""The paper's ablation "w/o self-guidance loss" (Table 2): its weight is 0.

    python train.py --config configs/ablations/without_self_guidance.py --workdir runs/without_self_guidance \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses
from pathlib import Path

from omnicodec_jax import config_files
from omnicodec_jax.config import Config


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, self_guidance=0.0))


config = ablate(config_files.load(Path(__file__).parents[1] / "paper_12hz.py"))
