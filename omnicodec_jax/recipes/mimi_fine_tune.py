"""The published Mimi goes on learning from audio of yours, and returns to transformers.

    omnicodec convert mimi --checkpoint kyutai/mimi --out models/mimi
    omnicodec train --config mimi_fine_tune --workdir runs/mimi_fine_tune --run.start-from models/mimi \\
        --data.prepared data/prepared
    omnicodec export-model --workdir runs/mimi_fine_tune --out models/mine
    omnicodec convert mimi --checkpoint models/mine --out mine_for_transformers --to-transformers

Neither Mimi's discriminators nor its WavLM head are published, so discriminators begin at random and after the codec,
and nothing teaches the semantic codebook. With `--train.freeze encoder quantizer` only the decoder learns, and all
tokens stay as they are.
"""

import dataclasses

from omnicodec_jax.config import Config, DataConfig, MimiConfig, OptimizerConfig, TrainConfig
from omnicodec_jax.recipes import mimi


def fine_tune(config: Config) -> Config:
    return dataclasses.replace(
        config,
        codec=MimiConfig(),
        loss=dataclasses.replace(config.loss, wavlm_distillation=0.0),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            weight_decay=config.optimizer.weight_decay,
            weight_decay_modules=config.optimizer.weight_decay_modules,
            warmup_steps=1000,
            total_steps=50_000,
        ),
        data=DataConfig(batch_size=16, segment_samples=72_000),
        train=TrainConfig(discriminator_from=2000),
    )


config = fine_tune(mimi.config)
