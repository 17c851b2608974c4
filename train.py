"""Trains a codec: python train.py --config configs/demo.py --workdir runs/demo."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax import arguments, command, config_files
from omnicodec_jax.config import Config

MOST_USED = {
    "data.prepared": "Directory that `omnicodec prepare` has written.",
    "data.features": "Directory of stored semantic features (python -m convert.semantic_features).",
    "data.batch_size": "Clips in a step, over all devices.",
    "optimizer.total_steps": "Steps of the whole run. The learning rate falls until then, so choose it at the start.",
    "optimizer.learning_rate": "The highest learning rate, which is reached after optimizer.warmup-steps.",
    "run.wavlm": "WavLM for its losses (python -m convert.wavlm). Without it they are off.",
    "run.encoder": "Encoder to compute semantic features with in each step (python -m convert.qwen3_aut).",
    "run.start_from": "Model directory that a new run takes its weights from, for fine-tuning.",
    "run.save_every": "Steps between two checkpoints.",
    "run.mesh.fsdp": "Devices that share the state out among them, when one alone has no room for it.",
}
"""Options that stand in the short help."""


def main() -> int | None:
    """Parses the command line and runs what it says."""
    default = config_files.named_by(sys.argv[1:], Config)

    def train(
        *,
        config: Path,
        workdir: Path,
        profile: Annotated[str | None, tyro.conf.arg(metavar="START:STOP")] = None,
        settings: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
    ) -> int:
        """Train a codec, or go on with a run that has checkpoints: the same command does both.

        Args:
            config: Config file, such as configs/demo.py.
            workdir: Directory of the run: checkpoints, TensorBoard events.
            profile: Steps to write an xprof trace of, into WORKDIR/profile.
            settings: All that the config says.
        """
        from omnicodec_jax.data.claim import claim
        from omnicodec_jax.training import loop, multihost

        multihost.initialize()
        with claim(workdir) if multihost.is_main() else contextlib.nullcontext():
            return loop.run(settings, workdir, None if profile is None else loop.Profile.parse(profile))

    return arguments.parse_with_config(train, "python train.py", MOST_USED)()


if __name__ == "__main__":
    command.log_progress()
    command.use_compilation_cache()
    command.exit_with(main)
