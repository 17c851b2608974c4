"""Measures how stable the codes of a codec are: the share of codes that stay the same when the sound hardly changes."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from omnicodec_jax.data import audio
from omnicodec_jax.errors import AudioError
from omnicodec_jax.evaluation.systems import Codec, System

SHIFTS = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
"""The parts of a frame by which a clip begins later."""
GENERATIONS = (1, 2, 5)
"""The numbers of times that a clip is encoded and decoded before its codes are compared."""
RATES = (44_100, 16_000)
"""The sample rates in Hz that a clip is resampled to and back from."""
GAINS = (0.9, 0.5)
NOISES = (60, 40)
"""The levels of white noise, in dB below the clip."""
CHANCE = "chance"
"""The title of the share of codes that are equal by chance: in two frames of a clip that are drawn at random."""


def titles() -> list[str]:
    """Returns the titles of all changes, in the order of the tables."""
    return [
        *(f"shifted {_part(part)}" for part in SHIFTS),
        *(f"re-encoded {number} ×" for number in GENERATIONS),
        *(f"by {rate / 1000:g} kHz" for rate in RATES),
        *(f"× {gain}" for gain in GAINS),
        *(f"noise −{level} dB" for level in NOISES),
        CHANCE,
    ]


def shares_kept(codec: Codec, samples: np.ndarray) -> dict[str, list[float]]:
    """Returns for each change the share of codes that stay the same, of each codebook.

    Args:
        codec: A codec with codes. Its last system is measured.
        samples: The clip, float32 [T] at the codec's sample rate.

    Returns:
        The shares of all codebooks, by the `titles` of the changes. Left out are changes that do nothing at this
        codec's sample rate, and those after which the clip is too short to be encoded. A clip of one frame has no
        chance.

    Raises:
        AudioError: If the codec has no codes, or cannot encode the clip.
    """
    system = codec.systems[-1]
    (output,) = codec.reconstruct(samples, [system])
    if output.codes is None or system.frame_rate is None:
        raise AudioError(f"{system.name} has no codes")
    kept = {CHANCE: chance(output.codes)} if output.codes.shape[1] > 1 else {}
    for title, changed, frames in _changed(codec, system, samples, output.samples):
        if changed.size < audio.MIN_SECONDS * codec.sample_rate:
            continue
        codes = codec.encode(changed)
        assert codes is not None  # the clip had codes before it was changed
        if min(output.codes.shape[1] - frames, codes.shape[1]) > 0:
            kept[title] = share_equal(output.codes, codes, frames)
    return kept


def _changed(
    codec: Codec, system: System, samples: np.ndarray, decoded: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields the title of each change, the changed clip, and by how many frames it begins later."""
    assert system.frame_rate is not None
    frame = codec.sample_rate / system.frame_rate
    for part in SHIFTS:
        yield f"shifted {_part(part)}", samples[round(float(part) * frame) :], int(part)
    generation = decoded
    for number in range(1, max(GENERATIONS) + 1):
        if number in GENERATIONS:
            yield f"re-encoded {number} ×", generation, 0
        if number < max(GENERATIONS):
            (output,) = codec.reconstruct(generation, [system])
            generation = output.samples
    for rate in RATES:
        if rate != codec.sample_rate:
            there = audio.resample(samples, codec.sample_rate, rate)
            yield f"by {rate / 1000:g} kHz", audio.resample(there, rate, codec.sample_rate)[: samples.size], 0
    for gain in GAINS:
        yield f"× {gain}", np.float32(gain) * samples, 0
    noise = np.random.default_rng(0).standard_normal(samples.size, np.float32)
    for level in NOISES:
        amplitude = np.float32(np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-level / 20))
        yield f"noise −{level} dB", samples + amplitude * noise, 0


def _part(part: Fraction) -> str:
    return f"{part} frame"


def share_equal(codes: np.ndarray, changed: np.ndarray, frames: int = 0) -> list[float]:
    """Returns the share of equal codes of each codebook.

    Args:
        codes: Codes of the clip: [K, N].
        changed: Codes of the changed clip: [K, N'].
        frames: The number of frames by which the changed clip begins later.
    """
    codes = codes[:, frames:]
    count = min(codes.shape[1], changed.shape[1])
    return (codes[:, :count] == changed[:, :count]).mean(axis=1).tolist()


def chance(codes: np.ndarray) -> list[float]:
    """Returns for each codebook the probability that two random frames of a clip, of two at least, are equal."""
    pairs = codes.shape[1] * (codes.shape[1] - 1)
    counts = [np.unique(row, return_counts=True)[1] for row in codes]
    return [float(np.sum(count * (count - 1)) / pairs) for count in counts]
