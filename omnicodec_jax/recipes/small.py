"""A codec that two CPU cores can train: 12.5 Hz, 1 + 15 codebooks of 1024 entries, 2 kbit/s, 5.9 M parameters.

    python -m benchmarks.open_corpus --out data/open_corpus             # nineteen hours of open audio
    omnicodec prepare --manifest speech=data/open_corpus/train/speech.jsonl,… --out data/prepared
    omnicodec convert semantic-features --prepared data/prepared --encoder small --out data/features \
        --crop-seconds 1.28
    omnicodec train --config small --workdir runs/small

Its semantic features are those of Whisper tiny.en, which lies with the bundled codec (`small`). What a small codec
needs in order to use its acoustic codebooks is told in docs/training.md.
"""

from omnicodec_jax.config import (
    AcousticConfig,
    CodebookConfig,
    CodecConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
    DomainConfig,
    LossConfig,
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
        dimension=192,
        seanet=SEANetConfig(n_filters=16, n_residual_layers=1),
        # A step sees no more of the past than a crop holds, so that long clips are nothing new to it.
        transformer=TransformerConfig(num_heads=4, num_layers=2, dim_feedforward=768, context=32),
        semantic=SemanticConfig(source="whisper", feature_dim=384, codebook_size=1024, codebook_dim=128),
        acoustic=AcousticConfig(num_quantizers=15, codebook_size=1024, codebook_dim=64, min_quantizers=1),
        codebook=CodebookConfig(decay=0.99),
        wavlm_dim=None,
    ),
    discriminators=DiscriminatorConfig(
        stft=STFTDiscriminatorConfig(windows=(876,), filters=8),
        waveform=WaveformDiscriminatorConfig(periods=(3,), windows=(), channels=64),
        wavlm=None,
    ),
    optimizer=OptimizerConfig(
        weight_decay_modules=("encoder_transformer", "decoder_transformer", "semantic_encoder", "semantic_decoder"),
        learning_rate=1e-3,
        betas=(0.8, 0.99),
        warmup_steps=100,
        total_steps=40_000,
        ema_decay=0.999,
    ),
    loss=LossConfig(latent_cepstrum=20.0),
    train=TrainConfig(
        compute_dtype="float32",
        remat=False,
        initialization="variance_preserving",
        semantic_dropout=0.5,
        semantic_dropout_until=16_000,
        acoustic_dropout=0.1,
        latent_cepstrum_until=4_000,
        discriminator_from=24_000,
    ),
    run=RunConfig(log_every=50, validate_every=500, save_every=250),
    data=DataConfig(
        features="data/features",
        domains=(
            DomainConfig(name="speech", weight=3.0),
            DomainConfig(name="music"),
            DomainConfig(name="sound"),
        ),
        sample_by="hours",
        batch_size=8,
        segment_samples=30_720,
        num_workers=0,
    ),
)
