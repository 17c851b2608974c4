"""A training step of the whole GAN on a CPU, and each of its parts: python -m benchmarks.train_speed

Times are in seconds and in units, so that machines can be compared. One unit is the time in which
`transformers.MimiModel` decodes four clips of 10 s; it is measured in turns with each part. The reference
implementation's step of released_12hz on two clips of 2 s takes 5.5 units and 7.9 GiB. Weights, audio and features are
random, which does not change the arithmetic.
"""

import ctypes
import dataclasses
import gc
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from omnicodec_jax import compilation_cache
from omnicodec_jax.config import DiscriminatorConfig, MeshConfig, TrainConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.discriminators import Discriminators
from omnicodec_jax.distributed import sharding
from omnicodec_jax.model_directory import build
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.gan import CodecForward, FrozenVariables, Gan, TrainInputs, merge_gradients
from omnicodec_jax.training.packing import pack, unpack
from omnicodec_jax.training.state import (
    TrainState,
    apply_optimizer,
    discriminator_optimizer,
    generator_optimizer,
    start_state,
)
from omnicodec_jax.training.step import jit_step

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Case = Callable[[], object]


# -- What is measured


@dataclasses.dataclass
class Run:
    """The GAN of a recipe with its state and one batch. It has WavLM where the codec has a head for it."""

    name: str
    train: TrainConfig
    clips: int
    seconds: float

    def __post_init__(self):
        config = config_files.load(self.name)
        wavlm = None if config.codec.wavlm_dim is None else WavLMConfig()
        if wavlm is None:
            config = dataclasses.replace(config, discriminators=dataclasses.replace(config.discriminators, wavlm=None))
        self.gan = Gan(dataclasses.replace(config, train=self.train), wavlm)
        rng, codec = np.random.default_rng(0), config.codec
        samples = round(self.seconds * codec.sample_rate)
        self.batch: TrainBatch = {"audio": jnp.asarray(0.1 * rng.standard_normal((self.clips, 1, samples), np.float32))}
        if codec.semantic is not None and codec.semantic.source == "stored":
            shape = (self.clips, round(13 * self.seconds), codec.semantic.feature_dim)
            self.batch["features"] = jnp.asarray(rng.standard_normal(shape, np.float32))
        self.frozen = FrozenVariables(wavlm=None if wavlm is None else random_variables(WavLM(wavlm), rng))
        discriminators = random_variables(Discriminators(config.discriminators), rng)["params"]
        state: TrainState = start_state(config, random_variables(build(codec), rng), discriminators)
        # A step gives its state away, and the moving average of the parameters begins as the parameters themselves.
        self.state = jax.tree.map(jnp.copy, state)

    def cases(self) -> Iterator[tuple[str, Case, float]]:
        """Yields name, function and GFLOP of the step, then of each of its parts by itself, compiling each in turn."""
        yield "step", *self.step()
        for name, part in self.parts().items():
            yield name, *compiled(*part)

    def step(self) -> tuple[Case, float]:
        """Returns the whole step, which replaces `state`, and its GFLOP."""
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        lowered = jit_step(self.gan, mesh, self.state, self.frozen).lower(self.state, self.batch, self.frozen)
        step = lowered.compile()

        def run() -> object:
            self.state, metrics = step(self.state, self.batch, self.frozen)
            return metrics

        return run, gflop(lowered)

    def parts(self) -> dict[str, tuple[Any, ...]]:
        """Returns the function and arguments of each part, gradients included. Together they are about the step."""
        gan, batch, frozen, state = self.gan, self.batch, self.frozen, self.state
        audio = batch["audio"]
        wavlm_states = jax.jit(gan.wavlm_states)(audio, frozen)
        parts: dict[str, tuple[Any, ...]] = {"codec": (self.codec, state.params, state.codebooks, batch)}
        if gan.wavlm is not None:
            parts["WavLM"] = (self.wavlm, audio, frozen, wavlm_states)
        for name, config in families(gan.config.discriminators).items():
            alone = dataclasses.replace(gan, config=dataclasses.replace(gan.config, discriminators=config))
            inputs = (state.discriminators, audio, wavlm_states)
            parts[f"{name}: discriminator"] = (partial(discriminator_gradient, alone), *inputs)
            parts[f"{name}: codec's loss, with mel"] = (partial(adversarial_gradient, alone), *inputs)
        for side, optimizer, params, moments in (
            ("codec", generator_optimizer, state.params, state.generator_optimizer),
            ("discriminators", discriminator_optimizer, state.discriminators, state.discriminator_optimizer),
        ):
            parts[f"optimizer of the {side}"] = (partial(update, optimizer(gan.config)), params, moments)
        return parts

    def codec(self, params: Any, codebooks: Any, batch: TrainBatch) -> object:
        """Computes the forward and backward pass of the codec without the frozen network."""
        forward = dataclasses.replace(self.gan, wavlm=None).codec_forward(
            params, codebooks, batch, FrozenVariables(), jax.random.key(0), jnp.zeros((), jnp.int32)
        )
        return forward.vjp(jnp.ones_like(forward.reconstruction), None)

    def wavlm(self, audio: jax.Array, frozen: FrozenVariables, gradient: Any) -> object:
        """Runs WavLM forward on the real audio, and forward and backward on the reconstruction."""
        real = self.gan.wavlm_states(audio, frozen)
        pull_back = jax.vjp(lambda audio: self.gan.wavlm_states(audio, frozen), 0.9 * audio)[1]
        return real, pull_back(gradient)


