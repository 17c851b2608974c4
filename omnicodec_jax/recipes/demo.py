"""A codec small enough for two CPU cores: 12.5 Hz, 1 + 8 codebooks of 256 entries, 900 bit/s, 1.0 M parameters.

    make demo                                                           # prepares the bundled clips first
    omnicodec train --config demo --workdir runs/demo_from_nothing

Its semantic features are stacked log-mel frames, so that it needs no weights from elsewhere. On two cores it takes
under eight minutes; the mel distance of held-out clips falls by half (docs/training.md).
"""

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
        dimension=64,
        seanet=SEANetConfig(n_filters=8, n_residual_layers=1),
        transformer=TransformerConfig(num_heads=4, num_layers=2, dim_feedforward=256, context=50),
        codebook=CodebookConfig(decay=0.95),
        semantic=SemanticConfig(source="log_mel", feature_dim=1024, codebook_size=256, codebook_dim=64),
        acoustic=AcousticConfig(num_quantizers=8, codebook_size=256, codebook_dim=32, min_quantizers=2),
        wavlm_dim=None,
    ),
    discriminators=DiscriminatorConfig(
        stft=STFTDiscriminatorConfig(windows=(876,), filters=8),
        waveform=WaveformDiscriminatorConfig(periods=(3,), windows=(), channels=64),
        wavlm=None,
    ),
    optimizer=OptimizerConfig(
        weight_decay_modules=("encoder_transformer", "decoder_transformer", "semantic_encoder", "semantic_decoder"),
        learning_rate=5e-4,
        warmup_steps=20,
        total_steps=500,
    ),
    train=TrainConfig(compute_dtype="float32", remat=False),
    run=RunConfig(log_every=20, validate_every=100, save_every=100),
    data=DataConfig(
        prepared="runs/demo/prepared",
        domains=(DomainConfig(name="speech"), DomainConfig(name="music"), DomainConfig(name="sound")),
        batch_size=4,
        segment_samples=48_000,
        num_workers=0,
    ),
)
