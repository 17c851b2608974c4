"""Options of a training run."""

import dataclasses
from typing import Literal, get_args

from omnicodec_jax.config.checks import require, require_positive
from omnicodec_jax.config.discriminators import DiscriminatorConfig
from omnicodec_jax.config.models import CodecConfig, MimiConfig

FrozenPart = Literal["encoder", "semantic", "quantizer", "decoder"]


# Source: paper Eq. 1; spec §3.2.
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the generator's loss terms."""

    mel: float = 15.0
    semantic: float = 1.0
    semantic_perceptual: float = 0.0
    """Weight of the perceptual loss, which draws the semantic features of the decoded audio to those of the real audio.
    The encoder of `codec.semantic.source` then runs in the step, even if features are stored."""
    commitment_semantic: float = 1.0
    commitment_acoustic: float = 1.0
    self_guidance: float = 0.1
    """Weight of self-guidance; 0: the paper's ablation without it (Table 2)."""
    self_guidance_norm: Literal["l1", "l2"] = "l2"
    """Distance of self-guidance: `l2` is the mean squared difference, `l1` the mean absolute one."""
    adversarial: float = 1.0
    feature_matching_stft: float = 1.0
    feature_matching_waveform: float = 1.0
    feature_matching_wavlm: float = 1.0
    latent_cepstrum: float = 0.0
    """Weight of the term that draws the first channels of the encoder's latent to the cepstrum of the frame, until
    `train.latent_cepstrum_until`."""
    wavlm_distillation: float = 0.0
    wavlm_distillation_kind: Literal["speechtokenizer", "mimi"] = "speechtokenizer"
    """Form of the distillation loss: `speechtokenizer`: -log σ(cosine) of each channel over time; `mimi`: 1 - cosine of
    each frame over channels."""

    def __post_init__(self):
        require(self.self_guidance_norm in ("l1", "l2"), self, "self_guidance_norm", "'l1' or 'l2'")
        kinds = ("speechtokenizer", "mimi")
        kind = self.wavlm_distillation_kind
        require(kind in kinds, self, "wavlm_distillation_kind", "'speechtokenizer' or 'mimi'")
        for field in dataclasses.fields(self):
            if field.name not in ("self_guidance_norm", "wavlm_distillation_kind"):
                require(0 <= getattr(self, field.name) < float("inf"), self, field.name, "0 or more, and finite")


