"""Compiles the language model's training step for TPUs that are not there, as training/aot.py does the codec's.

python -m omnicodec_jax.evaluation.aot --config configs/language_model.py --topology v5e:4x4
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax import arguments, command, config_files
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.evaluation import perplexity
from omnicodec_jax.training import aot, sharding

FRAME_RATE = 12.5

MOST_USED = {
    "batch_size": "Windows in a step, over all chips.",
    "window_frames": "Frames of a window.",
    "num_codebooks": "Codebooks that are predicted.",
    "layout": "What the model knows when it predicts a code.",
    "remat": "Compute activations again for the backward pass: less memory, more arithmetic.",
    "mesh.data": "Groups of chips that hold the same state. Default: as many as there are chips for.",
    "mesh.fsdp": "Chips that share the state out among them.",
    "mesh.tensor": "Chips that share the transformer's channels.",
}
"""Options that stand in the short help."""


def main() -> int | None:
    """Parses the command line, compiles and prints."""
    default = config_files.named_by(sys.argv[1:], PerplexityConfig)

    def compile_for(
        *,
        config: Path,
        topology: str,
        settings: Annotated[PerplexityConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = default,
    ) -> None:
        """Compile the training step for TPUs without any, and say what it needs; for tokens at 12.5 Hz.

        Args:
            config: Config file, such as configs/language_model.py.
            topology: Chips to compile for: v5e:4x4, v5p:2x2x2, …
            settings: All that the config says.
        """
        chips = aot.devices(topology)
        chip = aot.CHIPS[topology.partition(":")[0]]
        planned = aot.plan(chip, perplexity.lower_step(settings, sharding.make_mesh(settings.mesh, chips)))
        audio = settings.batch_size * settings.window_frames / FRAME_RATE / len(chips)
        print(aot.report(planned, chip, audio))

    return arguments.parse_with_config(compile_for, "python -m omnicodec_jax.evaluation.aot", MOST_USED)()


if __name__ == "__main__":
    command.log_progress()
    os.environ["JAX_PLATFORMS"] = "cpu"
    aot.exit_with(main)
