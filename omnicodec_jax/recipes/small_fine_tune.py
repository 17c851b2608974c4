"""The decoder of the bundled codec learns from audio of yours for a minute on two CPU cores.

    omnicodec train --config small_fine_tune --workdir runs/small_fine_tune --run.start-from small \\
        --run.encoder ENCODER --data.prepared data/prepared
    omnicodec export-model --workdir runs/small_fine_tune --out models/mine --encoder ENCODER

ENCODER is the folder weights/small/encoder of the package. Encoder and quantizer are frozen: tokens stay as they are,
so that what was tokenized before can be decoded by either codec. More audio wants more steps
(`--optimizer.total-steps`).
"""

import dataclasses

from omnicodec_jax.config import Config, DiscriminatorConfig, OptimizerConfig, RunConfig, TrainConfig
from omnicodec_jax.recipes import small

STEPS = 60


def fine_tune(config: Config) -> Config:
    return dataclasses.replace(
        config,
        # Untrained discriminators would lead a trained decoder astray.
        discriminators=DiscriminatorConfig(stft=None, waveform=None, wavlm=None),
        loss=dataclasses.replace(config.loss, latent_cepstrum=0.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            betas=config.optimizer.betas,
            weight_decay_modules=config.optimizer.weight_decay_modules,
            warmup_steps=10,
            total_steps=STEPS,
        ),
        train=TrainConfig(
            compute_dtype="float32",
            remat=False,
            freeze=("encoder", "semantic", "quantizer"),
        ),
        run=RunConfig(log_every=20, validate_every=1000, save_every=1000),
        data=dataclasses.replace(
            config.data,
            features=None,
            domains=tuple(dataclasses.replace(domain, weight=1.0) for domain in config.data.domains),
            batch_size=6,
        ),
    )


config = fine_tune(small.config)
