"""The discriminators: three families (MS-STFT, waveform, WavLM) of sub-discriminators, in one module."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from omnicodec_jax.config import DiscriminatorConfig
from omnicodec_jax.discriminators.output import DiscriminatorOutput
from omnicodec_jax.discriminators.stft import STFTDiscriminator
from omnicodec_jax.discriminators.waveform import WaveformDiscriminator
from omnicodec_jax.discriminators.wavlm import HiddenStates, WavLMDiscriminator
from omnicodec_jax.models.backbone import Audio

DiscriminatorOutputs = dict[str, tuple[DiscriminatorOutput, ...]]
"""Outputs by family ("stft", "waveform", "wavlm"), one for each sub-discriminator of the family."""


class SubDiscriminator(NamedTuple):
    """One sub-discriminator, which can run by itself: `Discriminators(config)` applied to `select(params)`."""

    config: DiscriminatorConfig
    """A config with this sub-discriminator alone."""
    family: str
    name: str | None
    """The module that holds its parameters within the family's; None: the family has this sub-discriminator alone."""

    @property
    def takes_wavlm_states(self) -> bool:
        """Whether its input is WavLM's hidden states rather than audio."""
        return self.config.wavlm is not None

    def select(self, params: Any) -> Any:
        """Selects its parameters from those of all discriminators; they keep their places in the tree."""
        family = params[self.family]
        return {self.family: family if self.name is None else {self.name: family[self.name]}}


def sub_discriminators(config: DiscriminatorConfig) -> Iterator[SubDiscriminator]:
    """Yields all sub-discriminators; their outputs, one after the other, are those of `Discriminators`."""
    none = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
    if config.stft is not None:
        for window in config.stft.windows:
            alone = dataclasses.replace(config.stft, windows=(window,))
            yield SubDiscriminator(dataclasses.replace(none, stft=alone), "stft", f"window_{window}")
    if config.waveform is not None:
        empty = dataclasses.replace(config.waveform, periods=(), rates=(), windows=())
        for sizes, prefix in (("periods", "period"), ("rates", "rate"), ("windows", "window")):
            for size in getattr(config.waveform, sizes):
                alone = dataclasses.replace(empty, **{sizes: (size,)})
                yield SubDiscriminator(dataclasses.replace(none, waveform=alone), "waveform", f"{prefix}_{size}")
    if config.wavlm is not None:
        yield SubDiscriminator(dataclasses.replace(none, wavlm=config.wavlm), "wavlm", None)


class Discriminators(nn.Module):
    """All discriminators of a config; `apply(variables, audio, method=lambda m, x: m.stft(x))` applies one family.

    All outputs have the batch as their first axis, so that real and fake audio can go through as one batch. The
    convolutions compute in `dtype`; parameters, spectra and logits are float32.
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
        """Returns inputs that `init` can call the module with: short, but as long as every window."""
        windows = [8]
        for family in (self.config.stft, self.config.waveform):
            if family is not None:
                windows += family.windows
        hidden_states, wavlm = None, self.config.wavlm
        if wavlm is not None:
            hidden_states = tuple(jnp.zeros((1, 1, wavlm.hidden_size)) for _ in range(wavlm.hidden_states))
        return jnp.zeros((1, 1, 2 * max(windows))), hidden_states

    def __call__(self, audio: Audio, hidden_states: HiddenStates | None = None) -> DiscriminatorOutputs:
        """Applies all families. hidden_states: those of WavLM on this audio, for the WavLM discriminator."""
        config = self.config
        outputs: DiscriminatorOutputs = {}
        if config.stft is not None:
            outputs["stft"] = self.stft(audio)
        if config.waveform is not None:
            outputs["waveform"] = self.waveform(audio)
        if config.wavlm is not None:
            if hidden_states is None:
                raise ValueError("this config has a WavLM discriminator: hidden_states are needed")
            outputs["wavlm"] = self.wavlm(hidden_states)
        return outputs
