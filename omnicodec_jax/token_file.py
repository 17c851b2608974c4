"""One clip's tokens on disk: a safetensors file with uint16 codes and JSON metadata. No pickle."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omnicodec_jax.errors import TokenError
from omnicodec_jax.files import replacing

SUFFIX = ".safetensors"
_KEY = "omnicodec"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Codes of one clip and what decoding needs to give the clip back."""

    codes: np.ndarray
    """uint16 [K, N], k = 0 the semantic codebook."""
    model: str
    """Hash of the model that made them."""
    frame_rate: float
    sample_rate: int
    """Of the original."""
    num_samples: int
    """Of the original, at its own rate."""
    gain: float
    """What the original was multiplied by before encoding."""

    def num_frames(self, model_rate: int, hop_length: int) -> int:
        """Frames that the original has at a model's sample rate."""
        samples = -(-self.num_samples * model_rate // self.sample_rate)
        return -(-samples // hop_length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whole or not at all."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "codes"}
        with replacing(Path(path)) as temporary:
            save_file({"codes": self.codes.astype(np.uint16)}, temporary, {_KEY: json.dumps(fields)})

    @staticmethod
    def model_of(path: str | os.PathLike[str]) -> str:
        """Reads only which model has made a file. Raises TokenError for what is no token file."""
        try:
            with safe_open(Path(path), "np") as file:
                return json.loads((file.metadata() or {})[_KEY])["model"]
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
            raise TokenError(f"{path}: not a token file of omnicodec encode ({error})") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenFile":
        """Raises TokenError for what is no token file."""
        path = Path(path)
        if not path.is_file():
            raise TokenError(f"{path}: no such file")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                fields = json.loads(metadata[_KEY])
                codes = file.get_tensor("codes")
            tokens = cls(codes=codes, **fields)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
            raise TokenError(f"{path}: not a token file of omnicodec encode ({error})") from None
        for name, kind in {"sample_rate": int, "num_samples": int, "gain": float}.items():
            value = fields[name]
            if type(value) not in (int, kind) or not 0 < value < float("inf"):
                raise TokenError(f"{path}: {name} = {value!r}: must be a positive number")
        if codes.ndim != 2 or codes.dtype != np.uint16:
            raise TokenError(f"{path}: codes are {codes.dtype} {list(codes.shape)}, must be uint16 [K, N]")
        return tokens
