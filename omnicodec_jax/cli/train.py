"""`omnicodec train`: the command that trains a codec from a config and prepared audio."""

import contextlib
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.cli.arguments import WithConfig
from omnicodec_jax.config import Config
from omnicodec_jax.errors import UsageError

MOST_USED = {
    "data.prepared": "Directory that `omnicodec prepare` has written.",
    "data.features": "Directory of stored semantic features (omnicodec convert semantic-features).",
    "data.batch_size": "Clips in a step, over all devices.",
    "optimizer.total_steps": "Steps of the whole run. The learning rate falls until then, so choose it at the start.",
    "optimizer.learning_rate": "The highest learning rate, which is reached after optimizer.warmup-steps.",
    "run.wavlm": "Directory of WavLM (omnicodec convert wavlm). Without it, the losses that need it are off.",
    "run.encoder": "Directory of the encoder that computes semantic features (omnicodec convert whisper, qwen3-aut).",
    "run.start_from": "Model directory that a new run takes its weights from, for fine-tuning.",
    "run.save_every": "Steps between two checkpoints.",
    "run.mesh.fsdp": "Number of devices that share the state, when one alone has no room for it.",
}


def train(
    *,
    config: str,
    workdir: Path,
    profile: Annotated[str | None, tyro.conf.arg(metavar="START:STOP")] = None,
    settings: Config,
) -> int:
    """Train a codec, or go on with a run that has checkpoints: the same command does both.

    Args:
        config: Recipe, such as released_12hz, or a file of your own.
        workdir: Directory of the run: checkpoints, TensorBoard events.
        profile: Steps to write an xprof trace of, into WORKDIR/profile.
        settings: All that the config says.
    """
    from omnicodec_jax.data.claim import claim
    from omnicodec_jax.distributed import multihost
    from omnicodec_jax.training import loop, lost_time

    began = lost_time.process_start()
    if profile is not None and isinstance(workdir, BucketPath):
        raise UsageError(f"--profile: writes to a disk, and --workdir {workdir} is in a bucket")
    multihost.initialize()
    with claim(workdir) if multihost.is_main() else contextlib.nullcontext():
        return loop.run(settings, workdir, None if profile is None else loop.Profile.parse(profile), began)


TRAIN = WithConfig(train, {Config: MOST_USED})
