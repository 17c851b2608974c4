"""Counts what a compiled program does, from its text: operations, memory traffic and exchanges between chips."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from omnicodec_jax.planning import collectives, hlo
from omnicodec_jax.planning.collectives import Collective
from omnicodec_jax.planning.hlo import Computation, Computations, Instruction, num_bytes
from omnicodec_jax.planning.operations import operations
from omnicodec_jax.planning.speeds import Arithmetic, Chip

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
"""The operations that read and write no memory themselves."""


class Totals(NamedTuple):
    """The counts of one run of a program on one device."""

    operations: Counter[Arithmetic]
    """The operations of matrix products and convolutions. A multiply-add counts as 2."""
    bytes_accessed: int
    """The bytes that are read from memory and written to it. Arrays in on-chip memory do not count."""
    exchanges: Counter[Collective]
    """The number of times that each exchange between chips takes place."""

    @property
    def flops(self) -> int:
        """The number of operations in all kinds of arithmetic."""
        return self.operations.total()

    @property
    def collectives(self) -> dict[str, int]:
        """The bytes of the exchanges by their kind: of the operands or of the result, whichever are more."""
        return collectives.by_kind(self.exchanges)


class Count(NamedTuple):
    """The counts of one instruction, times the number of times that it runs."""

    operation: str
    """XLA's name of the operation, such as `fusion`."""
    origin: str
    """The `op_name` that JAX gave the instruction, or else that of the instruction that computes its first operand."""
    operations: Counter[Arithmetic]
    bytes_accessed: int

    def seconds(self, chip: Chip) -> float:
        """Returns the time at full speed: that of the operations or of the memory traffic, whichever is longer."""
        computing = sum((count / chip.speeds[arithmetic] for arithmetic, count in self.operations.items()), 0.0)
        return max(computing, self.bytes_accessed / chip.bandwidth)


def counts(computations: Computations, entry: str) -> Iterator[Count]:
    """Yields the counts of every instruction of a program outside of fusions; see `hlo.parse`."""
    for computation, instruction, times in hlo.running(computations, entry):
        found = operations(computations, computation, instruction)
        for arithmetic in found:
            found[arithmetic] *= times
        moved = 0
        if instruction.op not in FREE and not instruction.op.endswith("-done"):
            moved = times * _moved(computations, hlo.operand_types(computation, instruction), instruction)
        if moved or found:
            yield Count(instruction.op, _origin(computation, instruction), found, moved)


def _origin(computation: Computation, instruction: Instruction) -> str:
    while not (name := re.search(r'op_name="([^"]*)"', instruction.attributes)):
        before = [operand for operand in instruction.operands if operand in computation]
        if not before:
            return ""
        instruction = computation[before[0]]
    return name[1]


def totals(text: str) -> Totals:
    """Returns the totals of a program, from its `compiled.as_text()`."""
    computations, entry = hlo.parse(text)
    found: Counter[Arithmetic] = Counter()
    moved = 0
    for count in counts(computations, entry):
        found += count.operations
        moved += count.bytes_accessed
    return Totals(found, moved, _exchanges(computations, entry))


def _exchanges(computations: Computations, entry: str) -> Counter[Collective]:
    exchanges: Counter[Collective] = Counter()
    hidden: set[Collective] = set()
    for computation, instruction, times in hlo.running(computations, entry):
        for collective in collectives.collectives(computations, computation, instruction):
            if instruction.op == "fusion":  # each of the fusions that run at the same time as an exchange contains it
                if collective in hidden:
                    continue
                hidden.add(collective)
            exchanges[collective] += times
    return exchanges


def _moved(computations: Computations, operands: list[str], instruction: Instruction) -> int:
    """Returns the bytes that an instruction reads from memory and writes to it."""
    read = [num_bytes(operand, on_chip=False) for operand in operands]
    written = num_bytes(_without_workspace(instruction), on_chip=False)
    if instruction.op in ("slice", "dynamic-slice"):
        return (num_bytes(instruction.type) if read[0] else 0) + written
    if instruction.op == "dynamic-update-slice":
        return read[1] + (num_bytes(operands[1]) if written else 0)
    if instruction.op == "async-start":  # it may fetch a slice ahead, and its type holds the whole operand
        inside = [computations[name] for name in instruction.called]
        moves = [(fused, inner) for fused in inside for inner in fused.values() if inner.op not in FREE]
        return sum(_moved(computations, hlo.operand_types(fused, inner), inner) for fused, inner in moves)
    if instruction.op == "send":
        return sum(read)
    if instruction.op == "custom-call":  # a kernel may take one array twice, for pieces of it and for their halos
        read = list(dict(zip(instruction.operands, read, strict=True)).values())
    if instruction.op.endswith("-start") or instruction.op == "recv":
        return written
    for fused in map(computations.__getitem__, instruction.called if instruction.op == "fusion" else []):
        operands_of = [(user, user.operands) for user in fused.values()]
        for name, parameter in fused.items():
            if parameter.op != "parameter" or not read[int(parameter.arguments)]:
                continue
            users = [user for user, used in operands_of if name in used]
            if all(user.op in ("slice", "dynamic-slice") for user in users):
                read[int(parameter.arguments)] = sum(num_bytes(user.type) for user in users)
            elif all(user.op == "dynamic-update-slice" and user.operands[0] == name for user in users):  # in place
                read[int(parameter.arguments)] = 0
                written -= num_bytes(parameter.type) - sum(num_bytes(fused[user.operands[1]].type) for user in users)
    return sum(read) + max(0, written)


def _without_workspace(instruction: Instruction) -> str:
    """Returns the type of a result without the workspace that a call of one of NVIDIA's libraries returns beside it."""
    is_call = instruction.op == "custom-call" and re.search(r'target="__cu(dnn|blas)', instruction.attributes)
    return re.sub(r", [su]8\[\d+\](\{[^{}]*\})?\)$", ")", instruction.type) if is_call else instruction.type
