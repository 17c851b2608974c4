"""An audio file that is being decoded: its format, its samples, and what both decoders check of them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omnicodec_jax.data import containers, streams
from omnicodec_jax.errors import AudioError

SLACK = 0.025
"""Seconds that may be missing at the end of a file, as some writers count wrongly."""
CODEC_SLACK = 0.5
"""Seconds that may be missing where a header also counts what a codec adds at either end."""
PREROLL = 1.0
"""Seconds decoded before an offset, after which codecs give what they give from the start."""


class Source(NamedTuple):
    """Format of an open audio file, and its samples."""

    sample_rate: int
    channels: int
    coding: str
    """Coding of the samples in the file, by libsndfile's or FFmpeg's name."""
    blocks: Iterator[np.ndarray]
    """Samples of the file, float32 [t, channels], block by block."""


def check_whole(path: Path, length: int, sample_rate: int) -> None:
    """Raises AudioError for a file that is damaged, or holds less or more than its header promises.

    `length` samples were read.
    """
    extent = containers.extent(path)
    if extent is not None and extent.promised:  # nothing is promised of what was written to a pipe
        _check_extent(extent, length, sample_rate)
        if problem := streams.another(path, extent.end):
            raise AudioError(problem)
    if problem := streams.fault(path):
        raise AudioError(problem)


def _check_extent(extent: containers.Extent, length: int, sample_rate: int) -> None:
    per_byte = length / max(extent.held, 1)
    missing, more = per_byte * (extent.promised - extent.held), per_byte * extent.more
    if missing > (0 if extent.pieces > 1 else slack(length, sample_rate)):
        raise AudioError(f"truncated: {math.ceil(missing)} of {round(length + missing)} samples are missing")
    if more > slack(length, sample_rate):
        raise AudioError(
            f"its header counts {length / sample_rate:.2f} s, {more / sample_rate:.2f} s more lie behind them; was it "
            "still being written, or joined from several? Save it anew with a program that reads all of it"
        )


def slack(length: int, sample_rate: int) -> float:
    """Returns how many samples may be missing of `length`."""
    return min(SLACK * sample_rate, length / 20)


def check_rate(now: int, before: int, place: str) -> None:
    """Raises AudioError where the sample rate of a file changes."""
    if now != before:
        raise AudioError(f"changes from {before} to {now} Hz after {place}; split it there")


def with_channels(block: np.ndarray, channels: int) -> np.ndarray:
    """Gives a block [t, any] the file's number of channels. If it has another number, each becomes its mix to mono."""
    if block.shape[1] == channels:
        return block
    return np.repeat(block.mean(axis=1, keepdims=True), channels, axis=1)
