"""Runs a codec on devices: any number of clips of any length, through one compiled program for each of its models.

Encoding goes through these stages; `CodecLanes.encode` calls them one after the other:

    PreparedClip ──> semantic features [S, F] ──> semantic hidden [S, D] ──> codes [K, N]
        `_semantic_features`        `_semantic_hidden`         `encode_frames`

The last stage interpolates the semantic hidden at the frames, and encodes audio and semantic branch (blocks.py).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.blocks import Array, AudioBlocks, CodeBlocks, FeatureBlocks, encode_block
from omnicodec_jax.config import CodecConfig, MimiConfig
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.lanes import ACCELERATOR_VECTORS, Clock, ContinuousBatcher, Key, Use, map_present, replicate
from omnicodec_jax.memory_budget import MemoryBudget, budget_of_lanes
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.semantic import FeatureExtractor, FrozenEncoder


class PreparedClip(NamedTuple):
    """A clip that `OmniCodecTokenizer.prepare` has checked, with its semantic features or the log-mel for them."""

    samples: np.ndarray
    """The audio, float32 [T] at the model's rate."""
    features: np.ndarray | None = None
    """The semantic features, float32 [S, F], if they were given."""
    log_mel: np.ndarray | None = None
    """The log-mel, float32 [M, bins], if the semantic features are computed from it."""


KeyedClip = tuple[Any, PreparedClip]
"""A clip with the caller's key."""
InLane = tuple[tuple[Any, np.ndarray], np.ndarray | None]
"""A clip on its way through the stages: its key, its samples, and the result of the previous stage."""


class CodecLanes:
    """Encodes and decodes clips on all rows of some devices at once."""

    def __init__(
        self,
        model: Any,
        config: CodecConfig | MimiConfig,
        variables: model_directory.Variables,
        encoder: FrozenEncoder | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """Puts the weights on the devices; nothing is compiled before the first clip.

        Args:
            model: The codec as a Flax module.
            config: The codec's config.
            variables: The codec's parameters and codebooks.
            encoder: Frozen audio encoder in the number format that it computes in. Without one, semantic features must
                be given.
            devices: Devices of this process, all of one kind. Default: one.
        """
        self._hop_length, self._clock = config.hop_length, Clock()
        devices = jax.local_devices()[:1] if devices is None else devices
        if not len(devices):
            raise ModelError("devices: there must be one or more")
        weights = replicate(variables, devices)
        self.encoder_batcher = ContinuousBatcher(model, encode_block, weights, 1, devices, self._clock)
        self.decoder_batcher = ContinuousBatcher(model, type(model).decode, weights, 1, devices, self._clock)
        self.semantic_batcher: ContinuousBatcher | None = None
        """The batcher of the semantic branch; None for models without one."""
        self.extract: FeatureExtractor | None = None
        """The extractor of semantic features; None if the model needs none, or if they must be given."""
        semantic = getattr(config, "semantic", None)
        if semantic is not None:
            blocks = None if devices[0].platform == "cpu" else ACCELERATOR_VECTORS
            self.semantic_batcher = ContinuousBatcher(
                model, OmniCodec.semantic_hidden, weights, 0, devices, self._clock, blocks
            )
            if encoder is not None or semantic.source == "log_mel":
                self.extract = FeatureExtractor(encoder, devices, self._clock)

    def encode(self, clips: Iterable[KeyedClip]) -> Iterator[tuple[Any, np.ndarray]]:
        """Encodes any number of clips; see `OmniCodecTokenizer.encode_each`."""
        budget, clips = budget_of_lanes(), map(check_prepared, clips)
        if self.semantic_batcher is None:
            entered = budget.entering(clips, _size)
            hidden = map_present(lambda key, clip: ((key, clip.samples), None), entered)
        else:
            hidden = self._semantic_hidden(self._semantic_features(clips, budget))
        return budget.leaving(self.encode_frames(hidden))

    def _semantic_features(self, clips: Iterable[KeyedClip], budget: MemoryBudget) -> Iterator[InLane | None]:
        """Yields each clip with its semantic features [S, F]: those that were given, or those of its log-mel."""
        for is_given, group in itertools.groupby(clips, lambda keyed: keyed[1].features is not None):
            entered = budget.entering(group, _size)
            if is_given:
                yield from map_present(lambda key, clip: ((key, clip.samples), clip.features), entered)
            else:
                assert self.extract is not None  # `prepare` refuses clips without features otherwise
                mels = map_present(lambda key, clip: ((key, clip.samples), clip.log_mel), entered)
                yield from self.extract.features(mels)

    def _semantic_hidden(self, clips: Iterable[InLane | None]) -> Iterator[InLane | None]:
        """Yields each clip with its semantic hidden [S, D]: the output of the semantic branch before its quantizer."""
        assert self.semantic_batcher is not None
        return self.semantic_batcher.run(map_present(lambda keyed, features: (keyed, FeatureBlocks(features)), clips))

    def encode_frames(self, clips: Iterable[InLane | None]) -> Iterator[Any]:
        """Yields the key of each clip with its codes [K, N], computed from its audio and its semantic hidden."""
        hop = self._hop_length

        def blocks(keyed: tuple[Any, np.ndarray], hidden: np.ndarray | None) -> tuple[Any, AudioBlocks]:
            return keyed[0], AudioBlocks(keyed[1], hidden, hop)

        return self.encoder_batcher.run(map_present(blocks, clips))

    def decode(self, tokens: Iterable[tuple[Key, Array]]) -> Iterator[tuple[Key, np.ndarray]]:
        """Decodes any number of clips; see `OmniCodecTokenizer.decode_each`."""
        budget, hop = budget_of_lanes(), self._hop_length
        for _, group in itertools.groupby(tokens, lambda keyed: len(keyed[1])):
            entered = budget.entering(group, lambda codes: hop * codes.shape[1])
            blocks = map_present(lambda key, codes: (key, CodeBlocks(np.asarray(codes, np.int32), hop)), entered)
            yield from budget.leaving(self.decoder_batcher.run(blocks))

    def forget(self) -> None:
        """Sets the counts of `use` back to zero."""
        for batcher in (self.encoder_batcher, self.decoder_batcher):
            batcher.forget()
        self._clock.forget()

    @property
    def use(self) -> Use:
        """The counts of what the devices have done for `encode` and `decode` so far."""
        encoder, decoder = self.encoder_batcher, self.decoder_batcher
        return Use(encoder.frames + decoder.frames, encoder.valid + decoder.valid, *self._clock.times)


def check_prepared(keyed: Any) -> KeyedClip:
    """Returns a clip with its key. Raises AudioError for a clip that has not been made ready."""
    if not isinstance(keyed, tuple | list) or len(keyed) != 2 or not isinstance(keyed[1], PreparedClip):
        raise AudioError("encode_each takes pairs of a key and a clip that `prepare` has made ready")
    return keyed[0], keyed[1]


def _size(clip: PreparedClip) -> int:
    return clip.samples.size
