"""A codec of the recipe `small` goes on with a perceptual loss, so that words are understood.

    omnicodec train --config small_perceptual --workdir runs/small_perceptual --run.start-from models/small \
        --run.encoder small --data.prepared data/prepared

This was the last run of the bundled codec; docs/training.md has what it gave. The encoder is needed beside stored
features, since the step runs it on decoded audio.
"""

import dataclasses

from omnicodec_jax.config import Config, DiscriminatorConfig
from omnicodec_jax.recipes import small


def go_on(config: Config) -> Config:
    speech, *others = config.data.domains
    return dataclasses.replace(
        config,
        discriminators=DiscriminatorConfig(stft=None, waveform=None, wavlm=None),
        loss=dataclasses.replace(config.loss, latent_cepstrum=0.0, semantic_perceptual=15.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-4, total_steps=6000),
        train=dataclasses.replace(
            config.train,
            semantic_dropout=0.0,
            semantic_dropout_until=None,
            acoustic_dropout=0.05,
            latent_cepstrum_until=None,
            discriminator_from=0,
        ),
        data=dataclasses.replace(config.data, domains=(dataclasses.replace(speech, weight=8.0), *others)),
    )


config = go_on(small.config)
