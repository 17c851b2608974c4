"""Mimi (arXiv 2410.00037 §3.3) on the same backbone as OmniCodec: the peer to compare with.

Its semantic codebook quantizes the same latent as the acoustic ones do, side by side, instead of being taken out.
"""

import jax.numpy as jnp

from omnicodec_jax.config import MimiConfig
from omnicodec_jax.models.backbone import Audio, Backbone, Codes, Latent
from omnicodec_jax.models.conv import Lengths
from omnicodec_jax.models.quantize import ResidualVectorQuantizer


class Mimi(Backbone):
    """Inference only; the same `encode_frames`, `encode` and `decode` as OmniCodec, whole or streaming."""

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
        """All K codes; lengths: valid samples of each row."""
        latent = self.acoustic_latent(audio, lengths)
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
        """Codes [B, k, N] of the first k codebooks → audio [B, 1, N·hop]."""
        return self.decode_latent(self.dequantize(codes))

    def __call__(self, audio: Audio) -> Audio:
        """Reconstruction, at the length of the input."""
        return self.decode(self.encode(audio))[:, :, : audio.shape[2]]