def random_variables(model: nn.Module, rng: np.random.Generator) -> dict[str, Any]:
    """Draws variables of the right shapes with numpy, since jax.random would take minutes to compile."""

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) / math.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(partial(init_variables, model), jax.random.key(0)))


def families(config: DiscriminatorConfig) -> dict[str, DiscriminatorConfig]:
    """Returns configs with one kind of discriminator each, by the name of the kind."""
    none = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
    kinds = {
        "stft": dataclasses.replace(none, stft=config.stft),
        "wavlm": dataclasses.replace(none, wavlm=config.wavlm),
    }
    if config.waveform is not None:
        for kind in ("periods", "rates", "windows"):
            others = {other: () for other in ("periods", "rates", "windows") if other != kind}
            if getattr(config.waveform, kind):
                alone = dataclasses.replace(config.waveform, **others)
                kinds[f"waveform, {kind}"] = dataclasses.replace(none, waveform=alone)
    return {name: kind for name, kind in kinds.items() if kind != none}


def discriminator_gradient(gan: Gan, discriminators: Any, audio: jax.Array, wavlm_states: Any) -> object:
    """The gradient of a discriminator's loss."""
    forward = given(audio, wavlm_states)
    return merge_gradients(
        gan.for_each_discriminator(discriminators, forward, gan.discriminator_gradient, in_one_batch=True)
    )


def adversarial_gradient(gan: Gan, discriminators: Any, audio: jax.Array, wavlm_states: Any) -> object:
    """The gradient of the mel loss, and of the losses that one family of discriminators gives the codec."""
    forward = given(audio, wavlm_states)
    adversarial = gan.for_each_discriminator(discriminators, forward, gan.adversarial_gradient)
    return gan.generator_gradient(forward, adversarial).gradient


def given(audio: jax.Array, wavlm_states: Any) -> CodecForward:
    """A forward that stands for the codec's, with audio that is nearly the real one."""
    inputs = TrainInputs(audio, None, wavlm_states)
    return CodecForward(inputs, 0.9 * audio, wavlm_states, jnp.zeros(()), {}, {}, lambda *gradient: {"codec": gradient})


def update(optimizer: optax.GradientTransformation, params: Any, moments: Any) -> object:
    """Computes one update of the optimizer, with the parameters in place of their gradient."""
    packed = pack(params)
    moved, moments = apply_optimizer(optimizer, packed, moments, packed)
    return unpack(moved, params), moments


