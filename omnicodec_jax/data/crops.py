"""Crops: the parts of segments that a model is trained on, by the reference's rule (spec §4).

    a segment of at least a crop               a part of the segment
    of at least PAD_FROM of a crop             all of the segment, and silence after it
    of less                                    all of the segment, repeated without a gap, from any of its samples on

Stored features are those of such crops, too, so that the encoder and the codec get the same samples.
"""

import numpy as np

from omnicodec_jax.data import records

PAD_FROM = 0.8
"""Share of a crop. A segment that is at least so long is padded with silence; a shorter one is repeated."""


def num_starts(length: int, wanted: int) -> int:
    """Returns at how many samples of a segment of `length` a crop of `wanted` can begin, from the first sample on."""
    if length >= wanted:
        return length - wanted + 1
    return 1 if length >= PAD_FROM * wanted else length


def spread_starts(length: int, wanted: int, stride: int) -> list[int]:
    """Returns where crops begin, about a stride apart and evenly spread. A segment that is padded has one crop.

    Those of a long segment reach from its beginning to its end. A rest of less than a tenth of a stride brings no
    further crop, since clips of "ten seconds" are often some milliseconds longer.
    """
    starts = num_starts(length, wanted)
    if length < wanted:
        count = min(starts, -(-length // stride))
        return [number * starts // count for number in range(count)]
    last = starts - 1
    count = 1 + max(0, -(-(last - stride // 10) // stride))
    return [number * last // max(1, count - 1) for number in range(count)]


def read(record: bytes, length: int, start: int, wanted: int) -> np.ndarray:
    """Returns the crop that begins at sample `start` of a segment of `length`: float32 [wanted]."""
    if length >= wanted:
        samples = records.read_samples(record, start, wanted)
    else:
        samples = records.read_samples(record)
        if length < PAD_FROM * wanted:
            samples = np.resize(np.roll(samples, -start), wanted)
    crop = np.zeros(wanted, np.float32)
    crop[: samples.size] = samples.astype(np.float32) / 32768
    return crop
