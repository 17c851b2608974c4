"""The residual blocks of a stage of SEANet as one kernel for TPUs (Pallas), forward and backward.

A stage at the full rate has 240 000 steps of 64 channels for a clip of 10 s, and its four blocks do little arithmetic
with them. XLA writes each intermediate result to memory, and reads it again. Here a piece of a clip goes through all
blocks in the chip's own memory: the forward pass reads the input and writes the result, and the backward pass reads the
input and the gradient, computes the rest again, and writes the gradients of the input and of the kernels.

    cells     ├─ 4 steps · C ─┼─ 4 steps · C ─┼─ …     [B, N, 4·C]: where channels are fewer than a TPU's lanes
    a piece   ├─ halo ─┼────── PIECE cells ──────┼─ halo ─┤     as far as convolutions reach back, gradients forward

Only TPUs run the kernel. Elsewhere, and in streams, `seanet.residual_blocks` applies the blocks as layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from omnicodec_jax.models.conv import conv1d, elu
from omnicodec_jax.own_rows import on_own_rows

LANES = 128
"""The number of lanes of a TPU's vector register. Fewer channels would leave lanes empty, so steps form cells."""
TILE = 16
"""The number of rows of a tile of bfloat16 numbers, and the smallest halo. Pieces are whole multiples of the halo."""
PIECE = 256
"""The number of cells of a clip that go through the blocks at once; a power of two."""
WIDEST = 256
"""The largest number of channels of a stage that the kernel runs. Wider stages have few steps, and so move little."""
MEMORY = 16 * 2**20
"""The bytes of the chip's own memory that the kernel may take: all that a v4 has."""
HIGHEST = jax.lax.Precision.HIGHEST


class BlockParameters(NamedTuple):
    """The parameters of a residual block: a dilated convolution, and one of a single tap."""

    kernel: Float[Array, "k C H"]
    bias: Float[Array, " H"]
    kernel_out: Float[Array, "1 H C"]
    bias_out: Float[Array, " C"]

    @property
    def channels(self) -> int:
        """The number of channels of the block's input and output."""
        return self.bias_out.shape[0]


AudioConv = tuple[Float[Array, "k _ _"], Float[Array, " _"]]
"""The kernel and the bias of a convolution from audio or to audio, which has one channel on that side."""


def residual_stage(
    x: Float[Array, "B T _"],
    blocks: Sequence[BlockParameters],
    dilations: Sequence[int],
    dtype: DTypeLike,
    conv_in: AudioConv | None = None,
    conv_out: AudioConv | None = None,
) -> Float[Array, "B T _"]:
    """Applies residual blocks one after the other, with dilated convolutions: x + conv(ELU(conv(ELU(x)))).

    The convolutions are causal, with zeros before the clip. Everything is computed again for the gradient.

    Args:
        x: Input of the first block; with `conv_in`, audio [B, T, 1].
        blocks: Parameters of the blocks.
        dilations: Dilation of the first convolution of each block.
        dtype: Number format of the blocks.
        conv_in: Convolution of audio that comes before the blocks; it is computed in float32.
        conv_out: Convolution after the blocks that makes audio [B, T, 1] of ELU(x); it is computed in float32.
    """

    def run(x: Float[Array, "B T _"], *arrays: Array) -> Float[Array, "B T _"]:
        blocks, entry, end = jax.tree.unflatten(structure, arrays)
        options = {"dilations": dilations, "dtype": dtype}
        on_tpu = in_one_kernel if blocks[0].channels <= WIDEST else one_by_one
        return jax.lax.platform_dependent(
            x, blocks, entry, end, tpu=partial(on_tpu, **options), default=partial(one_by_one, **options)
        )

    arrays, structure = jax.tree.flatten((blocks, conv_in, conv_out))
    return on_own_rows(jax.checkpoint(run, prevent_cse=False), x, *arrays, checked=False)


