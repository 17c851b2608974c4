"""Causal convolutions over [B, T, C], for whole sequences and for streams.

A module runs in one of two ways over the same parameters. Called plainly, it takes the whole sequence. Applied with
`mutable=["stream"]`, it takes the next chunk of a stream. It reads the last inputs before the chunk from the collection
"stream", where they are zeros at the start, and stores there the last inputs before the next chunk. The collection is
the whole state of a stream, with one row for each row of the batch; a row begins anew when its state is set to zero.

Layers compute in their `dtype`, whatever the types of the input and of the parameters. Their outputs and the state of
a stream have that type, too.

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
"""The name of the collection that holds the state of a stream."""
SHORT = 32
"""The largest number of steps of a block for which moving the kernel costs more than moving the block."""

Activations = Float[Array, "B T C"]
Past = Float[Array, "B P C"]
ConvOutput = Float[Array, "B N O"]
Lengths = Int[Array, " B"]


def is_streaming(module: nn.Module) -> bool:
    """Returns whether a module is applied to the next chunk of a stream rather than to a whole sequence."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def take_past(module: nn.Module, x: Activations, size: int) -> Past | None:
    """Returns the `size` steps before x in a stream, and stores those before the next chunk; None outside streams."""
    if size == 0 or not is_streaming(module):
        return None
    stored = module.variable(STREAM, "past", jnp.zeros, (x.shape[0], size, x.shape[2]), x.dtype)
    past = stored.value
    recent = jnp.concatenate([past, x[:, max(0, x.shape[1] - size) :]], axis=1)
    stored.value = recent[:, recent.shape[1] - size :]
    return past


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Makes the initializer U(±1/√fan_in), PyTorch's default for linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def add_bias(module: nn.Module, y: Float[Array, "*B O"], init: nn.initializers.Initializer) -> Float[Array, "*B O"]:
    """Adds the module's parameter "bias" to y in float32, so that the bias's gradient is not summed in bfloat16."""
    bias = module.param("bias", init, y.shape[-1:]).astype(jnp.float32)
    return (y.astype(jnp.float32) + bias.reshape((1,) * (y.ndim - 1) + (-1,))).astype(y.dtype)


class Dense(nn.Module):
    """A linear layer over the last axis with PyTorch's initial distribution; its kernel is [in, out]."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Multiplies the last axis of x by the kernel, and adds the bias."""
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return add_bias(self, y, init) if self.use_bias else y


