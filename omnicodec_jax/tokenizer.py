"""The public face: audio in, tokens out, and back.

Audio of any length runs through one compiled program, in blocks with the stream's state carried from block to
block (lanes.py). So the model's memory does not grow with length, no length is compiled for, and blocks meet without a
seam: the causal model gives on blocks what it gives on the whole.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.config import CodecConfig, MimiConfig, SemanticConfig
from omnicodec_jax.data.levels import as_float, check_range
from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.lanes import Clock, Inputs, Lanes, Use, Work, replicated
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.semantic import Encoder, FeatureExtractor, load_encoder

SEMANTIC_RATE = 12.75
"""Feature vectors a second, between 12.5 (log-mel) and 13 (Qwen3-Omni); to tell another clip's apart."""

Array = np.ndarray | jax.Array


class Heard(NamedTuple):
    """A clip that is ready to encode: what of it can be computed in any thread, by itself."""

    samples: np.ndarray
    """float32 [T] at the model's rate."""
    semantic: np.ndarray
    """Semantic features [S, F] if they were given, else the log-mel [M, 128] that they are computed of."""
    given: bool = False


def load_codec(
    name: str | os.PathLike[str], revision: str | None = None
) -> tuple[CodecConfig | MimiConfig, model_directory.Variables]:
    """Reads config and variables (numpy) of a codec, by directory or hub id. Raises ModelError, ConfigError."""
    config, variables = model_directory.load(model_directory.resolve(name, revision))
    if not isinstance(config, CodecConfig | MimiConfig):
        raise ModelError(f"{name}: a {model_directory.model_type(config)} model, not a codec")
    return config, variables


