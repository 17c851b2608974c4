"""OmniCodec (arXiv 2603.20638 §2): one semantic codebook, acoustic residual codebooks, decoupled by two adapters."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from omnicodec_jax.config import CodecConfig
from omnicodec_jax.dsp import interpolate
from omnicodec_jax.models.backbone import Audio, Backbone, Codes, Latent
from omnicodec_jax.models.conv import Dense, Lengths, is_streaming
from omnicodec_jax.models.quantize import Quantized, ResidualVectorQuantizer

Features = Float[Array, "B S F"]
Kept = Bool[Array, " B"]
"""A mask over the clips of a batch: True where dropout keeps a clip's semantic or acoustic vectors."""


class CodecOutput(NamedTuple):
    """The result of a forward pass in training: everything that the losses are computed from.

    A field is None if the config does not have the part that computes it.
    """

    audio: Audio
    """The reconstruction of the audio."""
    latent: Latent
    """The encoder's latent, before the codebooks."""
    acoustic: Quantized
    """The result of the acoustic codebooks."""
    semantic: Quantized | None
    """The result of the semantic codebook."""
    semantic_image: Latent | None
    """The output of adapter 2 for the quantized semantic vectors. The decoder takes its sum with `acoustic.output`."""
    semantic_features: Float[Array, "B S F"] | None
    """The reconstruction of the semantic features."""
    wavlm_projection: Float[Array, "B N W"] | None
    """The projection of the quantized semantic vectors to the width of WavLM's hidden states."""
    hidden_quantized: Float[Array, "B M D"]
    """The output of the decoder transformer for the quantized latent, two steps a frame."""
    hidden_guide: Float[Array, "B M D"] | None
    """The output of the decoder transformer for the latent before quantization: the target of self-guidance, without
    gradient."""

    @property
    def codes(self) -> Codes:
        """The codes of all codebooks, of which k = 0 is the semantic one."""
        acoustic = self.acoustic.codes
        return acoustic if self.semantic is None else jnp.concatenate([self.semantic.codes, acoustic], axis=1)


