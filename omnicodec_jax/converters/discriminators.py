"""The key table of the discriminators: it maps the reference's state dict to our variables, in both directions.

Source: ASLP-lab/OmniCodec at commit 7e18277. Its weight normalisation is the older one of PyTorch: `weight_v` is our
kernel, `weight_g` our gain.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omnicodec_jax.config import DiscriminatorConfig
from omnicodec_jax.converters.reference import CONV
from omnicodec_jax.converters.tensors import KeyEntry, from_entries, to_entries

CONV_2D = (2, 3, 1, 0)
"""Axes of a 2-D convolution's kernel."""
CONV_NARROW = (3, 2, 1, 0)
"""Axes of the kernel of a 2-D convolution that is one wide. Here it is a 1-D convolution."""


def weight_normed(key: str, module: str, axes: tuple[int, ...]) -> Iterator[KeyEntry]:
    """Yields the entries of a convolution's kernel, gain and bias."""
    yield KeyEntry(f"{key}.weight_v", f"params.{module}.kernel", axes)
    yield KeyEntry(f"{key}.weight_g", f"params.{module}.gain", axes)
    yield KeyEntry(f"{key}.bias", f"params.{module}.bias")


def key_table(config: DiscriminatorConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor of the discriminators that the config has."""
    entries: list[KeyEntry] = []
    if config.stft is not None:
        for i, window in enumerate(config.stft.windows):
            key, module = f"net_msstftd.discriminators.{i}", f"stft.window_{window}"
            entries.append(KeyEntry(f"{key}.convs.0.conv.weight", f"params.{module}.conv_0.kernel", CONV_2D))
            entries.append(KeyEntry(f"{key}.convs.0.conv.bias", f"params.{module}.conv_0.bias"))
            for j in range(1, 5):
                entries += weight_normed(f"{key}.convs.{j}.conv", f"{module}.conv_{j}", CONV_2D)
            entries += weight_normed(f"{key}.conv_post.conv", f"{module}.conv_post", CONV_2D)
    if config.waveform is not None:
        periods, rates, windows = config.waveform.periods, config.waveform.rates, config.waveform.windows
        kinds = [("period", size, CONV_NARROW) for size in periods]
        kinds += [("rate", size, CONV) for size in rates] + [("window", size, CONV_2D) for size in windows]
        for i, (kind, size, axes) in enumerate(kinds):
            key, module = f"net_dacd.discriminator.discriminators.{i}", f"waveform.{kind}_{size}"
            if kind == "window":
                layers = {f"band_convs.{b}.{j}": f"band_{b}_conv_{j}" for b in range(5) for j in range(5)}
            else:
                layers = {f"convs.{j}": f"conv_{j}" for j in range(5 if kind == "period" else 6)}
            for theirs, ours in layers.items():
                entries += weight_normed(f"{key}.{theirs}.0", f"{module}.{ours}", axes)
            entries += weight_normed(f"{key}.conv_post", f"{module}.conv_post", axes)
    if config.wavlm is not None:
        for theirs, ours in {"pre": "conv_in", "conv_post": "conv_post"}.items():
            entries += weight_normed(f"net_wld.{theirs}", f"wavlm.{ours}", CONV)
        for j in range(3):
            entries += weight_normed(f"net_wld.convs.{j}", f"wavlm.conv_{j}", CONV)
    return entries


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: DiscriminatorConfig) -> dict[str, Any]:
    """Converts the reference's state dict to our variables. Raises ConversionError with every key that does not fit."""
    return from_entries(state_dict, key_table(config), config)


def to_state_dict(variables: Mapping[str, Any], config: DiscriminatorConfig) -> dict[str, np.ndarray]:
    """Converts our variables to the reference's state dict: the inverse of `from_state_dict`."""
    return to_entries(variables, key_table(config))
