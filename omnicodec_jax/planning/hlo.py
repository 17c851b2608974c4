"""Counts what a compiled program does, from its text: operations, memory traffic and collectives.

XLA's own analysis counts the body of a loop once, however often the loop runs, and a step loops over its micro-batches.
Here the body counts as often as it runs. Where XLA cannot say how often that is, it counts once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "c64": 8, "f64": 8, "s64": 8, "u64": 8}
"""Bytes of an element by its type. Elements of all other types have 4."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
"""Operations that read and write no memory themselves."""

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?=, |$)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .*\{$")
_NAMES = re.compile(r"%([\w.-]+)")


class Instruction(NamedTuple):
    """One line of a computation."""

    type: str
    op: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return _NAMES.findall(self.arguments)

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        lists = re.findall(r"(?:calls|body|condition|to_apply|\w*computations?)=(\{[^}]*\}|%\S+)", self.attributes)
        return _NAMES.findall(" ".join(lists))


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations in `compiled.as_text()` by name, and the name of the one that runs first."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            computations[name][found[1]] = Instruction(*found.groups()[1:])
    return computations, entry


class Totals(NamedTuple):
    """The counts of one run of a program on one device."""

    flops: int
    """Operations of matrix products and convolutions. A multiplication with its addition counts as 2."""
    bytes_accessed: int
    """Bytes that are read from memory and written to it. What stays in on-chip memory does not count."""
    collectives: dict[str, int]
    """Bytes by kind of collective. What counts is the larger of its operands and its result."""


def totals(text: str) -> Totals:
    """Returns what a program does, from its `compiled.as_text()`."""
    computations, entry = parse(text)
    flops = moved = 0
    collectives: dict[str, int] = {}
    hidden: set[tuple[str, str, int]] = set()
    for computation, instruction, times in _running(computations, entry, 1):
        operands = [computation[name].type if name in computation else "" for name in instruction.operands]
        flops += times * _flops(computations, operands, instruction)
        for found in _collectives(computations, operands, instruction):
            if instruction.op == "fusion":  # a collective that runs behind several fusions is in each of them
                if found in hidden:
                    continue
                hidden.add(found)
            kind, _, size = found
            collectives[kind] = collectives.get(kind, 0) + times * size
        if instruction.op not in FREE and not instruction.op.endswith("-done"):
            moved += times * _moved(computations, operands, instruction)
    return Totals(flops, moved, collectives)


def _collectives(
    computations: dict[str, Computation], operands: list[str], instruction: Instruction
) -> Iterator[tuple[str, str, int]]:
    """Yields kind, channel and bytes of each collective that the instruction is or contains."""
    kind = instruction.op.removesuffix("-start")
    if kind in COLLECTIVES:
        given = sum(map(num_bytes, operands))
        # The start of an asynchronous all-gather returns a tuple of the operands and the result.
        result = num_bytes(instruction.type) - (given if instruction.op == "all-gather-start" else 0)
        channel = re.search(r"channel_id=\d+", instruction.attributes)
        size = given if kind == "collective-permute" else max(given, result)
        yield kind, channel[0] if channel else instruction.arguments, size
    elif instruction.op in ("fusion", "async-start"):
        for name in instruction.called:
            inside = computations[name]
            for inner in inside.values():
                yield from _collectives(computations, [inside[o].type for o in inner.operands], inner)


def _running(
    computations: dict[str, Computation], name: str, times: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields every instruction outside of fusions with its computation, and how often it runs.

    All branches of a conditional count.
    """
    for instruction in computations[name].values():
        yield computations[name], instruction, times
        if instruction.op in ("while", "call", "conditional"):
            inside = times * (_trips(computations, instruction) if instruction.op == "while" else 1)
            for called in instruction.called:
                yield from _running(computations, called, inside)


def _trips(computations: dict[str, Computation], loop: Instruction) -> int:
    """Returns how often a loop runs: the constant that its condition compares the counter with; 1 if there is none."""
    (condition,) = re.findall(r"condition=%([\w.-]+)", loop.attributes)
    inside = list(computations[condition].values())
    inside += [inner for outer in inside for name in outer.called for inner in computations[name].values()]
    constants = [int(i.arguments) for i in inside if i.op == "constant" and i.type.startswith(("s32[]", "u32[]"))]
    return max(constants, default=1)


def num_bytes(type: str, on_chip: bool = True) -> int:
    """Returns the bytes of all arrays of a type, with or without the arrays in on-chip memory."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(_numbers(sizes))
        for dtype, sizes, layout in _ARRAY.findall(type)
        if on_chip or "S(" not in layout
    )


def _moved(computations: dict[str, Computation], operands: list[str], instruction: Instruction) -> int:
    """Returns the bytes that an instruction reads from memory and writes to it."""
    read = [num_bytes(operand, on_chip=False) for operand in operands]
    written = num_bytes(instruction.type, on_chip=False)
    if instruction.op == "dynamic-slice":
        return 2 * written
    if instruction.op == "dynamic-update-slice":
        return 2 * read[1]
    if instruction.op.endswith("-start"):
        return written
    for fused in map(computations.__getitem__, instruction.called if instruction.op == "fusion" else []):
        for name, parameter in fused.items():
            users = [user for user in fused.values() if name in user.operands]
            if parameter.op != "parameter" or not read[int(parameter.arguments)]:
                continue
            if all(user.op in ("slice", "dynamic-slice") for user in users):
                read[int(parameter.arguments)] = sum(num_bytes(user.type) for user in users)
            elif all(user.op == "dynamic-update-slice" and user.operands[0] == name for user in users):  # in place
                read[int(parameter.arguments)] = 0
                written -= num_bytes(parameter.type) - sum(num_bytes(fused[user.operands[1]].type) for user in users)
    return sum(read) + max(0, written)


def _flops(computations: dict[str, Computation], operands: list[str], instruction: Instruction) -> int:
    """Returns the operations of an instruction, with those of the computations of a fusion."""
    if instruction.op == "fusion":
        insides = (computations[name] for name in instruction.called)
        return sum(
            _flops(computations, [inside[name].type for name in inner.operands], inner)
            for inside in insides
            for inner in inside.values()
            if inner.op in ("fusion", "dot", "convolution")
        )
    if instruction.op == "dot":
        (axes,) = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = _sizes(operands[0])
        return 2 * math.prod(_sizes(instruction.type)) * math.prod(sizes[axis] for axis in _numbers(axes))
    if instruction.op == "convolution":
        return _convolution_flops(operands, instruction)
    return 0


def _convolution_flops(operands: list[str], instruction: Instruction) -> int:
    """Returns the operations of a convolution. Taps in padding or between steps of a dilated input do not count."""
    (labels,) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    types = (*operands, instruction.type)
    inputs, kernel, outputs = (dict(zip(*pair, strict=True)) for pair in zip(labels, map(_sizes, types), strict=True))
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", " ".join(re.findall(r"window=\{(.*?)\}", instruction.attributes))))
    flops = 2 * outputs["b"] * outputs["f"] * kernel["i"]
    for number, axis in enumerate(sorted(label for label in labels[2] if label.isdigit())):
        tap = np.arange(kernel[axis])[None] * _option(window, "rhs_dilate", number, 1) - _option(
            window, "pad", number, 0
        )
        position = np.arange(outputs[axis])[:, None] * _option(window, "stride", number, 1) + tap
        spread = _option(window, "lhs_dilate", number, 1)
        inside = (position >= 0) & (position <= (inputs[axis] - 1) * spread) & (position % spread == 0)
        flops *= int(np.count_nonzero(inside))
    return flops


def _option(window: dict[str, str], name: str, axis: int, default: int) -> int:
    """Returns the value of one axis of a window's option such as `pad=3_1x0_0`; of padding, that before the input."""
    return int(window[name].split("x")[axis].split("_")[0]) if name in window else default


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _sizes(type: str) -> list[int]:
    return _numbers(_ARRAY.findall(type)[0][1])
