"""Causal convolutions over [B, T, C], and what they carry when streaming.

A module runs in one of two ways over the same parameters. Called plainly, it sees the whole sequence. Applied with
`mutable=["stream"]`, it sees the next chunk: it takes the last inputs before it from the collection "stream" (all
zeros at the start) and leaves there those before the next chunk. The collection is the whole state of a stream, one
row per batch entry; a row is restarted by zeroing it.

Layers compute in their `dtype`, which is that of what they return and of what a stream carries, whatever the type of
the input and of the parameters.

    whole   ├── zeros ──┤ x0 x1 x2 x3 x4 x5 x6 x7 …
    stream  ├── zeros ──┤ x0 x1 x2 x3 │         ├─ last inputs ─┤ x4 x5 x6 x7 │ …
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

STREAM = "stream"
SHORT = 32
"""Steps of a block up to which moving the kernel costs more than moving the block."""

Sequence = Float[Array, "B T C"]
Past = Float[Array, "B P C"]
Output = Float[Array, "B N O"]
Lengths = Int[Array, " B"]


def is_streaming(module: nn.Module) -> bool:
    """Whether this call sees the next chunk of a stream rather than a whole sequence."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def take_past(module: nn.Module, x: Sequence, size: int) -> Past | None:
    """The `size` steps before x, None for zeros; leaves the stream those before the next chunk."""
    if size == 0 or not is_streaming(module):
        return None
    stored = module.variable(STREAM, "past", jnp.zeros, (x.shape[0], size, x.shape[2]), x.dtype)
    past = stored.value
    recent = jnp.concatenate([past, x[:, max(0, x.shape[1] - size) :]], axis=1)
    stored.value = recent[:, recent.shape[1] - size :]
    return past


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(±1/√fan_in): PyTorch's default for weights and biases of linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def add_bias(module: nn.Module, y: Float[Array, "*B O"], init: nn.initializers.Initializer) -> Float[Array, "*B O"]:
    """y plus the module's parameter "bias"; float32 inside, so that its gradient is no sum of bfloat16 numbers."""
    bias = module.param("bias", init, y.shape[-1:]).astype(jnp.float32)
    return (y.astype(jnp.float32) + bias.reshape((1,) * (y.ndim - 1) + (-1,))).astype(y.dtype)


class Dense(nn.Module):
    """Linear layer over the last axis with PyTorch's initial distribution; kernel [in, out]."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return add_bias(self, y, init) if self.use_bias else y


class CausalConv1d(nn.Module):
    """Convolution that sees only the past; T steps in, ceil(T / stride) out; kernel [k, in, out].

    The input is padded with (k - 1)·dilation + 1 - stride steps on the left. Where T is no multiple of the stride,
    the last window is filled up on the right: with zeros, or with the last step if `replicate`, which also fills
    the left with the first step.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    replicate: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sequence, lengths: Lengths | None = None) -> Output:
        """lengths: valid steps of each row, if some rows end before the others; what follows them is not looked at."""
        fan_in = self.kernel_size * x.shape[2]
        kernel = self.param("kernel", torch_uniform(fan_in), (self.kernel_size, x.shape[2], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.stride > 1:
            x = self._fill_last_window(x, lengths)
        left = (self.kernel_size - 1) * self.dilation + 1 - self.stride
        past = take_past(self, x, left)
        if self.replicate:
            past = self._from_first_step(x, left, past)
        y = causal_conv1d(x, kernel, self.stride, self.dilation, past)
        return add_bias(self, y, torch_uniform(fan_in)) if self.use_bias else y

    def _fill_last_window(self, x: Sequence, lengths: Lengths | None) -> Float[Array, "B T1 C"]:
        steps, missing = x.shape[1], -x.shape[1] % self.stride
        if missing and is_streaming(self):
            raise ValueError("a stream's block must hold whole frames; give the end of the audio by `lengths`")
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), mode="edge" if self.replicate else "constant")
        if lengths is None:
            return x
        valid = (jnp.arange(steps + missing)[None] < lengths[:, None])[..., None]
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return jnp.where(valid, x, jnp.take_along_axis(x, last, axis=1) if self.replicate else 0)

    def _from_first_step(self, x: Sequence, left: int, past: Past | None) -> Past:
        """The past, or where nothing came before, the first step over and over."""
        repeated = jnp.repeat(x[:, :1], left, axis=1)
        if past is None:
            return repeated
        started = self.variable(STREAM, "started", jnp.zeros, (x.shape[0],), jnp.bool_)
        past = jnp.where(started.value[:, None, None], past, repeated)
        started.value = jnp.ones_like(started.value)
        return past


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution of kernel 2·stride that sees only the past; T steps in, T·stride out.

    The last `stride` steps of the full result, which would need the next input, are cut off. `depthwise` keeps
    the channels apart. Kernel [2·stride, in, out], depthwise [2·stride, 1, C].
    """

    features: int
    stride: int
    use_bias: bool = True
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sequence) -> Output:
        inputs, outputs = (1, x.shape[2]) if self.depthwise else (x.shape[2], self.features)
        # PyTorch counts a transposed convolution's fan-in over its output channels per group.
        init = torch_uniform(2 * self.stride * (1 if self.depthwise else outputs))
        kernel = self.param("kernel", init, (2 * self.stride, inputs, outputs))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        past = take_past(self, x, 1)
        y = depthwise_transpose(x, kernel, past) if self.depthwise else conv_transpose1d(x, kernel, past)
        return add_bias(self, y, init) if self.use_bias else y


@jax.custom_vjp
def elu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ELU with exp(x) - 1 for expm1: equal to 1e-7 and half the time, which counts at 240 000 steps of 64 channels.

    Its gradient is made of its result, which the convolution after it keeps anyway: so nothing else is kept.
    """
    y = x.astype(jnp.float32)  # exp(x) - 1 of a small x is lost in bfloat16
    return jnp.where(y > 0, y, jnp.exp(jnp.where(y > 0, 0, y)) - 1).astype(x.dtype)


