"""Every option of the system: frozen dataclasses with validation.

Numbers of the released code and of the paper live in `configs/`; the defaults here are what both agree on.
"""

import dataclasses
import math
from typing import Literal, get_args

from omnicodec_jax.errors import ConfigError

SemanticSource = Literal["log_mel", "qwen3_aut", "stored"]
MAX_CODEBOOK_SIZE = 65_536
"""Codes are stored as uint16."""


def _require(condition: bool, owner: object, field: str, expected: str) -> None:
    if not condition:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}: must be {expected}")


def _require_positive(owner: object, *fields: str) -> None:
    for field in fields:
        _require(getattr(owner, field) > 0, owner, field, "positive")


def _require_windows(owner: object, field: str) -> None:
    _require(all(w >= 8 and w % 2 == 0 for w in getattr(owner, field)), owner, field, "even, 8 or more each")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SEANetConfig:
    """Convolutional encoder and decoder (spec §1.1–1.2)."""

    n_filters: int = 64
    """Channels at full rate; doubled at every stage down."""
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    """Strides in decoder order."""
    n_residual_layers: int = 4
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    """Residual blocks work at 1/compress of the channels."""

    def __post_init__(self):
        _require_positive(self, "n_filters", "kernel_size", "residual_kernel_size", "last_kernel_size", "compress")
        _require(self.n_residual_layers >= 0, self, "n_residual_layers", "0 or more")
        _require(self.dilation_base >= 1, self, "dilation_base", "1 or more")
        _require(all(r >= 2 for r in self.ratios) and bool(self.ratios), self, "ratios", "strides of 2 or more")
        _require(self.n_filters % self.compress == 0, self, "n_filters", f"a multiple of compress={self.compress}")

    @property
    def hop_length(self) -> int:
        """Samples per encoder output step."""
        return math.prod(self.ratios)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Causal windowed transformer (spec §1.4); its width is the codec's `dimension`."""

    num_heads: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    context: int = 250
    """A query sees itself and the `context - 1` steps before it."""
    max_period: float = 10000.0
    layer_scale: float = 0.01
    """Initial LayerScale."""

    def __post_init__(self):
        _require_positive(self, "num_heads", "num_layers", "dim_feedforward", "context", "max_period")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Semantic branch: frozen features, a transformer, one codebook (spec §1.6–1.7)."""

    source: SemanticSource = "stored"
    """Features [S, feature_dim] are given with the audio, or computed from it: by the encoder, or by no network."""
    feature_dim: int = 2048
    codebook_size: int = 2048
    codebook_dim: int = 1024

    def __post_init__(self):
        _require_positive(self, "feature_dim", "codebook_size", "codebook_dim")
        _require(self.codebook_size <= MAX_CODEBOOK_SIZE, self, "codebook_size", f"at most {MAX_CODEBOOK_SIZE}")
        sources = get_args(SemanticSource)
        _require(self.source in sources, self, "source", f"one of {', '.join(sources)}")
        if self.source == "log_mel":
            _require(self.feature_dim == 1024, self, "feature_dim", "1024 (8 frames of 128 bins) with source='log_mel'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcousticConfig:
    """Residual vector quantizer (spec §1.9)."""

    num_quantizers: int = 32
    codebook_size: int = 2048
    codebook_dim: int = 256
    min_quantizers: int = 8
    """Quantizer dropout draws the number of active layers from {min_quantizers, …, num_quantizers}."""

    def __post_init__(self):
        _require_positive(self, "num_quantizers", "codebook_size", "codebook_dim")
        _require(self.codebook_size <= MAX_CODEBOOK_SIZE, self, "codebook_size", f"at most {MAX_CODEBOOK_SIZE}")
        _require(
            1 <= self.min_quantizers <= self.num_quantizers,
            self,
            "min_quantizers",
            f"between 1 and num_quantizers={self.num_quantizers}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """EMA codebook, shared by the semantic and the acoustic quantizers (spec §1.8)."""

    decay: float = 0.99
    epsilon: float = 1e-5
    """Smallest usage that an embedding is divided by."""
    dead_threshold: float = 0.1
    """A code is dead when its usage is below this share of the mean usage; 0 switches replacement off."""
    check_every: int = 5
    """Steps between looks for dead codes."""
    kmeans_iterations: int = 50

    def __post_init__(self):
        _require(0 < self.decay < 1, self, "decay", "between 0 and 1")
        _require_positive(self, "epsilon", "check_every", "kmeans_iterations")
        _require(0 <= self.dead_threshold < 1, self, "dead_threshold", "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What OmniCodec and Mimi share: everything around the quantizers."""

    sample_rate: int = 24000
    dimension: int = 512
    """Width of the latents and of the transformers."""
    seanet: SEANetConfig = SEANetConfig()
    transformer: TransformerConfig = TransformerConfig()
    codebook: CodebookConfig = CodebookConfig()
    input_peak: float | None = None
    """Files are scaled to this peak before they are encoded, and back after decoding; None: as they are."""

    def __post_init__(self):
        _require_positive(self, "sample_rate", "dimension")
        heads = self.transformer.num_heads
        _require(self.dimension % (2 * heads) == 0, self, "dimension", f"a multiple of 2 x num_heads={heads} (RoPE)")
        _require(self.input_peak is None or 0 < self.input_peak <= 1, self, "input_peak", "in (0, 1], or None")

    @property
    def hop_length(self) -> int:
        """Samples per frame: the SEANet's hop and the down-sampler's factor 2."""
        return 2 * self.seanet.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig(BackboneConfig):
    """OmniCodec: what a model directory's config.json holds."""

    semantic: SemanticConfig | None = SemanticConfig()
    """None: the paper's ablation without the semantic branch (Table 2)."""
    acoustic: AcousticConfig = AcousticConfig()
    adapter_1: bool = True
    """False: the paper's ablation that does not subtract the semantic vector before the acoustic RVQ (Table 2)."""
    wavlm_dim: int | None = 768
    """Width of the WavLM distillation head; None: no head."""
    input_peak: float | None = 0.95

    def __post_init__(self):
        super().__post_init__()
        if self.semantic is None:
            _require(self.wavlm_dim is None, self, "wavlm_dim", "None without a semantic branch")

    @property
    def num_quantizers(self) -> int:
        """K: all codebooks, the semantic one included."""
        return self.acoustic.num_quantizers + (self.semantic is not None)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each of the K codebooks."""
        semantic = () if self.semantic is None else (self.semantic.codebook_size,)
        return semantic + (self.acoustic.codebook_size,) * self.acoustic.num_quantizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MimiConfig(BackboneConfig):
    """Mimi (arXiv 2410.00037 §3.3), the peer that every table compares with."""

    seanet: SEANetConfig = SEANetConfig(n_residual_layers=1)
    num_semantic_quantizers: int = 1
    num_quantizers: int = 32
    """All codebooks, the semantic ones included."""
    codebook_size: int = 2048
    codebook_dim: int = 256

    def __post_init__(self):
        super().__post_init__()
        _require_positive(self, "num_semantic_quantizers", "codebook_size", "codebook_dim")
        _require(
            self.num_quantizers > self.num_semantic_quantizers,
            self,
            "num_quantizers",
            f"more than num_semantic_quantizers={self.num_semantic_quantizers}",
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each of the K codebooks."""
        return (self.codebook_size,) * self.num_quantizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class STFTDiscriminatorConfig:
    """Multi-scale STFT discriminator (spec §2.1)."""

    windows: tuple[int, ...] = (206, 334, 542, 876, 1418, 2296)
    """One sub-discriminator each; the hop is half the window."""
    filters: int = 32
    negative_slope: float = 0.3
    """Of the leaky ReLU."""

    def __post_init__(self):
        _require_positive(self, "filters")
        _require_windows(self, "windows")
        _require(0 <= self.negative_slope < 1, self, "negative_slope", "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveformDiscriminatorConfig:
    """Multi-period, multi-rate and multi-resolution discriminators of the Descript Audio Codec (spec §2.2)."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Multi-period: one sub-discriminator each sees every p-th sample."""
    rates: tuple[int, ...] = ()
    """Multi-rate (MSD): factors that the audio is down-sampled by. The paper names it; the released code has none."""
    windows: tuple[int, ...] = (334, 542, 876, 1418, 2296)
    """Multi-resolution STFT; the hop is a quarter of the window."""
    channels: int = 1024
    """Of the deepest layers; all others are in a fixed ratio to it."""

    def __post_init__(self):
        _require_positive(self, "channels")
        _require(self.channels % 64 == 0, self, "channels", "a multiple of 64")
        _require(all(p >= 2 for p in self.periods), self, "periods", "2 or more each")
        _require(all(r >= 1 for r in self.rates), self, "rates", "1 or more each")
        _require_windows(self, "windows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WavLMDiscriminatorConfig:
    """Discriminator over all hidden states of WavLM (spec §2.3)."""

    channels: int = 64
    hidden_size: int = 768
    hidden_states: int = 13
    """The embedding and every layer's output."""

    def __post_init__(self):
        _require_positive(self, "channels", "hidden_size", "hidden_states")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The discriminator families; None: without that one."""

    stft: STFTDiscriminatorConfig | None = STFTDiscriminatorConfig()
    waveform: WaveformDiscriminatorConfig | None = WaveformDiscriminatorConfig()
    wavlm: WavLMDiscriminatorConfig | None = WavLMDiscriminatorConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the generator's loss terms (paper Eq. 1; spec §3.2)."""

    mel: float = 15.0
    semantic: float = 1.0
    commitment_semantic: float = 1.0
    commitment_acoustic: float = 1.0
    self_guidance: float = 0.1
    """0: the paper's ablation without self-guidance (Table 2)."""
    self_guidance_norm: Literal["l1", "l2"] = "l2"
    """`l2` is the mean squared difference, `l1` the mean absolute one."""
    adversarial: float = 1.0
    feature_matching_stft: float = 1.0
    feature_matching_waveform: float = 1.0
    feature_matching_wavlm: float = 1.0
    wavlm_distillation: float = 0.0

    def __post_init__(self):
        _require(self.self_guidance_norm in ("l1", "l2"), self, "self_guidance_norm", "'l1' or 'l2'")
        for field in dataclasses.fields(self):
            if field.name != "self_guidance_norm":
                _require(getattr(self, field.name) >= 0, self, field.name, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and what happens to a gradient before it (spec §4)."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_modules: tuple[str, ...] = ()
    """Top-level modules whose parameters decay; no others do."""
    clip_value: float = 1.0
    """Gradients are clipped elementwise to ± this."""
    warmup_steps: int = 2500
    total_steps: int = 500_000
    cosine_cycles: float = 0.5
    """0.5: down to 0 at total_steps; 1: down and up again."""
    accumulation: int = 1
    """Micro-batches per update."""
    ema_decay: float | None = None
    """Of the moving average of the codec's parameters; None: none is kept."""

    def __post_init__(self):
        _require_positive(self, "learning_rate", "epsilon", "clip_value", "total_steps", "cosine_cycles")
        _require(all(0 <= b < 1 for b in self.betas), self, "betas", "in [0, 1)")
        _require(self.weight_decay >= 0, self, "weight_decay", "0 or more")
        _require(0 <= self.warmup_steps < self.total_steps, self, "warmup_steps", f"below {self.total_steps=}")
        _require(self.accumulation >= 1, self, "accumulation", "1 or more")
        _require(self.ema_decay is None or 0 <= self.ema_decay < 1, self, "ema_decay", "in [0, 1), or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One domain of the prepared audio, and its share of every batch."""

    name: str
    weight: float = 1.0

    def __post_init__(self):
        _require_positive(self, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from, and what one training batch is (spec §4)."""

    prepared: str = "data/prepared"
    """Directory that `omnicodec prepare` has written."""
    features: str | None = None
    """Directory that `convert.semantic_features` has written; for semantic.source='stored'."""
    domains: tuple[DomainConfig, ...] = (
        DomainConfig(name="speech", weight=6.0),
        DomainConfig(name="music"),
        DomainConfig(name="sound"),
    )
    sample_by: Literal["clips", "hours"] = "clips"
    """Within a domain: every clip is as likely (the reference's way), or every second of audio."""
    batch_size: int = 24
    """Clips per update over all devices."""
    segment_samples: int = 240_000
    num_workers: int = 4
    """Processes on each host that read and decode; 0: the training process itself."""

    def __post_init__(self):
        _require_positive(self, "batch_size", "segment_samples")
        _require(self.num_workers >= 0, self, "num_workers", "0 or more")
        _require(self.sample_by in ("clips", "hours"), self, "sample_by", "'clips' or 'hours'")
        names = [domain.name for domain in self.domains]
        _require(bool(names) and len(set(names)) == len(names), self, "domains", "one or more, each once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a step is computed (spec §8.6–8.7)."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of convolutions and matrix products; parameters, spectra, codebooks and losses stay float32."""
    remat: bool = True
    """Activations are computed again for the backward pass instead of being kept."""

    def __post_init__(self):
        _require(self.compute_dtype in ("float32", "bfloat16"), self, "compute_dtype", "'float32' or 'bfloat16'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: what a file in configs/ exposes as `config`."""

    codec: CodecConfig = CodecConfig()
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    seed: int = 0

    def __post_init__(self):
        _require(
            self.data.batch_size % self.optimizer.accumulation == 0,
            self.data,
            "batch_size",
            f"a multiple of accumulation={self.optimizer.accumulation}",
        )
        if self.codec.semantic is None:
            _require(self.loss.semantic == 0, self.loss, "semantic", "0 without a semantic branch")
        if self.codec.wavlm_dim is None:
            _require(self.loss.wavlm_distillation == 0, self.loss, "wavlm_distillation", "0 without a WavLM head")
