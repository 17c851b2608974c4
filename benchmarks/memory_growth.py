"""Memory of a training process over 2000 steps and 40 checkpoints: python -m benchmarks.memory_growth [--steps STEPS]

The run is that of `omnicodec train`, with a codec and discriminators so small that a step takes little more than what
the loop around it does: reading batches, writing checkpoints, logging, validation. What it prints is the memory of the
process at every tenth of the run, and how much of it the second half of the run has added.
"""

import dataclasses
import logging
import tempfile
from pathlib import Path

from omnicodec_jax.cli import command
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import Config, DomainConfig, OptimizerConfig, RunConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import prepare
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.training import loop, lost_time

STEPS, CHECKPOINTS = 2000, 40
TINY = Path(__file__).parents[1] / "tests" / "tiny_experiment.py"
"""The experiment of the tests, in which every network is as small as it goes."""


def smallest() -> Config:
    """Returns the experiment of the tests with one domain and without the discriminator of waveforms."""
    tiny = config_files.load(TINY)
    return dataclasses.replace(
        tiny,
        discriminators=dataclasses.replace(tiny.discriminators, waveform=None),
        data=dataclasses.replace(tiny.data, domains=(DomainConfig(name="sound"),), batch_size=2, num_workers=1),
    )


def measure(folder: Path, steps: int) -> list[tuple[int, float]]:
    """Trains for some steps with CHECKPOINTS checkpoints. Returns the steps of its record, and the memory in GiB."""
    settings = PrepareConfig(validation=0.3)
    prepare.run({"sound": BUNDLED_CLIPS}, folder / "prepared", settings, 1, Share())
    config = smallest()
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(warmup_steps=2, total_steps=steps, ema_decay=0.9),
        data=dataclasses.replace(config.data, prepared=str(folder / "prepared")),
        run=RunConfig(
            log_every=max(1, steps // (2 * CHECKPOINTS)),
            save_every=max(1, steps // CHECKPOINTS),
            validate_every=max(1, steps // 4),
            validation_batches=1,
        ),
    )
    loop.run(config, folder / "run")
    return [(line.step, line.host_gib) for line in lost_time.read(folder / "run") if line.step is not None]


def main(*, steps: int = STEPS) -> None:
    """Train the smallest codec with 40 checkpoints, and print the memory of the process at every tenth of the run.

    Args:
        steps: Length of the run.
    """
    command.log_progress()
    logging.getLogger("omnicodec_jax").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), steps)
        print(lost_time.of_run(Path(folder) / "run"))
    for tenth in range(11):
        step, gib = min(lines, key=lambda line: abs(line[0] - tenth * steps / 10))
        print(f"step {step:5d}  {1024 * gib:7.1f} MiB")
    half = min(lines, key=lambda line: abs(line[0] - steps / 2))
    print(f"the second half of the run added {1024 * (lines[-1][1] - half[1]):.1f} MiB")


if __name__ == "__main__":
    command.run(main, prog="python -m benchmarks.memory_growth")
