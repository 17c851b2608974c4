"""The paper's ablation "w/o Adapter-1" (Table 2): the semantic vector is not taken out of the acoustic latent.

    python train.py --config configs/ablations/without_adapter_1.py --workdir runs/without_adapter_1 \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features
"""

import dataclasses
from pathlib import Path

from omnicodec_jax import config_files
from omnicodec_jax.config import Config


def ablate(config: Config) -> Config:
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, adapter_1=False))


config = ablate(config_files.load(Path(__file__).parents[1] / "paper_12hz.py"))
