"""Mimi (arXiv 2410.00037 §3.3), the codec to compare with, on the same backbone as OmniCodec.

Its semantic codebook and its acoustic codebooks quantize the same latent side by side (split RVQ). In OmniCodec, what
the semantic codes say is taken out of the acoustic latent.
"""

import jax.numpy as jnp

from omnicodec_jax.config import MimiConfig
from omnicodec_jax.models.backbone import Audio, Backbone, Codes, Latent
from omnicodec_jax.models.conv import Lengths
from omnicodec_jax.models.quantize import ResidualVectorQuantizer


class Mimi(Backbone):
    """The Mimi model, for inference only. It has the same `encode_frames`, `encode` and `decode` as OmniCodec."""

    config: MimiConfig

    def setup(self):
        super().setup()
        config = self.config

        def quantizer(num_quantizers: int) -> ResidualVectorQuantizer:
            return ResidualVectorQuantizer(
                num_quantizers,
                config.codebook_size,
                config.codebook_dim,
                config.dimension,
                config.codebook,
                dtype=self.dtype,
            )

        self.semantic_quantizer = quantizer(config.num_semantic_quantizers)
        self.acoustic_quantizer = quantizer(config.num_quantizers - config.num_semantic_quantizers)

    def encode_frames(self, audio: Audio, semantic_codes: None = None, lengths: Lengths | None = None) -> Codes:
        """Encodes audio [B, 1, T] into codes [B, K, ceil(T / hop)]; see `OmniCodec.encode_frames`."""
        latent = self.acoustic_latent(audio, lengths)
        return jnp.concatenate([self.semantic_quantizer.encode(latent), self.acoustic_quantizer.encode(latent)], axis=1)

    def encode(self, audio: Audio) -> Codes:
        """Encodes audio [B, 1, T] into codes [B, K, ceil(T / hop)]."""
        return self.encode_frames(audio)

    def dequantize(self, codes: Codes) -> Latent:
        """Sums the vectors of codes [B, k, N] of the first k ≥ 1 codebooks into a latent [B, N, D]."""
        first = self.config.num_semantic_quantizers
        latent = self.semantic_quantizer.decode(codes[:, :first])
        return latent + self.acoustic_quantizer.decode(codes[:, first:]) if codes.shape[1] > first else latent

    def decode(self, codes: Codes) -> Audio:
        """Decodes codes [B, k, N] of the first k codebooks into audio [B, 1, N·hop]."""
        return self.decode_latent(self.dequantize(codes))

    def __call__(self, audio: Audio) -> Audio:
        """Encodes and decodes audio [B, 1, T], at its own length."""
        return self.decode(self.encode(audio))[:, :, : audio.shape[2]]