class OmniCodecTokenizer:
    """Turns audio into tokens and back: a codec with its weights.

    `encode` and `decode` take batches; `encode_each` and `decode_each` take any number of clips as they come.

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
        encoder: Encoder | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """Takes a config and the weights that belong to it; `from_pretrained` reads both from a directory.

        Args:
            config: What the model is.
            variables: Its parameters and codebooks, as `model_directory.load` gives them.
            encoder: Qwen3-Omni's audio encoder, to compute semantic features with that would have to be given
                otherwise.
            devices: Of this process, all of one kind; one by default, all of them to tokenize a corpus.
        """
        self.config = config
        self.variables = jax.tree.map(jnp.asarray, dict(variables))
        self._clock = Clock()
        devices = jax.local_devices()[:1] if devices is None else devices
        model, weights = model_directory.build(config), replicated(self.variables, devices)  # once, for all lanes
        self._encode = Lanes(model, encode_block, weights, 1, devices, self._clock)
        self._decode = Lanes(model, type(model).decode, weights, 1, devices, self._clock)
        self._encoder = encoder
        self.extract: FeatureExtractor | None = None
        """Computes semantic features, if the model has them computed."""
        if self.semantic is not None:
            self._hide = Lanes(model, OmniCodec.semantic_hidden, weights, 0, devices, self._clock)
            if encoder is not None or self.semantic.source == "log_mel":
                self.extract = FeatureExtractor(encoder, devices, self._clock)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        encoder: str | os.PathLike[str] | None = None,
        devices: Sequence[Any] | None = None,
    ) -> "OmniCodecTokenizer":
        """Loads a model from a directory, or from the Hugging Face hub.

        Args:
            name: Model directory, or hub id such as `you/your-codec`.
            revision: Branch, tag or commit of a hub model.
            encoder: Directory of Qwen3-Omni's audio encoder (`omnicodec convert qwen3-aut`), to compute semantic
                features with that would have to be given otherwise.
            devices: Of this process, all of one kind; one by default.

        Returns:
            The codec, ready to encode and decode.

        Raises:
            ModelError: If there is no such model, it is incomplete, or it is no codec.
            ConfigError: If its config.json is not one.
        """
        config, variables = load_codec(name, revision)
        loaded = None if encoder is None else load_encoder(encoder, getattr(config, "semantic", None))
        return cls(config, variables, loaded, devices)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model as config.json and model.safetensors, each whole or not at all.

        Args:
            directory: Where to; it is made if it is not there.
        """
        model_directory.save(directory, self.config, self.variables)

    @cached_property
    def model_hash(self) -> str:
        """Identifies config and weights; token files carry it."""
        return model_directory.model_hash(self.config, self.variables)

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio that goes in and comes out, Hz."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.config.frame_rate

    @property
    def num_quantizers(self) -> int:
        """K, the semantic codebook included."""
        return len(self.config.codebook_sizes)

    @property
    def codebook_size(self) -> int:
        """Entries of the largest codebook."""
        return max(self.config.codebook_sizes)

    @property
    def bitrate(self) -> float:
        """Bits per second of all K codebooks."""
        return self.frame_rate * sum(float(np.log2(size)) for size in self.config.codebook_sizes)

    @property
    def semantic(self) -> SemanticConfig | None:
        """The semantic branch that features are computed for; None: the model needs none."""
        return getattr(self.config, "semantic", None)

    @property
    def computes_features(self) -> bool:
        """Whether audio is all that `encode` needs."""
        return self.semantic is None or self.extract is not None

    @cached_property
    def encoder_hash(self) -> str | None:
        """Identifies the encoder that semantic features are computed with, if there is one."""
        return None if self._encoder is None else model_directory.model_hash(*self._encoder)

    def num_frames(self, num_samples: int) -> int:
        """Counts the frames of a clip.

        Args:
            num_samples: Its length at the model's rate.

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

        Floats are taken as they are, integers by their full scale: files are scaled to `config.input_peak` by
        `data.audio.load`. A row's codes depend on its own samples alone.

        Args:
            audio: [B, 1, T] at the model's rate: floats of full scale ±1, or integers.
            sample_rate: The audio's, Hz; another one than the model's is refused.
            lengths: Samples of each row, if some are shorter than T.
            semantic_features: One array [S, F] per row, for models that do not compute them.

        Returns:
            Codes int32 [B, K, ceil(T / hop)], k = 0 the semantic one; 0 past the last frame of a row.

        Raises:
            AudioError: If the audio has another rate or shape, is out of range, or lacks its semantic features.
        """
        audio = as_float(audio)
        if sample_rate != self.sample_rate:
            raise AudioError(f"audio at {sample_rate} Hz: this model takes {self.sample_rate} Hz; resample it first")
        if audio.ndim != 3 or audio.shape[1] != 1 or 0 in audio.shape:
            raise AudioError(f"audio of shape {list(audio.shape)}: must be [B, 1, T], mono")
        sizes = [audio.shape[2]] * audio.shape[0] if lengths is None else [int(n) for n in lengths]
        if len(sizes) != audio.shape[0] or not all(0 < n <= audio.shape[2] for n in sizes):
            raise AudioError(f"lengths {sizes}: must be one per row, each between 1 and {audio.shape[2]}")
        given = [None] * len(sizes) if semantic_features is None else semantic_features
        if len(given) != len(sizes):
            raise AudioError(f"{len(given)} arrays of semantic features for {len(sizes)} clips")
        heard = [self.hear(row[0, :size], f) for row, size, f in zip(audio, sizes, given, strict=True)]
        result = np.zeros((len(sizes), self.num_quantizers, self.num_frames(max(sizes))), np.int32)
        for row, codes in self.encode_each(enumerate(heard)):
            result[row, :, : codes.shape[1]] = codes
        return result

    def decode(self, codes: Array) -> np.ndarray:
        """Turns a batch of codes into audio.

        Args:
            codes: Integers [B, k, N] of the first k ≤ K codebooks.

        Returns:
            Audio float32 [B, 1, N · hop] at the model's rate.

        Raises:
            TokenError: If these are no codes of this model.
        """
        codes = np.asarray(codes)
        self.check_codes(codes)
        result = np.zeros((codes.shape[0], 1, codes.shape[2] * self.hop_length), np.float32)
        for row, audio in self.decode_each(enumerate(codes)):
            result[row] = audio
        return result

    # -- Of any number of clips, as they come

    def hear(self, samples: np.ndarray, features: Array | None = None) -> Heard:
        """Makes a clip ready for `encode_each`; may run in any thread.

        Args:
            samples: float32 [T] at the model's rate.
            features: Its semantic features [S, F], for models that do not compute them.

        Returns:
            What `encode_each` takes.

        Raises:
            AudioError: If samples or features cannot be encoded, or features are missing.
        """
        check_range(samples)
        if self.semantic is None:
            return Heard(samples, np.zeros((0, 0), np.float32))
        if features is not None:
            return Heard(samples, self._checked(np.asarray(features, np.float32), samples.size), given=True)
        if self.extract is not None:
            return Heard(samples, self.extract.log_mel(samples, self.sample_rate))
        raise AudioError(
            "this model needs the semantic features [S, F] of each clip: pass semantic_features, or load it with "
            "the encoder that computes them"
        )

    def encode_each(self, clips: Iterable[tuple[Any, Heard]]) -> Iterator[tuple[Any, np.ndarray]]:
        """Encodes any number of clips, of any lengths, through one compiled program.

        Args:
            clips: Keys of yours and what `hear` has made of the clips; asked for when there is room for them. All of
                them have features, or none has.

        Yields:
            Keys and codes int32 [K, N], as they get ready: not in the order of the clips.
        """
        if self.semantic is None:
            return self._encode.run(self._encode_work(key, heard.samples, None) for key, heard in clips)
        hidden = self._hide.run(self._hide_work(key, features) for key, features in self._features(clips))
        return self._encode.run(self._encode_work(key, heard.samples, h) for (key, heard), h in hidden)

    def decode_each(self, tokens: Iterable[tuple[Any, Array]]) -> Iterator[tuple[Any, np.ndarray]]:
        """Decodes any number of clips, of any lengths, through one compiled program.

        Args:
            tokens: Keys of yours and codes [k, N], all of the same k ≤ K.

        Yields:
            Keys and audio float32 [1, N · hop], as they get ready.
        """
        return self._decode.run(self._decode_work(key, np.asarray(codes, np.int32)) for key, codes in tokens)

    def warm_up(self) -> None:
        """Compiles what `encode_each` needs. `use` begins anew, so that it tells nothing of that."""
        second = np.sin(np.arange(self.sample_rate, dtype=np.float32))
        for _ in self.encode_each([(None, self.hear(second))]):
            pass
        self._encode.forget()
        self._clock.forget()

    @property
    def use(self) -> Use:
        """What `encode_each` and `decode_each` have made the devices do so far."""
        lanes = (self._encode, self._decode)
        frames, valid = sum(lane.frames for lane in lanes), sum(lane.valid for lane in lanes)
        return Use(frames, valid, *self._clock.times)

    def check_num_quantizers(self, count: int | None) -> None:
        """Refuses a number of codebooks that this model cannot decode from.

        Args:
            count: How many of the first codebooks; None: all.

        Raises:
            TokenError: If it is below 1, or above K.
        """
        if count is not None and not 1 <= count <= self.num_quantizers:
            raise TokenError(f"--num-quantizers {count}: this model has 1 to {self.num_quantizers}")

    def check_codes(self, codes: np.ndarray) -> None:
        """Refuses what are no codes of this model.

        Args:
            codes: Integers [B, k, N], k ≤ K.

        Raises:
            TokenError: If the type, the shape or a value is none of this model's.
        """
        if codes.ndim != 3 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
            raise TokenError(f"codes of type {codes.dtype} and shape {list(codes.shape)}: must be integers [B, k, N]")
        if codes.shape[1] > self.num_quantizers:
            raise TokenError(f"{codes.shape[1]} codebooks: this model has {self.num_quantizers}")
        sizes = np.array(self.config.codebook_sizes[: codes.shape[1]])[None, :, None]
        if (bad := np.argwhere((codes < 0) | (codes >= sizes))).size:
            row, k, n = bad[0]
            raise TokenError(
                f"code {codes[row, k, n]} in codebook {k}, frame {n}: must be between 0 and {sizes[0, k, 0] - 1}"
                f" ({len(bad)} out of range)"
            )

    def _checked(self, features: np.ndarray, num_samples: int) -> np.ndarray:
        """Semantic features that were given."""
        assert self.semantic is not None
        width = self.semantic.feature_dim
        if features.ndim != 2 or features.shape[1] != width or not len(features):
            raise AudioError(f"semantic features of shape {list(features.shape)}: must be [S, {width}]")
        if not np.isfinite(features).all():
            raise AudioError("semantic features hold values that are NaN or infinite")
        seconds, implied = num_samples / self.sample_rate, len(features) / SEMANTIC_RATE
        if abs(implied - seconds) > 0.1 * seconds + 0.2:
            raise AudioError(f"{len(features)} semantic feature vectors for {seconds:.2f} s: another clip's?")
        return features

    def _features(self, clips: Iterable[tuple[Any, Heard]]) -> Iterator[tuple[tuple[Any, Heard], np.ndarray]]:
        """Each clip, as the key of its semantic features [S, F]."""
        clips = iter(clips)
        for first in clips:
            pairs = ((clip, clip[1].semantic) for clip in itertools.chain([first], clips))
            yield from pairs if first[1].given or self.extract is None else self.extract.features(pairs)

    def _hide_work(self, key: Any, features: np.ndarray) -> Work:
        """Semantic branch before its quantizer, [S, D]."""

        def block(start: int, size: int) -> Inputs:
            return (_slice(features, 0, start, size),)

        return Work(key, len(features), block, len(features), len(features))

    def _encode_work(self, key: Any, samples: np.ndarray, hidden: np.ndarray | None) -> Work:
        """Codes [K, N]."""
        frames, hop = self.num_frames(samples.size), self.hop_length

        def block(start: int, size: int) -> Inputs:
            length = np.int32(min(samples.size - start * hop, size * hop))
            audio = _slice(samples[None], 1, start * hop, size * hop)
            if hidden is None:
                return audio, length
            # By its place in the whole clip, wherever a block begins.
            places = range(start, min(frames, start + size))
            return audio, length, _slice(dsp.interpolate(hidden[None], frames, places)[0], 0, 0, size)

        return Work(key, frames, block, frames, samples.size / hop)

    def _decode_work(self, key: Any, codes: np.ndarray) -> Work:
        """Audio [1, N·hop]."""
        frames = codes.shape[1]

        def block(start: int, size: int) -> Inputs:
            return (_slice(codes, 1, start, size),)

        return Work(key, frames, block, frames * self.hop_length, frames)


def encode_block(model: nn.Module, audio: Array, lengths: Array, hidden: Array | None = None) -> Array:
    """A block of a stream: audio [B, 1, n·hop], its valid samples [B], semantic branch at its frames → [B, K, n]."""
    semantic = None if hidden is None else model.encode_semantic(hidden)
    return model.encode_frames(audio, semantic, lengths)


def _slice(x: np.ndarray, axis: int, start: int, size: int) -> np.ndarray:
    """`size` steps from `start`, filled up with zeros past the end."""
    x = x[(slice(None),) * axis + (slice(start, start + size),)]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return np.pad(x, padding)
