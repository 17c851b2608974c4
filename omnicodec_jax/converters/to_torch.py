"""Converts a model directory, or its discriminators, for PyTorch.

omnicodec convert to-torch --model models/omnicodec --out models/torch
omnicodec convert to-torch --model models/omnicodec --out omnicodec.pth
omnicodec convert to-torch --model models/omnicodec/discriminators --out discriminators.pth

A directory is a model that transformers runs. A file is a bare state dict for the reference implementation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import codec_directory, model_directory
from omnicodec_jax.config import CodecConfig, DiscriminatorConfig
from omnicodec_jax.converters import discriminators, pytorch_model, reference
from omnicodec_jax.converters.tensors import ConversionError, import_torch
from omnicodec_jax.files import rewriting, save_tensors

PYTORCH = (".pth", ".pt")
SUFFIXES = (*PYTORCH, ".safetensors")
OMNICODEC = model_directory.Role("an OmniCodec or its discriminators", ("omnicodec", "discriminators"))


def main(model: Path, out: Path) -> None:
    """Export a model to PyTorch.

    Args:
        model: Model directory or hub id of an OmniCodec, or the folder of its discriminators.
        out: Directory to write, for transformers; or a .pth or .safetensors file: a state dict and nothing else.
    """
    directory = model_directory.resolve(model, files=(*codec_directory.FILES, *codec_directory.FOR_TRAINING))
    config, variables = model_directory.load(directory, OMNICODEC)
    if out.name == model_directory.WEIGHTS and (out.parent / model_directory.CONFIG).is_file():
        raise ConversionError(f"{out}: the weights of the model in {out.parent}; choose another --out")
    if out.suffix in SUFFIXES:
        kind: Any = reference if isinstance(config, CodecConfig) else discriminators
        state_dict = kind.to_state_dict(variables, config)
        _write(out, state_dict)
        print(f"{out}: {len(state_dict)} tensors")
    elif out.suffix in model_directory.PYTORCH or out.is_file():
        raise ConversionError(f"{out}: must be a directory, or end in {', '.join(SUFFIXES)}")
    elif isinstance(config, DiscriminatorConfig):
        raise ConversionError(f"{out}: discriminators go to a file that ends in {', '.join(SUFFIXES)}")
    else:
        model_directory.refuse_other_kind(out, "omnicodec", theirs=True)
        _write(out / pytorch_model.CHECKPOINT, reference.to_state_dict(variables, config))
        if (directory / model_directory.DISCRIMINATORS / model_directory.CONFIG).is_file():
            beside = model_directory.load(directory / model_directory.DISCRIMINATORS)
            pytorch_model.save_discriminators(out, *beside)
        else:
            pytorch_model.remove_discriminators(out)  # those of another model
        whisper = pytorch_model.read_whisper(directory / model_directory.ENCODER, config)
        count = pytorch_model.save(out, config, variables, whisper)
        print(f"{out}: {count} tensors; AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True) loads them")
    if isinstance(config, CodecConfig):
        print("not in it, as nothing here holds them: " + ", ".join(f"{prefix}*" for prefix in reference.DROPPED))


def _write(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as PyTorch or safetensors do, by the suffix."""
    with rewriting(path) as temporary:
        if path.suffix in PYTORCH:
            torch = import_torch()
            with open(temporary, "wb") as file:  # given a path, PyTorch writes its name into the file
                torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, file)
        else:
            save_tensors(state_dict, temporary)
