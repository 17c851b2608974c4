"""The kernel that runs a stage's residual blocks on TPUs computes what the blocks compute one after the other."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import batch_size, carrying_clips, listed
from jax.sharding import Mesh
from tiny import normal

from omnicodec_jax.config import MeshConfig, SEANetConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.models import residual_stage
from omnicodec_jax.models.residual_stage import BlockParameters, in_one_kernel, of_cells, one_by_one
from omnicodec_jax.models.seanet import SEANetDecoder, SEANetEncoder

SEANET = SEANetConfig(n_filters=8, ratios=(2, 2), n_residual_layers=2)


def parameters(channels: int, count: int) -> list[BlockParameters]:
    hidden = channels // 2
    shapes = ((3, channels, hidden), (hidden,), (1, hidden, channels), (channels,))

    def block(number: int) -> BlockParameters:
        return BlockParameters(*(channels**-0.5 * normal(*shape, seed=number + i) for i, shape in enumerate(shapes)))

    return [block(4 * number) for number in range(count)]


def pulled_back(stage: Any, x: jax.Array, *arrays: Any, **options: Any) -> list[Any]:
    """The result of a stage, and the gradients of its input and of all parameters."""

    def run(x: jax.Array, *arrays: Any) -> Any:
        y, vjp = jax.vjp(partial(stage, dtype=jnp.float32, **options), x, *arrays)
        return y, vjp(jnp.sin(y))

    return jax.tree.leaves(jax.jit(run)(x, *arrays))


@pytest.mark.parametrize(
    ("channels", "steps", "dilations", "conv_in", "conv_out"),
    [
        (32, 2 * 64 * 8 + 13, (1, 2), (normal(7, 1, 32), normal(32)), None),  # three pieces of cells of eight steps
        (64, 300, (1,), None, (0.1 * normal(3, 64, 1), normal(1))),  # two pieces of cells of four steps
        (128, 90, (1, 8), None, None),  # a step is a cell; the last piece is short
    ],
)
def test_kernel_computes_what_the_blocks_do_forwards_and_backwards(
    monkeypatch, channels, steps, dilations, conv_in, conv_out
):
    monkeypatch.setattr(residual_stage, "PIECE", 64)
    x, blocks = normal(2, steps, 1 if conv_in else channels, seed=99), parameters(channels, len(dilations))
    expected = pulled_back(one_by_one, x, blocks, conv_in, conv_out, dilations=dilations)
    ours = pulled_back(in_one_kernel, x, blocks, conv_in, conv_out, dilations=dilations, interpret=True)
    assert len(ours) == 2 + 4 * len(dilations) + 2 * (conv_in is not None) + 2 * (conv_out is not None)
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_kernel_rounds_to_bfloat16_where_the_blocks_do():
    x, blocks = normal(1, 40, 128, seed=99), parameters(128, 1)
    ours = in_one_kernel(x, blocks, None, None, (2,), jnp.bfloat16, interpret=True)
    expected = one_by_one(x, blocks, None, None, (2,), jnp.bfloat16)
    assert ours.dtype == expected.dtype == jnp.bfloat16
    assert (ours == expected).mean() > 0.98  # sums are rounded in another order


@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
def test_kernel_over_cells_has_each_tap_once_at_each_step(dilation):
    kernel = jnp.arange(1.0, 7.0).reshape(3, 2, 1)
    wide, shifts = of_cells(kernel, dilation, 4)
    assert wide.shape == (len(shifts), 4 * 2, 4 * 1)
    assert sorted(np.asarray(wide)[np.asarray(wide) != 0].tolist()) == sorted(4 * list(range(1, 7)))
    assert shifts == tuple(sorted(shifts, reverse=True))


@pytest.mark.parametrize(("platform", "calls"), [("tpu", 1), ("cpu", 0), ("cuda", 0)])
def test_only_a_tpu_runs_the_kernel(platform, calls):
    x = jax.ShapeDtypeStruct((2, 256, 64), jnp.bfloat16)
    blocks = parameters(64, 1)
    traced = jax.jit(lambda x: residual_stage.residual_stage(x, blocks, (1,), jnp.bfloat16)).trace(x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("custom_call @tpu_custom_call") == calls


@pytest.mark.parametrize(
    ("dtype", "remat", "calls"), [("bfloat16", True, 4), ("bfloat16", False, 0), ("float32", True, 0)]
)
def test_stages_are_kernels_where_a_step_in_bfloat16_computes_anew(dtype, remat, calls):
    modules = SEANetEncoder(SEANET, 8, jnp.dtype(dtype), remat), SEANetDecoder(SEANET, jnp.dtype(dtype), remat)
    inputs = jax.ShapeDtypeStruct((2, 40, 1), jnp.float32), jax.ShapeDtypeStruct((2, 10, 8), jnp.float32)
    found = 0
    for module, x in zip(modules, inputs, strict=True):
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        text = jax.jit(module.apply).trace(variables, x).lower(lowering_platforms=("tpu",)).as_text()
        found += text.count("custom_call @tpu_custom_call")
    assert found == calls


def test_devices_run_the_stage_on_their_own_clips_and_add_up_the_gradients():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x, blocks = normal(batch_size(mesh), 52, 8), parameters(8, 2)

    def gradients(x: jax.Array, blocks: list[BlockParameters], mesh: Mesh | None) -> Any:
        def loss(x: jax.Array, blocks: list[BlockParameters]) -> jax.Array:
            return jnp.square(residual_stage.residual_stage(x, blocks, (1, 2), jnp.float32)).sum()

        with sharding.in_force(mesh):
            return jax.grad(loss, argnums=(0, 1))(x, blocks)

    held = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    jitted = jax.jit(partial(gradients, mesh=mesh), in_shardings=held, out_shardings=held)
    compiled = jitted.lower(x, blocks).compile()
    text = compiled.as_text() or ""
    assert listed(text)  # gradients of the parameters
    assert carrying_clips(mesh, text) == []
    expected = jax.jit(partial(gradients, mesh=None))(x, blocks)
    for ours, other in zip(jax.tree.leaves(compiled(x, blocks)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5 * np.abs(other).max())
