"""The plan of tokenizing: each program that a chip runs to turn audio into tokens, as the tokenizer calls it."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omnicodec_jax import dsp, lanes, model_directory, semantic
from omnicodec_jax.blocks import encode_block
from omnicodec_jax.child_processes import Child, Children, Reported, Tell
from omnicodec_jax.config import CodecConfig, MimiConfig, Precision
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.model_directory import build
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.planning.chips import Topology
from omnicodec_jax.planning.compiling import compile_for
from omnicodec_jax.planning.encoders import released_encoder
from omnicodec_jax.planning.step_plan import StepPlan
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig

LOG = logging.getLogger(__name__)

RATE = dsp.MEL_SAMPLE_RATE
"""The sample rate of the audio that log-mels are computed from, Hz."""


class Work(NamedTuple):
    """The step that is planned: the codec, the shape of a batch, and the number formats."""

    codec: CodecConfig | MimiConfig
    rows: int
    """The number of clips that a chip processes at once."""
    block: int
    """The number of frames of each clip in a step."""
    precision: Precision = "float32"
    encoder_precision: Precision = "float32"


class Program(NamedTuple):
    """One program of a chip, and the seconds of audio that one run of it processes."""

    lower: Callable[[], jax.stages.Lowered]
    seconds: float


def plan_tokenization(
    codec: CodecConfig | MimiConfig,
    topology: str,
    rows: int | None = None,
    block: int | None = None,
    precision: Precision = "float32",
    encoder_precision: Precision = "float32",
) -> dict[str, StepPlan]:
    """Returns the plans of the programs that encode a clip, in the order in which a clip passes through them.

    The log-mel is not among them, since the host computes it.

    Args:
        codec: The codec. If it takes features of a frozen audio encoder, that encoder is planned, too.
        topology: The chips, such as v5e:1x1. Each works by itself.
        rows: Number of clips at once; None: as many as the tokenizer takes.
        block: Number of frames of a block; None: as many as the tokenizer takes.
        precision: Number format of the codec.
        encoder_precision: Number format of the frozen audio encoder.

    Raises:
        ConfigError: For a topology that does not exist, a step without clips, or a program that does not fit.
    """
    for name, count in (("rows", rows), ("block", block)):
        if count is not None and count < 1:
            raise ConfigError(f"--{name} {count}: must be 1 or more")
    devices = Topology.parse(topology).devices
    shape = rows or lanes.ACCELERATOR_ROWS, block or lanes.ACCELERATOR_BLOCKS[0]
    work = Work(codec, *shape, precision, encoder_precision)
    LOG.info("%s, %d rows x %d frames", topology, *shape)
    plans = {}
    for name in programs(work, devices):
        # Each program is planned in a process of its own, which then ends, since the compiler cannot be stopped.
        with Children([Child(partial(_plan, work, topology), "spawn", set_up=_set_up)]) as children:
            for _, event in children.run([name]):
                if isinstance(event, Reported):
                    plans[name] = event.value
        if name not in plans:
            raise ConfigError(f"the compiler died of the program {name!r}: out of memory?")
        LOG.info("%s: planned", name)
    return plans


def _set_up() -> None:
    """Keeps a child process from looking for chips."""
    jax.config.update("jax_platforms", "cpu")


def _plan(work: Work, topology: str, name: str, report: Tell) -> None:
    """Reports the plan of one program, and ends the process."""
    found = Topology.parse(topology)
    program = programs(work, found.devices)[name]
    report(StepPlan.from_program(compile_for(found.chip, program.lower()), found, program.seconds))
    os._exit(0)


def programs(work: Work, devices: list[Any]) -> dict[str, Program]:
    """Returns the programs that encode a clip, by name."""
    return dict(_programs(work, devices[:1]))


def _programs(work: Work, devices: list[Any]) -> Iterator[tuple[str, Program]]:
    codec, rows, block, *_ = work
    model, step = build(codec).clone(dtype=jnp.dtype(work.precision)), partial(_step, devices=devices, rows=rows)
    counts = _shape(rows, dtype=jnp.int32)
    audio, frames = (_shape(rows, 1, block * codec.hop_length), counts), rows * block / codec.frame_rate
    if (branch := codec.semantic) is None:
        yield "codec", Program(lambda: step(model, encode_block, audio), frames)
        return
    encoder = released_encoder(branch)
    windows = semantic.FeatureWindows.of(encoder)
    if encoder is not None:
        dtype = jnp.dtype(work.encoder_precision)
        window = semantic.MelWindows(np.zeros((1, windows.mel_bins), np.float32), encoder)
        inputs = tuple(_shape(rows, *np.shape(part), dtype=part.dtype) for part in window.block(0, 1))
        module = model_directory.build(encoder, dtype=dtype)
        run = partial(step, module, type(module).__call__, inputs, dtype=dtype)
        name = "Qwen3-Omni's encoder" if isinstance(encoder, Qwen3AuTConfig) else "Whisper's encoder"
        yield name, Program(run, rows * window.size * dsp.MEL_HOP / RATE)
    vectors, rate = lanes.ACCELERATOR_VECTORS[0], windows.live_vectors / windows.live_seconds
    features = (_shape(rows, vectors, branch.feature_dim),)
    yield "semantic branch", Program(lambda: step(model, OmniCodec.semantic_hidden, features), rows * vectors / rate)
    hidden = _shape(rows, block, codec.dimension)
    yield "codec", Program(lambda: step(model, encode_block, (*audio, hidden)), frames)


def _step(
    model: Any, method: Any, inputs: tuple[Any, ...], devices: list[Any], rows: int, dtype: Any = jnp.float32
) -> jax.stages.Lowered:
    """Returns the step over all rows of a chip, lowered from shapes in the form that `ContinuousBatcher` calls."""
    mesh = lanes.mesh_of(devices)
    step = lanes.batch_step(model, method, mesh)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables)
    marks = _shape(rows, dtype=jnp.bool_)
    state = jax.eval_shape(step.on_one_device, variables, {}, marks, marks, *inputs)[1]
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("rows",)))
    held = _on(everywhere, variables)
    on_all_devices: Any = step.on_all_devices
    return on_all_devices.lower(held, *_on(split, (state, marks, marks, *inputs)))


def _shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def _on(sharding: Any, tree: Any) -> Any:
    """Returns a tree of shapes with a sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
