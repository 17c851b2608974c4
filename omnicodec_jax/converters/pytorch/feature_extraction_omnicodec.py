"""Makes batches for `OmniCodecModel` of clips, and of their semantic features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, EncodecFeatureExtractor


class OmniCodecFeatureExtractor(EncodecFeatureExtractor):
    """Scales clips to the loudness that the model knows, and fills a batch up on the right.

    It gives `input_values` [B, 1, T] and `padding_mask` [B, T], as that of Mimi does, and with semantic features
    `semantic_features` [B, S, F] and `semantic_features_mask` [B, S].
    """

    def __init__(self, sampling_rate: int = 24_000, input_peak: float | None = 0.95, **kwargs: Any):
        """Sets the options.

        Args:
            sampling_rate: Sample rate of the audio, Hz.
            input_peak: What the largest sample of each clip is scaled to; None: clips stay as loud as they are.
            kwargs: Options of every feature extractor of transformers.
        """
        super().__init__(sampling_rate=sampling_rate, **kwargs)
        self.input_peak = input_peak

    def __call__(
        self, raw_audio: Any, semantic_features: Sequence[Any] | None = None, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Makes a batch.

        Args:
            raw_audio: A mono clip [T] at `sampling_rate`, or a list of clips: floating-point numbers, or int16 or int32
                as they stand in WAV files, whose largest number is full scale.
            semantic_features: The semantic features [S, F] of each clip, for models that do not compute them.
            return_tensors: "pt" for tensors of PyTorch, "np" for arrays.
            kwargs: Other arguments of transformers' `EncodecFeatureExtractor`, such as sampling_rate and padding.

        Returns:
            The arguments of the model's `encode`.

        Raises:
            ValueError: If the sample rate is another, or a clip is empty, not mono, or not finite.
        """
        batched = isinstance(raw_audio, list | tuple) and len(raw_audio) > 0 and not np.isscalar(raw_audio[0])
        clips = [self._scaled(as_float(np.asarray(clip))) for clip in (raw_audio if batched else [raw_audio])]
        batch = super().__call__(clips, return_tensors=return_tensors, **kwargs)
        if semantic_features is None:
            return batch
        if len(semantic_features) != len(clips):
            raise ValueError(f"{len(semantic_features)} arrays of semantic features for {len(clips)} clips")
        rows = [np.asarray(row, np.float32) for row in semantic_features]
        if odd := [list(row.shape) for row in rows if row.ndim != 2]:
            raise ValueError(f"semantic features of shape {odd[0]}: must be [vectors, width] for each clip")
        steps = max(map(len, rows))
        padded = np.stack([np.pad(row, ((0, steps - len(row)), (0, 0))) for row in rows])
        mask = np.stack([np.arange(steps) < len(row) for row in rows]).astype(np.int32)
        vectors = BatchFeature(
            {"semantic_features": padded, "semantic_features_mask": mask}, tensor_type=return_tensors
        )
        return BatchFeature({**batch, **vectors})

    def _scaled(self, clip: np.ndarray) -> np.ndarray:
        """Scales a clip to `input_peak`; a clip of zeros stays as it is."""
        if not clip.size:
            raise ValueError("a clip of no samples: must have one or more")
        if clip.ndim != 1:
            raise ValueError(f"a clip of shape {list(clip.shape)}: must be [samples], mono")
        peak = float(np.abs(clip).max())
        if not np.isfinite(peak):
            raise ValueError("a clip that holds values that are NaN or infinite")
        if self.input_peak is None or peak == 0:
            return clip
        return clip * np.float32(self.input_peak / peak)


def as_float(clip: np.ndarray) -> np.ndarray:
    """Returns samples as float32, full scale ±1. Raises ValueError for numbers that samples are not written in."""
    if clip.dtype.kind == "i" and clip.dtype.itemsize in (2, 4):  # in either byte order
        return (clip / -float(np.iinfo(clip.dtype).min)).astype(np.float32)
    if clip.dtype.kind == "f":
        return clip.astype(np.float32)
    raise ValueError(f"samples of {clip.dtype}: must be floating-point numbers, int16 or int32")


__all__ = ["OmniCodecFeatureExtractor"]
