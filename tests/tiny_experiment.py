"""A whole training run in miniature: every part is there, each as small as it goes."""

import dataclasses
from typing import Any

from omnicodec_jax.config import (
    AcousticConfig,
    CodebookConfig,
    CodecConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
    DomainConfig,
    OptimizerConfig,
    RunConfig,
    SEANetConfig,
    SemanticConfig,
    STFTDiscriminatorConfig,
    TrainConfig,
    TransformerConfig,
    WaveformDiscriminatorConfig,
)

config = Config(
    codec=CodecConfig(
        dimension=16,
        seanet=SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1),
        transformer=TransformerConfig(num_heads=2, num_layers=1, dim_feedforward=32, context=8),
        codebook=CodebookConfig(decay=0.9, kmeans_iterations=5),
        semantic=SemanticConfig(source="log_mel", feature_dim=1024, codebook_size=8, codebook_dim=8),
        acoustic=AcousticConfig(num_quantizers=3, codebook_size=8, codebook_dim=8, min_quantizers=2),
        wavlm_dim=None,
    ),
    discriminators=DiscriminatorConfig(
        stft=STFTDiscriminatorConfig(filters=4, windows=(206,)),
        waveform=WaveformDiscriminatorConfig(periods=(3,), windows=(), channels=64),
        wavlm=None,
    ),
    optimizer=OptimizerConfig(warmup_steps=2, total_steps=8, ema_decay=0.9),
    data=DataConfig(
        domains=(DomainConfig(name="sound", weight=3.0), DomainConfig(name="speech")),
        batch_size=8,
        segment_samples=5760,
        num_workers=0,
    ),
    train=TrainConfig(compute_dtype="float32", remat=False),
    run=RunConfig(log_every=1, validate_every=4, validation_batches=1, save_every=2, keep_last=2),
)


def replaced(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with other values in some of its sections."""
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)
