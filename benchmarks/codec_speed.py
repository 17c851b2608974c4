"""Encode and decode of 10 s clips at full size, against transformers' Mimi: python -m benchmarks.codec_speed

Both run in one process with the same threads and take turns, and the figures are medians. Weights are random, which
does not change the arithmetic. The model under test is released_12hz. It has four residual blocks a stage where Mimi
has one, and 33 codebooks where Mimi has 32.

`python -m benchmarks.codec_speed onnx` compares with ONNX Runtime, which runs the same model as exported programs;
`python -m benchmarks.codec_speed onnx small` does so with the bundled codec, whose encoder takes audio alone.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SECONDS, RATE, FRAMES = 10, 24_000, 125
CONFIG = "released_12hz"

Cases = dict[str, Callable[[], object]]


def codec(name: str) -> Any:
    """Returns the tokenizer of the model under test: a bundled one, or a recipe's with random weights."""
    import jax

    from omnicodec_jax import model_directory, shipped
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.models.initialize import init_variables, on_cpu
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    if name in shipped.MODELS:
        return OmniCodecTokenizer.from_pretrained(shipped.MODELS[name])
    config: Any = config_files.load(name).codec
    initialize = partial(init_variables, model_directory.build(config))
    variables = on_cpu(initialize, jax.random.key(0))
    rng = np.random.default_rng(0)
    for quantizer in variables["codebooks"].values():
        quantizer["embedding_sum"] = rng.standard_normal(quantizer["embedding_sum"].shape, np.float32)
    return OmniCodecTokenizer(config, variables)


def inputs(config: Any, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns audio [B, 1, T], semantic features [B, S, F] and codes [B, K, N] of random numbers."""
    rng = np.random.default_rng(1)
    audio = 0.1 * rng.standard_normal((batch, 1, SECONDS * RATE), np.float32)
    features = rng.standard_normal((batch, 13 * SECONDS, config.semantic.feature_dim), np.float32)
    size = min(config.semantic.codebook_size, config.acoustic.codebook_size)
    return audio, features, rng.integers(0, size, (batch, config.num_quantizers, FRAMES))


def frames_of(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the codes [B, K, 1] of one frame after the other."""
    return (codes[:, :, frame : frame + 1] for frame in range(codes.shape[2]))


def ours(batch: int, name: str) -> Cases:
    """Returns the functions that are measured, for this package."""
    from omnicodec_jax.streaming import StreamingDecoder

    tokenizer = codec(name)
    audio, features, codes = inputs(tokenizer.config, batch)
    hidden = np.random.default_rng(2).standard_normal((batch, 13 * SECONDS, tokenizer.config.dimension), np.float32)
    stream = StreamingDecoder(tokenizer, batch)
    return {
        "decode": lambda: tokenizer.decode(codes),
        "decode, a frame at a time": lambda: [stream(frame) for frame in frames_of(codes)],
        "encode, acoustic path": lambda: dict(
            tokenizer._lanes.encode_frames(((row, audio[row, 0]), hidden[row]) for row in range(batch))
        ),
        "encode, from features": lambda: tokenizer.encode(audio, RATE, semantic_features=features),
        "encode, from audio": lambda: tokenizer.encode(audio, RATE),
    }


def mimi(batch: int, name: str) -> Cases:
    """Returns the same functions for transformers' Mimi, whatever the name of ours."""
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


def onnx(batch: int, name: str) -> Cases:
    """Returns the same functions for ONNX Runtime, and prints the sizes of the programs."""
    import onnxruntime

    from omnicodec_jax import shipped
    from omnicodec_jax.converters.onnx_program import export_directory, export_onnx

    tokenizer, beside = codec(name), shipped.MODELS.get(name)
    from_audio = "encoder" if beside is None else "encoder-from-audio"
    options, sessions = onnxruntime.SessionOptions(), {}
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for what in dict.fromkeys(("decoder", "decoder-step", "encoder", from_audio)):
            path = Path(folder) / f"{what}.onnx"
            if beside is None:
                export_onnx(tokenizer.config, tokenizer.variables, what, path)
            else:
                export_directory(str(beside), what, path)
            print(f"{what}: {path.stat().st_size / 2**20:.0f} MiB", flush=True)
            sessions[what] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            path.unlink()
    audio, features, codes = inputs(tokenizer.config, batch)
    given = {"input_values": audio}
    step = sessions["decoder-step"]
    cache = {
        value.name: np.zeros([batch, *value.shape[1:]], np.int64 if "int64" in value.type else np.float32)
        for value in step.get_inputs()[1:]
    }

    def stream() -> None:
        for frame in frames_of(codes):
            _, *after = step.run(None, {"audio_codes": frame, **cache})
            cache.update(zip(cache, after, strict=True))

    cases: Cases = {
        "decode": lambda: sessions["decoder"].run(None, {"audio_codes": codes}),
        "decode, a frame at a time": stream,
        "encode, from features": lambda: sessions["encoder"].run(None, {**given, "semantic_features": features}),
    }
    if beside is not None:
        cases["encode, from audio"] = lambda: sessions[from_audio].run(None, given)
    return cases


def measure(peer: str, batch: int, repeats: int, name: str = CONFIG) -> None:
    """Measures speed in turns with a peer, and prints a line for each function."""
    systems = {"ours": ours(batch, name), peer: PEERS[peer](batch, name)}
    print(f"| {name}, 10 s clips | batch | ours, s | {peer}, s | ours / {peer} | single turns | × real time |")
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
            f"{min(ratios):.2f}–{max(ratios):.2f} | {batch * SECONDS / ours_s:.1f}, {batch * SECONDS / peer_s:.1f} |",
            flush=True,
        )


PEERS: dict[str, Callable[[int, str], Cases]] = {"Mimi": mimi, "ONNX Runtime": onnx}


def peak_memory(system: str, batch: int) -> None:
    """Prints how much memory this process needs at its peak beyond the loaded model, in MiB. It works on Linux only."""
    cases = {"ours": ours, "Mimi": mimi}[system](batch, CONFIG)
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
    elif sys.argv[1:2] == ["onnx"]:
        measure("ONNX Runtime", 1, 5, sys.argv[2] if len(sys.argv) > 2 else CONFIG)
    else:
        from omnicodec_jax.cli import command

        command.run(main, prog="python -m benchmarks.codec_speed")
