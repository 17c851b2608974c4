"""A language model that learns a minute of tokens in half a minute on two cores: 0.5 M parameters for 8 codebooks.

    omnicodec perplexity --config language_model_demo --tokens runs/demo/tokens

From so little audio it learns which codes are frequent, and then the training clips by heart, so it stops early. Its
window is long enough to hear two and a half seconds and draw the next two. To compare codecs, use the recipe
language_model and hours of audio.
"""

from omnicodec_jax.config import LanguageModelConfig, OptimizerConfig, PerplexityConfig

config = PerplexityConfig(
    model=LanguageModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_key_value_heads=1, intermediate_size=64),
    layout="delayed",
    window_frames=64,
    held_out=0.3,
    batch_size=8,
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        weight_decay_modules=("layers",),
        warmup_steps=5,
        total_steps=40,
    ),
    compute_dtype="float32",
    remat=False,
    num_workers=0,
)