def compiled(function: Callable[..., object], *arguments: Any) -> tuple[Case, float]:
    """Compiles a function, and returns it with its arguments, and its GFLOP."""
    lowered = jax.jit(function).lower(*arguments)
    return partial(lowered.compile(), *arguments), gflop(lowered)


def gflop(lowered: jax.stages.Lowered) -> float:
    """Returns the GFLOP that XLA counts before it optimises. It counts the body of a loop once."""
    analysis: Any = lowered.cost_analysis()
    return analysis["flops"] / 1e9


def mimi() -> Case:
    """Returns the function whose time is the unit."""
    import torch
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    codes = torch.randint(0, 2048, (4, 32, 125))

    @torch.inference_mode()
    def decode() -> object:
        return model.decode(codes).audio_values

    return decode


# -- Measuring


def seconds_of(cases: list[Case], clock: Callable[[], float], repeats: int) -> list[float]:
    """Runs functions in turns, and returns the median seconds of each, after a turn to warm up."""
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats + 1):
        for run, values in zip(cases, seconds, strict=True):
            start = clock()
            jax.block_until_ready(run())
            values.append(clock() - start)
    return [statistics.median(values[1:]) for values in seconds]


def peak_memory(run: Run) -> float:
    """Returns the peak memory of this process during two steps, in GiB, with all weights. It works on Linux only."""
    step, _ = run.step()
    jax.block_until_ready(step())
    # Memory that tracing and compiling have left is given back, and the peak is reset.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        jax.block_until_ready(step())
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def main(
    configs: tuple[str, ...] = ("released_12hz", "demo"),
    discriminator_update: Literal["alternating", "simultaneous"] = "alternating",
    remat: bool = False,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    clips: int = 2,
    seconds: float = 2.0,
    repeats: int = 5,
    clock: Literal["wall", "cpu"] = "wall",
    memory_only: bool = False,
) -> None:
    """Measure a training step.

    Args:
        configs: Recipes.
        discriminator_update: As in TrainConfig.
        remat: As in TrainConfig.
        compute_dtype: As in TrainConfig.
        clips: Clips in a batch.
        seconds: Length of each clip.
        repeats: Turns of each part.
        clock: "cpu" adds up the time of all threads, for a machine that others use, too.
        memory_only: Print the peak of this process, GiB, and nothing else.
    """
    train = TrainConfig(compute_dtype=compute_dtype, remat=remat, discriminator_update=discriminator_update)
    if memory_only:
        (name,) = configs
        print(f"{peak_memory(Run(name, train, clips, seconds)):.2f}")
        return
    unit = mimi()
    for name in configs:
        run = Run(name, train, clips, seconds)
        about = f"{name}, {discriminator_update}, {compute_dtype}{', remat' if remat else ''}"
        print(f"\n| {about} | GFLOP | s | units | GFLOP/s |\n| --- | --- | --- | --- | --- |", flush=True)
        for part, call, work in run.cases():
            part_s, unit_s = seconds_of([call, unit], CLOCKS[clock], repeats)
            print(f"| {part} | {work:.1f} | {part_s:.2f} | {part_s / unit_s:.3f} | {work / part_s:.0f} |", flush=True)
        options = ["--configs", name, "--discriminator-update", discriminator_update, "--compute-dtype", compute_dtype]
        options += ["--clips", str(clips), "--seconds", str(seconds), "--remat" if remat else "--no-remat"]
        command = [sys.executable, "-m", "benchmarks.train_speed", "--memory-only", *options]
        peak = subprocess.check_output(command, text=True)
        print(f"\nPeak memory of a step: {peak.strip()} GiB; the unit in the last turn: {unit_s:.2f} s", flush=True)


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    compilation_cache.use()
    command.run(main, prog="python -m benchmarks.train_speed")
