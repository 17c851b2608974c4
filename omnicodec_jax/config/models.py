"""Options of OmniCodec and of Mimi, and of their parts."""

import dataclasses
import math
from typing import Literal, get_args

from omnicodec_jax.config.checks import require, require_positive
from omnicodec_jax.config.identity import TRAINING_ONLY
from omnicodec_jax.errors import ConfigError

SemanticSource = Literal["log_mel", "qwen3_aut", "whisper", "stored"]
Precision = Literal["float32", "bfloat16"]
"""The number format in which a model's convolutions and matrix products are computed."""
MAX_CODEBOOK_SIZE = 65_536
"""The largest number of entries of a codebook, since codes are stored as uint16."""


def check_precision(**named: str) -> None:
    """Raises ConfigError for the first of the named options whose value is no `Precision`."""
    for name, value in named.items():
        if value not in get_args(Precision):
            raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(get_args(Precision))}")


# Source: spec §1.1–1.2.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SEANetConfig:
    """Options of the convolutional encoder and decoder."""

    n_filters: int = 64
    """Channels at the full rate. Every stage of the encoder doubles them."""
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    """Strides of the stages, in the order of the decoder."""
    n_residual_layers: int = 4
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    """Residual blocks work at 1/compress of the channels."""

    def __post_init__(self):
        require_positive(self, "n_filters", "kernel_size", "residual_kernel_size", "last_kernel_size", "compress")
        require(self.n_residual_layers >= 0, self, "n_residual_layers", "0 or more")
        require(self.dilation_base >= 1, self, "dilation_base", "1 or more")
        require(all(r >= 2 for r in self.ratios) and bool(self.ratios), self, "ratios", "strides of 2 or more")
        require(self.n_filters % self.compress == 0, self, "n_filters", f"a multiple of compress={self.compress}")

    @property
    def hop_length(self) -> int:
        """The number of samples per output step of the encoder."""
        return math.prod(self.ratios)


# Source: spec §1.4.
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Options of a causal transformer with windowed attention. Its width is the codec's `dimension`."""

    num_heads: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    context: int = 250
    """Steps that a query attends to: itself and the `context - 1` steps before it."""
    max_period: float = 10000.0
    layer_scale: float = dataclasses.field(default=0.01, metadata=TRAINING_ONLY)
    """Initial factors of LayerScale."""

    def __post_init__(self):
        require_positive(self, "num_heads", "num_layers", "dim_feedforward", "context", "max_period")


# Source: spec §1.6–1.7.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Options of the semantic branch: frozen features, a transformer, one codebook."""

    source: SemanticSource = "stored"
    """Source of the features [S, feature_dim]. `stored`: they are given with the audio; `qwen3_aut`, `whisper`: the
    frozen encoder of that name computes them; `log_mel`: they are stacked frames of the log-mel spectrogram."""
    feature_dim: int = 2048
    codebook_size: int = 2048
    codebook_dim: int = 1024

    def __post_init__(self):
        require_positive(self, "feature_dim", "codebook_size", "codebook_dim")
        require(self.codebook_size <= MAX_CODEBOOK_SIZE, self, "codebook_size", f"at most {MAX_CODEBOOK_SIZE}")
        sources = get_args(SemanticSource)
        require(self.source in sources, self, "source", f"one of {', '.join(sources)}")
        if self.source == "log_mel":
            require(self.feature_dim == 1024, self, "feature_dim", "1024 (8 frames of 128 bins) with source='log_mel'")


# Source: spec §1.9.
@dataclasses.dataclass(frozen=True, kw_only=True)
class AcousticConfig:
    """Residual vector quantizer."""

    num_quantizers: int = 32
    codebook_size: int = 2048
    codebook_dim: int = 256
    min_quantizers: int = dataclasses.field(default=8, metadata=TRAINING_ONLY)
    """Quantizer dropout draws the number of active layers from {min_quantizers, …, num_quantizers}."""

    def __post_init__(self):
        require_positive(self, "num_quantizers", "codebook_size", "codebook_dim")
        require(self.codebook_size <= MAX_CODEBOOK_SIZE, self, "codebook_size", f"at most {MAX_CODEBOOK_SIZE}")
        require(
            1 <= self.min_quantizers <= self.num_quantizers,
            self,
            "min_quantizers",
            f"between 1 and num_quantizers={self.num_quantizers}",
        )


