"""Options of the discriminators."""

import dataclasses

from omnicodec_jax.config.checks import require, require_positive


def _require_windows(owner: object, field: str) -> None:
    require(all(w >= 8 and w % 2 == 0 for w in getattr(owner, field)), owner, field, "even, 8 or more each")


# Source: spec §2.1.
@dataclasses.dataclass(frozen=True, kw_only=True)
class STFTDiscriminatorConfig:
    """Multi-scale STFT discriminator."""

    windows: tuple[int, ...] = (206, 334, 542, 876, 1418, 2296)
    """One sub-discriminator each; the hop is half the window."""
    filters: int = 32
    negative_slope: float = 0.3
    """Slope of the leaky ReLU below 0."""

    def __post_init__(self):
        require_positive(self, "filters")
        _require_windows(self, "windows")
        require(0 <= self.negative_slope < 1, self, "negative_slope", "in [0, 1)")


# Source: spec §2.2.
@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveformDiscriminatorConfig:
    """Multi-period, multi-rate and multi-resolution discriminators of the Descript Audio Codec."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Multi-period: one sub-discriminator each sees every p-th sample."""
    rates: tuple[int, ...] = ()
    """Multi-rate (MSD): factors that the audio is down-sampled by. The paper names it; the released code has none."""
    windows: tuple[int, ...] = (334, 542, 876, 1418, 2296)
    """Multi-resolution STFT; the hop is a quarter of the window."""
    channels: int = 1024
    """Channels of the deepest layers; all others are in a fixed ratio to it."""

    def __post_init__(self):
        require_positive(self, "channels")
        require(self.channels % 64 == 0, self, "channels", "a multiple of 64")
        require(all(p >= 2 for p in self.periods), self, "periods", "2 or more each")
        require(all(r >= 1 for r in self.rates), self, "rates", "1 or more each")
        _require_windows(self, "windows")


# Source: spec §2.3.
@dataclasses.dataclass(frozen=True, kw_only=True)
class WavLMDiscriminatorConfig:
    """Discriminator over all hidden states of WavLM."""

    channels: int = 64
    hidden_size: int = 768
    hidden_states: int = 13
    """The embedding and every layer's output."""

    def __post_init__(self):
        require_positive(self, "channels", "hidden_size", "hidden_states")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The discriminator families; None: without that one."""

    stft: STFTDiscriminatorConfig | None = STFTDiscriminatorConfig()
    waveform: WaveformDiscriminatorConfig | None = WaveformDiscriminatorConfig()
    wavlm: WavLMDiscriminatorConfig | None = WavLMDiscriminatorConfig()
