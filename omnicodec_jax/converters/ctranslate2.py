"""Reads models in the binary format of CTranslate2, such as those of faster-whisper, without CTranslate2.

A file holds the format's version, the name and the revision of the model's layout, variables, and aliases:

    version uint32 │ name │ revision uint32 │ count uint32 │ variable … │ count uint32 │ alias, name of a variable …
    variable:  name │ rank uint8 │ size uint32 … │ type uint8 │ bytes uint32 │ values
    name:      length uint16 │ text, and a zero

Numbers are little-endian. A quantized variable is accompanied by another, NAME_scale: int8 values are the weights times
the scale of their row (the first axis), and int16 values are the weights times one scale.

Source: `ModelSpec._serialize` and `_quantize` in CTranslate2's python/ctranslate2/specs/model_spec.py, versions 4 to 6
of the format.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from omnicodec_jax.converters.tensors import ConversionError

VERSIONS = (4, 5, 6)
"""Versions of the format that can be read. Earlier ones are older than Whisper."""
TYPES = tuple(np.dtype(name) for name in ("f4", "i1", "i2", "i4", "f2", ml_dtypes.bfloat16))
"""The number formats, by the number that a file has for each."""
SCALE = "_scale"


class Model(NamedTuple):
    """A model as CTranslate2 has written it."""

    layout: str
    """The name of its layout, such as WhisperSpec."""
    variables: dict[str, np.ndarray]
    """The variables by name, as they are stored, scales and aliases included."""

    def weights(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the weights whose names begin with a prefix, without it: float32, scales applied, no scalars."""
        stored = {name.removeprefix(prefix): value for name, value in self.variables.items() if name.startswith(prefix)}
        return {
            name: _scaled(value, stored.get(name + SCALE))
            for name, value in stored.items()
            if value.ndim and not (name.endswith(SCALE) and name.removesuffix(SCALE) in stored)
        }


def _scaled(value: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    value = value.astype(np.float32)
    if scale is None:
        return value
    return value / scale.astype(np.float32).reshape(-1, *[1] * (value.ndim - 1))


def read(path: Path) -> Model:
    """Reads a file, usually model.bin. Raises ConversionError if it is no file of CTranslate2, or is damaged."""
    reader = _Reader(path.read_bytes())
    try:
        (version,) = reader.numbers("I")
        if version not in VERSIONS:
            raise ConversionError(f"{path}: not a model of CTranslate2 in version {VERSIONS[0]} to {VERSIONS[-1]}")
        layout = reader.text()
        _revision, count = reader.numbers("II")
        variables = dict(reader.variable() for _ in range(count))
        (count,) = reader.numbers("I")
        for _ in range(count):
            alias, name = reader.text(), reader.text()
            variables[alias] = variables[name]
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise ConversionError(f"{path}: cut off, or not a model of CTranslate2: {error}") from None
    if reader.position != len(reader.data):
        raise ConversionError(f"{path}: not a model of CTranslate2: it goes on where a model ends")
    return Model(layout, variables)


class _Reader:
    """Reads one thing after the other from the bytes of a file."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def numbers(self, format: str) -> tuple[int, ...]:
        """Reads numbers, whose format is that of `struct`."""
        found = struct.unpack_from("<" + format, self.data, self.position)
        self.position += struct.calcsize("<" + format)
        return found

    def text(self) -> str:
        """Reads a name."""
        (length,) = self.numbers("H")
        return self._bytes(length).removesuffix(b"\0").decode()

    def variable(self) -> tuple[str, np.ndarray]:
        """Reads a variable and its name."""
        name = self.text()
        (rank,) = self.numbers("B")
        shape = self.numbers(f"{rank}I")
        kind, size = self.numbers("BI")
        dtype = TYPES[kind]
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {list(shape)} has {size} bytes")
        return name, np.frombuffer(self._bytes(size), dtype).reshape(shape)

    def _bytes(self, size: int) -> bytes:
        part = self.data[self.position : self.position + size]
        if len(part) < size:
            raise ValueError("it ends too early")
        self.position += size
        return part
