"""An ablation that the paper does not have: the semantic features are stacked log-mel frames, of no trained encoder.

    omnicodec train --config ablations/log_mel_source --workdir runs/log_mel_source \\
        --run.wavlm models/wavlm --data.prepared data/prepared

It shows what a supervised audio encoder brings to the semantic codes.
"""

import dataclasses

from omnicodec_jax.config import Config
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    assert config.codec.semantic is not None
    semantic = dataclasses.replace(config.codec.semantic, source="log_mel", feature_dim=1024)
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, semantic=semantic))


config = ablate(paper_12hz.config)