def _elu_forward(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    y = elu(x)
    return y, y


def _elu_backward(y: Float[Array, "..."], gradient: Float[Array, "..."]) -> tuple[Float[Array, "..."]]:
    return (jnp.where(y > 0, gradient, gradient * (y + 1)),)


elu.defvjp(_elu_forward, _elu_backward)


def causal_conv1d(x: Sequence, kernel: Float[Array, "k C O"], stride: int, dilation: int, past: Past | None) -> Output:
    """Convolution of x after `past` (None: zeros), of (k - 1)·dilation + 1 - stride steps.

    A convolution is linear: x is convolved after zeros, and what the past adds to the first outputs is convolved by
    itself, so that x is never copied to stand behind its past, unless it is short.
    """
    reach = (kernel.shape[0] - 1) * dilation + 1
    if past is not None and x.shape[1] <= SHORT:
        return conv1d(jnp.concatenate([past, x], axis=1), kernel, stride, dilation)
    y = conv1d(x, kernel, stride, dilation, reach - stride)
    if past is None:
        return y
    touched = -(-past.shape[1] // stride)
    added = conv1d(past, kernel, stride, dilation, 0, (touched - 1) * stride + reach - past.shape[1])[:, : y.shape[1]]
    # In place; `y.at[].add` is a scatter, which makes the whole decoder a sixth slower on a CPU.
    return jax.lax.dynamic_update_slice_in_dim(y, y[:, : added.shape[1]] + added, 0, axis=1)


def conv1d(
    x: Sequence, kernel: Float[Array, "k C O"], stride: int, dilation: int, left: int = 0, right: int = 0
) -> Output:
    """Convolution after and before so many zeros."""
    if x.shape[2] == stride == dilation == 1:  # audio in: sums of shifted copies, where a matrix unit would starve
        x = jnp.pad(x, ((0, 0), (left, right), (0, 0)))
        taps, steps = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
        return sum((x[:, i : i + steps] * kernel[i][None] for i in range(1, taps)), x[:, :steps] * kernel[0][None])
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,),
        padding=[(left, right)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    multiply = partial(conv1d_as_product, stride=stride, dilation=dilation, left=left, right=right)
    # A gradient needs x and the kernel, and nothing of what either way has in between.
    run = jax.checkpoint(partial(jax.lax.platform_dependent, tpu=multiply, default=convolve), prevent_cse=False)
    return run(x, kernel)


def conv1d_as_product(
    x: Sequence, kernel: Float[Array, "k C O"], stride: int, dilation: int, left: int, right: int
) -> Output:
    """`conv1d` as a matrix product with shifted copies side by side. k, T and what is padded: multiples of the stride.

    XLA cuts a convolution along a long time axis into pieces, to have more rows: for a TPU that takes 2.5 times the
    memory traffic of this, at 64 channels, and 30 times as long to compile.
    """
    batch, _, channels = x.shape
    cells, outputs = kernel.shape[0] // stride, kernel.shape[2]
    # Of a stride's width, so that the convolution has stride 1.
    x = x.reshape(batch, -1, stride * channels)
    x = jnp.pad(x, ((0, 0), (left // stride, right // stride), (0, 0)))
    kernel = kernel.reshape(cells, stride * channels, outputs)
    steps = x.shape[1] - (cells - 1) * dilation
    if outputs == 1:  # audio out: shifted copies of products are narrower than products of shifted copies
        y = jnp.einsum("btc,kco->kbto", x, kernel, precision=jax.lax.Precision.HIGHEST)
        return sum((y[i, :, i * dilation :][:, :steps] for i in range(1, cells)), y[0, :, :steps])
    shifted = [x[:, i * dilation :][:, :steps] for i in range(cells)]
    return jnp.concatenate(shifted, axis=2) @ kernel.reshape(-1, outputs)


def conv_transpose1d(x: Sequence, kernel: Float[Array, "S2 C O"], past: Past | None) -> Output:
    """Output step t·S + s is x[t]·kernel[s] + x[t-1]·kernel[S + s]: a convolution of two taps to S·O channels.

    A stream's short x is multiplied by each tap by itself: to bring the kernel into that form would take most of the
    time.
    """
    taps, inputs, outputs = kernel.shape
    stride = taps // 2
    if past is not None and x.shape[1] <= SHORT:
        row = jnp.concatenate([past, x], axis=1)
        products = jnp.einsum("sbtc,sco->sbto", jnp.broadcast_to(row, (taps, *row.shape)), kernel)
        return jnp.moveaxis(products[:stride, :, 1:] + products[stride:, :, :-1], 0, 2).reshape(x.shape[0], -1, outputs)
    two_taps = kernel.reshape(2, stride, inputs, outputs)[::-1].swapaxes(1, 2).reshape(2, inputs, stride * outputs)
    return causal_conv1d(x, two_taps, 1, 1, past).reshape(x.shape[0], -1, outputs)


def depthwise_transpose(x: Sequence, kernel: Float[Array, "S2 1 C"], past: Past | None) -> Float[Array, "B N C"]:
    """As `conv_transpose1d`, each channel by itself."""
    past = jnp.zeros_like(x[:, :1]) if past is None else past
    before = jnp.concatenate([past, x[:, :-1]], axis=1)
    first, second = jnp.split(kernel[:, 0], 2)
    y = x[:, :, None] * first[None, None] + before[:, :, None] * second[None, None]
    return y.reshape(x.shape[0], -1, x.shape[2])