class OmniCodec(Backbone):
    """The OmniCodec model, as pure functions of `variables = {"params", "codebooks"}`.

    `apply(variables, audio, features, method="encode")` and `apply(variables, codes, method="decode")` take whole
    clips. With `mutable=["stream"]`, `encode_frames` and `decode` take the next block of a stream.
    """

    config: CodecConfig

    def setup(self):
        super().setup()
        config, dense = self.config, partial(Dense, dtype=self.dtype)
        self.acoustic_quantizer = ResidualVectorQuantizer(
            config.acoustic.num_quantizers,
            config.acoustic.codebook_size,
            config.acoustic.codebook_dim,
            config.dimension,
            config.codebook,
            dtype=self.dtype,
            learns="acoustic_quantizer" not in self.fixed,
        )
        if config.semantic is not None:
            self.semantic_in = dense(config.dimension)
            self.semantic_encoder = self._transformer()
            self.semantic_quantizer = ResidualVectorQuantizer(
                1,
                config.semantic.codebook_size,
                config.semantic.codebook_dim,
                config.dimension,
                config.codebook,
                use_bias=True,
                dtype=self.dtype,
                learns="semantic_quantizer" not in self.fixed,
            )
            self.adapter_2 = dense(config.dimension)
            self.semantic_decoder = self._transformer()
            self.semantic_out = dense(config.semantic.feature_dim)
            if config.adapter_1:
                self.adapter_1 = dense(config.dimension)
            if config.wavlm_dim is not None:
                self.wavlm_head = dense(config.wavlm_dim)

    def example_inputs(self) -> tuple[Float[Array, "..."], ...]:
        """Makes inputs of the smallest shape, for `init` to call the module with."""
        semantic = self.config.semantic
        return super().example_inputs() + (() if semantic is None else (jnp.zeros((1, 1, semantic.feature_dim)),))

    # -- Semantic-acoustic decoupling (paper §2.2): adapter 1's output for the quantized semantic vectors is subtracted
    # from the acoustic latent before its quantizer, and adapter 2's output is added after it. In training, both outputs
    # are left out for clips that are not `kept`.

    def decouple(self, latent: Latent, semantic: Latent | None, kept: Kept | None = None) -> Latent:
        """Subtracts adapter 1's output for the quantized semantic vectors from the latent of the acoustic codebooks."""
        if semantic is None or not self.config.adapter_1:
            return latent
        return latent - of_kept(self.adapter_1(semantic).astype(jnp.float32), kept)

    def semantic_image(self, semantic: Latent | None, kept: Kept | None = None) -> Latent | None:
        """Computes adapter 2's output for the quantized semantic vectors; None without a semantic branch."""
        return None if semantic is None else of_kept(self.adapter_2(semantic).astype(jnp.float32), kept)

    def recombine(self, acoustic: Latent, image: Latent | None) -> Latent:
        """Adds the semantic image to the quantized acoustic latent; the decoder takes the sum."""
        return acoustic if image is None else acoustic + image

    # -- Encode

    def semantic_hidden(self, features: Features) -> Float[Array, "B S D"]:
        """Computes the semantic branch before its quantizer, at the rate of the features."""
        return self.semantic_encoder(self.semantic_in(features))

    def semantic_frames(self, features: Features | None, frames: int) -> Latent | None:
        """Interpolates `semantic_hidden` at the codec's frames, [B, N, D]; None without a semantic branch."""
        if self.config.semantic is None:
            return None
        if features is None:
            raise ValueError("this config has a semantic branch: semantic_features [B, S, F] are needed")
        return interpolate(self.semantic_hidden(features), frames)

    def encode_semantic(self, hidden: Latent) -> Int[Array, "B 1 N"]:
        """Quantizes the result of `semantic_frames` to the codes of the semantic codebook."""
        return self.semantic_quantizer.encode(hidden)

    def encode_frames(
        self, audio: Audio, semantic_codes: Int[Array, "B 1 N"] | None, lengths: Lengths | None = None
    ) -> Codes:
        """Encodes audio into the codes of all K codebooks, given those of the semantic one.

        Args:
            audio: float32 [B, 1, T].
            semantic_codes: int32 [B, 1, N]; None if the config has no semantic branch.
            lengths: Number of valid samples of each row of a ragged batch, int32 [B]; None: all rows are T long.

        Returns:
            Codes int32 [B, K, N], N = ceil(T / hop), of which the first ceil(length / hop) of each row are valid.
        """
        latent = self.acoustic_latent(audio, lengths)
        if semantic_codes is None:
            return self.acoustic_quantizer.encode(latent)
        semantic = self.semantic_quantizer.decode(semantic_codes)
        acoustic_codes = self.acoustic_quantizer.encode(self.decouple(latent, semantic))
        return jnp.concatenate([semantic_codes, acoustic_codes], axis=1)

    def encode(self, audio: Audio, semantic_features: Features | None = None) -> Codes:
        """Encodes audio [B, 1, T] and the semantic features of the same clips into codes [B, K, ceil(T / hop)]."""
        hidden = self.semantic_frames(semantic_features, -(-audio.shape[2] // self.config.hop_length))
        return self.encode_frames(audio, None if hidden is None else self.encode_semantic(hidden))

    # -- Decode

    def dequantize(self, codes: Codes) -> Latent:
        """Sums the vectors of codes [B, k, N] of the first k ≥ 1 codebooks into a latent [B, N, D]."""
        if self.config.semantic is None:
            return self.acoustic_quantizer.decode(codes)
        # No acoustic codes decode to zeros, since the acoustic quantizer's output projection has no bias.
        semantic = self.semantic_quantizer.decode(codes[:, :1])
        return self.recombine(self.acoustic_quantizer.decode(codes[:, 1:]), self.semantic_image(semantic))

    def decode(self, codes: Codes) -> Audio:
        """Decodes codes [B, k, N] of the first k codebooks into audio [B, 1, N·hop]."""
        return self.decode_latent(self.dequantize(codes))

    # -- Train

    def __call__(
        self,
        audio: Audio,
        semantic_features: Features | None = None,
        num_quantizers: int | Int[Array, ""] | None = None,
        kept: Kept | None = None,
        bypassed: Bool[Array, " B"] | None = None,
        acoustic_kept: Kept | None = None,
    ) -> CodecOutput:
        """Encodes and decodes a batch of crops, and computes what the losses need.

        Apply it with `mutable=["codebooks"]` and `rngs={"codebooks": key}` to let the codebooks learn from the batch.

        Args:
            audio: float32 [B, 1, T].
            semantic_features: float32 [B, S, F]; None if the config has no semantic branch.
            num_quantizers: Number of acoustic codebooks that quantizer dropout leaves on; None: all.
            kept: Clips whose semantic vectors semantic dropout leaves in; None: all.
            acoustic_kept: Clips whose acoustic vectors acoustic dropout leaves in; None: all.
            bypassed: Clips whose acoustic vectors are not quantized; None: none.
        """
        if is_streaming(self):
            raise ValueError('a training forward is no stream: apply it with mutable=["codebooks"]')
        config, samples = self.config, audio.shape[2]
        latent = self.acoustic_latent(audio)
        frames = latent.shape[1]

        hidden = self.semantic_frames(semantic_features, frames)
        semantic = None if hidden is None else self.semantic_quantizer(hidden)
        vector = None if semantic is None else semantic.output
        acoustic = self.acoustic_quantizer(self.decouple(latent, vector, kept), num_quantizers, bypassed)
        acoustic = acoustic._replace(output=of_kept(acoustic.output, acoustic_kept))
        image = self.semantic_image(vector, kept)
        upsampled = self.upsample(self.recombine(acoustic.output, image))

        # -- Self-guidance (paper §2.3): the output of the decoder transformer for the quantized latent should equal its
        # output for the latent before quantization. This target has no gradient, so no activations are kept for one.
        hidden_quantized = self.decoder_transformer(upsampled)
        forward_only = nn.map_variables(lambda module, x: module(x), "params", stop_gradient)
        hidden_guide = forward_only(self.decoder_transformer, stop_gradient(interpolate(latent, 2 * frames)))
        if acoustic_kept is not None:  # without acoustic codes, the decoder cannot reach the target
            hidden_guide = jnp.where(acoustic_kept[:, None, None], hidden_guide, stop_gradient(hidden_quantized))

        reconstructed = projection = None
        if vector is not None and semantic_features is not None:
            steps = semantic_features.shape[1]
            reconstructed = self.semantic_out(interpolate(self.semantic_decoder(upsampled), steps)).astype(jnp.float32)
            projection = None if config.wavlm_dim is None else self.wavlm_head(vector).astype(jnp.float32)
        return CodecOutput(
            audio=self.synthesize(hidden_quantized)[:, :, :samples],
            latent=latent,
            acoustic=acoustic,
            semantic=semantic,
            semantic_image=image,
            semantic_features=reconstructed,
            wavlm_projection=projection,
            hidden_quantized=hidden_quantized,
            hidden_guide=stop_gradient(hidden_guide),
        )

    # -- Codebook initialisation

    def codebook_inputs(self, audio: Audio, semantic_features: Features | None = None) -> tuple[Latent, Latent | None]:
        """Computes the latents that the acoustic codebooks and the semantic codebook are fitted to."""
        latent = self.acoustic_latent(audio)
        return latent, self.semantic_frames(semantic_features, latent.shape[1])

    def semantic_vectors(self, hidden: Latent) -> Float[Array, "M V"]:
        """Projects the result of `semantic_frames` to the vectors that the semantic codebook quantizes."""
        return self.semantic_quantizer.vectors(hidden)

    def acoustic_vectors(self, latent: Latent, semantic_codes: Int[Array, "B 1 N"] | None) -> Float[Array, "M V"]:
        """Projects the result of `acoustic_latent` to the vectors that the acoustic codebooks quantize."""
        semantic = None if semantic_codes is None else self.semantic_quantizer.decode(semantic_codes)
        return self.acoustic_quantizer.vectors(self.decouple(latent, semantic))


def of_kept(x: Latent, kept: Kept | None) -> Latent:
    """Puts zeros in the place of the clips that are not kept."""
    return x if kept is None else jnp.where(kept[:, None, None], x, 0.0)
