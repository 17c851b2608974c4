"""How fast a device trains, fits the first codebooks and tokenizes, beside its plan, and which operations are slow."""

import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.accelerator.sameness import Row
from benchmarks.accelerator.settings import Settings, bundled_audio, seconds_of
from benchmarks.train_speed import Run
from omnicodec_jax.config import Precision, TrainConfig
from omnicodec_jax.models.initialize import initialize_codebooks
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training.loop import Profile
from omnicodec_jax.training.start import VECTORS_PER_ENTRY

TOPOLOGIES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb:1",
    "NVIDIA A100-SXM4-80GB": "a100:1",
    "NVIDIA H100 80GB HBM3": "h100:1",
    "NVIDIA H200": "h200:1",
    "TPU v4": "v4:1x1x1",
    "TPU v5 lite": "v5e:1x1",
    "TPU v5e": "v5e:1x1",
    "TPU v5": "v5p:1x1x1",
    "TPU v5p": "v5p:1x1x1",
    "TPU v6 lite": "v6e:1x1",
    "TPU v6e": "v6e:1x1",
}
"""What `omnicodec plan` calls one such device, by the kind that JAX says it is. JAX knows a v5e, v5p or v6e by two.

Others have no plan: a GPU without NVLink of the same name has fewer cores or slower memory, and a GH200 is no H200."""
SLOWEST = 12
"""Number of operations that are listed."""
KERNEL = 50
"""Characters of a kernel's name that are shown."""


# -- Training


def training_run(settings: Settings, clips: int) -> Run:
    """Returns a training run with random weights and audio."""
    remat = settings.compute_dtype == "bfloat16"
    train: Any = TrainConfig(compute_dtype=settings.compute_dtype, remat=remat)  # pyright: ignore[reportArgumentType]
    return Run(settings.config, train, clips, settings.seconds)


def training_step(settings: Settings, model: Path, clips: int) -> Row:
    """Measures a training step: time and peak memory, beside what the plan says."""
    planning, run = start_plan(settings, clips), training_run(settings, clips)
    start = time.perf_counter()
    step, _ = run.step()
    compiling = time.perf_counter() - start
    seconds = seconds_of(step, settings.repeats)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peak = "peak memory not told" if memory is None else f"{memory / 2**30:.1f} GiB at most"
    hours = clips * settings.seconds * 24 / seconds
    here = f"{1e3 * seconds:.0f} ms, {peak}, {hours:.0f} h of audio a day, compiled in {compiling:.0f} s"
    return Row(f"training step, {clips} clips of {settings.seconds:g} s", here, said_by(planning))


class Plan(NamedTuple):
    """A process that plans a step, while the device compiles and runs it."""

    topology: str
    process: subprocess.Popen[str]


def start_plan(settings: Settings, clips: int) -> Plan | None:
    """Starts `omnicodec plan` for such a step on such a device. Returns None where there is none, or none is wanted."""
    topology = TOPOLOGIES.get(jax.devices()[0].device_kind)
    if topology is None or not settings.plan:
        return None
    command = [sys.executable, "-m", "omnicodec_jax", "plan", "--config", settings.config, "--topology", topology]
    command += ["--clips-per-chip", str(clips)]
    return Plan(topology, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))


def said_by(plan: Plan | None) -> str:
    """Waits for a plan, and says what it says."""
    if plan is None:
        return "no plan"
    output, errors = plan.process.communicate()
    memory = re.search(r"total\s+([\d.]+) GiB", output)
    roofline = re.search(r"roofline\s+([\d.]+) ms", output)
    if memory is None or roofline is None:
        return f"no plan: {(errors.strip().splitlines() or ['it says nothing'])[-1]}"
    return f"plan for {plan.topology}: {roofline[1]} ms at best, {memory[1]} GiB"


def first_codebooks(settings: Settings, model: Path) -> Row:
    """Measures k-means of all codebooks at the start of a run, with its compilation, beside 200 training steps without.

    The audio is that of the bundled clips. The codec's weights are random, and so is what it is fitted to.
    """
    clips = settings.batches[-1]
    run = training_run(settings, clips)
    gan, config = run.gan, run.gan.config
    size, frames = max(config.codec.codebook_sizes), run.batch["audio"].shape[2] // config.codec.hop_length
    audio = np.concatenate(bundled_audio(settings, config.codec.sample_rate))
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(math.ceil(VECTORS_PER_ENTRY * size / (clips * frames))):
        starts = rng.integers(len(audio), size=clips)
        pieces = [np.resize(np.roll(audio, -start), run.batch["audio"].shape[2]) for start in starts]
        batch = gan.inputs({**run.batch, "audio": jax.numpy.asarray(np.stack(pieces)[:, None])}, run.frozen)
        batches.append((batch.audio, batch.features))
    variables = {"params": run.state.params, CODEBOOKS: run.state.codebooks}
    start = time.perf_counter()
    fitted = initialize_codebooks(gan.codec.clone(dtype=jax.numpy.float32), variables, batches, jax.random.key(0))
    jax.block_until_ready(fitted)
    ours = time.perf_counter() - start
    steps = 200 * seconds_of(run.step()[0], settings.repeats)
    return Row("k-means of all codebooks", f"{ours:.1f} s, {ours / steps:.2f} of 200 training steps", f"{steps:.1f} s")


# -- Tokenization


def tokenizing(settings: Settings, model: Path, precision: Precision) -> Callable[[], object]:
    """Returns a function that tokenizes clips in memory."""
    tokenizer = OmniCodecTokenizer.from_pretrained(model, precision=precision)
    rng = np.random.default_rng(0)
    samples = round(settings.seconds * tokenizer.sample_rate)
    clips = [tokenizer.prepare(rng.normal(0, 0.1, samples).astype(np.float32)) for _ in range(settings.clips)]
    return lambda: [codes for _, codes in tokenizer.encode_each(enumerate(clips))]


def tokenization(settings: Settings, model: Path, precision: Precision) -> Row:
    """Measures the tokenizer on clips in memory, beside Mimi in PyTorch on the same device."""
    seconds = seconds_of(tokenizing(settings, model, precision), settings.repeats)
    here = f"{settings.clips * settings.seconds / seconds:.0f} x real time"
    return Row(f"tokenization, {precision}", here, "without the semantic encoder, clips in memory")


# -- Traces


def slowest_of_a_step(settings: Settings, model: Path) -> Row:
    """Lists the operations of a training step that take the most time."""
    clips = settings.batches[0]
    return slowest(f"a step of {clips} clips", training_run(settings, clips).step()[0])


def slowest_of_tokenization(settings: Settings, model: Path) -> Row:
    """Lists the operations of tokenizing in float32 that take the most time."""
    return slowest(f"tokenizing {settings.clips} clips", tokenizing(settings, model, "float32"))


def slowest(what: str, run: Callable[[], object]) -> Row:
    """Traces a function the second time that it runs, and lists the operations that take the most time."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with Profile.trace(Path(folder)):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        spent = operations(jax.profiler.ProfileData.from_file(str(file)))
    total = sum(spent.values())
    listed = [f"{name} {share / total:.1%}" for name, share in spent.most_common(SLOWEST)]
    return Row(f"slowest operations of {what}", ", ".join(listed), f"{total / 1e6:.1f} ms in all")


def operations(profile: Any) -> Counter[str]:
    """Adds up the nanoseconds of each HLO operation of a trace, on all devices; behind it stands a GPU's kernel."""
    spent: Counter[str] = Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                if operation:
                    kernel = "" if event.name == operation else f" ({event.name[:KERNEL]})"
                    spent[operation + kernel] += event.duration_ns
    return spent
