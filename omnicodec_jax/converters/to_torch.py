"""Converts a model directory, or its discriminators, to a state dict of the PyTorch reference implementation.

omnicodec convert to-torch --model models/omnicodec --out omnicodec.pth
omnicodec convert to-torch --model models/omnicodec/discriminators --out discriminators.pth
"""

from pathlib import Path

from omnicodec_jax import model_directory
from omnicodec_jax.config import CodecConfig, DiscriminatorConfig
from omnicodec_jax.converters import discriminators, reference
from omnicodec_jax.converters.tensors import ConversionError, import_torch
from omnicodec_jax.files import rewriting


def main(model: Path, out: Path) -> None:
    """Export a model to PyTorch.

    Args:
        model: Model directory or hub id of an OmniCodec, or the folder of its discriminators.
        out: .pth or .safetensors file to write: a bare state dict.
    """
    config, variables = model_directory.load(model_directory.resolve(model))
    if isinstance(config, CodecConfig):
        state_dict, dropped = reference.to_state_dict(variables, config), reference.DROPPED
    elif isinstance(config, DiscriminatorConfig):
        state_dict, dropped = discriminators.to_state_dict(variables, config), ()
    else:
        raise ConversionError(f"{model}: a {type(config).__name__} model; only OmniCodec models go to PyTorch")
    with rewriting(out) as path:
        if out.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(state_dict, path)
        elif out.suffix in (".pth", ".pt"):
            torch = import_torch()
            torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, path)
        else:
            raise ConversionError(f"{out}: must end in .pth, .pt or .safetensors")
    print(f"{out}: {len(state_dict)} tensors")
    if dropped:
        print("not in it, as nothing here holds them: " + ", ".join(f"{prefix}*" for prefix in dropped))
