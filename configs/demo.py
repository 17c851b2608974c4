"""A codec small enough for two CPU cores: 12.5 Hz, 1 + 8 codebooks of 256 entries, 900 bit/s, 1.0 M parameters.

Its semantic features are stacked log-mel frames, so that it needs no weights from elsewhere.
"""

from omnicodec_jax.config import (
    AcousticConfig,
    CodecConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
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
        semantic=SemanticConfig(source="log_mel", feature_dim=1024, codebook_size=256, codebook_dim=64),
        acoustic=AcousticConfig(num_quantizers=8, codebook_size=256, codebook_dim=32, min_quantizers=2),
        wavlm_dim=None,
    ),
    discriminators=DiscriminatorConfig(
        stft=STFTDiscriminatorConfig(windows=(206, 876), filters=8),
        waveform=WaveformDiscriminatorConfig(periods=(3,), windows=(334,), channels=64),
        wavlm=None,
    ),
    optimizer=OptimizerConfig(
        weight_decay_modules=("encoder_transformer", "decoder_transformer", "semantic_encoder", "semantic_decoder"),
        warmup_steps=100,
        total_steps=2000,
    ),
    train=TrainConfig(compute_dtype="float32", remat=False),
    run=RunConfig(log_every=20, validate_every=200, save_every=200),
    data=DataConfig(prepared="runs/demo/prepared", batch_size=4, segment_samples=48_000, num_workers=0),
)
