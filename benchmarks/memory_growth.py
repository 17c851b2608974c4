"""Memory of a training process over 2000 steps and 40 checkpoints: python -m benchmarks.memory_growth [--steps STEPS]

The run is that of `omnicodec train`, with a codec and discriminators so small that a step takes little more than what
the loop around it does: reading batches, writing checkpoints, logging, validation. What it prints at every tenth of the
run is the memory of the process, and how much of it glibc has given out and not got back. The process keeps memory that
is freed, in pieces that not all fits into, so that the second number tells whether anything large is never freed. Small
objects of Python are not in it, since Python takes their memory from the system by itself.
"""

import ctypes
import dataclasses
import logging
import re
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


class MallInfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns, from its malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


class InUse(logging.Handler):
    """Notes how many MiB are in use whenever a run logs a step.

    Attributes:
        mib: The MiB by step.
    """

    def __init__(self):
        super().__init__()
        self.mib: dict[int, float] = {}
        self._mallinfo = ctypes.CDLL(None).mallinfo2
        self._mallinfo.restype = MallInfo

    def emit(self, record: logging.LogRecord) -> None:
        """Notes what is in use, if the record is that of a step."""
        if found := re.match(r"step (\d+)/", record.getMessage()):
            info = self._mallinfo()
            self.mib[int(found[1])] = (info.uordblks + info.hblkhd) / 2**20


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
    logger, in_use = logging.getLogger("omnicodec_jax"), InUse()
    logger.addHandler(in_use)
    logger.propagate = False  # its lines are not printed
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), steps)
        print(lost_time.of_run(Path(folder) / "run"))
    for tenth in range(1, 11):
        step, gib = min(lines, key=lambda line: abs(line[0] - tenth * steps / 10))
        print(f"step {step:5d}  process {1024 * gib:7.1f} MiB  in use {in_use.mib[step]:7.1f} MiB")
    half, end = (min(in_use.mib, key=lambda step: abs(step - part * steps)) for part in (0.5, 1))
    print(f"the second half of the run added {in_use.mib[end] - in_use.mib[half]:.1f} MiB to what is in use")


if __name__ == "__main__":
    command.run(main, prog="python -m benchmarks.memory_growth")