# Source: spec §4.
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of AdamW, of its schedule, and of what happens to gradients before it."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_modules: tuple[str, ...] = ()
    """Top-level modules whose parameters decay. No other parameters do."""
    clip_value: float = 1.0
    """Bound ± to which gradients are clipped elementwise."""
    warmup_steps: int = 2500
    total_steps: int = 500_000
    cosine_cycles: float = 0.5
    """Cycles of the cosine after the warm-up. 0.5: down to 0 at total_steps; 1: down and up again."""
    accumulation: int = 1
    """Micro-batches per update of the networks. Codebooks learn from each of them in turn, as PyTorch's do in every
    forward: their decay and the steps between looks for dead codes are counted in micro-batches."""
    ema_decay: float | None = None
    """Decay of the moving average of the codec's parameters; None: none is kept. At first the decay is lower, so that
    the average spans a tenth of the steps so far."""

    def __post_init__(self):
        require_positive(self, "learning_rate", "epsilon", "clip_value", "total_steps", "cosine_cycles")
        require(all(0 <= b < 1 for b in self.betas), self, "betas", "in [0, 1)")
        require(0 <= self.weight_decay < float("inf"), self, "weight_decay", "0 or more, and finite")
        total = self.total_steps
        require(0 <= self.warmup_steps < total, self, "warmup_steps", f"0 or more, and below total_steps = {total}")
        require(self.accumulation >= 1, self, "accumulation", "1 or more")
        require(self.ema_decay is None or 0 <= self.ema_decay < 1, self, "ema_decay", "in [0, 1), or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One domain of the prepared audio and its share of every batch."""

    name: str
    weight: float = 1.0

    def __post_init__(self):
        require_positive(self, "weight")


# Source: spec §4.
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of the data: where the samples come from, and what a training batch consists of."""

    prepared: str = "data/prepared"
    """Directory that `omnicodec prepare` has written."""
    features: str | None = None
    """Directory that `omnicodec convert semantic-features` has written, for semantic.source='stored', or instead of
    run.encoder."""
    domains: tuple[DomainConfig, ...] = (
        DomainConfig(name="speech", weight=6.0),
        DomainConfig(name="music"),
        DomainConfig(name="sound"),
    )
    sample_by: Literal["clips", "hours"] = "clips"
    """Probability of clips within a domain: every clip is as likely (as in the reference), or every second of audio."""
    batch_size: int = 24
    """Clips per update over all devices."""
    segment_samples: int = 240_000
    num_workers: int = 4
    """Processes on each host that read and decode; 0: the training process itself."""

    def __post_init__(self):
        require_positive(self, "batch_size", "segment_samples")
        require(self.num_workers >= 0, self, "num_workers", "0 or more")
        require(self.sample_by in ("clips", "hours"), self, "sample_by", "'clips' or 'hours'")
        names = [domain.name for domain in self.domains]
        require(bool(names) and len(set(names)) == len(names), self, "domains", "one or more, each once")


# Source: spec §8.6–8.7.
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a step is computed."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of convolutions and matrix products. Parameters, spectra, codebooks and losses stay float32."""
    remat: bool = True
    """Whether activations of the codec and of WavLM are computed again for the backward pass instead of being kept.
    (Those of a sub-discriminator are used at once.) XLA does not do so on a CPU; there, operations are ordered for the
    least memory."""
    discriminator_update: Literal["alternating", "simultaneous"] = "alternating"
    """Discriminators that the codec learns against. `alternating`: the updated ones, as in the reference;
    `simultaneous`: those before the update, which saves running them forward again."""
    discriminator_from: int = 0
    """Step from which the discriminators run and learn. Before it the codec learns from the other losses alone, and a
    step costs what it does without discriminators. Their learning rate warms up from there."""
    discriminator_learning_rate: float | None = None
    """Highest learning rate of the discriminators, which warms up and falls as the codec's does; None: the codec's
    own, `optimizer.learning_rate`."""
    semantic_dropout: float = 0.0
    """Share of the clips of each batch whose semantic vectors are left out of both adapters, so that their acoustic
    codes must say everything."""
    semantic_dropout_until: int | None = None
    """Step at which semantic dropout ends; None: never."""
    acoustic_dropout: float = 0.0
    """Share of the clips of each batch whose decoder gets the semantic vectors alone, so that the semantic codebook can
    be listened to by itself. These are other clips than those of semantic dropout."""
    latent_cepstrum_until: int | None = None
    """Step at which the term `loss.latent_cepstrum` ends; None: never."""
    quantizer_bypass: float = 0.0
    """Share of the clips of each batch whose vectors reach the decoder without quantization (the acoustic ones of
    OmniCodec, all of Mimi). The codebooks learn from these vectors, too."""
    initialization: Literal["pytorch", "variance_preserving"] = "pytorch"
    """Distribution of the codec's random kernels: U(±1/√fan_in), or U(±√3/√fan_in), which keeps the variance. With the
    latter, the first convolution also scales audio to a variance of about 1, so that the ELUs are not nearly linear."""
    freeze: tuple[FrozenPart, ...] = ()
    """Parts of the codec that do not learn, codebooks included; `run.start_from` names the model they come from. With
    `encoder` and `quantizer`, only the decoder learns, and existing tokens stay valid."""

    def __post_init__(self):
        require(self.compute_dtype in ("float32", "bfloat16"), self, "compute_dtype", "'float32' or 'bfloat16'")
        updates = ("alternating", "simultaneous")
        require(self.discriminator_update in updates, self, "discriminator_update", "'alternating' or 'simultaneous'")
        require(self.discriminator_from >= 0, self, "discriminator_from", "0 or more")
        if self.discriminator_learning_rate is not None:
            require_positive(self, "discriminator_learning_rate")
        require(0 <= self.semantic_dropout <= 1, self, "semantic_dropout", "in [0, 1]")
        until = self.semantic_dropout_until
        require(until is None or until >= 0, self, "semantic_dropout_until", "0 or more, or None")
        rest, both = 1 - self.semantic_dropout, self.semantic_dropout + self.acoustic_dropout
        require(  # of 0.8 and 0.2 the sum is 1, while 1 - 0.8 is below 0.2
            self.acoustic_dropout >= 0 and both <= 1,
            self,
            "acoustic_dropout",
            f"in [0, 1 - semantic_dropout = {rest:g}]",
        )
        until = self.latent_cepstrum_until
        require(until is None or until >= 0, self, "latent_cepstrum_until", "0 or more, or None")
        require(0 <= self.quantizer_bypass <= 1, self, "quantizer_bypass", "in [0, 1]")
        distributions = ("pytorch", "variance_preserving")
        require(self.initialization in distributions, self, "initialization", "'pytorch' or 'variance_preserving'")
        parts = get_args(FrozenPart)
        require(set(self.freeze) <= set(parts), self, "freeze", f"some of {', '.join(parts)}")
        require(
            not {"encoder", "quantizer", "decoder"} <= set(self.freeze), self, "freeze", "less than all of the codec"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work."""

    slices: int | None = None
    """Number of parts of the cluster with a slower network between them: slices of TPUs, or hosts of GPUs. The groups
    of `data` are spread over them, and those of `fsdp` and `tensor` stay within one. None: as many as the devices say;
    1: the slower network counts as any other."""
    data: int | None = None
    """Number of groups of devices that see different clips and hold the same state; None: as many as there are devices
    for."""
    fsdp: int = 1
    """Number of devices in a group of `data` that see different clips and hold a part of the state each."""
    tensor: int = 1
    """Number of devices that see the same clips and compute a part of the transformers' channels each."""

    def __post_init__(self):
        require_positive(self, "fsdp", "tensor")
        require(self.slices is None or self.slices > 0, self, "slices", "positive, or None")
        require(self.data is None or self.data > 0, self, "data", "positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that do not change what a run learns, so that they may change from one start of a run to the next."""

    mesh: MeshConfig = MeshConfig()
    start_from: str | None = None
    """Model directory whose weights a new run starts from; None: random ones."""
    wavlm: str | None = None
    """Directory that `omnicodec convert wavlm` has written; None: the terms that need WavLM are left out."""
    encoder: str | None = None
    """Directory of the frozen encoder, for semantic.source='qwen3_aut' or 'whisper': what `omnicodec convert qwen3-aut`
    or `omnicodec convert whisper` has written, or a codec that has one, such as "small" (Whisper tiny.en)."""
    log_every: int = 50
    """Steps between two lines of the log."""
    validate_every: int | None = 2000
    """Steps between two validations on the held-out clips; None: there are none, not even before the first step."""
    validation_batches: int = 4
    """Number of batches of held-out clips in each validation, of batch_size clips each."""
    save_every: int = 1000
    keep_last: int = 3
    """Number of checkpoints that are kept, beside the best by validation mel distance."""

    def __post_init__(self):
        require_positive(self, "log_every", "validation_batches", "save_every", "keep_last")
        require(self.validate_every is None or self.validate_every > 0, self, "validate_every", "positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All options of one training run. A recipe exposes one as `config`."""

    codec: CodecConfig | MimiConfig = CodecConfig()
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    seed: int = 0

    def __post_init__(self):
        require(
            self.data.batch_size % self.optimizer.accumulation == 0,
            self.data,
            "batch_size",
            f"a multiple of accumulation={self.optimizer.accumulation}",
        )
        require(0 <= self.seed < 2**63, self, "seed", "0 or more, and below 2**63")
        if self.codec.semantic is None:
            require(self.loss.semantic == 0, self.loss, "semantic", "0 without a semantic branch")
        if self.codec.semantic is None or self.codec.semantic.source == "stored":
            rule = "0 without semantic features that the step can compute"
            require(self.loss.semantic_perceptual == 0, self.loss, "semantic_perceptual", rule)
        if self.codec.num_semantic_quantizers == 0:
            for name in ("semantic_dropout", "acoustic_dropout"):
                require(getattr(self.train, name) == 0, self.train, name, "0 without a semantic codebook")
            require("semantic" not in self.train.freeze, self.train, "freeze", "without semantic, which is not there")
        if isinstance(self.codec, MimiConfig):
            require(self.loss.self_guidance == 0, self.loss, "self_guidance", "0 for Mimi, which has none")
        if self.codec.wavlm_dim is None:
            require(self.loss.wavlm_distillation == 0, self.loss, "wavlm_distillation", "0 without a WavLM head")
