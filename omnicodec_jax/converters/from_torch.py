"""Converts a PyTorch checkpoint of the reference implementation to a model directory.

omnicodec convert from-torch --checkpoint omnicodec.pth --config released_12hz --out models/omnicodec
omnicodec convert from-torch --checkpoint models/torch --out models/omnicodec

Discriminators are needed to train on. Their place is a folder in the model directory:

omnicodec convert from-torch --checkpoint discriminators.pth --discriminators --config released_12hz \
    --out models/omnicodec/discriminators
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import model_directory, targets
from omnicodec_jax.codec_directory import remove_other_encoder
from omnicodec_jax.config import CodecConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import discriminators as reference_discriminators
from omnicodec_jax.converters import pytorch_model, reference
from omnicodec_jax.converters.tensors import ConversionError, name_groups, read_state_dict, unwrap
from omnicodec_jax.converters.transformers_directory import read_config


def main(
    checkpoint: Path, out: Path, config: Path | None = None, discriminators: bool = False, part: str | None = None
) -> None:
    """Convert a PyTorch checkpoint of OmniCodec.

    Args:
        checkpoint: A .pth or .safetensors file with a state dict, or with anything that holds one, as Lightning's
            checkpoints do; or a directory that `omnicodec convert to-torch`, or `save_pretrained` of the model in
            PyTorch, has written. Discriminators, and an encoder of Whisper, in that directory are converted with it.
        out: Model directory to write.
        config: Recipe or config file that the model was trained with, or the YAML file of the authors' code. A
            directory needs none, since it holds its own.
        discriminators: Convert a checkpoint of the discriminators.
        part: Copy to take from a checkpoint that holds the model more than once, such as "ema".
    """
    if checkpoint.is_dir() and (checkpoint / model_directory.CONFIG).is_file():
        mapping = read_config(checkpoint, "omnicodec")
        if config is not None or discriminators or part is not None:
            raise ConversionError(f"{checkpoint}: says itself what it is; leave out --config, --discriminators, --part")
        network, tensors, encoder = pytorch_model.load(checkpoint, mapping)
        beside, discriminators_out = pytorch_model.load_discriminators(checkpoint), out / model_directory.DISCRIMINATORS
        model_directory.refuse_other_kind(out, "omnicodec")  # before anything is written
        if beside is not None:
            _convert(checkpoint, *beside, reference_discriminators, discriminators_out)
        else:
            model_directory.remove(discriminators_out)  # those of another model
        if encoder is not None:
            model_directory.save(out / model_directory.ENCODER, *encoder)
            print(f"{out / model_directory.ENCODER}: encoder {model_directory.model_hash(*encoder)}")
        _convert(checkpoint, network, tensors, reference, out)
        remove_other_encoder(out, network)
        return
    tensors, kind = read_state_dict(checkpoint), reference_discriminators if discriminators else reference
    targets.check_apart(checkpoint, out / model_directory.WEIGHTS)
    if config is None:
        raise ConversionError(f"{checkpoint}: does not say what it is; give the --config that it was trained with")
    network: Any = config_files.load(config).discriminators if discriminators else _read_config(config)
    _convert(checkpoint, network, tensors, kind, out, part)


def _convert(
    checkpoint: Path, network: Any, tensors: Mapping[str, np.ndarray], kind: Any, out: Path, part: str | None = None
) -> None:
    """Converts a state dict of the codec, or of its discriminators, to a model directory."""
    try:
        state_dict, left_out = unwrap(tensors, [entry.key for entry in kind.key_table(network)], part)
        variables = kind.from_state_dict(state_dict, network)
    except ConversionError as error:
        raise ConversionError(f"{checkpoint}: {error}") from None
    model_directory.save(out, network, variables)
    dropped = [key for key in state_dict if key.startswith(reference.DROPPED)] if kind is reference else []
    count, digest = len(state_dict) - len(dropped), model_directory.model_hash(network, variables)
    print(f"{out}: {count} tensors, {'model' if kind is reference else 'discriminators'} {digest}")
    if left_out := left_out + dropped:
        print(f"left out on purpose: {name_groups(left_out)}")


def _read_config(path: Path) -> CodecConfig:
    """Returns OmniCodec's config from a recipe, a config file, or a YAML file of the reference."""
    if path.suffix not in (".yaml", ".yml"):
        codec = config_files.load(path).codec
        if not isinstance(codec, CodecConfig):
            raise ConversionError(f"{path}: a config of Mimi, whose checkpoints omnicodec convert mimi converts")
        return codec
    import yaml

    try:
        mapping = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConversionError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return reference.config_from_reference(mapping)
