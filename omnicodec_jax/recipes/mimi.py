"""Mimi (moshi paper, arXiv 2410.00037 §3.3) from random weights: 1 + 31 codebooks at 12.5 Hz, 4400 bit/s.

    omnicodec train --config mimi --workdir runs/mimi --run.wavlm models/wavlm_large --data.prepared data/prepared

WavLM large teaches the semantic codebook. Its states are 1024 wide; for WavLM base add `--codec.wavlm-dim 768`. Half
of the clips of a batch reach the decoder unquantized. `--loss.mel 0` is the paper's adversarial-only training, which
leaves the mel loss out; its value is still shown.

From the paper: batches of 128 windows of 12 s for 4 M steps, AdamW at 8e-4 with betas 0.5 and 0.9, weight decay 0.05
of the transformers alone, an average of the weights of decay 0.99, and the discriminators of EnCodec. The weights of
the losses and the warm-up are those of this project's other recipes. The paper trains 8 codebooks
(`--codec.num-quantizers 8`); there are 32 here, as the published checkpoint has them.
"""

from omnicodec_jax.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    MimiConfig,
    OptimizerConfig,
    STFTDiscriminatorConfig,
    TrainConfig,
)

config = Config(
    codec=MimiConfig(wavlm_dim=1024),
    discriminators=DiscriminatorConfig(
        stft=STFTDiscriminatorConfig(windows=(128, 256, 512, 1024, 2048)), waveform=None, wavlm=None
    ),
    loss=LossConfig(mel=15.0, semantic=0.0, self_guidance=0.0, wavlm_distillation=1.0, wavlm_distillation_kind="mimi"),
    optimizer=OptimizerConfig(
        learning_rate=8e-4,
        weight_decay=0.05,
        weight_decay_modules=("encoder_transformer", "decoder_transformer"),
        total_steps=4_000_000,
        ema_decay=0.99,
    ),
    data=DataConfig(batch_size=128, segment_samples=288_000),
    train=TrainConfig(quantizer_bypass=0.5),
)
