"""The class that turns audio into tokens and tokens into audio.

Audio of any length runs through one compiled program in blocks, and the state of the stream is carried from block to
block (lanes.py). So memory does not grow with the length, and nothing is compiled for a new length. There is no seam
between blocks, since a causal model computes the same for blocks as for the whole.

`prepare` checks a clip and makes it ready on the host; codec_lanes.py has the stages that follow.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnicodec_jax import model_directory, shipped
from omnicodec_jax.blocks import Array, check_codes
from omnicodec_jax.codec_directory import find_encoder, load_codec, save_codec
from omnicodec_jax.codec_lanes import CodecLanes, PreparedClip
from omnicodec_jax.config import CodecConfig, MimiConfig, Precision, SemanticConfig
from omnicodec_jax.config.models import check_precision
from omnicodec_jax.data.levels import as_float, check_range
from omnicodec_jax.errors import AudioError, TokenError
from omnicodec_jax.given import as_array, rows_of_batch, whole_number
from omnicodec_jax.lanes import Key, Use
from omnicodec_jax.semantic import FeatureExtractor, FrozenEncoder, check_features, in_precision, read_encoder_of


class OmniCodecTokenizer:
    """A codec with its weights, which turns audio into tokens and back.

    `encode` and `decode` take batches. `encode_each` and `decode_each` take any number of clips as they come, and keep
    an accelerator busy with many of them at once.

    Examples:
        >>> import numpy as np
        >>> tokenizer = OmniCodecTokenizer.from_pretrained("models/untrained")
        >>> codes = tokenizer.encode(np.full((1, 1, 24_000), 0.1, np.float32), sample_rate=24_000)
        >>> codes.shape, str(codes.dtype)  # [B, K, N]
        ((1, 9, 13), 'int32')
        >>> tokenizer.decode(codes[:, :4]).shape  # of the first 4 codebooks, [B, 1, N · hop]
        (1, 1, 24960)
    """

    def __init__(
        self,
        config: CodecConfig | MimiConfig,
        variables: model_directory.Variables,
        encoder: FrozenEncoder | None = None,
        devices: Sequence[Any] | None = None,
        precision: Precision = "float32",
        encoder_precision: Precision = "float32",
    ):
        """Takes a config and the weights that belong to it; `from_pretrained` reads both from a directory.

        Args:
            config: The codec's config.
            variables: The codec's parameters and codebooks, as `model_directory.load` returns them.
            encoder: Frozen encoder of the semantic features; None: models that need features must be given them.
            devices: Devices of this process, all of one kind. Default: one; pass all of them to tokenize a corpus.
            precision: Number format of the codec's convolutions and matrix products; see `from_pretrained`.
            encoder_precision: Number format of the encoder's convolutions and matrix products.
        """
        check_precision(precision=precision, encoder_precision=encoder_precision)
        self.config, self.precision = config, precision
        self.model = model_directory.build(config, dtype=jnp.dtype(precision))
        """The codec as a Flax module, without its weights."""
        self.variables = jax.tree.map(jnp.asarray, dict(variables))
        self._encoder = encoder
        self.encoder_precision: Precision | None = None if encoder is None else encoder_precision
        """The number format that the encoder computes in; None if there is no encoder."""
        computing = None if encoder is None else in_precision(encoder, encoder_precision)
        self._lanes = CodecLanes(self.model, config, self.variables, computing, devices)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = shipped.DEFAULT,
        revision: str | None = None,
        encoder: str | os.PathLike[str] | None = None,
        devices: Sequence[Any] | None = None,
        precision: Precision = "float32",
        encoder_precision: Precision = "float32",
    ) -> "OmniCodecTokenizer":
        """Loads a model from a directory, or from the Hugging Face hub.

        Args:
            name: Model directory, hub id such as `you/your-codec`, or `small`, the codec that comes with the package.
            revision: Branch, tag or commit of a hub model.
            encoder: Directory of the encoder that computes semantic features (`omnicodec convert whisper` or
                `omnicodec convert qwen3-aut`). Default: the folder `encoder` in that of the model. Without an encoder,
                models that need semantic features must be given them.
            devices: Devices of this process, all of one kind. Default: one.
            precision: Number format of the codec's convolutions and matrix products. bfloat16 is faster on GPUs and
                TPUs, and many codes are others (docs/tokens.md).
            encoder_precision: Number format of the encoder's convolutions and matrix products.

        Returns:
            The codec, ready to encode and decode.

        Raises:
            ModelError: If there is no such model, it is incomplete, or it is no codec.
            ConfigError: If its config.json cannot be read as a config, or a precision is no `Precision`.
        """
        config, variables = load_codec(name, revision)
        found = find_encoder(name, revision, encoder)
        loaded = None if found is None else read_encoder_of(found, getattr(config, "semantic", None))
        return cls(config, variables, loaded, devices, precision, encoder_precision)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles config and weights. The copy computes on one device, the first of the process that reads it."""
        precisions = self.precision, self.encoder_precision or "float32"
        return type(self), (self.config, self.variables, self._encoder, None, *precisions)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, each whole or not at all, and the encoder, if any, beside them.

        Args:
            directory: Directory to write to; it is made if it is not there.
        """
        save_codec(directory, self.config, self.variables, self._encoder)

    @cached_property
    def model_hash(self) -> str:
        """The hash of config and weights: 16 hex digits, which token files carry."""
        return model_directory.model_hash(self.config, self.variables)

    @cached_property
    def tokens_hash(self) -> str:
        """The hash of the parts that make tokens: 16 hex digits, which are equal for models that differ only in their
        decoders."""
        return model_directory.tokens_hash(self.config, self.variables)

    @cached_property
    def _hash_of_0_1(self) -> str | None:
        return model_directory.hash_of_0_1(self.config, self.variables)

    def model_hash_as(self, known: str | None, tokens_hash: str | None = None) -> str:
        """Returns the hash that tokens of this model carry, which may be that of an earlier version or another decoder.

        Args:
            known: The hash that some tokens carry; None: there are no tokens.
            tokens_hash: The `tokens_hash` that these tokens carry; tokens of earlier versions have none.

        Returns:
            `known`, if version 0.1 gave it to this model, or if it is the hash of a model that makes the same tokens;
            otherwise `model_hash`. So tokens are of this model if the result is the hash that they carry.
        """
        if known is None or known == self.model_hash:
            return self.model_hash
        if tokens_hash is not None and tokens_hash == self.tokens_hash:
            return known
        return known if known == self._hash_of_0_1 else self.model_hash

    @property
    def sample_rate(self) -> int:
        """The sample rate of the model's audio, Hz."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """The number of samples in a frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        """The number of frames per second."""
        return self.config.frame_rate

    @property
    def num_quantizers(self) -> int:
        """The number of codebooks, K, the semantic one included."""
        return len(self.config.codebook_sizes)

    @property
    def codebook_size(self) -> int:
        """The number of entries of the largest codebook."""
        return max(self.config.codebook_sizes)

    @property
    def bitrate(self) -> float:
        """The bit rate of all K codebooks, in bits per second."""
        return self.frame_rate * sum(float(np.log2(size)) for size in self.config.codebook_sizes)

    @property
    def semantic(self) -> SemanticConfig | None:
        """The config of the semantic branch; None if the model takes audio alone."""
        return getattr(self.config, "semantic", None)

    @property
    def feature_source(self) -> str | None:
        """The kind of the encoder that computes semantic features; without one, the source that the config names."""
        if self._encoder is not None:
            return model_directory.model_type(self._encoder[0])
        return None if self.semantic is None else self.semantic.source

    @property
    def extract(self) -> FeatureExtractor | None:
        """The extractor of semantic features; None if the model needs none, or if they must be given."""
        return self._lanes.extract

    @property
    def computes_features(self) -> bool:
        """Whether `encode` needs nothing but audio."""
        return self.semantic is None or self.extract is not None

    @cached_property
    def encoder_hash(self) -> str | None:
        """The hash of the encoder of semantic features: 16 hex digits; None if there is no encoder."""
        return self.encoder_hash_as(None)

    def encoder_hash_as(self, known: str | None) -> str | None:
        """Returns the encoder's hash that tokens carry, which may be that of an earlier version; see `model_hash_as`.

        Args:
            known: The hash of an encoder that some tokens carry; None: there are no tokens.

        Returns:
            `known`, if it is the hash that version 0.1 gave to this encoder; `encoder_hash` otherwise.
        """
        return None if self._encoder is None else model_directory.model_hash(*self._encoder, known=known)

    def num_frames(self, num_samples: int) -> int:
        """Counts the frames of a clip.

        Args:
            num_samples: Length of the clip in samples at the model's rate.

        Returns:
            ceil(num_samples / hop_length), by integer arithmetic.
        """
        return -(-num_samples // self.hop_length)

    def encode(
        self,
        audio: Array,
        sample_rate: int,
        lengths: Sequence[int] | None = None,
        semantic_features: Sequence[Array] | Array | None = None,
    ) -> np.ndarray:
        """Turns a batch of audio into codes.

        Floats are taken as they are, and integers are divided by their full scale. Files are scaled to
        `config.input_peak` before that, by `data.audio.load`. A row's codes depend on its own samples alone.

        Args:
            audio: [B, 1, T] at the model's rate: floats of full scale ±1, or integers.
            sample_rate: Sample rate of the audio, Hz; another one than the model's is refused.
            lengths: Number of samples of each row, if some rows are shorter than T.
            semantic_features: One array [S, F] per row, for models that do not compute them.

        Returns:
            Codes int32 [B, K, ceil(T / hop)], of which k = 0 is the semantic codebook; 0 past the last frame of a row.

        Raises:
            AudioError: If the audio has another rate or shape, is out of range, or lacks its semantic features.
        """
        if whole_number(sample_rate, "sample_rate", AudioError) != self.sample_rate:
            raise AudioError(f"audio at {sample_rate} Hz: this model takes {self.sample_rate} Hz; resample it first")
        rows = rows_of_batch(as_float(audio), lengths)
        given = [None] * len(rows) if semantic_features is None else semantic_features
        if (count := len(given) if np.iterable(given) else 0) != len(rows):
            raise AudioError(f"{count} arrays of semantic features for {len(rows)} clips")
        clips = [self.prepare(samples, features) for samples, features in zip(rows, given, strict=True)]
        frames = max(self.num_frames(samples.size) for samples in rows)
        result = np.zeros((len(rows), self.num_quantizers, frames), np.int32)
        for row, codes in self.encode_each(enumerate(clips)):
            result[row, :, : codes.shape[1]] = codes
        return result

    def decode(self, codes: Array) -> np.ndarray:
        """Turns a batch of codes into audio.

        Args:
            codes: Integers [B, k, N] of the first k ≤ K codebooks.

        Returns:
            Audio float32 [B, 1, N · hop] at the model's rate.

        Raises:
            TokenError: If the codes cannot be of this model.
        """
        codes = as_array(codes, "codes", TokenError)
        self.check_codes(codes)
        result = np.zeros((codes.shape[0], 1, codes.shape[2] * self.hop_length), np.float32)
        for row, audio in self.decode_each(enumerate(codes)):
            result[row] = audio
        return result

    # -- Any number of clips, as they come

    def prepare(self, samples: np.ndarray, features: Array | None = None) -> PreparedClip:
        """Checks a clip and makes it ready for `encode_each`; may run in any thread.

        Args:
            samples: [T] at the model's rate: floats of full scale ±1, or integers.
            features: Semantic features [S, F] of the clip, for models that do not compute them.

        Raises:
            AudioError: If samples or features cannot be encoded, or features are missing.
        """
        if (samples := as_float(samples)).ndim != 1 or not samples.size:
            raise AudioError(f"samples of shape {list(samples.shape)}: must be [T], mono")
        check_range(samples)
        if features is not None:
            features = as_array(features, "semantic features", AudioError, np.float32)
            check_features(features, self.semantic, samples.size / self.sample_rate)
            return PreparedClip(samples, features=features)
        if self.semantic is None:
            return PreparedClip(samples)
        if self.extract is not None:
            return PreparedClip(samples, log_mel=self.extract.log_mel(samples, self.sample_rate))
        raise AudioError(
            "this model needs the semantic features [S, F] of each clip: pass semantic_features, or load it with "
            "the encoder that computes them"
        )

    def encode_each(self, clips: Iterable[tuple[Key, PreparedClip]]) -> Iterator[tuple[Key, np.ndarray]]:
        """Encodes any number of clips, of any lengths, through one compiled program.

        Args:
            clips: Keys of the caller's choice, and clips that `prepare` has made ready. The next clip is asked for
                only when a lane is free, and when the clips in the lanes do not fill a quarter of the memory.

        Yields:
            Keys and codes int32 [K, N], in the order in which they are ready, which is not that of the clips.

        Examples:
            >>> import numpy as np
            >>> tokenizer = OmniCodecTokenizer.from_pretrained("models/untrained")
            >>> noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
            >>> clips = {"short": noise[:24_000], "long": noise}
            >>> prepared = ((name, tokenizer.prepare(samples)) for name, samples in clips.items())
            >>> sorted((name, codes.shape) for name, codes in tokenizer.encode_each(prepared))
            [('long', (9, 25)), ('short', (9, 13))]
        """
        return self._lanes.encode(clips)

    def decode_each(self, tokens: Iterable[tuple[Key, Array]]) -> Iterator[tuple[Key, np.ndarray]]:
        """Decodes any number of clips, of any lengths, through one compiled program.

        Args:
            tokens: Keys of the caller's choice, and codes [k, N] with k ≤ K. Where k changes from one clip to the
                next, the clips before it are finished first, and another program is compiled.

        Yields:
            Keys and audio float32 [1, N · hop], in the order in which they are ready, which is not that of the clips.

        Raises:
            TokenError: If codes cannot be of this model.
        """

        def checked(key: Key, codes: Array) -> tuple[Key, np.ndarray]:
            array = as_array(codes, "codes", TokenError)
            self.check_codes(array[None])
            return key, array

        return self._lanes.decode(checked(*clip) for clip in tokens)

    def warm_up(self) -> None:
        """Compiles the programs of `encode_each`, and sets the counts of `use` back to zero."""
        second = np.sin(np.arange(self.sample_rate, dtype=np.float32))
        for _ in self.encode_each([(None, self.prepare(second))]):
            pass
        self._lanes.forget()

    @property
    def use(self) -> Use:
        """The counts of what the devices have done for `encode_each` and `decode_each` so far."""
        return self._lanes.use

    # -- Checks

    def check_num_quantizers(self, count: int | None) -> None:
        """Refuses a number of codebooks that this model cannot decode from.

        Args:
            count: Number of first codebooks to decode from; None: all.

        Raises:
            TokenError: If the number is below 1, or above K.
        """
        if count is not None and not 1 <= whole_number(count, "--num-quantizers", TokenError) <= self.num_quantizers:
            raise TokenError(f"--num-quantizers {count}: this model has 1 to {self.num_quantizers}")

    def check_codes(self, codes: np.ndarray) -> None:
        """Refuses codes that this model cannot have made.

        Args:
            codes: Integers [B, k, N], k ≤ K.

        Raises:
            TokenError: If the type, the shape or a value is one that this model's codes cannot have.
        """
        check_codes(codes, self.config.codebook_sizes)
