"""Exports a run's checkpoint as a model directory, which needs neither the run nor Orbax."""

from pathlib import Path

import jax
import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.codec_directory import encoder_directory
from omnicodec_jax.config import MeshConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import CheckpointError
from omnicodec_jax.models.quantize import CODEBOOKS, COUNTER
from omnicodec_jax.semantic import read_encoder_of
from omnicodec_jax.training import checkpoint
from omnicodec_jax.training.packing import Tree
from omnicodec_jax.training.start import state_template


def export_model(
    workdir: Path,
    out: Path,
    step: int | None = None,
    ema: bool = False,
    number: model_directory.Number = "float32",
    encoder: Path | None = None,
) -> int:
    """Writes the codec of a run to a model directory, and its discriminators and frozen encoder to folders in it.

    Args:
        workdir: The directory of the run.
        out: The model directory.
        step: The step of a kept checkpoint; None: the last one.
        ema: Whether to take the moving average of the parameters instead of the parameters.
        number: The number format in which the codec's weights are stored.
        encoder: Model directory of the encoder of the semantic branch, which is copied. None: an encoder that is in
            `out` already stays there.

    Returns:
        The step of the checkpoint.

    Raises:
        CheckpointError: If the run, the step or the average is not there.
        ModelError: If `encoder` holds no encoder, or none of the kind that the codec takes.
    """
    config, step = checkpoint.read(workdir, step)
    if ema and config.optimizer.ema_decay is None:
        raise CheckpointError(f"{workdir}: this run keeps no moving average (optimizer.ema_decay); leave out --ema")
    own, discriminators = out / model_directory.ENCODER, out / model_directory.DISCRIMINATORS
    if encoder is None and (own / model_directory.CONFIG).is_file():
        encoder = own
    elif encoder is not None:
        encoder = encoder_directory(encoder)
    if encoder is not None:
        read_encoder_of(encoder, getattr(config.codec, "semantic", None))
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    state = checkpoint.restore(workdir, step, state_template(config, mesh))
    params = state.ema_params if ema else state.params
    if state.discriminators:
        model_directory.save(discriminators, config.discriminators, {"params": state.discriminators})
    else:
        model_directory.remove(discriminators)  # those of another model
    if encoder is not None and encoder != own:
        model_directory.copy(encoder, own)
    codebooks = state.codebooks
    if "quantizer" not in config.train.freeze:  # new counters would change the hash of a frozen quantizer's tokens
        codebooks = with_new_counters(codebooks, config.codec.codebook.check_every)
    model_directory.save(out, config.codec, {"params": params, CODEBOOKS: codebooks}, number)
    return step


def with_new_counters(codebooks: Tree, check_every: int) -> Tree:
    """Returns codebooks with the counters of new codebooks. Only training reads the counters, which count steps.

    PyTorch's checkpoints have no counters. With new ones, a model has the same hash after a conversion to PyTorch and
    back.
    """
    leaves = model_directory.flatten(codebooks)
    new = {name: np.full_like(leaf, check_every) for name, leaf in leaves.items() if name.endswith(COUNTER)}
    return model_directory.unflatten(leaves | new)
