"""Finds what chips exchange with each other, and how long that takes at best."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from omnicodec_jax.planning.hlo import Computation, Computations, Instruction, num_bytes, operand_types
from omnicodec_jax.planning.speeds import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """One exchange of arrays between the chips of a group."""

    kind: str
    group: tuple[int, ...]
    """The numbers of the chips of the first group. Other groups are as large, and exchange at the same time."""
    channel: str
    """The name that tells an exchange from others of its kind."""
    size: int
    """The bytes of the operands or of the result, whichever are more."""
    slices: int = 1
    """The number of slices of TPUs that take part, over the network of the data centre; 1: it stays in one slice."""

    def is_slow(self, per_host: int) -> bool:
        """Returns whether the exchange goes over the network between hosts of GPUs, or between slices of TPUs."""
        return self.slices > 1 or len({member // per_host for member in self.group}) > 1

    def seconds(self, chip: Chip, per_host: int) -> float:
        """Returns how long the exchange takes at best, if every chip sends and receives all the time.

        In a ring, each of n chips sends (n - 1) / n of the array to its neighbour; for an all-reduce, it does so twice,
        to reduce the array and to gather the result. Groups that reach beyond a host share the hosts' network.
        """
        members = self.slices if self.slices > 1 else max(1, len(self.group))
        sent = self.size if self.kind.startswith("collective") else self.size * (members - 1) / members
        sent *= 2 if self.kind == "all-reduce" else 1
        if self.slices > 1:  # each chip exchanges its part with the chips in the same place of the other slices
            return sent / min(chip.links, chip.network or chip.links)
        on_host = sum(member // per_host == self.group[0] // per_host for member in self.group)
        if chip.network is None or on_host == len(self.group):
            return sent / chip.links
        return sent / min(chip.links, chip.network * on_host)


def collectives(computations: Computations, computation: Computation, instruction: Instruction) -> Iterator[Collective]:
    """Yields each exchange that an instruction is or contains."""
    kind = instruction.op.removesuffix("-start")
    if kind in KINDS:
        given = sum(map(num_bytes, operand_types(computation, instruction)))
        # The start of an asynchronous all-gather returns a tuple of the operands and the result.
        result = num_bytes(instruction.type) - (given if instruction.op == "all-gather-start" else 0)
        channel = re.search(r"channel_id=\d+", instruction.attributes)
        size = given if kind == "collective-permute" else max(given, result)
        group = first_group(instruction.attributes)
        yield Collective(kind, group, channel[0] if channel else instruction.arguments, size)
    elif instruction.op == "send" and (kind := _between_slices(instruction.attributes)):
        size = num_bytes(operand_types(computation, instruction)[0])
        rendezvous = re.search(r'host_transfer_rendezvous="([^"]*)"', instruction.attributes)
        name = rendezvous[1] if rendezvous else instruction.arguments
        yield Collective(kind, (), name, size, num_slices(instruction.attributes))
    elif instruction.op in ("fusion", "async-start"):
        for name in instruction.called:
            for inner in computations[name].values():
                yield from collectives(computations, computations[name], inner)


def _between_slices(attributes: str) -> str | None:
    """Returns the kind of the exchange between slices that a transfer to the host belongs to; None: to none."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    return kind[1].lower().replace("_", "-") if kind else None


def num_slices(attributes: str) -> int:
    """Returns how many slices take part in an exchange: libtpu writes `{1,2}x{0:3}`, slices x chips of each."""
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attributes)
    count = 0
    for part in target[1].split(",") if target else ():
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    return max(2, count)


def first_group(attributes: str) -> tuple[int, ...]:
    """Returns the first group of chips in the attributes of an exchange; empty where all chips are in one group.

    XLA writes groups as lists (`{{0,1},{2,3}}`), as an array of numbers (`[2,2]<=[2,2]T(1,0)`: 0, 1, 2, … reshaped,
    transposed and reshaped again), or by axes of a mesh (`mesh['a'=2,'b'=2] {'b'}`).
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return tuple(int(number) for number in listed[1].split(","))
    if array := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, shape, order = (
            [int(number) for number in (part or "").split(",") if number] for part in array.groups()
        )
        numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))
        return tuple(numbers.reshape(groups)[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        used = re.findall(r"'(\w+)'", mesh[2])
        return tuple(numbers[tuple(slice(None) if axis in used else 0 for axis in axes)].ravel().tolist())
    return ()


def by_kind(found: Counter[Collective]) -> dict[str, int]:
    """Returns the bytes of all exchanges by their kind."""
    sums: Counter[str] = Counter()
    for collective, times in found.items():
        sums[collective.kind] += times * collective.size
    return dict(sums)
