"""Encode and decode of 10 s clips at full size, against transformers' Mimi: python -m benchmarks.codec_speed

Both run in one process with the same threads and take turns, and the figures are medians. Weights are random, which
does not change the arithmetic. The model under test is released_12hz. It has four residual blocks a stage where Mimi
has one, and 33 codebooks where Mimi has 32.

`python -m benchmarks.codec_speed onnx` compares with ONNX Runtime, which runs the same model as exported programs.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SECONDS, RATE, FRAMES = 10, 24_000, 125
CONFIG = "released_12hz"

Cases = dict[str, Callable[[], object]]


def random_codec() -> tuple[Any, Any]:
    """Returns config and variables of the model under test."""
    import jax

    from omnicodec_jax import model_directory
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.models.initialize import COMPILE_QUICKLY, init_variables

    codec = config_files.load(CONFIG).codec
    initialize = partial(init_variables, model_directory.build(codec))
    variables = jax.jit(initialize, compiler_options=COMPILE_QUICKLY)(jax.random.key(0))
    rng = np.random.default_rng(0)
    for quantizer in variables["codebooks"].values():
        quantizer["embedding_sum"] = rng.standard_normal(quantizer["embedding_sum"].shape, np.float32)
    return codec, variables


def ours(batch: int) -> Cases:
    """Returns the functions that are measured, for this package."""
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    codec, variables = random_codec()
    rng = np.random.default_rng(1)
    tokenizer = OmniCodecTokenizer(codec, variables)
    audio = rng.standard_normal((batch, 1, SECONDS * RATE), np.float32)
    features = rng.standard_normal((batch, 13 * SECONDS, 2048), np.float32)
    codes = rng.integers(0, 2048, (batch, tokenizer.num_quantizers, FRAMES))
    hidden = rng.standard_normal((batch, 13 * SECONDS, codec.dimension), np.float32)
    return {
        "decode": lambda: tokenizer.decode(codes),
        "encode, acoustic path": lambda: dict(
            tokenizer._lanes.encode_frames(((row, audio[row, 0]), hidden[row]) for row in range(batch))
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


def onnx(batch: int) -> Cases:
    """Returns the same functions for ONNX Runtime, and prints the sizes of the programs."""
    import onnxruntime

    from omnicodec_jax.converters.onnx_program import export_onnx

    sessions: dict[str, Any] = {}
    codec, variables = random_codec()
    with tempfile.TemporaryDirectory() as folder:
        for what in ("decoder", "encoder", "decoder-step"):
            path = Path(folder) / f"{what}.onnx"
            export_onnx(codec, variables, what, path)
            print(f"{what}: {path.stat().st_size / 2**20:.0f} MiB", flush=True)
            if what != "decoder-step":
                sessions[what] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            path.unlink()
    rng = np.random.default_rng(1)
    audio = rng.standard_normal((batch, 1, SECONDS * RATE), np.float32)
    features = rng.standard_normal((batch, 13 * SECONDS, 2048), np.float32)
    codes = rng.integers(0, 2048, (batch, codec.num_quantizers, FRAMES))
    return {
        "decode": lambda: sessions["decoder"].run(None, {"audio_codes": codes}),
        "encode, from features": lambda: sessions["encoder"].run(
            None, {"input_values": audio, "semantic_features": features}
        ),
    }


def measure(peer: str, batch: int, repeats: int) -> None:
    """Measures speed in turns with a peer, and prints a line for each function."""
    systems = {"ours": ours(batch), peer: PEERS[peer](batch)}
    print(f"| 10 s clips | batch | ours, s | {peer}, s | ours / {peer} | single turns | × real time of {peer} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in systems[peer]:
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for repeat in range(repeats + 2):
            for name in sorted(systems, reverse=bool(repeat % 2)):
                start = time.perf_counter()
                systems[name][case]()
                seconds[name].append(time.perf_counter() - start)
        ours_s, peer_s = (statistics.median(values[2:]) for values in (seconds["ours"], seconds[peer]))
        ratios = [a / b for a, b in zip(seconds["ours"][2:], seconds[peer][2:], strict=True)]
        print(
            f"| {case} | {batch} | {ours_s:.2f} | {peer_s:.2f} | **{ours_s / peer_s:.2f}** | "
            f"{min(ratios):.2f}–{max(ratios):.2f} | {batch * SECONDS / peer_s:.1f} |",
            flush=True,
        )


PEERS: dict[str, Callable[[int], Cases]] = {"Mimi": mimi, "ONNX Runtime": onnx}


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
    for batch in batches:
        measure("Mimi", batch, repeats)
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
    elif sys.argv[1:] == ["onnx"]:
        measure("ONNX Runtime", 1, 5)
    else:
        from omnicodec_jax.cli import command

        command.run(main, prog="python -m benchmarks.codec_speed")
