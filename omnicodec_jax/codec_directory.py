"""Finds, reads and writes the model directory of a codec, on disk or on the Hugging Face hub, and its encoder."""

import os
from pathlib import Path
from typing import Any

from omnicodec_jax import model_directory
from omnicodec_jax.buckets import as_path
from omnicodec_jax.config import CodecConfig, MimiConfig
from omnicodec_jax.errors import ModelError
from omnicodec_jax.semantic import read_encoder_of

FILES = tuple(
    f"{folder}{name}"
    for folder in ("", f"{model_directory.ENCODER}/")
    for name in (model_directory.CONFIG, model_directory.WEIGHTS)
)
"""Files of a codec's model directory."""
FOR_TRAINING = tuple(
    f"{model_directory.DISCRIMINATORS}/{name}" for name in (model_directory.CONFIG, model_directory.WEIGHTS)
)
"""Files of a codec's model directory that only training has a use for."""


def find_encoder(
    name: str | os.PathLike[str], revision: str | None = None, encoder: str | os.PathLike[str] | None = None
) -> Path | None:
    """Finds the frozen encoder of a codec's semantic branch.

    Args:
        name: Model directory of the codec, or hub id.
        revision: Branch, tag or commit of a hub model.
        encoder: Directory of the encoder, or of a codec with it, where it is not that of this codec.

    Returns:
        The directory that is given, or else the folder `encoder` in the codec's own; None if that is not there.
    """
    if encoder is not None:
        return encoder_directory(encoder)
    beside = model_directory.resolve(name, revision, FILES) / model_directory.ENCODER
    return beside if (beside / model_directory.CONFIG).is_file() else None


def encoder_directory(name: str | os.PathLike[str]) -> Path:
    """Finds the directory of a frozen encoder.

    Args:
        name: Model directory or hub id of the encoder, or of a codec that has it in its folder `encoder`; the name of a
            bundled codec, too.

    Raises:
        ModelError: If there is no such model.
    """
    directory = model_directory.resolve(name, files=FILES)
    beside = directory / model_directory.ENCODER
    return beside if (beside / model_directory.CONFIG).is_file() else directory


def save_codec(
    directory: str | os.PathLike[str],
    config: CodecConfig | MimiConfig,
    variables: model_directory.Variables,
    encoder: tuple[Any, model_directory.Variables] | None,
) -> None:
    """Writes the model directory of a codec, and its frozen encoder, if it has one, into the folder `encoder` there."""
    if encoder is not None:
        model_directory.save(as_path(directory) / model_directory.ENCODER, *encoder)
    model_directory.save(directory, config, variables)
    remove_other_encoder(as_path(directory), config)


def remove_other_encoder(directory: Path, config: CodecConfig | MimiConfig) -> None:
    """Removes the encoder of the codec that was in a directory before, if the one there now takes none of its features.

    With that encoder beside it, the new codec could not be loaded.
    """
    own = directory / model_directory.ENCODER
    if (own / model_directory.CONFIG).is_file():
        try:
            read_encoder_of(own, getattr(config, "semantic", None))
        except ModelError:
            model_directory.remove(own)


def load_codec(
    name: str | os.PathLike[str], revision: str | None = None
) -> tuple[CodecConfig | MimiConfig, model_directory.Variables]:
    """Reads config and variables of a codec, as numpy arrays.

    Args:
        name: Model directory, or hub id such as `you/your-codec`.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ModelError: If there is no such model, it is incomplete, or it is no codec.
        ConfigError: If its config.json is not one.
    """
    config, variables = model_directory.load(model_directory.resolve(name, revision, FILES), model_directory.CODEC)
    return config, variables