def one_by_one(
    x: Float[Array, "B T _"],
    blocks: Sequence[BlockParameters],
    conv_in: AudioConv | None,
    conv_out: AudioConv | None,
    dilations: Sequence[int],
    dtype: DTypeLike,
) -> Float[Array, "B T _"]:
    """Computes `residual_stage` by operations of XLA, which writes each result to memory."""

    def convolve(x: Array, kernel: Array, bias: Array, dilation: int = 1) -> Array:
        y = conv1d(x, kernel.astype(x.dtype), 1, dilation, (kernel.shape[0] - 1) * dilation)
        return (y.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]).astype(x.dtype)

    x = (x if conv_in is None else convolve(x, *conv_in)).astype(dtype)
    for block, dilation in zip(blocks, dilations, strict=True):
        y = elu(convolve(elu(x), block.kernel, block.bias, dilation))
        x = x + convolve(y, block.kernel_out, block.bias_out)
    return x if conv_out is None else convolve(elu(x).astype(jnp.float32), *conv_out)


def in_one_kernel(
    x: Float[Array, "B T _"],
    blocks: Sequence[BlockParameters],
    conv_in: AudioConv | None,
    conv_out: AudioConv | None,
    dilations: Sequence[int],
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "B T _"]:
    """Computes `residual_stage` piece by piece; `interpret` runs the kernel in JAX, on any device."""
    (batch, steps, _), channels = x.shape, blocks[0].channels
    fold = 2 * LANES // channels if channels < LANES else 1
    cells = jnp.pad(x, ((0, 0), (0, -steps % fold), (0, 0))).reshape(batch, -1, fold * x.shape[2])
    if conv_in is not None:
        cells = conv_of_audio_cells(cells, *conv_in)
    arrays, shifts = [], []
    for block, dilation in zip(jax.tree.map(jnp.float32, list(blocks)), dilations, strict=True):
        wide, reach = of_cells(block.kernel, dilation, fold)
        arrays += [wide, jnp.tile(block.bias, fold)[None]]
        arrays += [of_cells(block.kernel_out, 1, fold)[0][0], jnp.tile(block.bias_out, fold)[None]]
        shifts.append(reach)
    y: Any = _stage(tuple(shifts), interpret, cells.astype(dtype), tuple(arrays))
    if conv_out is not None:
        y = conv_to_audio_cells(elu(y), *conv_out)
    return y.reshape(batch, fold * y.shape[1], -1)[:, :steps]


def conv_of_audio_cells(
    cells: Float[Array, "B N f"], kernel: Float[Array, "k 1 C"], bias: Float[Array, " C"]
) -> Float[Array, "B N fC"]:
    """Convolves audio in cells by a matrix product in full float32, and returns the result in cells."""
    wide, shifts = of_cells(kernel, 1, cells.shape[2])
    before = jnp.pad(cells, ((0, 0), (shifts[0], 0), (0, 0)))
    around = [before[:, shifts[0] - shift :][:, : cells.shape[1]] for shift in shifts]
    y = jnp.matmul(jnp.concatenate(around, axis=2), wide.reshape(-1, wide.shape[2]), precision=HIGHEST)
    return y + jnp.tile(bias, cells.shape[2])[None, None]


