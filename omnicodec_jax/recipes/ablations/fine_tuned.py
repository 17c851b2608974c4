"""The paper's OmniCodec-FT (Table 4): a trained model goes on with speech alone.

    omnicodec train --config ablations/fine_tuned --workdir runs/fine_tuned --run.start-from MODEL \\
        --run.wavlm models/wavlm --data.prepared data/prepared --data.features data/features

MODEL is a model directory that `omnicodec export-model` has written, with its discriminators. The learning rate is a
tenth, and the run a twentieth as long; the paper gives neither.
"""

import dataclasses

from omnicodec_jax.config import Config, DomainConfig
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    optimizer = config.optimizer
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, domains=(DomainConfig(name="speech"),)),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate / 10,
            warmup_steps=optimizer.warmup_steps // 20,
            total_steps=optimizer.total_steps // 20,
        ),
    )


config = ablate(paper_12hz.config)
