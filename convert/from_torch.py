"""A PyTorch checkpoint of the reference implementation → a model directory.

python -m convert.from_torch --checkpoint omnicodec.pth --config configs/released_12hz.py --out models/omnicodec

Discriminators, to go on training with, belong into a folder of the model:

python -m convert.from_torch --checkpoint discriminators.pth --discriminators --config configs/released_12hz.py \
    --out models/omnicodec/discriminators
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

import convert.discriminators
from convert import reference
from convert.tensors import ConversionError
from omnicodec_jax import command, config_files, model_directory
from omnicodec_jax.config import CodecConfig


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a .pth or .safetensors file, bare or under "model". Never runs code from the file."""
    if not path.is_file():
        raise ConversionError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path}: not a readable safetensors file: {error}") from None
    torch = import_torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path}: not a checkpoint that can be read without running its code: {reason}") from None
    state_dict = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ConversionError(f'{path}: neither a state dict nor {{"model": state dict}}')
    return {key: value.float().numpy() for key, value in state_dict.items()}


def import_torch() -> ModuleType:
    """PyTorch, or a ConversionError that says how to get it."""
    try:
        import torch
    except ImportError:
        raise ConversionError("this needs PyTorch: pip install -e '.[torch]', or use .safetensors") from None
    return torch


def main(checkpoint: Path, config: Path, out: Path, discriminators: bool = False) -> None:
    """Convert a PyTorch checkpoint of OmniCodec.

    Args:
        checkpoint: .pth or .safetensors file; a bare state dict or {"model": state dict}.
        config: File in configs/ that it was trained with, or the reference's own YAML file.
        out: Model directory to write.
        discriminators: It is a checkpoint of the discriminators.
    """
    if discriminators:
        judges = config_files.load(config).discriminators
        variables = convert.discriminators.from_state_dict(read_state_dict(checkpoint), judges)
        model_directory.save(out, judges, variables)
        print(f"{out}: discriminators")
        return
    codec = _read_config(config)
    state_dict = read_state_dict(checkpoint)
    variables = reference.from_state_dict(state_dict, codec)
    model_directory.save(out, codec, variables)
    dropped = [key for key in state_dict if key.startswith(reference.DROPPED)]
    print(f"{out}: {len(state_dict) - len(dropped)} tensors, model {model_directory.model_hash(codec, variables)}")
    if dropped:
        print(f"left out on purpose: {len(dropped)} tensors of {', '.join(p + '*' for p in reference.DROPPED)}")


def _read_config(path: Path) -> CodecConfig:
    if path.suffix not in (".yaml", ".yml"):
        return config_files.load(path).codec
    import yaml

    try:
        mapping = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConversionError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return reference.config_from_reference(mapping)


if __name__ == "__main__":
    command.run(main, prog="python -m convert.from_torch")
