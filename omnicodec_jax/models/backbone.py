"""The backbone that OmniCodec and Mimi share: SEANet and a transformer on either side of the quantizers."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from omnicodec_jax.config import BackboneConfig
from omnicodec_jax.models.conv import CausalConv1d, CausalConvTranspose1d, Lengths
from omnicodec_jax.models.seanet import SEANetDecoder, SEANetEncoder
from omnicodec_jax.models.transformer import Transformer

Audio = Float[Array, "B 1 T"]
Latent = Float[Array, "B N D"]
Codes = Int[Array, "B K N"]

PARTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder", "encoder_transformer", "downsample", "semantic_in", "semantic_encoder"),
    "semantic": ("semantic_in", "semantic_encoder", "semantic_quantizer"),
    "quantizer": ("semantic_quantizer", "adapter_1", "acoustic_quantizer"),
    "decoder": ("adapter_2", "upsample", "decoder_transformer", "decoder"),
}
"""The top-level modules of each part of a codec. The parts `encoder` and `quantizer` alone decide which tokens a codec
makes; the modules of `semantic` are in them, too. Modules that are in no part are heads, which only training uses."""


class Backbone(nn.Module):
    """Encoder and decoder of a codec, which puts its quantizers between them (Mimi, arXiv 2410.00037 §3.1).

    Convolutions and matrix products compute in `dtype`; parameters, latents and audio are float32. `remat` saves
    memory in training: for the gradient, activations inside stages and layers are computed again instead of kept.
    """

    config: BackboneConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    fixed: tuple[str, ...] = ()
    """The modules that do not learn. Here, this keeps the codebooks of a quantizer; the caller leaves out gradients."""

    def setup(self):
        config, dtype = self.config, self.dtype
        self.encoder = SEANetEncoder(config.seanet, config.dimension, dtype, self.remat)
        self.encoder_transformer = self._transformer()
        self.downsample = CausalConv1d(config.dimension, 4, stride=2, use_bias=False, replicate=True, dtype=dtype)
        # A depthwise convolution makes no matrix product, so it computes in float32.
        self.upsample = CausalConvTranspose1d(config.dimension, 2, use_bias=False, depthwise=True)
        self.decoder_transformer = self._transformer()
        self.decoder = SEANetDecoder(config.seanet, dtype, self.remat)

    def _transformer(self) -> Transformer:
        return Transformer(self.config.transformer, self.dtype, self.remat)

    def example_inputs(self) -> tuple[Float[Array, "..."], ...]:
        """Makes inputs of the smallest shape, for `init` to call the module with."""
        return (jnp.zeros((1, 1, self.config.hop_length)),)

    def acoustic_latent(self, audio: Audio, lengths: Lengths | None = None) -> Latent:
        """Encodes audio into the latent before the quantizers.

        Args:
            audio: float32 [B, 1, T].
            lengths: Number of valid samples of each row, int32 [B]; None: all rows are T long.

        Returns:
            Latent float32 [B, ceil(T / hop), D].
        """
        x, lengths = self.encoder(jnp.swapaxes(audio, 1, 2), lengths)
        return self.downsample(self.encoder_transformer(x), lengths).astype(jnp.float32)

    def synthesize(self, hidden: Float[Array, "B M D"]) -> Audio:
        """Makes audio from the output of the decoder transformer [B, M, D], which has two steps a frame."""
        return jnp.swapaxes(self.decoder(hidden), 1, 2)

    def decode_latent(self, latent: Latent) -> Audio:
        """Decodes the latent after the quantizers, [B, N, D], into audio [B, 1, N·hop]."""
        return self.synthesize(self.decoder_transformer(self.upsample(latent)))
