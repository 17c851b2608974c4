"""Spectra in cells of four bins: what discriminators compute with them is what they compute with bins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from omnicodec_jax import losses
from omnicodec_jax.discriminators.cells import CELL, CellConv, conv_of_bins, conv_of_cells, from_cells, to_cells
from omnicodec_jax.discriminators.conv import conv
from omnicodec_jax.discriminators.output import DiscriminatorOutput


@pytest.mark.parametrize("function", [conv_of_bins, conv_of_cells])
@pytest.mark.parametrize(
    ("bins", "kernel_size", "stride", "dilation"),
    [
        (10, (3, 9), 1, 1),
        (21, (3, 9), 2, 2),
        (43, (3, 9), 2, 4),
        (4, (3, 3), 1, 1),
        (3, (3, 9), 2, 1),
        (7, (1, 5), 3, 1),
    ],
)
def test_convolution_of_cells_is_that_of_bins(function, bins, kernel_size, stride, dilation):
    x, kernel = normal(2, 6, bins, 3), normal(*kernel_size, 3, 5, seed=1)
    found = -(-bins // stride)

    def of_bins(x, kernel):
        return conv(x, kernel, stride, dilation, 1)

    def of_cells(x, kernel):
        y = function(to_cells(x), kernel, stride, dilation, -(-found // CELL))
        return from_cells(y, found)

    def pulled_back(convolve):
        y, vjp = jax.vjp(convolve, x, kernel)
        return y, vjp(jnp.sin(y))

    expected, ours = (jax.jit(partial(pulled_back, convolve))() for convolve in (of_bins, of_cells))
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_what_fills_up_the_last_cell_stays_zero():
    module, x = CellConv(6, (3, 9), stride=2, dilation=2), to_cells(normal(2, 5, 18, 4))
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, 18)
    y, bins = module.apply(variables, x, 18)
    assert (bins, y.shape) == (9, (2, 5, 3, CELL * 6))
    unfolded = from_cells(y, 12)
    assert bool(unfolded[:, :, :9].all())
    assert not unfolded[:, :, 9:].any()


def test_feature_matching_is_the_mean_over_the_bins():
    real, fake = ((normal(2, 5, 9, 4, seed=seed), normal(2, 5, 4, 4, seed=seed + 1)) for seed in (0, 2))
    in_cells = [DiscriminatorOutput(jnp.zeros(2), tuple(map(to_cells, maps)), (9, 4)) for maps in (real, fake)]
    for output, maps in zip(in_cells, (real, fake), strict=True):
        assert output.sizes == (2 * 5 * 9 * 4, 2 * 5 * 4 * 4)
        for ours, expected in zip(output.feature_maps, maps, strict=True):
            np.testing.assert_array_equal(ours, expected)
    expected = sum(np.abs(x - y).mean() for x, y in zip(real, fake, strict=True))
    assert losses.feature_matching((in_cells[0],), (in_cells[1],), "sum") == pytest.approx(expected, rel=1e-6)


def test_feature_maps_of_a_batch_of_many_gpus_have_more_elements_than_an_int32_can_count():
    def loss(real: jax.Array, fake: jax.Array) -> jax.Array:
        outputs = (DiscriminatorOutput(jnp.zeros(1), (maps,)) for maps in (real, fake))
        return losses.feature_matching(*((output,) for output in outputs), "sum")

    maps = jax.ShapeDtypeStruct((384, 2**20, 8), jnp.bfloat16)  # those of 384 clips, which 64 GPUs have
    assert jax.eval_shape(loss, maps, maps).shape == ()


@pytest.mark.parametrize(("platform", "channels"), [("tpu", CELL * 6), ("cpu", 6), ("cuda", 6)])
def test_only_a_tpu_convolves_cells(platform, channels):
    module, x = CellConv(6, (3, 9)), to_cells(normal(1, 5, 8, 4))
    variables = jax.eval_shape(partial(module.init, bins=8), jax.random.key(0), x)
    apply = jax.jit(lambda variables, x: module.apply(variables, x, 8)[0])
    text = apply.trace(variables, x).lower(lowering_platforms=(platform,)).as_text()
    (convolution,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolution.split("->")[-1].split("x")[-2] == str(channels)
