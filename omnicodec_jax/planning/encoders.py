"""The released encoder of a codec's semantic features, with which a plan computes."""

from omnicodec_jax.config import SemanticConfig
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.whisper import SIZES
from omnicodec_jax.semantic import EncoderConfig


def released_encoder(semantic: SemanticConfig) -> EncoderConfig | None:
    """Returns the config of a semantic branch's encoder, or None if its features are stacked log-mel frames.

    It is the Whisper with features of that width, or Qwen3-Omni's encoder, which is also taken for stored features.
    Raises ConfigError for a width that no Whisper has.
    """
    if semantic.source == "log_mel":
        return None
    if semantic.source != "whisper":
        return Qwen3AuTConfig()
    widths = {config.output_dim: config for config in SIZES.values()}  # large-v3 replaces large, which is as wide
    if semantic.feature_dim not in widths:
        known = ", ".join(map(str, widths))
        raise ConfigError(f"codec.semantic.feature_dim = {semantic.feature_dim}: must be one of Whisper's {known}")
    return widths[semantic.feature_dim]
