"""Live decoding a frame at a time at full size, against transformers' Mimi: python -m benchmarks.streaming_speed

One session with 80 ms frames is decoded in float32, on all cores and on one core. Mimi decodes with its caches; its
transformer has some, its convolutions have none. The two take turns of some seconds in one process. The first audio of
a session comes after one frame, since nothing looks ahead.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

TURN, WARM = 50, 5
"""Frames in a turn, and frames before them that do not count, since threads of the other system still wait for work."""
CONFIG = "released_12hz"


def ours() -> Callable[[np.ndarray], object]:
    """Returns the decoder of released_12hz with 33 codebooks."""
    import jax

    from omnicodec_jax import model_directory
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.models.initialize import init_variables, on_cpu
    from omnicodec_jax.streaming import StreamingDecoder
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    codec = config_files.load(CONFIG).codec
    initialize = partial(init_variables, model_directory.build(codec))
    variables = on_cpu(initialize, jax.random.key(0))
    return StreamingDecoder(OmniCodecTokenizer(codec, variables))


def mimi() -> Callable[[np.ndarray], object]:
    """Returns the decoder of transformers' Mimi at its default size with 32 codebooks."""
    import torch
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig(use_cache=True)).eval()
    state: dict[str, Any] = {"past": None}
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    @torch.inference_mode()
    def decode(codes: np.ndarray) -> object:
        # The argument is given by position, since releases of transformers name the caches differently.
        output = model.decode(torch.from_numpy(codes[:, :32]), None, state["past"])
        state["past"] = output[1]
        return output[0]

    return decode


def measure(frames: int) -> None:
    """Measures both systems, and prints a line for each."""
    rng = np.random.default_rng(0)
    systems = {"ours": ours(), "Mimi": mimi()}
    milliseconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(-(-frames // TURN)):
        for name, decode in systems.items():
            for number in range(TURN + WARM):
                codes = rng.integers(0, 2048, (1, 33, 1))
                start = time.perf_counter()
                decode(codes)
                if number >= WARM:
                    milliseconds[name].append(1e3 * (time.perf_counter() - start))
    cores = len(os.sched_getaffinity(0))
    for name, values in milliseconds.items():
        median, late = np.percentile(values, [50, 99])
        print(f"| {name} | {cores} | {median:.1f} | {late:.1f} |", flush=True)


def main(frames: int = 500) -> None:
    """Measure on all cores, then on one.

    Args:
        frames: How many frames are decoded.
    """
    print("| | cores | ms a frame | 99 % |\n| --- | --- | --- | --- |", flush=True)
    for cores in (sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(0))[:1]):
        code = f"from benchmarks.streaming_speed import start; start({frames})"
        subprocess.run([sys.executable, "-c", code], check=True, preexec_fn=partial(os.sched_setaffinity, 0, cores))


def start(frames: int) -> None:
    """Measures in a process of its own, so that every library sees the cores that it may use when it starts."""
    from omnicodec_jax import compilation_cache

    compilation_cache.use()
    measure(frames)


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    command.run(main, prog="python -m benchmarks.streaming_speed")
