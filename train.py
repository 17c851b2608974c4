"""Trains a codec: python train.py --config configs/demo.py --workdir runs/demo."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax import command, config_files
from omnicodec_jax.config import Config


def main() -> int:
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
            config: A file such as those in configs/; the options below replace what it says.
            workdir: Directory of the run: checkpoints, TensorBoard events.
            profile: Steps to write an xprof trace of, into WORKDIR/profile.
            settings: All that the config says.
        """
        from omnicodec_jax.training import loop, multihost

        multihost.initialize()
        return loop.run(settings, workdir, None if profile is None else loop.Profile.parse(profile))

    return tyro.cli(train, prog="train.py")


if __name__ == "__main__":
    command.log_progress()
    command.use_compilation_cache()
    command.exit_with(main)
