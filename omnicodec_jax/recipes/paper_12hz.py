"""OmniCodec at 12.5 Hz as the paper describes it: 1 + 31 codebooks, 4400 bit/s, 133.1 M parameters.

    omnicodec train --config paper_12hz --workdir runs/paper_12hz --run.wavlm models/wavlm \\
        --data.prepared data/prepared --data.features data/features [--run.mesh.fsdp 4]

Hardware of the authors: 4 A100 GPUs, global batch 24, gradient accumulation 2.

released_12hz.py says where the released code differs. The paper does not give the number of residual blocks; one a
stage fits its "approximately 134M parameters". It does not mention the WavLM distillation head (its §4 names that as
future work), so there is none. All four transformers have weight decay, which the paper leaves open.

With Qwen3-Omni's features, the paper's weight of the semantic loss, 1.0, has almost no effect: docs/training.md.
"""

from omnicodec_jax.config import (
    AcousticConfig,
    CodecConfig,
    Config,
    DiscriminatorConfig,
    LossConfig,
    OptimizerConfig,
    SEANetConfig,
    WaveformDiscriminatorConfig,
)

config = Config(
    codec=CodecConfig(
        seanet=SEANetConfig(ratios=(8, 6, 5, 4), n_residual_layers=1),
        acoustic=AcousticConfig(num_quantizers=31),
        wavlm_dim=None,
    ),
    discriminators=DiscriminatorConfig(waveform=WaveformDiscriminatorConfig(rates=(1,))),
    loss=LossConfig(
        mel=15.0,
        semantic=1.0,
        commitment_semantic=1.0,
        commitment_acoustic=1.0,
        self_guidance=0.1,
        self_guidance_norm="l2",
    ),
    optimizer=OptimizerConfig(
        weight_decay_modules=("encoder_transformer", "decoder_transformer", "semantic_encoder", "semantic_decoder"),
        warmup_steps=2500,
        total_steps=500_000,
        cosine_cycles=0.5,
        accumulation=2,
    ),
)
