"""Reads the text of a compiled program: its computations, how often instructions run, and the bytes of arrays.

XLA's own analysis counts the body of a loop once, however often the loop runs, and a step loops over its micro-batches.
Here the body counts as often as it runs, or once if XLA cannot say how often that is.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    "token": 0,
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "c64": 8,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
"""The bytes of an element by its type. Elements of all other types have 4 bytes."""

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?=, |$)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .*\{$")
_NAMES = re.compile(r"%([\w.#-]+)")


class Instruction(NamedTuple):
    """An instruction of HLO, which is one line of a computation."""

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
        """The names of the computations that the instruction runs."""
        lists = re.findall(r"(?:calls|body|condition|to_apply|\w*computations?)=(\{[^}]*\}|%\S+)", self.attributes)
        return _NAMES.findall(" ".join(lists))


Computation = dict[str, Instruction]
Computations = dict[str, Computation]


def parse(text: str) -> tuple[Computations, str]:
    """Returns the computations in `compiled.as_text()` by name, and the name of the one that runs first.

    For GPUs, XLA of JAX 0.11 writes `%name#1` for element 1 of a tuple, without an instruction of its own. Such an
    instruction is added here.
    """
    computations: Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = Instruction(*found.groups()[1:])
            for operand in instruction.operands:
                _add_element(computations[name], operand)
            computations[name][found[1]] = instruction
    return computations, entry


def _add_element(computation: Computation, operand: str) -> None:
    """Adds the instruction that takes an element of a tuple to a computation, where an operand is such an element."""
    of, _, index = operand.rpartition("#")
    if of and operand not in computation:
        _add_element(computation, of)
        element = elements(computation[of].type)[int(index)]
        computation[operand] = Instruction(element, "get-tuple-element", f"%{of}", f", index={index}")


def operand_types(computation: Computation, instruction: Instruction) -> list[str]:
    """Returns the types of the operands of an instruction."""
    return [computation[name].type if name in computation else "" for name in instruction.operands]


def running(computations: Computations, name: str, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields every instruction outside of fusions with its computation, and how often it runs.

    All branches of a conditional count.
    """
    for instruction in computations[name].values():
        yield computations[name], instruction, times
        if instruction.op in ("while", "call", "conditional"):
            inside = times * (_trips(computations, instruction) if instruction.op == "while" else 1)
            for called in instruction.called:
                yield from running(computations, called, inside)


def _trips(computations: Computations, loop: Instruction) -> int:
    """Returns how often a loop runs: what XLA knows, or the constant that its condition compares the counter with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    (condition,) = re.findall(r"condition=%([\w.-]+)", loop.attributes)
    inside = list(computations[condition].values())
    inside += [inner for outer in inside for name in outer.called for inner in computations[name].values()]
    constants = [int(i.arguments) for i in inside if i.op == "constant" and i.type.startswith(("s32[]", "u32[]"))]
    return max(constants, default=1)


# -- Types


def dtype(type: str) -> str:
    """Returns the element type of the first array of a type."""
    found = _ARRAY.search(type)
    return found[1] if found else ""


@functools.lru_cache(maxsize=1024)
def elements(type: str) -> list[str]:
    """Returns the types of the elements of a tuple, such as the two of `(f32[8]{0}, (s32[], pred[]))`."""
    found, depth = [""], 0
    for character in type[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [element.strip() for element in found]


def sizes(type: str) -> list[int]:
    """Returns the lengths of the axes of the first array of a type."""
    return _numbers(_ARRAY.findall(type)[0][1])


def num_bytes(type: str, on_chip: bool = True) -> int:
    """Returns the bytes that all arrays of a type take up, with or without the arrays in on-chip memory.

    A TPU keeps arrays in tiles, such as 8 x 128 elements, of which the last along each axis is padded. The padding
    counts, since it takes memory, and is read and written with the rest.
    """
    return sum(
        BYTES.get(dtype, 4) * _padded_elements(_numbers(axes), layout)
        for dtype, axes, layout in _ARRAY.findall(type)
        if on_chip or "S(" not in layout
    )


def _padded_elements(axes: list[int], layout: str) -> int:
    """Returns the number of elements of an array with its padding; a layout is such as `2,1,0:T(8,128)(2,1)`.

    A layout lists the axes from the minor one, whose elements are neighbours in memory, to the major one. The first
    tile divides the minor axes, and each other tile divides the tile before it.
    """
    order, _, properties = layout.partition(":")
    shape = [axes[axis] for axis in reversed(_numbers(order))] if order else axes
    tiles = re.match(r"T((?:\([\d,]*\))+)", properties)
    for tile in re.findall(r"\(([\d,]*)\)", tiles[1] if tiles else ""):
        lengths = _numbers(tile)
        shape = [1] * (len(lengths) - len(shape)) + shape
        whole, cut = shape[: len(shape) - len(lengths)], shape[len(shape) - len(lengths) :]
        shape = [*whole, *(-(-size // length) for size, length in zip(cut, lengths, strict=True)), *lengths]
    return math.prod(shape)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
