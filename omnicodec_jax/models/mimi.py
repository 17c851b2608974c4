"""Mimi (arXiv 2410.00037 §3.3), the codec to compare with, on the same backbone as OmniCodec.

Its semantic codebook and its acoustic codebooks quantize the same latent side by side (split RVQ). OmniCodec instead
subtracts a projection of the quantized semantic vectors from the acoustic latent.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from omnicodec_jax.config import MimiConfig
from omnicodec_jax.models.backbone import Audio, Backbone, Codes, Latent
from omnicodec_jax.models.codec import CodecOutput, Kept, of_kept
from omnicodec_jax.models.conv import Dense, Lengths, is_streaming
from omnicodec_jax.models.quantize import ResidualVectorQuantizer


class Mimi(Backbone):
    """The Mimi model, with the same methods as OmniCodec to encode, to decode and to train."""

    config: MimiConfig

    def setup(self):
        super().setup()
        config = self.config

        def quantizer(num_quantizers: int, name: str) -> ResidualVectorQuantizer:
            return ResidualVectorQuantizer(
                num_quantizers,
                config.codebook_size,
                config.codebook_dim,
                config.dimension,
                config.codebook,
                dtype=self.dtype,
                learns=name not in self.fixed,
            )

        self.semantic_quantizer = quantizer(config.num_semantic_quantizers, "semantic_quantizer")
        self.acoustic_quantizer = quantizer(config.acoustic.num_quantizers, "acoustic_quantizer")
        if config.wavlm_dim is not None:
            self.wavlm_head = Dense(config.wavlm_dim, dtype=self.dtype)

    def encode_frames(self, audio: Audio, semantic_codes: None = None, lengths: Lengths | None = None) -> Codes:
        """Encodes audio [B, 1, T] into codes [B, K, ceil(T / hop)]; see `OmniCodec.encode_frames`."""
        latent = self.acoustic_latent(audio, lengths)
        return jnp.concatenate([self.semantic_quantizer.encode(latent), self.acoustic_quantizer.encode(latent)], axis=1)

    def encode(self, audio: Audio, semantic_features: None = None) -> Codes:
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

    # -- Train

    def __call__(
        self,
        audio: Audio,
        semantic_features: None = None,
        num_quantizers: int | Int[Array, ""] | None = None,
        kept: Kept | None = None,
        bypassed: Bool[Array, " B"] | None = None,
        acoustic_kept: Kept | None = None,
    ) -> CodecOutput:
        """Encodes and decodes a batch of crops, and computes what the losses need; see `OmniCodec.__call__`.

        Args:
            audio: float32 [B, 1, T].
            semantic_features: Always None, since Mimi takes no features.
            num_quantizers: Number of acoustic codebooks that quantizer dropout leaves on; None: all.
            kept: Clips whose semantic vectors the decoder gets; None: all.
            bypassed: Clips whose vectors are not quantized at all (moshi paper §3.3); None: none.
            acoustic_kept: Clips whose acoustic vectors the decoder gets; None: all.
        """
        if is_streaming(self):
            raise ValueError('a training forward is no stream: apply it with mutable=["codebooks"]')
        latent = self.acoustic_latent(audio)
        semantic = self.semantic_quantizer(latent, bypassed=bypassed)
        acoustic = self.acoustic_quantizer(latent, num_quantizers, bypassed)
        acoustic = acoustic._replace(output=of_kept(acoustic.output, acoustic_kept))
        image = of_kept(semantic.output, kept)
        hidden = self.decoder_transformer(self.upsample(acoustic.output + image))
        # WavLM's head takes the semantic vectors before they are added to the acoustic ones.
        projection = None if self.config.wavlm_dim is None else self.wavlm_head(semantic.output).astype(jnp.float32)
        return CodecOutput(
            audio=self.synthesize(hidden)[:, :, : audio.shape[2]],
            latent=latent,
            acoustic=acoustic,
            semantic=semantic,
            semantic_image=image,
            semantic_features=None,
            wavlm_projection=projection,
            hidden_quantized=hidden,
            hidden_guide=None,
        )

    # -- Codebook initialisation

    def codebook_inputs(self, audio: Audio, semantic_features: None = None) -> tuple[Latent, Latent]:
        """Computes the latent that the acoustic and the semantic codebooks are fitted to, and returns it twice."""
        latent = self.acoustic_latent(audio)
        return latent, latent

    def encode_semantic(self, hidden: Latent) -> Int[Array, "B Q N"]:
        """Quantizes the latent to the codes of the semantic codebooks."""
        return self.semantic_quantizer.encode(hidden)

    def semantic_vectors(self, hidden: Latent) -> Float[Array, "M V"]:
        """Projects the latent to the vectors that the semantic codebooks quantize."""
        return self.semantic_quantizer.vectors(hidden)

    def acoustic_vectors(self, latent: Latent, semantic_codes: Int[Array, "B Q N"]) -> Float[Array, "M V"]:
        """Projects the latent to the vectors that the acoustic codebooks quantize, whatever the semantic codes are."""
        return self.acoustic_quantizer.vectors(latent)
