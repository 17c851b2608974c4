"""OmniCodec (arXiv 2603.20638 §2): one semantic codebook, acoustic residual codebooks, decoupled by two adapters."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from omnicodec_jax.config import CodecConfig
from omnicodec_jax.dsp import interpolate
from omnicodec_jax.models.backbone import Audio, Backbone, Codes, Latent
from omnicodec_jax.models.conv import Dense, Lengths, is_streaming
from omnicodec_jax.models.quantize import Quantized, ResidualVectorQuantizer

Features = Float[Array, "B S F"]


class CodecOutput(NamedTuple):
    """A training forward: everything that the losses are made of. None: the config has no such part."""

    audio: Audio
    acoustic: Quantized
    semantic: Quantized | None
    semantic_features: Float[Array, "B S F"] | None
    """Reconstruction of the semantic features."""
    wavlm_projection: Float[Array, "B N W"] | None
    hidden_quantized: Float[Array, "B M D"]
    """Decoder transformer on the quantized latent, two steps a frame."""
    hidden_guide: Float[Array, "B M D"]
    """The same on the latent before quantization: the target of self-guidance, no gradient."""

    @property
    def codes(self) -> Codes:
        """k = 0 is the semantic codebook."""
        acoustic = self.acoustic.codes
        return acoustic if self.semantic is None else jnp.concatenate([self.semantic.codes, acoustic], axis=1)


class OmniCodec(Backbone):
    """The codec as pure functions of `variables = {"params", "codebooks"}`.

    `apply(variables, audio, features, method="encode")` and `apply(variables, codes, method="decode")` see whole
    clips; with `mutable=["stream"]`, `encode_frames` and `decode` see the next block of a stream.
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
            )
            self.adapter_2 = dense(config.dimension)
            self.semantic_decoder = self._transformer()
            self.semantic_out = dense(config.semantic.feature_dim)
            if config.adapter_1:
                self.adapter_1 = dense(config.dimension)
            if config.wavlm_dim is not None:
                self.wavlm_head = dense(config.wavlm_dim)

    def example_inputs(self) -> tuple[Float[Array, "..."], ...]:
        """What `init` calls the module with."""
        semantic = self.config.semantic
        return super().example_inputs() + (() if semantic is None else (jnp.zeros((1, 1, semantic.feature_dim)),))

    # -- Semantic-acoustic decoupling (paper §2.2): what the semantic code tells is taken out of the acoustic latent
    # before its quantizer and put back after it. `semantic` is the quantized semantic vector.

    def decouple(self, latent: Latent, semantic: Latent | None) -> Latent:
        """Adapter-1: what the acoustic codebooks have to tell."""
        if semantic is None or not self.config.adapter_1:
            return latent
        return latent - self.adapter_1(semantic).astype(jnp.float32)

    def recombine(self, acoustic: Latent, semantic: Latent | None) -> Latent:
        """Adapter-2: what the decoder hears."""
        return acoustic if semantic is None else acoustic + self.adapter_2(semantic).astype(jnp.float32)

    # -- Encode

    def semantic_hidden(self, features: Features) -> Float[Array, "B S D"]:
        """Semantic branch before its quantizer, at the features' own rate."""
        return self.semantic_encoder(self.semantic_in(features))

    def semantic_frames(self, features: Features | None, frames: int) -> Latent | None:
        """`semantic_hidden`, interpolated to the codec's frames; None without a semantic branch."""
        if self.config.semantic is None:
            return None
        if features is None:
            raise ValueError("this config has a semantic branch: semantic_features [B, S, F] are needed")
        return interpolate(self.semantic_hidden(features), frames)

    def encode_semantic(self, hidden: Latent) -> Int[Array, "B 1 N"]:
        """Semantic codes of `semantic_frames`."""
        return self.semantic_quantizer.encode(hidden)

    def encode_frames(
        self, audio: Audio, semantic_codes: Int[Array, "B 1 N"] | None, lengths: Lengths | None = None
    ) -> Codes:
        """All K codes of the audio, the semantic ones as given (None: the config has no semantic branch).

        lengths: valid samples of each row of a ragged batch; codes of the first ceil(length / hop) frames are valid.
        """
        latent = self.acoustic_latent(audio, lengths)
        if semantic_codes is None:
            return self.acoustic_quantizer.encode(latent)
        semantic = self.semantic_quantizer.decode(semantic_codes)
        acoustic_codes = self.acoustic_quantizer.encode(self.decouple(latent, semantic))
        return jnp.concatenate([semantic_codes, acoustic_codes], axis=1)

    def encode(self, audio: Audio, semantic_features: Features | None = None) -> Codes:
        """Audio and the semantic features of the same clip → codes [B, K, ceil(T / hop)]."""
        hidden = self.semantic_frames(semantic_features, -(-audio.shape[2] // self.config.hop_length))
        return self.encode_frames(audio, None if hidden is None else self.encode_semantic(hidden))

    # -- Decode

    def dequantize(self, codes: Codes) -> Latent:
        """Latent of any prefix of the K codebooks, the first alone included."""
        if self.config.semantic is None:
            return self.acoustic_quantizer.decode(codes)
        # No acoustic codes decode to zeros, since the acoustic quantizer's output projection has no bias.
        semantic = self.semantic_quantizer.decode(codes[:, :1])
        return self.recombine(self.acoustic_quantizer.decode(codes[:, 1:]), semantic)

    def decode(self, codes: Codes) -> Audio:
        """Codes [B, k, N] of the first k codebooks → audio [B, 1, N·hop]."""
        return self.decode_latent(self.dequantize(codes))

    # -- Train

    def __call__(
        self,
        audio: Audio,
        semantic_features: Features | None = None,
        num_quantizers: int | Int[Array, ""] | None = None,
    ) -> CodecOutput:
        """Reconstruction and the ingredients of the losses.

        num_quantizers: acoustic layers that quantizer dropout leaves on. Apply with mutable=["codebooks"] and
        rngs={"codebooks": key} to let the codebooks learn from the batch.
        """
        if is_streaming(self):
            raise ValueError('a training forward is no stream: apply it with mutable=["codebooks"]')
        config, samples = self.config, audio.shape[2]
        latent = self.acoustic_latent(audio)
        frames = latent.shape[1]

        hidden = self.semantic_frames(semantic_features, frames)
        semantic = None if hidden is None else self.semantic_quantizer(hidden)
        vector = None if semantic is None else semantic.output
        acoustic = self.acoustic_quantizer(self.decouple(latent, vector), num_quantizers)
        upsampled = self.upsample(self.recombine(acoustic.output, vector))

        # -- Self-guidance (paper §2.3): the decoder's transformer should make of the quantized latent what it makes
        # of the latent before quantization. That target takes no gradient, nor keeps anything for one.
        hidden_quantized = self.decoder_transformer(upsampled)
        forward_only = nn.map_variables(lambda module, x: module(x), "params", stop_gradient)
        hidden_guide = forward_only(self.decoder_transformer, stop_gradient(interpolate(latent, 2 * frames)))

        reconstructed = projection = None
        if vector is not None and semantic_features is not None:
            steps = semantic_features.shape[1]
            reconstructed = self.semantic_out(interpolate(self.semantic_decoder(upsampled), steps)).astype(jnp.float32)
            projection = None if config.wavlm_dim is None else self.wavlm_head(vector).astype(jnp.float32)
        return CodecOutput(
            audio=self.synthesize(hidden_quantized)[:, :, :samples],
            acoustic=acoustic,
            semantic=semantic,
            semantic_features=reconstructed,
            wavlm_projection=projection,
            hidden_quantized=hidden_quantized,
            hidden_guide=stop_gradient(hidden_guide),
        )

    # -- Codebook initialisation

    def semantic_vectors(self, hidden: Latent) -> Float[Array, "M V"]:
        """What the semantic codebook quantizes, of `semantic_frames`."""
        return self.semantic_quantizer.vectors(hidden)

    def acoustic_vectors(self, latent: Latent, semantic_codes: Int[Array, "B 1 N"] | None) -> Float[Array, "M V"]:
        """What the acoustic codebooks quantize, of `acoustic_latent`."""
        semantic = None if semantic_codes is None else self.semantic_quantizer.decode(semantic_codes)
        return self.acoustic_quantizer.vectors(self.decouple(latent, semantic))
