"""Devices of a training step exchange kernels, gradients, statistics of codebooks and scalars, and never clips."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import Collective, batch_size, carrying_clips, groups, listed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from step_parts import ENCODER, OVER_STATES, PARTS, SAMPLES, WAVEFORM, WAVLM, WHISPER
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import model_directory
from omnicodec_jax.config import Config, MeshConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.semantic import EncoderConfig
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import state_template
from omnicodec_jax.training.step import jit_step

pytestmark = pytest.mark.minutes(1)

EVERY_DISCRIMINATOR = dataclasses.replace(TINY.discriminators, waveform=WAVEFORM, wavlm=OVER_STATES.wavlm)
OVER_ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
WINDOW_AND_TAIL = SAMPLES + WHISPER.window_seconds * TINY.codec.sample_rate
"""A clip of which Whisper has a whole window and a tail, which are rows of one batch."""


def exchanged_in_a_step(
    config: Config, axes: dict[str, int], encoder: EncoderConfig, wavlm: WavLMConfig | None = None
) -> list[str]:
    """What devices exchange of clips in a step with the encoder, its perceptual loss and that of the cepstrum."""
    mesh, source = sharding.make_mesh(MeshConfig(**axes)), model_directory.model_type(encoder)
    semantic = dataclasses.replace(config.codec.semantic, source=source, feature_dim=encoder.output_dim)
    rows = batch_size(mesh, config.optimizer.accumulation)
    config = replaced(
        config,
        codec={"wavlm_dim": wavlm and wavlm.dimension, "semantic": semantic},
        loss={"semantic_perceptual": 1.0, "latent_cepstrum": 1.0},
        data={"batch_size": rows, "segment_samples": WINDOW_AND_TAIL},
    )

    def frozen(network: Any) -> Any:
        module = network and model_directory.build(network)
        return module and sharding.template(mesh, partial(init_variables, module, jax.random.key(0)))

    variables = FrozenVariables(frozen(wavlm), frozen(encoder))
    state, gan = state_template(config, mesh), Gan(config, wavlm, encoder)
    audio = jax.ShapeDtypeStruct((rows, 1, WINDOW_AND_TAIL), np.float32, sharding=sharding.batch_sharding(mesh))
    batch = {"audio": audio}
    text = jit_step(gan, mesh, state, variables).lower(state, batch, variables).compile().as_text() or ""
    assert listed(text)
    return carrying_clips(mesh, text)


def test_no_device_of_a_step_gets_clips_of_another():
    assert exchanged_in_a_step(TINY, OVER_ALL_AXES, WHISPER) == []


@pytest.mark.slow  # above is the step without WavLM, and below are the parts that it lacks
@pytest.mark.parametrize(
    ("axes", "accumulation", "encoder"),
    [({"data": 8}, 1, ENCODER), ({"fsdp": 8}, 1, WHISPER), (OVER_ALL_AXES, 2, ENCODER)],
)
def test_no_device_of_a_step_with_every_part_gets_clips_of_another(axes, accumulation, encoder):
    """Every part: all kinds of sub-discriminators, WavLM, and the audio encoder."""
    every = dataclasses.replace(TINY, discriminators=EVERY_DISCRIMINATOR)
    config = replaced(every, optimizer={"accumulation": accumulation})
    assert exchanged_in_a_step(config, axes, encoder, WAVLM) == []


# -- Parts of a step by themselves


@pytest.mark.parametrize("part", PARTS)
def test_no_device_gets_clips_of_another_for(part):
    variables, mesh = PARTS[part].variables(), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def gradients(variables: Any, audio: jax.Array) -> Any:
        with sharding.in_force(mesh):
            part_of = jax.grad(partial(PARTS[part].compute, jnp.float32), argnums=(0, 1))
            of_variables, of_audio = part_of(sharding.gather(mesh, variables), audio)
        return sharding.shard(mesh, of_variables), of_audio

    held = (sharding.shardings(mesh, variables), sharding.batch_sharding(mesh))
    audio = jax.ShapeDtypeStruct((batch_size(mesh), 1, SAMPLES), np.float32)
    text = jax.jit(gradients, in_shardings=held, out_shardings=held).lower(variables, audio).compile().as_text() or ""
    assert listed(text)  # gradients of the variables
    assert carrying_clips(mesh, text) == []


# -- The list itself


def exchanged(function: Callable[[jax.Array], Any], *shape: int, out: Any = None) -> list[str]:
    """What eight devices exchange of clips where they compute a function of their rows."""
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows = sharding.batch_sharding(mesh)
    held = rows if out is None else NamedSharding(mesh, out)
    x = jax.ShapeDtypeStruct((batch_size(mesh), *shape), np.float32)
    return carrying_clips(mesh, jax.jit(function, in_shardings=rows, out_shardings=held).lower(x).compile().as_text())


def test_what_the_partitioner_gathers_by_itself_is_found():
    (line,) = exchanged(jnp.fft.rfft, 14)
    assert line.startswith("all-gather of (104, 14) by ")  # the FFT, or as JAX 0.11 says, the argument


GATHERED = {
    "clips": lambda x: x,
    "clips, as large as a kernel": lambda x: x[:, :64],
    "one number of each clip": lambda x: x.mean(axis=1),
    "frames of all clips in one axis": lambda x: x.reshape(-1, 16),
    "maps with the clips as last axis": lambda x: x.T,
}


@pytest.mark.parametrize("what", GATHERED)
def test_what_is_gathered_of_clips_is_found(what):
    assert exchanged(GATHERED[what], 128, out=P())


def test_what_devices_sum_of_each_clip_is_found():
    """As where each computes a share of the channels of all clips."""
    mesh = sharding.make_mesh(MeshConfig(data=8))
    held = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P("data"))
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((104, 16), (16, 8))]
    product = jax.jit(jnp.matmul, in_shardings=held, out_shardings=NamedSharding(mesh, P())).lower(*shapes)
    (line,) = carrying_clips(mesh, product.compile().as_text() or "")
    assert line.startswith("all-reduce of (104, 8) by ")


@pytest.mark.parametrize("size", [1, 3, 64, 512, 2048])
def test_statistic_over_all_clips_is_not_reported(size):
    assert exchanged(lambda x: x.mean(axis=0), size, out=P()) == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,7},{1,2}}", ((0, 7), (1, 2))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','b'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
    ],
)
def test_devices_that_exchange_something_are_read(attributes, expected):
    assert groups(attributes) == expected


def test_every_array_of_a_collective_is_listed():
    line = '  %all-reduce.3 = (f32[8,8]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={{0,1}}, metadata={op_name="x"}'
    assert listed(line) == [Collective("all-reduce", ((8, 8), ()), ((0, 1),), "x")]
