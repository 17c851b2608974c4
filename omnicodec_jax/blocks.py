"""Inputs of a codec, cut into blocks: semantic features, audio, and codes of clips of any length."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn

from omnicodec_jax import dsp
from omnicodec_jax.errors import TokenError
from omnicodec_jax.lanes import BlockInputs, InputSequence

Array = np.ndarray | jax.Array
"""An array on the host or on a device."""


@dataclasses.dataclass(frozen=True)
class FeatureBlocks(InputSequence):
    """Gives the semantic features of a clip to `OmniCodec.semantic_hidden`, block by block."""

    features: np.ndarray
    """The semantic features: float32 [S, F]."""

    @property
    def num_frames(self) -> int:
        """The number S of feature vectors."""
        return len(self.features)

    @property
    def num_outputs(self) -> int:
        """The number S of vectors of the semantic branch."""
        return len(self.features)

    @property
    def num_valid(self) -> float:
        """The number S of feature vectors that are no padding."""
        return float(len(self.features))

    def block(self, start: int, size: int) -> BlockInputs:
        """Returns `size` feature vectors from number `start` on, padded beyond the end."""
        return (padded_slice(self.features, 0, start, size),)


@dataclasses.dataclass(frozen=True)
class AudioBlocks(InputSequence):
    """Gives the audio of a clip and its semantic branch to `encode_block`, block by block."""

    samples: np.ndarray
    """The audio: float32 [T] at the model's rate."""
    semantic_hidden: np.ndarray | None
    """The output of the semantic branch before its quantizer, float32 [S, D]; None for models without that branch."""
    hop_length: int
    """Number of samples in a frame."""

    @property
    def num_frames(self) -> int:
        """The number N = ceil(T / hop) of frames, the last of which may be padded."""
        return -(-self.samples.size // self.hop_length)

    @property
    def num_outputs(self) -> int:
        """The number N of frames that have codes."""
        return self.num_frames

    @property
    def num_valid(self) -> float:
        """The length of the audio in frames: T / hop."""
        return self.samples.size / self.hop_length

    def block(self, start: int, size: int) -> BlockInputs:
        """Returns audio [1, size·hop], its number of valid samples, and the semantic branch [size, D] if there is one.

        The semantic branch is interpolated at the frames' places in the whole clip, wherever a block begins.
        """
        hop, frames = self.hop_length, self.num_frames
        length = np.int32(min(self.samples.size - start * hop, size * hop))
        audio = padded_slice(self.samples[None], 1, start * hop, size * hop)
        if self.semantic_hidden is None:
            return audio, length
        places = range(start, min(frames, start + size))
        hidden = dsp.interpolate(self.semantic_hidden[None], frames, places)[0]
        return audio, length, padded_slice(hidden, 0, 0, size)


@dataclasses.dataclass(frozen=True)
class CodeBlocks(InputSequence):
    """Gives the codes of a clip to a model's `decode`, block by block."""

    codes: np.ndarray
    """The codes of the first k codebooks: int32 [k, N]."""
    hop_length: int
    """Number of samples in a frame."""

    @property
    def num_frames(self) -> int:
        """Number of frames, N."""
        return self.codes.shape[1]

    @property
    def num_outputs(self) -> int:
        """Number of samples of the audio, N·hop."""
        return self.num_frames * self.hop_length

    @property
    def num_valid(self) -> float:
        """Number of frames that are no padding, N."""
        return float(self.num_frames)

    def block(self, start: int, size: int) -> BlockInputs:
        """Cuts out codes [k, size] from frame `start` on."""
        return (padded_slice(self.codes, 1, start, size),)


def encode_block(model: nn.Module, audio: Array, lengths: Array, semantic_hidden: Array | None = None) -> Array:
    """Encodes the next block of each row of a batch of streams; a method of `OmniCodec` and `Mimi`.

    Args:
        model: The codec, bound to its variables.
        audio: float32 [B, 1, n·hop].
        lengths: Number of valid samples of each row, int32 [B].
        semantic_hidden: Semantic branch at the n frames, float32 [B, n, D]; None for models that have none.

    Returns:
        Codes int32 [B, K, n].
    """
    semantic_codes = None if semantic_hidden is None else model.encode_semantic(semantic_hidden)
    return model.encode_frames(audio, semantic_codes, lengths)


def check_codes(codes: np.ndarray, codebook_sizes: Sequence[int]) -> None:
    """Refuses codes [B, k, N] that a model with codebooks of these sizes cannot have made. Raises TokenError."""
    if codes.ndim != 3 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
        raise TokenError(f"codes of type {codes.dtype} and shape {list(codes.shape)}: must be integers [B, k, N]")
    if codes.shape[1] > len(codebook_sizes):
        raise TokenError(f"{codes.shape[1]} codebooks: this model has {len(codebook_sizes)}")
    sizes = np.array(codebook_sizes[: codes.shape[1]])[None, :, None]
    if (bad := np.argwhere((codes < 0) | (codes >= sizes))).size:
        row, k, n = bad[0]
        raise TokenError(
            f"code {codes[row, k, n]} in codebook {k}, frame {n}: must be between 0 and {sizes[0, k, 0] - 1}"
            f" ({len(bad)} out of range)"
        )


def padded_slice(x: np.ndarray, axis: int, start: int, size: int) -> np.ndarray:
    """Cuts out `size` steps along an axis from step `start` on, filled up with zeros past the end."""
    x = x[(slice(None),) * axis + (slice(start, start + size),)]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return np.pad(x, padding)
