"""Discriminators: the three families that judge real and reconstructed audio, in one module."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from omnicodec_jax.config import DiscriminatorConfig
from omnicodec_jax.discriminators.conv import Judgement
from omnicodec_jax.discriminators.stft import STFTDiscriminator
from omnicodec_jax.discriminators.waveform import WaveformDiscriminator
from omnicodec_jax.discriminators.wavlm import HiddenStates, WavLMDiscriminator
from omnicodec_jax.models.backbone import Audio

Judgements = dict[str, tuple[Judgement, ...]]
"""By family ("stft", "waveform", "wavlm"), one of each sub-discriminator."""


class Member(NamedTuple):
    """One sub-discriminator."""

    config: DiscriminatorConfig
    """With it alone."""
    family: str
    name: str | None
    """Of its parameters in those of the family; None: they are the family's."""

    @property
    def hears_wavlm(self) -> bool:
        """Whether it judges WavLM's hidden states, rather than audio."""
        return self.config.wavlm is not None

    def own(self, params: Any) -> Any:
        """Its parameters among those of all discriminators, in the same tree."""
        family = params[self.family]
        return {self.family: family if self.name is None else {self.name: family[self.name]}}


def members(config: DiscriminatorConfig) -> Iterator[Member]:
    """All sub-discriminators. Judgements by one after the other are those of `Discriminators`, cut into pieces."""
    none = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
    if config.stft is not None:
        for window in config.stft.windows:
            alone = dataclasses.replace(config.stft, windows=(window,))
            yield Member(dataclasses.replace(none, stft=alone), "stft", f"window_{window}")
    if config.waveform is not None:
        empty = dataclasses.replace(config.waveform, periods=(), rates=(), windows=())
        for sizes, prefix in (("periods", "period"), ("rates", "rate"), ("windows", "window")):
            for size in getattr(config.waveform, sizes):
                alone = dataclasses.replace(empty, **{sizes: (size,)})
                yield Member(dataclasses.replace(none, waveform=alone), "waveform", f"{prefix}_{size}")
    if config.wavlm is not None:
        yield Member(dataclasses.replace(none, wavlm=config.wavlm), "wavlm", None)


class Discriminators(nn.Module):
    """All families that the config has; `apply(variables, audio, method=lambda m, x: m.stft(x))` applies one.

    Everything that comes out has the batch as its first axis, so real and fake audio can go through as one batch.
    `dtype` is what the convolutions compute in; parameters, spectra and logits stay float32.
    """

    config: DiscriminatorConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        if config.stft is not None:
            self.stft = STFTDiscriminator(config.stft, self.dtype)
        if config.waveform is not None:
            self.waveform = WaveformDiscriminator(config.waveform, self.dtype)
        if config.wavlm is not None:
            self.wavlm = WavLMDiscriminator(config.wavlm, self.dtype)

    def example_inputs(self) -> tuple[Audio, HiddenStates | None]:
        """What `init` calls the module with."""
        windows = (8,)
        for family in (self.config.stft, self.config.waveform):
            windows += () if family is None else family.windows
        wavlm = self.config.wavlm
        hidden = None if wavlm is None else (jnp.zeros((1, 1, wavlm.hidden_size)),) * wavlm.hidden_states
        return jnp.zeros((1, 1, 2 * max(windows))), hidden

    def __call__(self, audio: Audio, hidden_states: HiddenStates | None = None) -> Judgements:
        """Judgements of audio, and of what WavLM makes of it."""
        config = self.config
        judgements: Judgements = {}
        if config.stft is not None:
            judgements["stft"] = self.stft(audio)
        if config.waveform is not None:
            judgements["waveform"] = self.waveform(audio)
        if config.wavlm is not None:
            if hidden_states is None:
                raise ValueError("this config has a WavLM discriminator: hidden_states are needed")
            judgements["wavlm"] = self.wavlm(hidden_states)
        return judgements