def conv_to_audio_cells(
    cells: Float[Array, "B N fC"], kernel: Float[Array, "k C 1"], bias: Float[Array, " 1"]
) -> Float[Array, "B N f"]:
    """Convolves a map in cells to audio in cells, in full float32. The products are shifted, as they are narrow."""
    wide, shifts = of_cells(kernel, 1, cells.shape[2] // kernel.shape[1])
    products = jnp.einsum("bnc,sco->sbno", cells.astype(jnp.float32), wide, precision=HIGHEST)
    steps = cells.shape[1]
    shifted = [jnp.pad(products[i], ((0, 0), (shift, 0), (0, 0)))[:, :steps] for i, shift in enumerate(shifts)]
    return sum(shifted[1:], shifted[0]) + bias[None, None]


def of_cells(
    kernel: Float[Array, "k C O"], dilation: int, fold: int
) -> tuple[Float[Array, "S fC fO"], tuple[int, ...]]:
    """Returns a convolution's kernel over cells of `fold` steps, and how many cells back each of its taps reads."""
    taps, channels, outputs = kernel.shape
    times = np.arange(fold) - dilation * np.arange(taps - 1, -1, -1)[:, None]  # the step that tap i of step j reads
    shifts = sorted({int(-(time // fold)) for time in times.ravel()}, reverse=True)
    place = np.zeros((len(shifts), fold, fold, taps), np.float32)
    for (tap, step), time in np.ndenumerate(times):
        place[shifts.index(int(-(time // fold))), time % fold, step, tap] = 1
    wide = jnp.einsum("srji,ico->srcjo", place, kernel, precision=HIGHEST)
    return wide.reshape(len(shifts), fold * channels, fold * outputs), tuple(shifts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stage(shifts: tuple[tuple[int, ...], ...], interpret: bool, x: Any, arrays: tuple[Any, ...]) -> Array:
    """Applies the blocks to cells; `arrays` are kernel, bias, kernel and bias of each block."""
    return _call(partial(_forward_kernel, shifts), shifts, interpret, (x,), arrays)[0]


def _stage_forward(shifts: Any, interpret: bool, x: Array, arrays: tuple[Array, ...]) -> tuple[Array, Any]:
    return _stage(shifts, interpret, x, arrays), (x, arrays)


def _stage_backward(shifts: Any, interpret: bool, kept: Any, gradient: Array) -> tuple[Array, tuple[Array, ...]]:
    x, arrays = kept
    dx, *darrays = _call(partial(_backward_kernel, shifts), shifts, interpret, (x, gradient), arrays, backward=True)
    return dx, tuple(darrays)


_stage.defvjp(_stage_forward, _stage_backward)


def _call(
    kernel: Any,
    shifts: Any,
    interpret: bool,
    inputs: tuple[Array, ...],
    arrays: tuple[Array, ...],
    backward: bool = False,
) -> Sequence[Array]:
    """Runs a kernel on each piece of all clips, and passes it the halos around the piece, too."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    x = inputs[0]
    batch, cells, width = x.shape
    halo = TILE
    while halo < sum(max(reach) for reach in shifts):
        halo *= 2
    piece = min(max(PIECE, halo), -(-cells // halo) * halo)
    halos, last = piece // halo, -(-cells // halo) - 1
    middle = pl.BlockSpec((1, piece, width), lambda b, i: (b, i, 0))
    before = pl.BlockSpec((1, halo, width), lambda b, i: (b, jnp.maximum(i * halos - 1, 0), 0))
    after = pl.BlockSpec((1, halo, width), lambda b, i: (b, jnp.minimum((i + 1) * halos, last), 0))
    around = (before, middle, after) if backward else (before, middle)

    def whole(array: Array) -> Any:
        return pl.BlockSpec(array.shape, lambda b, i: (0,) * array.ndim)

    # Kernels are multiplied in the number format of x; biases stay float32.
    given = [array if array.shape[0] == 1 and array.ndim == 2 else array.astype(x.dtype) for array in arrays]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    shapes += [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in arrays] if backward else []
    products = sum(array.size for array in arrays if array.ndim > 2 or array.shape[0] > 1)
    flops = 2 * batch * cells * products * (3 if backward else 1)
    return pl.pallas_call(
        partial(kernel, cells, halo),
        out_shape=shapes,
        grid=(batch, -(-cells // piece)),
        in_specs=[*(spec for _ in inputs for spec in around), *map(whole, given)],
        out_specs=[middle, *(map(whole, arrays) if backward else ())],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=2 * x.size * len(shifts), bytes_accessed=(len(inputs) + 1) * x.nbytes
        ),
        interpret=interpret,
        name="residual_stage_backward" if backward else "residual_stage",
    )(*(x for x in inputs for _ in around), *given)


def _rows(cells: int, halo: int, parts: Sequence[Any]) -> tuple[Array, Array]:
    """Joins a piece and its halos to float32 [R, L], with zeros outside of the clip.

    Also returns the index in the clip of each row: [R, 1].
    """
    from jax.experimental import pallas as pl

    x = jnp.concatenate([part[0].astype(jnp.float32) for part in parts], axis=0)
    piece = parts[1].shape[1]
    places = pl.program_id(1) * piece - halo + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where((places >= 0) & (places < cells), x, 0.0), places


def _elu(x: Array) -> Array:
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0.0)) - 1)


def _dot(x: Array, y: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """Multiplies two matrices, and sums over the axes `over` of the first and of the second, in float32."""
    axes = (((over[0],), (over[1],)), ((), ()))
    precision = HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _rolled(x: Array, steps: int) -> Array:
    """Moves the rows of x down (up, if `steps` is negative). Rows that wrap around to the other end are in the halo."""
    from jax.experimental.pallas import tpu as pltpu

    return x if steps == 0 else pltpu.roll(x, steps % x.shape[0], 0)


def _blocks(
    shifts: Any, x: Array, inside: Array, arrays: Sequence[Any], dtype: Any
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Runs all blocks on the rows of a piece. Returns the result, and both results of ELU in each block, float32."""
    kept = []

    def rounded(x: Array) -> Array:
        return x.astype(dtype).astype(jnp.float32)

    for number, reach in enumerate(shifts):
        kernel, bias, kernel_out, bias_out = arrays[4 * number : 4 * number + 4]
        u = jnp.where(inside, rounded(_elu(x)), 0.0)
        h = jnp.zeros((), jnp.float32)
        for tap, shift in enumerate(reach):
            h += _dot(_rolled(u, shift).astype(dtype), kernel[tap])
        v = rounded(_elu(rounded(rounded(h) + bias[...])))
        x = rounded(x + rounded(rounded(_dot(v.astype(dtype), kernel_out[...])) + bias_out[...]))
        kept.append((u, v))
    return x, kept


def _forward_kernel(shifts: Any, cells: int, halo: int, before: Any, middle: Any, *refs: Any) -> None:
    *arrays, out = refs
    x, places = _rows(cells, halo, (before, middle))
    y, _ = _blocks(shifts, x, places >= 0, arrays, middle.dtype)
    out[0] = y[halo:].astype(out.dtype)


def _backward_kernel(shifts: Any, cells: int, halo: int, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    inputs, gradients, arrays = refs[:3], refs[3:6], refs[6 : 6 + 4 * len(shifts)]
    out, *sums = refs[6 + 4 * len(shifts) :]
    dtype, piece = inputs[1].dtype, inputs[1].shape[1]

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def clear() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    x, places = _rows(cells, halo, inputs)
    gradient: Any = _rows(cells, halo, gradients)[0]
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    own = (row >= halo) & (row < halo + piece)  # other pieces add the rows in halos to the gradients
    _, kept = _blocks(shifts, x, places >= 0, arrays, dtype)
    for number in reversed(range(len(shifts))):
        kernel, _, kernel_out, _ = arrays[4 * number : 4 * number + 4]
        dkernel, dbias, dkernel_out, dbias_out = sums[4 * number : 4 * number + 4]
        u, v = kept[number]
        counted = jnp.where(own, gradient, 0.0)
        dbias_out[...] += jnp.sum(counted, axis=0, keepdims=True)
        dkernel_out[...] += _dot(v.astype(dtype), counted.astype(dtype), (0, 0))
        dh = _dot(gradient.astype(dtype), kernel_out[...], (1, 1)) * jnp.where(v > 0, 1.0, v + 1)
        counted = jnp.where(own, dh, 0.0)
        dbias[...] += jnp.sum(counted, axis=0, keepdims=True)
        du: Any = jnp.zeros_like(u)
        for tap, shift in enumerate(shifts[number]):
            dkernel[tap] += _dot(_rolled(u, shift).astype(dtype), counted.astype(dtype), (0, 0))
            du += _rolled(_dot(dh.astype(dtype), kernel[tap], (1, 1)), -shift)
        gradient += jnp.where(places >= 0, du * jnp.where(u > 0, 1.0, u + 1), 0.0)
    out[0] = gradient[halo : halo + piece].astype(out.dtype)
