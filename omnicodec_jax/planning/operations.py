"""Counts the operations of matrix products and convolutions, by the arithmetic that computes them.

On a GPU, both are calls of NVIDIA's libraries, which XLA describes in the attributes of a `custom-call`. A kernel that
is written for a TPU (Pallas) is a `custom-call`, too.
"""

import math
import re
from collections import Counter

import numpy as np

from omnicodec_jax.planning.hlo import Computation, Computations, Instruction, dtype, operand_types, sizes
from omnicodec_jax.planning.speeds import Arithmetic

HALF = {"bf16", "f16", "s8", "u8", "f8e4m3fn", "f8e5m2"}
"""The types of elements that are multiplied as fast as bfloat16, or faster."""
PARTS = {
    "__cudnn$convForward": ("input", "kernel", "output"),
    "__cudnn$convBiasActivationForward": ("input", "kernel", "output"),
    "__cudnn$convBackwardInput": ("output", "kernel", "input"),
    "__cudnn$convBackwardFilter": ("input", "output", "kernel"),
}
"""The roles of the two operands and of the result of a call of cuDNN in the convolution that its attributes describe.
The names of other calls begin with one of these names."""


def operations(computations: Computations, computation: Computation, instruction: Instruction) -> Counter[Arithmetic]:
    """Returns the operations of an instruction, or of all that a fusion computes. A multiply-add counts as two."""
    if instruction.op in ("fusion", "async-start"):
        inside = (computations[name] for name in instruction.called)
        return sum((operations(computations, fused, inner) for fused in inside for inner in fused.values()), Counter())
    types = operand_types(computation, instruction)
    if not (count := _count(types, instruction)):
        return Counter()
    return Counter({_arithmetic(types, instruction): count})


def _count(types: list[str], instruction: Instruction) -> int:
    if instruction.op == "dot":
        return _product(types[0], instruction.type, r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    if instruction.op == "convolution":
        return _convolution(types[0], types[1], instruction.type, instruction.attributes)
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes) if "custom" in instruction.op else None
    if target and target[1].startswith("__cublas$"):
        axes = r'"lhs_contracting_dimensions":\[([\d,"]*)\]'
        return _product(types[0], instruction.type, axes, instruction.attributes)
    if target and target[1] == "tpu_custom_call":  # the kernels of this package say how much they compute
        said = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return int(said[1]) if said else 0
    for name, parts in PARTS.items():
        if target and target[1].startswith(name):
            found = dict(zip(parts, (*types[:2], instruction.type), strict=True))
            return _convolution(found["input"], found["kernel"], found["output"], instruction.attributes)
    return 0


def _arithmetic(types: list[str], instruction: Instruction) -> Arithmetic:
    """Returns the arithmetic of a product, which depends on the wider of its operands and on XLA's precision."""
    if all(dtype(operand) in HALF for operand in types[:2]):
        return "bfloat16"
    found = re.search(r'operand_precision(?:=\{|":\[)([\w,"]*)', instruction.attributes)
    asked = found[1].lower().replace('"', "").split(",") if found else []
    return f"float32 {next((precision for precision in ('highest', 'high') if precision in asked), 'default')}"


def _product(left: str, result: str, axes: str, attributes: str) -> int:
    """Returns the operations of a matrix product whose attributes name the axes of the left operand that are summed."""
    (summed,) = re.findall(axes, attributes)
    lengths = sizes(left)
    return 2 * math.prod(sizes(result)) * math.prod(lengths[int(axis)] for axis in re.findall(r"\d+", summed))


def _convolution(input: str, kernel: str, output: str, attributes: str) -> int:
    """Returns the operations of a convolution. Taps in padding or between steps of a dilated input do not count."""
    (labels,) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    types = map(sizes, (input, kernel, output))
    inputs, kernels, outputs = (dict(zip(*pair, strict=True)) for pair in zip(labels, types, strict=True))
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", " ".join(re.findall(r"window=\{(.*?)\}", attributes))))
    count = 2 * outputs["b"] * outputs["f"] * kernels["i"]
    for number, axis in enumerate(sorted(label for label in labels[2] if label.isdigit())):
        tap = np.arange(kernels[axis])[None] * _option(window, "rhs_dilate", number, 1) - _option(
            window, "pad", number, 0
        )
        position = np.arange(outputs[axis])[:, None] * _option(window, "stride", number, 1) + tap
        spread = _option(window, "lhs_dilate", number, 1)
        inside = (position >= 0) & (position <= (inputs[axis] - 1) * spread) & (position % spread == 0)
        count *= int(np.count_nonzero(inside))
    return count


def _option(window: dict[str, str], name: str, axis: int, default: int) -> int:
    """Returns the value that a window's option such as `pad=3_1x0_0` has for an axis: the first number, here 3 or 0."""
    return int(window[name].split("x")[axis].split("_")[0]) if name in window else default
