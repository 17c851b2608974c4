"""Levels of audio, and the rule by which silent or out of range audio is refused: the same for files and arrays."""

import numpy as np
from numpy.typing import ArrayLike

from omnicodec_jax.errors import AudioError
from omnicodec_jax.given import as_array

SILENCE = 2.0**-12
"""Swing, of full scale, up to which there is nothing to encode: eight steps of 16 bits (-72 dB); dither has two."""
COARSE_STEPS = {"U8": 2.0**-7, "S8": 2.0**-7, "ALAW": 2.0**-11, "MULAW": 2.0**-12, "ULAW": 2.0**-12}
"""The smallest step of coarser samples, by the end of their name; two of them are silence as well."""
LOUDEST = 100.0
"""Peak, of full scale, above which floats are on another scale (+40 dB): bytes reach 127, and Vorbis of 43 exists."""
CANCELLED = 0.05
"""Share of the channels' effective value that must be left in the mix to mono (-26 dB)."""
INTEGERS = {np.dtype(name): 2.0 ** (8 * np.dtype(name).itemsize - 1) for name in ("int8", "int16", "int32")}


class Level:
    """Measures the levels of one clip, block by block at its own rate."""

    def __init__(self, coding: str):
        """Starts without any samples.

        Args:
            coding: The coding that the samples of the file are stored in, by libsndfile's or FFmpeg's name.
        """
        name = coding.upper()
        step = next((step for end, step in COARSE_STEPS.items() if name.endswith(end)), 0.0)
        self._silence = max(SILENCE, 2 * step)
        self._low, self._high = np.inf, -np.inf
        self._energy, self._mono_energy = 0.0, 0.0

    def add(self, block: np.ndarray, mono: np.ndarray) -> None:
        """Measures a block float32 [t, channels] and its mix to mono [t]."""
        self._low, self._high = float(np.minimum(self._low, mono.min())), float(np.maximum(self._high, mono.max()))
        if block.shape[1] > 1:
            self._energy += float(np.vdot(block, block)) / block.shape[1]
            self._mono_energy += float(np.vdot(mono, mono))

    @property
    def peak(self) -> float:
        """The largest magnitude of a sample in the mix to mono."""
        return max(self._high, -self._low)

    def check(self) -> None:
        """Raises AudioError for a clip that is not finite, out of range, or silent."""
        check_range(np.array([self._low, self._high]))
        if self._mono_energy < CANCELLED**2 * self._energy:
            raise AudioError("silent: its channels cancel each other in the mix to mono; keep only one of them")
        if is_silent(np.array([self._low, self._high]), self._silence):
            raise AudioError(f"silent: swings by no more than {self._silence:.2g} of full scale")


def is_silent(samples: np.ndarray, silence: float = SILENCE) -> bool:
    """Returns whether samples swing by no more than `silence` of full scale to either side of their middle."""
    return samples.size == 0 or bool(np.ptp(samples) <= 2 * silence)


def check_range(samples: np.ndarray) -> None:
    """Raises AudioError for samples that are not finite, or on another scale than [-1, 1]."""
    peak = float(np.maximum(samples.max(initial=0.0), -samples.min(initial=0.0)))
    if not np.isfinite(peak):
        raise AudioError("holds samples that are NaN or infinite")
    if peak > LOUDEST:
        raise AudioError(
            f"out of range: float samples reach {peak:.4g}, where full scale is 1; divide them by 32768 if they are "
            "16 bit integers"
        )


def as_float(samples: ArrayLike) -> np.ndarray:
    """Returns samples as float32 in [-1, 1]: floats as they are, integers divided by their full scale.

    Raises AudioError for any other type.
    """
    array = as_array(samples, "audio", AudioError)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return array.astype(np.float32, copy=False)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / np.float32(128)
    if (full_scale := INTEGERS.get(array.dtype.newbyteorder("="))) is None:
        raise AudioError(f"audio of type {array.dtype}: must be float in [-1, 1], uint8, int8, int16 or int32")
    return array.astype(np.float32) / np.float32(full_scale)
