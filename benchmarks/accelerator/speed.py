"""How fast a device trains and tokenizes, beside its plan and beside Mimi in PyTorch, and which operations are slow."""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.sameness import Row
from benchmarks.accelerator.settings import Settings
from benchmarks.train_speed import Run
from omnicodec_jax.config import Precision, TrainConfig
from omnicodec_jax.tokenizer import OmniCodecTokenizer

TOPOLOGIES = {
    "A100": "a100:1",
    "H100": "h100:1",
    "v4": "v4:1x1x1",
    "v5 lite": "v5e:1x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6": "v6e:1x1",
}
"""What `omnicodec plan` calls one such device, by a part of the name that the device has."""
SLOWEST = 12
"""Number of operations that are listed."""


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a function, after two turns to warm up."""
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


# -- Training


def training_run(settings: Settings, clips: int) -> Run:
    """Returns a training run with random weights and audio."""
    remat = settings.compute_dtype == "bfloat16"
    train: Any = TrainConfig(compute_dtype=settings.compute_dtype, remat=remat)  # pyright: ignore[reportArgumentType]
    return Run(settings.config, train, clips, settings.seconds)


def training_step(settings: Settings, model: Path, clips: int) -> Row:
    """Measures a training step: time and peak memory, beside what the plan says."""
    step, _ = training_run(settings, clips).step()
    seconds = seconds_of(step, settings.repeats)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peak = "peak memory not told" if memory is None else f"{memory / 2**30:.1f} GiB at most"
    hours = clips * settings.seconds * 24 / seconds
    here = f"{1e3 * seconds:.0f} ms, {peak}, {hours:.0f} h of audio a day"
    return Row(f"training step, {clips} clips of {settings.seconds:g} s", here, plan(settings, clips))


def plan(settings: Settings, clips: int) -> str:
    """Says what `omnicodec plan` says about such a step on such a device."""
    kind = jax.devices()[0].device_kind
    topology = next((name for part, name in TOPOLOGIES.items() if part in kind), None)
    if topology is None:
        return f"no plan for {kind}"
    command = [sys.executable, "-m", "omnicodec_jax", "plan", "--config", settings.config, "--topology", topology]
    done = subprocess.run([*command, "--clips-per-chip", str(clips)], capture_output=True, text=True)
    memory = re.search(r"total\s+([\d.]+) GiB", done.stdout)
    roofline = re.search(r"roofline\s+([\d.]+) ms", done.stdout)
    if memory is None or roofline is None:
        return f"no plan: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}"
    return f"plan for {topology}: {roofline[1]} ms at best, {memory[1]} GiB"


def slowest_operations(settings: Settings, model: Path) -> Row:
    """Traces a training step, and lists the operations that take the most time."""
    clips = settings.batches[0]
    step, _ = training_run(settings, clips).step()
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step())
        (file,) = Path(folder).rglob("*.xplane.pb")
        spent = operations(jax.profiler.ProfileData.from_file(str(file)))
    total = sum(spent.values())
    listed = [f"{name} {share / total:.1%}" for name, share in spent.most_common(SLOWEST)]
    return Row(f"slowest operations of a step of {clips} clips", ", ".join(listed), f"{total / 1e6:.1f} ms in all")


def operations(profile: Any) -> Counter[str]:
    """Adds up the nanoseconds of each HLO operation of a trace, on all devices."""
    spent: Counter[str] = Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    spent[str(stats["hlo_op"])] += event.duration_ns
    return spent


# -- Tokenization


def tokenization(settings: Settings, model: Path, precision: Precision) -> Row:
    """Measures the tokenizer on clips in memory, beside Mimi in PyTorch on the same device."""
    tokenizer = OmniCodecTokenizer.from_pretrained(model, precision=precision)
    rng = np.random.default_rng(0)
    samples = round(settings.seconds * tokenizer.sample_rate)
    clips = [tokenizer.prepare(rng.normal(0, 0.1, samples).astype(np.float32)) for _ in range(settings.clips)]
    seconds = seconds_of(lambda: [codes for _, codes in tokenizer.encode_each(enumerate(clips))], settings.repeats)
    here = f"{settings.clips * settings.seconds / seconds:.0f} x real time"
    return Row(f"tokenization, {precision}", here, "without the semantic encoder, clips in memory")


def mimi(settings: Settings, model: Path) -> Row:
    """Measures transformers' Mimi, on the device that PyTorch finds."""
    import torch
    from transformers import MimiConfig, MimiModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = MimiModel(MimiConfig()).eval()
    network.to(device)
    for name, buffer in network.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    audio = torch.randn(settings.mimi_batch, 1, round(settings.seconds * 24_000), device=device)

    @torch.inference_mode()
    def encode() -> object:
        codes = network.encode(audio).audio_codes
        return codes.cpu().numpy()  # waits for the device

    seconds = seconds_of(encode, settings.repeats)
    here = f"{settings.mimi_batch * settings.seconds / seconds:.0f} x real time"
    return Row("Mimi in PyTorch, 32 codebooks", here, f"on {device}, {settings.mimi_batch} clips at once")