class CausalConv1d(nn.Module):
    """A convolution whose outputs depend on the past alone: [B, T, in] → [B, ceil(T / stride), out].

    Its kernel is [k, in, out].

    The input is padded with (k - 1)·dilation + 1 - stride steps on the left. If T is no multiple of the stride, the
    last window is filled up on the right. Both are filled with zeros; with `replicate`, the left is filled with the
    first step and the right with the last step.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    replicate: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Activations, lengths: Lengths | None = None) -> ConvOutput:
        """Convolves x; `lengths` are the valid steps of each row, and what follows them is ignored."""
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

    def parameters(self) -> tuple[Float[Array, "k C O"], Float[Array, " O"]]:
        """Returns the kernel and the bias of a layer that has them already."""
        return self.get_variable("params", "kernel"), self.get_variable("params", "bias")

    def _fill_last_window(self, x: Activations, lengths: Lengths | None) -> Float[Array, "B T1 C"]:
        steps, missing = x.shape[1], -x.shape[1] % self.stride
        if missing and is_streaming(self):
            raise ValueError("a stream's block must hold whole frames; give the end of the audio by `lengths`")
        if self.replicate:
            # `jnp.pad` with mode="edge" pads the batch axis, too, so that devices exchange rows for its gradient.
            x = jnp.concatenate([x, jnp.repeat(x[:, -1:], missing, axis=1)], axis=1)
        else:
            x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
        if lengths is None:
            return x
        valid = (jnp.arange(steps + missing)[None] < lengths[:, None])[..., None]
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return jnp.where(valid, x, jnp.take_along_axis(x, last, axis=1) if self.replicate else 0)

    def _from_first_step(self, x: Activations, left: int, past: Past | None) -> Past:
        """Returns the past of each row, or the first step repeated in rows that have no past yet."""
        repeated = jnp.repeat(x[:, :1], left, axis=1)
        if past is None:
            return repeated
        started = self.variable(STREAM, "started", jnp.zeros, (x.shape[0],), jnp.bool_)
        past = jnp.where(started.value[:, None, None], past, repeated)
        started.value = jnp.ones_like(started.value)
        return past


class CausalConvTranspose1d(nn.Module):
    """A transposed convolution of kernel 2·stride whose outputs depend on the past alone.

    It maps [B, T, in] to [B, T·stride, out]. The last `stride` steps of the full result, which would need the next
    input, are cut off. With `depthwise`, each channel is convolved by itself. The kernel is [2·stride, in, out], or
    [2·stride, 1, C] if depthwise.
    """

    features: int
    stride: int
    use_bias: bool = True
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Activations) -> ConvOutput:
        """Upsamples x by the stride."""
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
    """Computes the ELU with exp(x) - 1, which differs from expm1 by 1e-7 and takes half of the time.

    That matters, since the ELU is applied to 240 000 steps of 64 channels. Its gradient is computed from its result,
    which the next convolution keeps anyway, so that nothing else is kept.
    """
    y = x.astype(jnp.float32)  # in bfloat16, exp(x) - 1 of a small x would be zero
    return jnp.where(y > 0, y, jnp.exp(jnp.where(y > 0, 0, y)) - 1).astype(x.dtype)


def _elu_forward(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    y = elu(x)
    return y, y


def _elu_backward(y: Float[Array, "..."], gradient: Float[Array, "..."]) -> tuple[Float[Array, "..."]]:
    return (jnp.where(y > 0, gradient, gradient * (y + 1)),)


elu.defvjp(_elu_forward, _elu_backward)


def causal_conv1d(
    x: Activations, kernel: Float[Array, "k C O"], stride: int, dilation: int, past: Past | None
) -> ConvOutput:
    """Convolves x with the steps before it: `past` of (k - 1)·dilation + 1 - stride steps; None: zeros.

    Past and block are joined into one row, whose layout suits the convolution. But with a stride, a long joined row may
    not be a whole number of tiles, and would be copied once more. Then what the past adds to the first outputs is
    computed by itself, which gives the same since a convolution is linear.
    """
    reach = (kernel.shape[0] - 1) * dilation + 1
    if past is None:
        return conv1d(x, kernel, stride, dilation, reach - stride)
    if stride == 1 or x.shape[1] <= SHORT:
        return conv1d(jnp.concatenate([past, x], axis=1), kernel, stride, dilation)
    y = conv1d(x, kernel, stride, dilation, reach - stride)
    touched = -(-past.shape[1] // stride)
    added = conv1d(past, kernel, stride, dilation, 0, (touched - 1) * stride + reach - past.shape[1])[:, : y.shape[1]]
    # The sum is written in place. `y.at[].add` would be a scatter, which makes the decoder a sixth slower on a CPU.
    return jax.lax.dynamic_update_slice_in_dim(y, y[:, : added.shape[1]] + added, 0, axis=1)


def conv1d(
    x: Activations, kernel: Float[Array, "k C O"], stride: int, dilation: int, left: int = 0, right: int = 0
) -> ConvOutput:
    """Convolves x with `left` zeros before it and `right` zeros after it."""
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,),
        padding=[(left, right)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST if 1 in kernel.shape[1:] else None,  # the input or the output is audio
    )
    if x.shape[2] == stride == dilation == 1:  # the input is audio, and one channel would leave a matrix unit idle
        return jax.lax.platform_dependent(
            x, kernel, cpu=convolve, default=partial(conv1d_as_shifts, left=left, right=right)
        )
    multiply = partial(conv1d_as_product, stride=stride, dilation=dilation, left=left, right=right)
    products = {"tpu": multiply} | ({"cuda": multiply} if stride > 1 and x.dtype == jnp.float32 else {})
    # The gradient needs x and the kernel alone. Without the checkpoint, arrays of all branches would be kept for it.
    run = jax.checkpoint(partial(jax.lax.platform_dependent, **products, default=convolve), prevent_cse=False)
    return run(x, kernel)


def conv1d_as_shifts(x: Float[Array, "B T 1"], kernel: Float[Array, "k 1 O"], left: int, right: int) -> ConvOutput:
    """Computes `conv1d` of one channel as a sum of shifted copies, in full float32.

    A CPU does not use it, since it would write each copy to memory.
    """
    x = jnp.pad(x, ((0, 0), (left, right), (0, 0)))
    taps, steps = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    return sum((x[:, i : i + steps] * kernel[i][None] for i in range(1, taps)), x[:, :steps] * kernel[0][None])


def conv1d_as_product(
    x: Activations, kernel: Float[Array, "k C O"], stride: int, dilation: int, left: int, right: int
) -> ConvOutput:
    """Computes `conv1d` as one matrix product with shifted copies of x side by side.

    Kernel size, T and padding must be multiples of the stride. TPUs use it, since XLA cuts a convolution along a long
    time axis into pieces: at 64 channels, that takes 2.5 times the memory traffic of this product, and 30 times as long
    to compile. GPUs use it for convolutions with a stride in full float32, for which cuDNN may choose a slow algorithm:
    on an H100, one from 64 to 128 channels with stride 4 took 462 ms for 64 rows of 61 440 steps, and another with as
    many operations, from 128 to 256 channels with stride 5, took 7.5 ms.
    """
    batch, _, channels = x.shape
    cells, outputs = kernel.shape[0] // stride, kernel.shape[2]
    # `stride` steps are joined into one step of `stride` times as many channels, so that the convolution has stride 1.
    x = x.reshape(batch, -1, stride * channels)
    x = jnp.pad(x, ((0, 0), (left // stride, right // stride), (0, 0)))
    kernel = kernel.reshape(cells, stride * channels, outputs)
    steps = x.shape[1] - (cells - 1) * dilation
    if outputs == 1:  # the output is audio: it is cheaper to shift the narrow products than the wide input
        y = jnp.einsum("btc,kco->kbto", x, kernel, precision=jax.lax.Precision.HIGHEST)
        return sum((y[i, :, i * dilation :][:, :steps] for i in range(1, cells)), y[0, :, :steps])
    shifted = [x[:, i * dilation :][:, :steps] for i in range(cells)]
    return jnp.concatenate(shifted, axis=2) @ kernel.reshape(-1, outputs)


def conv_transpose1d(x: Activations, kernel: Float[Array, "S2 C O"], past: Past | None) -> ConvOutput:
    """Computes a transposed convolution, whose output step t·S + s is x[t]·kernel[s] + x[t-1]·kernel[S + s].

    That is a convolution with two taps to S·O channels. For a short x of a stream, x is multiplied by each tap by
    itself, since bringing the kernel into the form of two taps would take most of the time.
    """
    taps, inputs, outputs = kernel.shape
    stride = taps // 2
    if past is not None and x.shape[1] <= SHORT:
        row = jnp.concatenate([past, x], axis=1)
        products = jnp.einsum("sbtc,sco->sbto", jnp.broadcast_to(row, (taps, *row.shape)), kernel)
        return jnp.moveaxis(products[:stride, :, 1:] + products[stride:, :, :-1], 0, 2).reshape(x.shape[0], -1, outputs)
    two_taps = kernel.reshape(2, stride, inputs, outputs)[::-1].swapaxes(1, 2).reshape(2, inputs, stride * outputs)
    return causal_conv1d(x, two_taps, 1, 1, past).reshape(x.shape[0], -1, outputs)


def depthwise_transpose(x: Activations, kernel: Float[Array, "S2 1 C"], past: Past | None) -> Float[Array, "B N C"]:
    """Computes `conv_transpose1d` of each channel by itself."""
    past = jnp.zeros_like(x[:, :1]) if past is None else past
    before = jnp.concatenate([past, x[:, :-1]], axis=1)
    first, second = jnp.split(kernel[:, 0], 2)
    y = x[:, :, None] * first[None, None] + before[:, :, None] * second[None, None]
    return y.reshape(x.shape[0], -1, x.shape[2])