# Source: spec §1.8.
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Options of the codebooks, which follow moving averages (EMA), for semantic and acoustic quantizers alike."""

    decay: float = dataclasses.field(default=0.99, metadata=TRAINING_ONLY)
    epsilon: float = 1e-5
    """Smallest usage that an embedding is divided by."""
    dead_threshold: float = dataclasses.field(default=0.1, metadata=TRAINING_ONLY)
    """Share of the mean usage below which an entry is dead, and is replaced; 0: none is replaced."""
    check_every: int = dataclasses.field(default=5, metadata=TRAINING_ONLY)
    """Number of steps between two replacements of dead entries."""
    kmeans_iterations: int = dataclasses.field(default=50, metadata=TRAINING_ONLY)

    def __post_init__(self):
        require(0 < self.decay < 1, self, "decay", "between 0 and 1")
        require_positive(self, "epsilon", "check_every", "kmeans_iterations")
        require(0 <= self.dead_threshold < 1, self, "dead_threshold", "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Options of everything around the quantizers, which OmniCodec and Mimi share."""

    sample_rate: int = 24000
    dimension: int = 512
    """Width of the latents and of the transformers."""
    seanet: SEANetConfig = SEANetConfig()
    transformer: TransformerConfig = TransformerConfig()
    codebook: CodebookConfig = CodebookConfig()
    input_peak: float | None = None
    """Peak that files are scaled to before they are encoded; decoding scales back. None: files are not scaled."""

    def __post_init__(self):
        require_positive(self, "sample_rate", "dimension")
        heads = self.transformer.num_heads
        require(self.dimension % (2 * heads) == 0, self, "dimension", f"a multiple of 2 x num_heads={heads} (RoPE)")
        require(self.input_peak is None or 0 < self.input_peak <= 1, self, "input_peak", "in (0, 1], or None")

    @property
    def hop_length(self) -> int:
        """The number of samples per frame: the hop of SEANet times the down-sampler's factor 2."""
        return 2 * self.seanet.hop_length

    @property
    def frame_rate(self) -> float:
        """The number of frames per second."""
        return self.sample_rate / self.hop_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig(BackboneConfig):
    """Options of OmniCodec, as config.json of a model directory holds them."""

    semantic: SemanticConfig | None = SemanticConfig()
    """Semantic branch; None: the paper's ablation without it (Table 2)."""
    acoustic: AcousticConfig = AcousticConfig()
    adapter_1: bool = True
    """Whether the semantic vector is subtracted before the acoustic RVQ; False: the paper's ablation (Table 2)."""
    wavlm_dim: int | None = dataclasses.field(default=768, metadata=TRAINING_ONLY)
    """Width of the WavLM distillation head; None: no head."""
    input_peak: float | None = 0.95

    def __post_init__(self):
        super().__post_init__()
        if self.semantic is None:
            require(self.wavlm_dim is None, self, "wavlm_dim", "None without a semantic branch")

    @property
    def num_semantic_quantizers(self) -> int:
        """The number of semantic codebooks: 1, or 0 without the semantic branch."""
        return int(self.semantic is not None)

    @property
    def num_quantizers(self) -> int:
        """The number K of all codebooks, the semantic one included."""
        return self.num_semantic_quantizers + self.acoustic.num_quantizers

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The number of entries of each of the K codebooks."""
        semantic = () if self.semantic is None else (self.semantic.codebook_size,)
        return semantic + (self.acoustic.codebook_size,) * self.acoustic.num_quantizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MimiConfig(BackboneConfig):
    """Options of Mimi (arXiv 2410.00037 §3.3), the peer that every table compares with."""

    seanet: SEANetConfig = SEANetConfig(n_residual_layers=1)
    num_semantic_quantizers: int = 1
    num_quantizers: int = 32
    """Number of all codebooks, the semantic ones included."""
    codebook_size: int = 2048
    codebook_dim: int = 256
    min_quantizers: int = dataclasses.field(default=1, metadata=TRAINING_ONLY)
    """Quantizer dropout draws the number of active acoustic codebooks from {min_quantizers, …, all of them}."""
    wavlm_dim: int | None = dataclasses.field(default=None, metadata=TRAINING_ONLY)
    """Width of the WavLM distillation head; None: no head."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_semantic_quantizers", "codebook_size", "codebook_dim")
        require(
            self.num_quantizers > self.num_semantic_quantizers,
            self,
            "num_quantizers",
            f"more than num_semantic_quantizers={self.num_semantic_quantizers}",
        )
        acoustic = self.num_quantizers - self.num_semantic_quantizers
        require(
            1 <= self.min_quantizers <= acoustic, self, "min_quantizers", f"between 1 and {acoustic}, the acoustic ones"
        )

    @property
    def semantic(self) -> None:
        """Always None: Mimi takes no features, since its semantic codebook quantizes the latent of the audio."""
        return None

    @property
    def acoustic(self) -> AcousticConfig:
        """The acoustic quantizer by itself."""
        return AcousticConfig(
            num_quantizers=self.num_quantizers - self.num_semantic_quantizers,
            codebook_size=self.codebook_size,
            codebook_dim=self.codebook_dim,
            min_quantizers=self.min_quantizers,
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The number of entries of each of the K codebooks."""
        return (self.codebook_size,) * self.num_quantizers
