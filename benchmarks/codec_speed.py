"""Encode and decode of 10 s clips at full size, against transformers' Mimi: python -m benchmarks.codec_speed

Both run in one process with the same threads and take turns, and the figures are medians. Weights are random, which
does not change the arithmetic. The model under test is released_12hz. It has four residual blocks a stage where Mimi
has one, and 33 codebooks where Mimi has 32.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

SECONDS, RATE, FRAMES = 10, 24_000, 125
CONFIG = "released_12hz"

Cases = dict[str, Callable[[], object]]


def ours(batch: int) -> Cases:
    """Returns the functions that are measured, for this package."""
    import jax

    from omnicodec_jax import model_directory
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.models.initialize import COMPILE_QUICKLY, init_variables
    from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip

    codec = config_files.load(CONFIG).codec
    initialize = partial(init_variables, model_directory.build(codec))
    variables = jax.jit(initialize, compiler_options=COMPILE_QUICKLY)(jax.random.key(0))
    rng = np.random.default_rng(0)
    for quantizer in variables["codebooks"].values():
        quantizer["embedding_sum"] = rng.standard_normal(quantizer["embedding_sum"].shape, np.float32)
    tokenizer = OmniCodecTokenizer(codec, variables)
    audio = rng.standard_normal((batch, 1, SECONDS * RATE), np.float32)
    features = rng.standard_normal((batch, 13 * SECONDS, 2048), np.float32)
    codes = rng.integers(0, 2048, (batch, tokenizer.num_quantizers, FRAMES))
    hidden = rng.standard_normal((batch, 13 * SECONDS, codec.dimension), np.float32)
    return {
        "decode": lambda: tokenizer.decode(codes),
        "encode, acoustic path": lambda: dict(
            tokenizer._encode_frames(((row, PreparedClip(audio[row, 0])), hidden[row]) for row in range(batch))
        ),
        "encode, from features": lambda: tokenizer.encode(audio, RATE, semantic_features=features),
    }


def mimi(batch: int) -> Cases:
    """Returns the same functions for transformers' Mimi."""
    import torch
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    audio = torch.randn(batch, 1, SECONDS * RATE)
    codes = torch.randint(0, 2048, (batch, 32, FRAMES))

    @torch.inference_mode()
    def decode() -> object:
        return model.decode(codes).audio_values

    @torch.inference_mode()
    def encode() -> object:
        return model.encode(audio).audio_codes

    return {"decode": decode, "encode, acoustic path": encode, "encode, from features": encode}


def measure(batch: int, repeats: int) -> None:
    """Measures speed, and prints a line for each function."""
    systems = {"ours": ours(batch), "Mimi": mimi(batch)}
    for case in systems["ours"]:
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for repeat in range(repeats + 2):
            for name in sorted(systems, reverse=bool(repeat % 2)):
                start = time.perf_counter()
                systems[name][case]()
                seconds[name].append(time.perf_counter() - start)
        ours_s, mimi_s = (statistics.median(values[2:]) for values in (seconds["ours"], seconds["Mimi"]))
        ratios = [a / b for a, b in zip(seconds["ours"][2:], seconds["Mimi"][2:], strict=True)]
        print(
            f"| {case} | {batch} | {ours_s:.2f} | {mimi_s:.2f} | **{ours_s / mimi_s:.2f}** | "
            f"{min(ratios):.2f}–{max(ratios):.2f} |",
            flush=True,
        )


def peak_memory(system: str, batch: int) -> None:
    """Prints how much memory this process needs at its peak beyond the loaded model, in MiB. It works on Linux only."""
    cases = {"ours": ours, "Mimi": mimi}[system](batch)
    Path("/proc/self/clear_refs").write_text("5")  # this resets the peak

    def resident(field: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) // 1024

    before = resident("VmRSS")
    for case in ("decode", "encode, from features"):
        cases[case]()
    print(resident("VmHWM") - before)


def main(batches: tuple[int, ...] = (1, 4), repeats: int = 9) -> None:
    """Measure speed, then memory.

    Args:
        batches: Numbers of clips that are encoded and decoded at once.
        repeats: Turns of each system, after two to warm up.
    """
    print(
        "| 10 s clips | batch | ours, s | Mimi, s | ours / Mimi | single turns |\n| --- | --- | --- | --- | --- | --- |"
    )
    for batch in batches:
        measure(batch, repeats)
    print("\n| peak memory above the model, MiB | batch | ours | Mimi |\n| --- | --- | --- | --- |")
    for batch in batches:
        command = [sys.executable, "-m", "benchmarks.codec_speed", "memory"]
        peaks = [subprocess.check_output([*command, name, str(batch)], text=True) for name in ("ours", "Mimi")]
        print(f"| encode and decode | {batch} | {' | '.join(peak.strip() for peak in peaks)} |", flush=True)


if __name__ == "__main__":
    from omnicodec_jax import compilation_cache

    compilation_cache.use()
    if sys.argv[1:2] == ["memory"]:
        peak_memory(sys.argv[2], int(sys.argv[3]))
    else:
        from omnicodec_jax.cli import command

        command.run(main, prog="python -m benchmarks.codec_speed")
