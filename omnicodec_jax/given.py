"""Reads what callers of the Python API give: arrays and whole numbers of any library, or an error that names them."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from omnicodec_jax.errors import AudioError, OmniCodecError


def as_array(value: Any, what: str, error: type[OmniCodecError], dtype: DTypeLike | None = None) -> np.ndarray:
    """Returns an array, of any library, or nested lists, as one of NumPy. Raises `error` for anything else."""
    try:
        return np.asarray(value, dtype)
    except Exception as problem:  # each library has exceptions of its own
        raise error(f"{what}: cannot be read as an array: {problem}") from None


def whole_number(value: Any, what: str, error: type[OmniCodecError]) -> int:
    """Returns a whole number, of any type but boolean, as one of Python. Raises `error` for anything else."""
    array = as_array(value, what, error)
    if array.shape or array.dtype.kind not in "iuf" or not np.isfinite(array) or array % 1 != 0:
        raise error(f"{what} = {value!r}: must be a whole number")
    return int(array)


def whole_numbers(values: Any, what: str, error: type[OmniCodecError]) -> list[int]:
    """Returns whole numbers, in a list or an array, as those of Python. Raises `error` for anything else."""
    if isinstance(values, str | bytes) or not np.iterable(values):
        raise error(f"{what} = {values!r}: must be a list of whole numbers")
    return [whole_number(value, what, error) for value in values]


def rows_of_batch(audio: np.ndarray, lengths: Any = None) -> list[np.ndarray]:
    """Returns the samples of each row of a batch [B, 1, T]; `lengths` says how many a row has, None: all have T.

    Raises AudioError for another shape, and for lengths that are not from 1 to T.
    """
    if audio.ndim != 3 or audio.shape[1] != 1 or 0 in audio.shape:
        raise AudioError(f"audio of shape {list(audio.shape)}: must be [B, 1, T], mono")
    full = [audio.shape[2]] * audio.shape[0]
    sizes = full if lengths is None else whole_numbers(lengths, "lengths", AudioError)
    if len(sizes) != audio.shape[0] or not all(0 < n <= audio.shape[2] for n in sizes):
        raise AudioError(f"lengths {sizes}: must be one per row, each between 1 and {audio.shape[2]}")
    return [row[0, :size] for row, size in zip(audio, sizes, strict=True)]
