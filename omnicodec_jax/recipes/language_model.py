"""The language model of the semantic evaluation at the paper's size: 100.7 M parameters for 8 codebooks of 2048.

    omnicodec perplexity --config language_model --tokens data/tokens --out ppl.json

The paper says "100M Qwen2-based LLM" (§3.1.4) and nothing of its shape or training; both are ours. A window is 20 s of
audio at 12.5 Hz, 2048 steps in the flat layout.
"""

from omnicodec_jax.config import LanguageModelConfig, OptimizerConfig, PerplexityConfig

config = PerplexityConfig(
    model=LanguageModelConfig(
        hidden_size=768, num_layers=12, num_heads=12, num_key_value_heads=4, intermediate_size=2048
    ),
    layout="flat",
    num_codebooks=8,
    window_frames=256,
    held_out=0.01,
    batch_size=64,
    optimizer=OptimizerConfig(
        learning_rate=5e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        weight_decay_modules=("layers",),
        warmup_steps=1000,
        total_steps=50_000,
    ),
)
