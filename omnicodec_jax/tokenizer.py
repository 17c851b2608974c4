"""The public face: audio in, tokens out, and back.

Audio of any length runs through one compiled program, in blocks of ten seconds with the stream's state carried from
block to block. So the model's memory does not grow with length, no length is compiled for, and blocks meet without a
seam: the causal model gives on blocks what it gives on the whole.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from omnicodec_jax import model_directory, signal
from omnicodec_jax.config import CodecConfig, MimiConfig, SemanticConfig
from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.conv import STREAM
from omnicodec_jax.semantic import Encoder, FeatureExtractor, load_encoder

BLOCK_SECONDS = 10
ACCELERATOR_ROWS = 16
"""Clips side by side on a GPU or TPU, at most."""
SEMANTIC_RATE = 12.75
"""Feature vectors a second, between 12.5 (log-mel) and 13 (Qwen3-Omni); to tell another clip's apart."""
FEATURE_BLOCK = 128
"""Semantic feature vectors a step."""

Array = np.ndarray | jax.Array
Stream = dict[str, Any]


class OmniCodecTokenizer:
    """A codec with its weights.

    tokenizer = OmniCodecTokenizer.from_pretrained("models/omnicodec")
    codes = tokenizer.encode(audio, sample_rate=24_000)   # [B, 1, T] → [B, K, N]
    audio = tokenizer.decode(codes[:, :8])                # first 8 codebooks → [B, 1, N·hop]
    """

    def __init__(
        self, config: CodecConfig | MimiConfig, variables: model_directory.Variables, encoder: Encoder | None = None
    ):
        self.config = config
        self.variables = jax.tree.map(jnp.asarray, dict(variables))
        self._model = model_directory.build(config)
        self._block_frames = -(-BLOCK_SECONDS * config.sample_rate // config.hop_length)
        self._semantic_step = jax.jit(partial(_stream_step, self._model, OmniCodec.semantic_hidden))
        self._encode_step = jax.jit(partial(_stream_step, self._model, _encode_block))
        self._decode_step = jax.jit(partial(_stream_step, self._model, type(self._model).decode))
        self._starts: dict[tuple[Any, int], Stream] = {}
        self._extract: FeatureExtractor | None = None
        if self.semantic is not None and (encoder is not None or self.semantic.source == "log_mel"):
            self._extract = FeatureExtractor(None if self.semantic.source == "log_mel" else encoder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        encoder: str | os.PathLike[str] | None = None,
    ) -> "OmniCodecTokenizer":
        """From a model directory, or a Hugging Face hub id and revision. Raises ModelError, ConfigError.

        encoder: directory of the Qwen3-Omni audio encoder (`convert.qwen3_aut`), to compute semantic features with
        that would have to be given otherwise.
        """
        config, variables = model_directory.load(model_directory.resolve(name, revision))
        if not isinstance(config, CodecConfig | MimiConfig):
            raise ModelError(f"{name}: a {model_directory.model_type(config)} model, not a codec")
        if encoder is None:
            return cls(config, variables)
        return cls(config, variables, load_encoder(encoder, getattr(config, "semantic", None)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors."""
        model_directory.save(directory, self.config, self.variables)

    @cached_property
    def model_hash(self) -> str:
        """Identifies config and weights; token files carry it."""
        return model_directory.model_hash(self.config, self.variables)

    @property
    def sample_rate(self) -> int:
        """Of the audio that goes in and comes out, Hz."""
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

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: ceil(num_samples / hop_length)."""
        return -(-num_samples // self.hop_length)

    def encode(
        self,
        audio: Array,
        sample_rate: int,
        lengths: Sequence[int] | None = None,
        semantic_features: Sequence[Array] | Array | None = None,
    ) -> np.ndarray:
        """Audio [B, 1, T] at the model's rate → codes int32 [B, K, ceil(T / hop)].

        lengths: samples of each row if some are shorter than T. A row's codes depend on its own samples alone; past
        its num_frames(length) they are 0. semantic_features: one array [S, F] per row, for models that do not compute
        them. The audio is taken as it is: files are scaled to `config.input_peak` by `data.audio.load`.
        Raises AudioError.
        """
        audio = np.asarray(audio, np.float32)
        if sample_rate != self.sample_rate:
            raise AudioError(f"audio at {sample_rate} Hz: this model takes {self.sample_rate} Hz; resample it first")
        if audio.ndim != 3 or audio.shape[1] != 1 or 0 in audio.shape:
            raise AudioError(f"audio of shape {list(audio.shape)}: must be [B, 1, T], mono")
        if not np.isfinite(audio).all():
            raise AudioError("audio holds samples that are NaN or infinite")
        sizes = [audio.shape[2]] * audio.shape[0] if lengths is None else [int(n) for n in lengths]
        if len(sizes) != audio.shape[0] or not all(0 < n <= audio.shape[2] for n in sizes):
            raise AudioError(f"lengths {sizes}: must be one per row, each between 1 and {audio.shape[2]}")
        clips = [row[0, :size] for row, size in zip(audio, sizes, strict=True)]
        features = None if self.semantic is None else self._features(clips, semantic_features)

        result = np.zeros((len(clips), self.num_quantizers, self.num_frames(max(sizes))), np.int32)
        for rows in _tiles(len(clips)):
            hidden = None if features is None else self._semantic_hidden(features[rows])
            codes = self._encode_tile(clips[rows], hidden)
            for target, row, size in zip(result[rows], codes[: len(sizes[rows])], sizes[rows], strict=True):
                target[:, : self.num_frames(size)] = row[:, : self.num_frames(size)]
        return result

    def decode(self, codes: Array) -> np.ndarray:
        """Codes [B, k, N] of the first k ≤ K codebooks → audio float32 [B, 1, N·hop]. Raises TokenError."""
        codes = np.asarray(codes)
        self._check_codes(codes)
        codes = codes.astype(np.int32)
        result = np.zeros((codes.shape[0], 1, codes.shape[2] * self.hop_length), np.float32)
        for rows in _tiles(codes.shape[0]):
            tile = np.stack(_fill_tile(list(codes[rows])))
            steps = range(0, codes.shape[2], self._block_frames)
            audio = self._stream(self._decode_step, ((_slice(tile, 2, n, self._block_frames),) for n in steps))
            result[rows] = audio[: len(result[rows]), :, : result.shape[2]]
        return result

    def _check_codes(self, codes: np.ndarray) -> None:
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

    def _features(self, clips: list[np.ndarray], given: Sequence[Array] | Array | None) -> list[np.ndarray]:
        """Semantic features [S, F] of each clip."""
        assert self.semantic is not None
        if given is None:
            if self._extract is not None:
                return [self._extract(clip, self.sample_rate) for clip in clips]
            raise AudioError(
                "this model needs the semantic features [S, F] of each clip: pass semantic_features, or load it with "
                "the encoder that computes them"
            )
        features = [np.asarray(item, np.float32) for item in given]
        width = self.semantic.feature_dim
        if len(features) != len(clips) or any(f.ndim != 2 or f.shape[1] != width or not len(f) for f in features):
            shapes = [list(f.shape) for f in features]
            raise AudioError(f"semantic features of shapes {shapes}: must be {len(clips)} arrays [S, {width}]")
        if not all(np.isfinite(f).all() for f in features):
            raise AudioError("semantic features hold values that are NaN or infinite")
        for clip, f in zip(clips, features, strict=True):
            seconds, implied = clip.size / self.sample_rate, len(f) / SEMANTIC_RATE
            if abs(implied - seconds) > 0.1 * seconds + 0.2:
                raise AudioError(f"{len(f)} semantic feature vectors for {seconds:.2f} s: another clip's?")
        return features

    def _semantic_hidden(self, features: list[np.ndarray]) -> list[np.ndarray]:
        """Semantic branch before its quantizer, [S, D] of each clip of a tile."""
        features = _fill_tile(features)
        steps = range(0, max(len(f) for f in features), FEATURE_BLOCK)
        blocks = ((np.stack([_slice(f, 0, n, FEATURE_BLOCK) for f in features]),) for n in steps)
        hidden = self._stream(self._semantic_step, blocks)
        return [row[: len(f)] for row, f in zip(hidden, features, strict=True)]

    def _encode_tile(self, clips: list[np.ndarray], hidden: list[np.ndarray] | None) -> np.ndarray:
        """Codes of a tile, to the end of the last block."""
        clips = _fill_tile(clips)
        if hidden is not None:
            # Interpolated over the whole clip, so that a position does not depend on where a block begins.
            rows = zip(hidden, clips, strict=True)
            hidden = [signal.interpolate(h[None], self.num_frames(clip.size))[0] for h, clip in rows]
        return self._stream(self._encode_step, self._blocks(clips, hidden))

    def _blocks(
        self, clips: list[np.ndarray], hidden: list[np.ndarray] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Audio, semantic branch at frame rate, and valid samples of one block after the other, rows side by side."""
        frames, lengths = self._block_frames, np.array([clip.size for clip in clips], np.int32)
        samples = frames * self.hop_length
        for block in range(-(-int(lengths.max()) // samples)):
            start = block * samples
            audio = np.stack([_slice(clip, 0, start, samples) for clip in clips])[:, None]
            semantic = None if hidden is None else np.stack([_slice(h, 0, block * frames, frames) for h in hidden])
            yield audio, semantic, np.clip(lengths - start, 0, samples)

    def _stream(self, step: Any, blocks: Iterable[tuple]) -> np.ndarray:
        """Outputs of all blocks, joined along time; the state is carried from one to the next."""
        state, outputs = None, []
        for block in blocks:
            state = self._start(step, block) if state is None else state
            output, state = step(self.variables, state, *block)
            if outputs:  # off the device, now that the next block is on its way
                outputs[-1] = np.asarray(outputs[-1])
            outputs.append(output)
        return np.concatenate(outputs, axis=1 if step is self._semantic_step else 2)

    def _start(self, step: Any, block: tuple) -> Stream:
        """State before the first block: zeros, made once for each number of rows."""
        key = (step, len(block[0]))
        if key not in self._starts:
            shapes = jax.eval_shape(step, self.variables, {}, *block)[1]
            self._starts[key] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return self._starts[key]


def _tiles(count: int) -> Iterator[slice]:
    """Rows that run side by side. On a CPU one row fills the cores, and more would only spill the caches."""
    size = 1 if jax.default_backend() == "cpu" else ACCELERATOR_ROWS
    return (slice(start, start + size) for start in range(0, count, size))


def _fill_tile(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Rows to the next power of two, so that few sizes are compiled; what the added ones give is thrown away."""
    return rows + [rows[0]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))


def _encode_block(model: nn.Module, audio: Array, hidden: Array | None, lengths: Array) -> Array:
    semantic = None if hidden is None else model.encode_semantic(hidden)
    return model.encode_frames(audio, semantic, lengths)


def _stream_step(
    model: nn.Module, method: Any, variables: dict[str, Any], state: Stream, *inputs: Any
) -> tuple[Array, Stream]:
    """One block of a stream: its output and the state for the next."""
    output, after = model.apply({**variables, **state}, *inputs, method=method, mutable=[STREAM])
    return output, dict(after)


def _slice(x: np.ndarray, axis: int, start: int, size: int) -> np.ndarray:
    """`size` steps from `start`, filled up with zeros past the end."""
    x = x[(slice(None),) * axis + (slice(start, start + size),)]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return np.pad(x, padding)
