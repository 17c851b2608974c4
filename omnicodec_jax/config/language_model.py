"""Options of the language model that predicts tokens, and of its training."""

import dataclasses
from typing import Literal, get_args

from omnicodec_jax.config.checks import require, require_positive
from omnicodec_jax.config.experiment import MeshConfig, OptimizerConfig

LayoutName = Literal["flat", "delayed", "parallel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Decoder of the Qwen2 kind (arXiv 2407.10671 §2.2); the defaults make the paper's 100 M parameters (§3.1.4)."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_key_value_heads: int = 4
    """Each serves num_heads / num_key_value_heads queries (grouped-query attention)."""
    intermediate_size: int = 2048
    max_period: float = 10_000.0
    """Base of the rotary embedding: `rope_theta`."""
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    """The output layer is the embedding, transposed."""

    def __post_init__(self):
        require_positive(self, "hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size")
        require_positive(self, "max_period", "norm_epsilon")
        heads = self.num_heads
        require(self.hidden_size % (2 * heads) == 0, self, "hidden_size", f"a multiple of 2 x num_heads={heads} (RoPE)")
        require(heads % self.num_key_value_heads == 0, self, "num_key_value_heads", f"a divisor of num_heads={heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """One measurement of perplexity. The recipe language_model exposes one as `config`."""

    model: LanguageModelConfig = LanguageModelConfig()
    layout: LayoutName = "flat"
    """The codes that the model knows as it predicts one: all before, each codebook later by one, or earlier frames."""
    num_codebooks: int = 8
    """The number of codebooks that the model learns, from the first on; all of them if the tokens have fewer."""
    window_frames: int = 256
    """Clips are cut into windows of so many frames. The model does not see what was before a window."""
    held_out: float = 0.01
    """Share of the clips that is not trained on, chosen by their ids."""
    batch_size: int = 64
    """Windows per step over all devices."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=5e-4, betas=(0.9, 0.95), weight_decay=0.1, weight_decay_modules=("layers",), warmup_steps=1000
        )
    )
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the layers' matrix products; parameters, residual stream and logits stay float32."""
    remat: bool = True
    """Activations are computed again for the backward pass instead of being kept."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    num_workers: int = 4
    """Processes on each host that read; 0: the training process itself."""
    log_every: int = 50
    """Steps between two lines of the log."""
    save_every: int = 1000
    """Steps between two checkpoints, where a directory for them is given."""
    seed: int = 0

    def __post_init__(self):
        require_positive(self, "num_codebooks", "window_frames", "batch_size", "log_every", "save_every")
        layouts = get_args(LayoutName)
        require(self.layout in layouts, self, "layout", f"one of {', '.join(layouts)}")
        require(0 < self.held_out < 1, self, "held_out", "between 0 and 1")
        require(self.compute_dtype in ("float32", "bfloat16"), self, "compute_dtype", "'float32' or 'bfloat16'")
        require(self.num_workers >= 0, self, "num_workers", "0 or more")
        require(0 <= self.seed < 2**63, self, "seed", "0 or more, and below 2**63")
        require(self.optimizer.accumulation == 1, self.optimizer, "accumulation", "1 for a language model")
        require(self.optimizer.ema_decay is None, self.optimizer, "ema_decay", "None for a language model")
