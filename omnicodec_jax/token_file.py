"""The codes of one clip on disk: a safetensors file with uint16 codes and JSON metadata, without pickle."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from omnicodec_jax.buckets import as_path, on_disk
from omnicodec_jax.config.files import unknown_field
from omnicodec_jax.errors import TokenError
from omnicodec_jax.files import refuse_lfs_pointer, replacing, save_tensors
from omnicodec_jax.origin import Origin

SUFFIX = ".safetensors"
_KEY = "omnicodec"
_DAMAGED = SafetensorError, KeyError, TypeError, ValueError, OSError
_ADDED = {"precision": "float32", "encoder_precision": "float32", "tokens_hash": None}
"""Fields that files of version 0.1 do not have, and the values that held for them then."""


SMALLEST = 1e-12
"""The smallest number that the metadata may hold, and the inverse of the largest: beyond these, float32 loses the
audio."""


class Maker(NamedTuple):
    """The model and the number formats that have made the codes of a file."""

    model: str
    """The hash of the model. `OmniCodecTokenizer.model_hash_as` tells whether the codes are of a given model."""
    precision: str
    """The number format of the model's convolutions and matrix products."""
    encoder_precision: str
    """The number format of the encoder of semantic features, if there was one."""
    tokens_hash: str | None
    """The hash of the part of the model that makes codes; None: the file is of an earlier version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFile:
    """The codes of one clip, and what else is needed to decode the clip.

    Examples:
        >>> import numpy as np
        >>> codes = np.zeros((9, 13), np.uint16)
        >>> tokens = TokenFile(
        ...     codes=codes, model="0" * 16, frame_rate=12.5, sample_rate=44_100, num_samples=44_100, gain=1.0
        ... )
        >>> tokens.save("clip.safetensors")
        >>> TokenFile.load("clip.safetensors").num_frames(model_rate=24_000, hop_length=1920)
        13
    """

    codes: np.ndarray
    """The codes, uint16 [K, N], of which k = 0 is the semantic codebook."""
    model: str
    """The hash of the model that made the codes; docs/tokens.md says what it covers."""
    frame_rate: float
    """The number of frames per second."""
    sample_rate: int
    """The sample rate of the original, Hz."""
    num_samples: int
    """The number of samples of the original, at its own rate."""
    gain: float
    """The factor that the original was multiplied by before encoding."""
    source: Origin | None = None
    """The original file; None if it is not known."""
    precision: str = "float32"
    """The number format of the model's convolutions and matrix products."""
    encoder_precision: str = "float32"
    """The number format of the encoder of semantic features, if there was one."""
    tokens_hash: str | None = None
    """The hash of the part of the model that makes codes, which models with other decoders share; None: not known."""

    def num_frames(self, model_rate: int, hop_length: int) -> int:
        """Counts the frames that the original has for a model.

        Args:
            model_rate: The model's sample rate, Hz.
            hop_length: Number of samples in one of its frames.

        Returns:
            The number of frames. The last one may be filled up with silence.
        """
        return _frames_of(self.num_samples, self.sample_rate, model_rate, hop_length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the codes and the metadata to a file, whole or not at all.

        Args:
            path: File to write to; it should end in .safetensors.

        Raises:
            TokenError: For codes and metadata that such a file cannot hold.
        """
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or not codes.size or not ((codes >= 0) & (codes < 1 << 16) & (codes % 1 == 0)).all():
            what = f"codes of shape {list(codes.shape)}, {codes.dtype}"
            raise TokenError(f"{path}: {what}: must be whole numbers [K, N], each from 0 to 65535")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "codes"}
        fields = {name: value.item() if isinstance(value, np.generic) else value for name, value in fields.items()}
        _check_fields(path, fields)
        # Version 0.1 refuses fields that it does not know. Fields with the values that it assumes are left out.
        fields = {name: value for name, value in fields.items() if name not in _ADDED or value != _ADDED[name]}
        if self.source is not None:
            fields["source"] = self.source._asdict()
        with replacing(as_path(path)) as temporary:
            save_tensors({"codes": codes.astype(np.uint16)}, temporary, {_KEY: json.dumps(fields)})

    @staticmethod
    def made_by(path: str | os.PathLike[str]) -> tuple["Maker", Origin | None]:
        """Reads what has made the codes of a file, and their source, without the codes.

        Args:
            path: A token file.

        Returns:
            The maker of the codes, and the source, if it is known.

        Raises:
            TokenError: If it is no token file.
        """
        try:
            with on_disk(as_path(path)) as here, safe_open(here, "np") as file:
                fields = _read_fields(file)
                added = (fields.get(name, default) for name, default in _ADDED.items())
                return Maker(fields["model"], *added), fields.get("source")
        except _DAMAGED as error:
            raise TokenError(f"{path}: not a token file of omnicodec encode: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenFile":
        """Reads a token file.

        Args:
            path: A file that `omnicodec encode` or `save` has written.

        Returns:
            The codes and the metadata.

        Raises:
            TokenError: If it is no token file, is damaged, or has metadata of a later version.
        """
        path = as_path(path)
        if not path.is_file():
            raise TokenError(f"{path}: no such file")
        refuse_lfs_pointer(path, TokenError)
        try:
            with on_disk(path) as here, safe_open(here, "np") as file:
                fields = _read_fields(file)
                codes = file.get_tensor("codes")
            if problem := unknown_field(fields, (field.name for field in dataclasses.fields(cls))):
                raise TokenError(f"{path}: {problem}")
            tokens = cls(codes=codes, **fields)
        except TokenError:
            raise
        except _DAMAGED as error:
            raise TokenError(f"{path}: not a token file of omnicodec encode: {error}") from None
        _check_fields(path, fields)
        if codes.ndim != 2 or codes.dtype != np.uint16:
            raise TokenError(f"{path}: codes are {codes.dtype} {list(codes.shape)}, must be uint16 [K, N]")
        return tokens


def _read_fields(file: Any) -> dict[str, Any]:
    """Reads the metadata. Raises one of `_DAMAGED`."""
    metadata = file.metadata() or {}
    if _KEY not in metadata:
        raise ValueError("it has no metadata of one")
    fields = json.loads(metadata[_KEY])
    if not isinstance(fields, dict):
        raise ValueError("its metadata is no object")
    return fields if fields.get("source") is None else fields | {"source": Origin(**fields["source"])}


def _check_fields(path: Any, fields: dict[str, Any]) -> None:
    """Raises TokenError for metadata with which no clip can be decoded."""
    for name, kind in {"sample_rate": int, "num_samples": int, "gain": float, "frame_rate": float}.items():
        value = fields[name]
        if type(value) not in (int, kind) or not SMALLEST <= value < 1 / SMALLEST:
            raise TokenError(f"{path}: {name} = {value!r}: must be a positive {'whole ' * (kind is int)}number")
    if not isinstance(fields["model"], str):
        raise TokenError(f"{path}: model = {fields['model']!r}: must be the hash of a model")


def check_clip(tokenizer: Any, codes: np.ndarray, sample_rate: int, num_samples: int) -> None:
    """Refuses codes that a model cannot have made of a clip.

    Args:
        tokenizer: The model's `OmniCodecTokenizer`.
        codes: Integers [k, N], k ≤ K.
        sample_rate: Sample rate of the clip's original, Hz.
        num_samples: Length of the original, at its own rate.

    Raises:
        TokenError: If the codes cannot be the model's, or are not those of so many samples.
    """
    tokenizer.check_codes(codes[None])
    if codes.shape[1] != _frames_of(num_samples, sample_rate, tokenizer.sample_rate, tokenizer.hop_length):
        raise TokenError(f"damaged: {codes.shape[1]} frames do not fit {num_samples} samples; encode the audio again")


def _frames_of(num_samples: int, sample_rate: int, model_rate: int, hop_length: int) -> int:
    samples = -(-num_samples * model_rate // sample_rate)
    return -(-samples // hop_length)
