"""Mimi (arXiv 2410.00037 §3.3) from the same blocks as OmniCodec: the peer to compare with.

Its semantic codebook quantizes the same latent as the acoustic ones do, side by side, instead of being taken out.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.config import MimiConfig
from omnicodec_jax.models.codec import Audio, Codes, Latent
from omnicodec_jax.models.conv import CausalConv1d, CausalConvTranspose1d, Lengths
from omnicodec_jax.models.quantize import ResidualVectorQuantizer
from omnicodec_jax.models.seanet import SEANetDecoder, SEANetEncoder
from omnicodec_jax.models.transformer import Transformer


class Mimi(nn.Module):
    """Inference only; the same `encode_frames`, `encode` and `decode` as OmniCodec, whole or streaming."""

    config: MimiConfig

    def setup(self):
        config = self.config

        def quantizer(num_quantizers: int) -> ResidualVectorQuantizer:
            return ResidualVectorQuantizer(
                num_quantizers, config.codebook_size, config.codebook_dim, config.dimension, config.codebook
            )

        self.encoder = SEANetEncoder(config.seanet, config.dimension)
        self.encoder_transformer = Transformer(config.transformer)
        self.downsample = CausalConv1d(config.dimension, 4, stride=2, use_bias=False, replicate=True)
        self.semantic_quantizer = quantizer(config.num_semantic_quantizers)
        self.acoustic_quantizer = quantizer(config.num_quantizers - config.num_semantic_quantizers)
        self.upsample = CausalConvTranspose1d(config.dimension, 2, use_bias=False, depthwise=True)
        self.decoder_transformer = Transformer(config.transformer)
        self.decoder = SEANetDecoder(config.seanet)

    def latent(self, audio: Audio, lengths: Lengths | None = None) -> Latent:
        """What both quantizers see: [B, 1, T] → [B, ceil(T / hop), D]."""
        x, lengths = self.encoder(jnp.swapaxes(audio, 1, 2), lengths)
        return self.downsample(self.encoder_transformer(x), lengths)

    def encode_frames(self, audio: Audio, semantic_codes: None = None, lengths: Lengths | None = None) -> Codes:
        """All K codes; lengths: valid samples of each row."""
        latent = self.latent(audio, lengths)
        return jnp.concatenate([self.semantic_quantizer.encode(latent), self.acoustic_quantizer.encode(latent)], axis=1)

    def encode(self, audio: Audio) -> Codes:
        """Audio → codes [B, K, ceil(T / hop)]."""
        return self.encode_frames(audio)

    def dequantize(self, codes: Codes) -> Latent:
        """Latent of any prefix of the K codebooks."""
        first = self.config.num_semantic_quantizers
        latent = self.semantic_quantizer.decode(codes[:, :first])
        return latent + self.acoustic_quantizer.decode(codes[:, first:]) if codes.shape[1] > first else latent

    def decode(self, codes: Codes) -> Audio:
        """Codes [B, k, N] → audio [B, 1, N·hop]."""
        hidden = self.decoder_transformer(self.upsample(self.dequantize(codes)))
        return jnp.swapaxes(self.decoder(hidden), 1, 2)

    def __call__(self, audio: Audio) -> Float[Array, "B 1 T"]:
        """Reconstruction, at the length of the input."""
        return self.decode(self.encode(audio))[:, :, : audio.shape[2]]
