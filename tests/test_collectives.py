"""Devices of a training step exchange kernels, gradients, statistics of codebooks and scalars, and never clips."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import Collective, carrying_clips, groups, listed
from step_parts import ENCODER, OVER_STATES, PARTS, SAMPLES, WAVEFORM, WAVLM
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax.config import Config, MeshConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuT
from omnicodec_jax.pretrained.wavlm import WavLM
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import state_template
from omnicodec_jax.training.step import jit_step


def whole(accumulation: int = 1) -> Config:
    """A run with every part: all kinds of sub-discriminators, WavLM, and the audio encoder in the step."""
    semantic = dataclasses.replace(TINY.codec.semantic, source="qwen3_aut", feature_dim=ENCODER.output_dim)
    return replaced(
        TINY,
        codec={"wavlm_dim": WAVLM.dimension, "semantic": semantic},
        discriminators={"waveform": WAVEFORM, "wavlm": OVER_STATES.wavlm},
        optimizer={"accumulation": accumulation},
        data={"batch_size": 16, "segment_samples": SAMPLES},
    )


@pytest.mark.slow  # test_train_step.py has the step without frozen networks, and below are the parts that it lacks
@pytest.mark.parametrize(
    ("axes", "accumulation"), [({"data": 8}, 1), ({"fsdp": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)]
)
def test_no_device_of_a_step_gets_clips_of_another(axes, accumulation):
    config, mesh = whole(accumulation), sharding.make_mesh(MeshConfig(**axes))
    networks = [partial(init_variables, module, jax.random.key(0)) for module in (WavLM(WAVLM), Qwen3AuT(ENCODER))]
    frozen = FrozenVariables(*(sharding.template(mesh, variables) for variables in networks))
    state, gan = state_template(config, mesh), Gan(config, WAVLM, ENCODER)
    batch = {"audio": jax.ShapeDtypeStruct((16, 1, SAMPLES), np.float32, sharding=sharding.batch_sharding(mesh))}
    lowered = jit_step(gan, mesh, state, frozen).lower(state, batch, frozen)
    text = lowered.compile().as_text() or ""
    assert listed(text)
    packed = jax.eval_shape(lambda state: state.packed(), state)
    assert carrying_clips(mesh, text, state, packed, frozen) == []


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
    audio = jax.ShapeDtypeStruct((16, 1, SAMPLES), np.float32)
    text = jax.jit(gradients, in_shardings=held, out_shardings=held).lower(variables, audio).compile().as_text() or ""
    assert listed(text)  # gradients of the variables
    assert carrying_clips(mesh, text, variables) == []


# -- The list itself


def test_what_the_partitioner_gathers_by_itself_is_found():
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows = sharding.batch_sharding(mesh)
    text = jax.jit(jnp.fft.rfft, in_shardings=rows, out_shardings=rows).lower(np.zeros((16, 14), np.float32)).compile()
    (line,) = carrying_clips(mesh, text.as_text() or "")
    assert line.startswith("all-gather of (16, 14) by ")  # the FFT, or as JAX 0.11 says, the argument


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
