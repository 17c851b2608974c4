"""Convolutions over spectra whose bins are in cells: of four neighbouring bins the channels lie side by side.

    bins    0 1 2 3   4 5 6 7   8 9           [B, N, 10, C]
    cells  ├── 4·C ──┼── 4·C ──┼── 4·C ──┤    [B, N, 3, 4·C]; zeros fill up the last one

The discriminators of spectra have 32 channels, a quarter of a TPU's 128 lanes. Left to itself, XLA pads them, or cuts
the frames of six clips into pieces to have more rows, and copies every map from one layout into another between two
convolutions. Cells fill the lanes: forward and backward, a band of a spectrum moves half as much. The kernel of a
convolution over cells is the usual one at each of the four places, and zeros: 1.8 to 2.2 times the multiplications.
Therefore only TPUs compute it. All others take the cells apart, which moves nothing.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.discriminators.conv import Conv, conv

CELL = 4
"""Number of bins in a cell."""

Spectrum = Float[Array, "B N F C"]
Cells = Float[Array, "B N _ _"]


def to_cells(x: Spectrum) -> Cells:
    """Puts bins into cells, the last of which is filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % CELL), (0, 0)))
    return x.reshape(*x.shape[:2], -1, CELL * x.shape[3])


def from_cells(x: Cells, bins: int) -> Spectrum:
    """Takes bins out of their cells."""
    return x.reshape(*x.shape[:2], x.shape[2] * CELL, -1)[:, :, :bins]


class CellConv(Conv):
    """A `Conv` over two axes for maps in cells, with the same parameters and the same results."""

    @nn.compact
    def __call__(self, x: Cells, bins: int) -> tuple[Cells, int]:
        """Convolves a map of so many bins; returns the result and its number of bins."""
        kernel, init = self._kernel(x.shape[3] // CELL)
        bins = -(-bins // self.stride)
        place = {"stride": self.stride, "dilation": self.dilation, "size": -(-bins // CELL)}
        branches = {"tpu": partial(conv_of_cells, **place), "default": partial(conv_of_bins, **place)}
        convolve = partial(jax.lax.platform_dependent, **branches)
        # The gradient needs x and the kernel; without the checkpoint, arrays of both branches would be kept for it.
        y = jax.checkpoint(convolve, prevent_cse=False)(x.astype(self.dtype), kernel)
        bias = self.param("bias", init, (self.features,)).astype(jnp.float32)
        y = y.astype(jnp.float32) + jnp.tile(bias, CELL)[None, None, None]
        if y.shape[2] * CELL > bins:
            inside = (np.arange(y.shape[2] * CELL) < bins).reshape(-1, CELL).repeat(self.features, axis=1)
            y = jnp.where(inside[None, None], y, 0)
        return y.astype(self.dtype), bins


def conv_of_bins(x: Cells, kernel: Float[Array, "kN kF C O"], stride: int, dilation: int, size: int) -> Cells:
    """Takes cells apart, convolves the bins, and returns `size` cells. What fills up the last one is no zeros."""
    y = conv(from_cells(x, x.shape[2] * CELL), kernel, stride, dilation, 1)
    return to_cells(jnp.pad(y, ((0, 0), (0, 0), (0, size * CELL - y.shape[2]), (0, 0))))


def conv_of_cells(x: Cells, kernel: Float[Array, "kN kF C O"], stride: int, dilation: int, size: int) -> Cells:
    """Computes what `conv_of_bins` computes, as a convolution over cells of CELL · stride bins and of stride 1."""
    frames, taps, channels, outputs = kernel.shape
    step, edge = CELL * stride, taps // 2
    # The bins that one cell of the result depends on, in whole cells before and from its own place on.
    before, after = -(-edge // step), -(-((CELL - 1) * stride + taps - edge) // step)
    width = (before + after) * step
    places = [before * step - edge + i * stride for i in range(CELL)]
    kernels = [jnp.pad(kernel, ((0, 0), (at, width - taps - at), (0, 0), (0, 0))) for at in places]
    wide = jnp.stack(kernels, axis=3).reshape(frames, before + after, step * channels, CELL * outputs)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, size * stride - x.shape[2]), (0, 0)))
    around = frames // 2 * dilation
    return jax.lax.conv_general_dilated(
        x.reshape(*x.shape[:2], size, step * channels),
        wide,
        window_strides=(1, 1),
        padding=[(around, around), (before, after - 1)],
        rhs_dilation=(dilation, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def apply_cell_layers(
    x: Spectrum, layers: Sequence[CellConv], negative_slope: float
) -> tuple[tuple[Cells, ...], tuple[int, ...]]:
    """Applies layers one after the other; returns the activation after each (LeakyReLU) and its number of bins."""
    x, bins = to_cells(x.astype(layers[0].dtype)), x.shape[2]
    maps, sizes = [], []
    for layer in layers:
        x, bins = layer(x, bins)
        x = nn.leaky_relu(x, negative_slope)
        maps.append(x)
        sizes.append(bins)
    return tuple(maps), tuple(sizes)
