"""Every option of the system: frozen dataclasses with validation.

Numbers of the released code and of the paper live in `recipes/`; the defaults here are what both agree on. Saved
configs outlive the options of their day: an option that is added needs a default that does what was done without it,
and no default ever changes.
"""

from omnicodec_jax.config.discriminators import (
    DiscriminatorConfig,
    STFTDiscriminatorConfig,
    WaveformDiscriminatorConfig,
    WavLMDiscriminatorConfig,
)
from omnicodec_jax.config.experiment import (
    Config,
    DataConfig,
    DomainConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from omnicodec_jax.config.language_model import LanguageModelConfig, PerplexityConfig
from omnicodec_jax.config.models import (
    AcousticConfig,
    BackboneConfig,
    CodebookConfig,
    CodecConfig,
    MimiConfig,
    Precision,
    SEANetConfig,
    SemanticConfig,
    TransformerConfig,
)

__all__ = [
    "AcousticConfig",
    "BackboneConfig",
    "CodebookConfig",
    "CodecConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "DomainConfig",
    "LanguageModelConfig",
    "LossConfig",
    "MeshConfig",
    "MimiConfig",
    "OptimizerConfig",
    "PerplexityConfig",
    "Precision",
    "RunConfig",
    "SEANetConfig",
    "STFTDiscriminatorConfig",
    "SemanticConfig",
    "TrainConfig",
    "TransformerConfig",
    "WavLMDiscriminatorConfig",
    "WaveformDiscriminatorConfig",
]
