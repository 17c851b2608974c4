"""Breaks a compiled program down: what each part of the networks, and each operation, moves and computes.

XLA keeps the origin of an instruction: `jit(train_step)/transpose(jvp(OmniCodec))/encoder/conv_in/dot_general` is a
product in the backward pass of a convolution of the encoder. Parts are modules and the scopes of `jax.named_scope`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from omnicodec_jax.planning import hlo
from omnicodec_jax.planning.speeds import Chip
from omnicodec_jax.planning.totals import Count, counts

SMALL = 0.05
"""The share of the bytes up to which a part is not divided into its own parts."""
REST = "(rest)"
"""The name for the instructions of a part that are in none of its own parts."""
CONTROL = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat", "custom_vjp_call"}
"""Names in the origin of an instruction that stand for control flow and not for a part."""


class Needs(NamedTuple):
    """The bytes, operations and seconds that a part, or an operation, needs in a program."""

    name: str
    bytes_accessed: int
    flops: int
    seconds: float
    """The sum of the instructions' rooflines."""


class OpName(NamedTuple):
    """The origin of an instruction: the modules that it belongs to, and its operation."""

    path: tuple[str, ...]
    """The names of the modules and scopes, the outermost first."""
    operation: str
    """JAX's name of the operation, and whether it belongs to a backward pass."""

    @classmethod
    def parse(cls, op_name: str) -> "OpName":
        """Reads XLA's `op_name`. A fusion of several instructions has the name of one of them."""
        *scopes, operation = op_name.split("/")
        path = dict.fromkeys(name for scope in scopes if (name := _scope(scope)))
        operation = "argument" if "[" in operation else operation
        is_backward = any(scope.startswith("transpose(") for scope in scopes)
        return cls(tuple(path), operation + " (backward)" * is_backward)


def _scope(text: str) -> str | None:
    """Returns the name of a module or scope without the transformations around it; None if it is no part.

    A method has the name of its module. Functions that are jitted by themselves, and branches of control flow, are no
    parts.
    """
    while wrapped := re.fullmatch(r"(\w+)\((.*)\)", text):
        if wrapped[1] in ("jit", "pjit"):
            return None
        text = wrapped[2]
    if "<locals>" in text or text in CONTROL or text.startswith("branch_"):
        return None
    return text.split(".")[0] or None


def by_part(found: Sequence[Count], chip: Chip) -> list[Needs]:
    """Returns the parts of a program from its counts, the largest first. A name begins with those of the outer parts.

    A part is divided as long as it moves more than the share `SMALL` of all bytes.
    """
    small = SMALL * sum(count.bytes_accessed for count in found)
    return _divided((), [(OpName.parse(count.origin).path, count) for count in found], chip, small)


def _divided(
    inside: tuple[str, ...], found: list[tuple[tuple[str, ...], Count]], chip: Chip, small: float
) -> list[Needs]:
    depth, parts = len(inside), dict[str, list[tuple[tuple[str, ...], Count]]]()
    for path, count in found:
        parts.setdefault(path[depth] if len(path) > depth else REST, []).append((path, count))
    rows = []
    for name, own in parts.items():
        row = _row("/".join([*inside, name]), (count for _, count in own), chip)
        may_divide = name != REST and row.bytes_accessed > small and any(len(path) > depth + 1 for path, _ in own)
        rows.append((row, _divided((*inside, name), own, chip, small) if may_divide else []))
    rows.sort(key=lambda pair: -pair[0].bytes_accessed)
    return [row for pair in rows for row in (pair[0], *pair[1])]


def by_operation(found: Sequence[Count], chip: Chip) -> list[Needs]:
    """Returns the operations of a program from its counts, the largest first."""
    operations: dict[str, list[Count]] = {}
    for count in found:
        operations.setdefault(OpName.parse(count.origin).operation or count.operation, []).append(count)
    rows = [_row(name, own, chip) for name, own in operations.items()]
    return sorted(rows, key=lambda row: -row.bytes_accessed)


def _row(name: str, own: Iterable[Count], chip: Chip) -> Needs:
    own = list(own)
    moved, flops = sum(count.bytes_accessed for count in own), sum(count.operations.total() for count in own)
    return Needs(name, moved, flops, sum(count.seconds(chip) for count in own))


def breakdown(text: str, chip: Chip) -> str:
    """Returns the tables of parts and of operations for a program, from its `compiled.as_text()`."""
    found = list(counts(*hlo.parse(text)))
    parts, operations = by_part(found, chip), by_operation(found, chip)
    return f"{_table('part', parts, operations)}\n\n{_table('operation', operations, operations)}"


def _table(title: str, rows: list[Needs], operations: list[Needs]) -> str:
    """Returns a table below the total of the operations. Rows below a thousandth of the total are left out."""
    everything = Needs("all", *(sum(column) for column in zip(*(row[1:] for row in operations), strict=True)))
    shown = [everything, *(row for row in rows if row.seconds >= everything.seconds / 1000)]
    width = max(len(_indented(row.name)) for row in (*shown, Needs(title, 0, 0, 0.0)))
    lines = [f"{title:{width}}{'GB':>10}{'TFLOP':>10}{'ms':>10}"]
    for row in shown:
        numbers = f"{row.bytes_accessed / 1e9:10.2f}{row.flops / 1e12:10.3f}{1e3 * row.seconds:10.2f}"
        lines.append(f"{_indented(row.name):{width}}{numbers}")
    return "\n".join(lines)


def _indented(name: str) -> str:
    """Returns the last name of a part, indented by the number of its outer parts."""
    *around, last = name.split("/")
    return "  " * len(around) + last
