"""The discriminator over the hidden states of WavLM (spec §2.3)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.config import WavLMDiscriminatorConfig
from omnicodec_jax.discriminators.conv import Conv
from omnicodec_jax.discriminators.output import DiscriminatorOutput

HiddenStates = tuple[Float[Array, "B S W"], ...]
"""WavLM's embedding and the outputs of all of its layers, for audio at 16 kHz."""


class WavLMDiscriminator(nn.Module):
    """The WavLM discriminator: 1-D convolutions over all hidden states, concatenated along channels; logits [B, S, 1].

    Its feature maps are the hidden states themselves, since these are what feature matching compares.
    """

    config: WavLMDiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: HiddenStates) -> tuple[DiscriminatorOutput]:
        width = self.config.channels
        x = Conv(width, (1,), dtype=self.dtype, name="conv_in")(jnp.concatenate(hidden_states, axis=-1))
        for i, features in enumerate((2 * width, 4 * width, 4 * width)):
            x = nn.leaky_relu(Conv(features, (5,), dtype=self.dtype, name=f"conv_{i}")(x), 0.1)
        logits = Conv(1, (3,), dtype=self.dtype, name="conv_post")(x)
        return (DiscriminatorOutput(logits.astype(jnp.float32), hidden_states),)
