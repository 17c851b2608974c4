"""The convolution with weight normalisation of every discriminator."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from omnicodec_jax.models.conv import add_bias, torch_uniform


class Conv(nn.Module):
    """A convolution over one or two axes of [B, *S, C], with symmetric zero padding and optional weight normalisation.

    The kernel is [*k, in / groups, out]. Kernel sizes must be odd. `stride` applies to the last axis and `dilation` to
    the first. With weight normalisation (arXiv 1602.07868) the kernel of each output channel is gain · kernel /
    ‖kernel‖, and the gain starts at the norm. The convolution computes in `dtype`; the parameters and the normalisation
    are float32.
    """

    features: int
    kernel_size: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    weight_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B ... C"]) -> Float[Array, "B ... O"]:
        kernel, init = self._kernel(x.shape[-1])
        y = conv(x.astype(self.dtype), kernel, self.stride, self.dilation, self.groups)
        return add_bias(self, y, init)

    def _kernel(self, inputs: int) -> tuple[Float[Array, "... I O"], nn.initializers.Initializer]:
        """Returns the normed kernel in `dtype`, and the initializer of the bias."""
        shape = (*self.kernel_size, inputs // self.groups, self.features)
        init = torch_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", init, shape)
        if self.weight_norm:
            norm = jnp.sqrt(jnp.sum(kernel**2, axis=range(kernel.ndim - 1), keepdims=True))
            kernel *= self.param("gain", lambda _: norm) / norm
        return kernel.astype(self.dtype), init


def conv(
    x: Float[Array, "B ... C"], kernel: Float[Array, "... I O"], stride: int, dilation: int, groups: int
) -> Float[Array, "B ... O"]:
    """Convolves x, channels last, with k // 2 zeros, times the dilation, on either side."""
    if groups > 1:
        return grouped_conv(x, kernel, stride, groups)
    edges = [k // 2 for k in kernel.shape[:-2]]
    edges[0] *= dilation
    padding = [(edge, edge) for edge in edges]
    axes = len(edges)
    if axes == 2 and stride > 1:
        x, kernel = stride_to_channels(x, kernel, stride)
        padding[1], stride = (0, 0), 1
    spatial = "HW"[-axes:]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,) * (axes - 1) + (stride,),
        padding=padding,
        rhs_dilation=(dilation,) + (1,) * (axes - 1),
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )


def grouped_conv(
    x: Float[Array, "B T C"], kernel: Float[Array, "k I O"], stride: int, groups: int
) -> Float[Array, "B N O"]:
    """Computes a 1-D grouped convolution as one batched matrix product.

    On a CPU the gradient of XLA's own grouped convolution takes minutes, and the gradient of this one a second.
    """
    x = x.reshape(*x.shape[:2], groups, -1).swapaxes(1, 2)
    kernel = jnp.moveaxis(kernel.reshape(*kernel.shape[:2], groups, -1), 2, 0)
    x, kernel = stride_to_channels(x, kernel, stride)
    taps = kernel.shape[1]
    steps = x.shape[2] - taps + 1
    windows = jnp.concatenate([x[:, :, t : t + steps] for t in range(taps)], axis=-1)
    y = jnp.einsum("bgni,gio->bngo", windows, kernel.reshape(groups, windows.shape[-1], -1))
    return y.reshape(*y.shape[:2], -1)


def stride_to_channels(
    x: Float[Array, "B N F C"], kernel: Float[Array, "kN kF C O"], stride: int
) -> tuple[Float[Array, "B N M SC"], Float[Array, "kN kM SC O"]]:
    """Rewrites input and kernel of a strided convolution so that a convolution of stride 1 gives the same result.

    Each `stride` neighbours along F become channels, and zeros fill up the kernel. F is padded by kF // 2 first. For
    9 taps and a stride of 2 this takes a tenth more multiplications. But the gradient of a strided convolution
    convolves an input of which half is zeros, so that forward and backward a discriminator takes only 0.6 of the time
    on a CPU.
    """
    batch, frames, bins, channels = x.shape
    taps, edge = kernel.shape[1], kernel.shape[1] // 2
    outputs, cells = (bins + 2 * edge - taps) // stride + 1, -(-taps // stride)
    right = (outputs + cells - 1) * stride - bins - edge
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), (edge, right, 0), (0, 0, 0)])
    kernel = jnp.pad(kernel, ((0, 0), (0, cells * stride - taps), (0, 0), (0, 0)))
    return (
        x.reshape(batch, frames, -1, stride * channels),
        kernel.reshape(kernel.shape[0], cells, stride * channels, -1),
    )
