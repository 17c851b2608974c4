"""OmniCodec at 12.5 Hz as the authors' released code trains it: 1 + 32 codebooks, 4537.5 bit/s, 137.7 M parameters.

    omnicodec train --config released_12hz --workdir runs/released_12hz --run.wavlm models/wavlm \\
        --data.prepared data/prepared --data.features data/features [--run.mesh.fsdp 4]

Hardware of the authors: 4 A100 GPUs, 24 clips of 10 s a step; on more devices, more clips: --data.batch-size.

The paper differs (see paper_12hz.py): it has 31 acoustic codebooks, one residual block a stage (134 M parameters), loss
weights 1, 1, 0.1 with a squared L2 self-guidance instead of 50, 10, 0.5 with L1, no WavLM distillation, warm-up 2.5K
and half a cosine over 500K instead of 1K and a full cosine over 2M, accumulation 2, and gradients clipped at 1.0 where
the code's clip acts as 2.0.
"""

from omnicodec_jax.config import AcousticConfig, CodecConfig, Config, LossConfig, OptimizerConfig, SEANetConfig

config = Config(
    codec=CodecConfig(
        seanet=SEANetConfig(ratios=(8, 6, 5, 4), n_residual_layers=4),
        acoustic=AcousticConfig(num_quantizers=32),
        wavlm_dim=768,
    ),
    loss=LossConfig(
        semantic=50.0,
        commitment_semantic=10.0,
        commitment_acoustic=10.0,
        self_guidance=0.5,
        self_guidance_norm="l1",
        feature_matching_stft=2.0,
        wavlm_distillation=50.0,
    ),
    optimizer=OptimizerConfig(
        weight_decay_modules=("encoder_transformer", "decoder_transformer"),
        warmup_steps=1000,
        total_steps=2_000_000,
        cosine_cycles=1.0,
        # The authors clip gradients at 1.0 that `accelerate` has halved: it divides every loss by
        # gradient_accumulation_steps, which is 2, although nothing is accumulated. The factor changes nothing for
        # AdamW, but it does for clipping.
        clip_value=2.0,
    ),
)
