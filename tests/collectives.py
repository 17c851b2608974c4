"""What the devices of a compiled program exchange: every collective, what it carries, and between which devices."""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
INSTRUCTION = re.compile(rf"%\S+ = (?P<type>\(.*?\)|\S+) (?P<kind>{KINDS})(?:-start)?\(.*?\), (?P<rest>.*)")
ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
ARRAY = re.compile(r"\w+\[([\d,]*)\]")
CLIPS = 13
"""How many clips a device has: a prime number that divides no side of what has no clips for an axis."""


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the arrays that the collective gives."""
    groups: tuple[tuple[int, ...], ...]
    """Numbers of the devices that exchange something with each other."""
    name: str
    """Where it comes from."""


def listed(text: str) -> list[Collective]:
    """Every collective of `compiled.as_text()`, those inside of loops and branches too."""
    return [
        Collective(
            found["kind"],
            tuple(tuple(map(int, filter(None, sizes.split(",")))) for sizes in ARRAY.findall(found["type"])),
            groups(found["rest"]),
            "".join(re.findall(r'op_name="([^"]*)"', found["rest"])),
        )
        for found in INSTRUCTION.finditer(text)
    ]


def groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The devices that exchange something, in each of the ways in which XLA writes them."""
    if pairs := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", pairs[1]))
    if axes := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({ORDER}\))? \{{([^}}]*)\}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        named = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", axes[4])]
        assert len(named) == len(axes[4].split(",")), attributes
        devices = ordered(axes[2] or str(math.prod(sizes.values())), axes[3]).reshape(*sizes.values())
        devices = np.moveaxis(devices, named, range(-len(named), 0))
        return tuple(map(tuple, devices.reshape(-1, math.prod(devices.shape[-len(named) :])).tolist()))
    counted = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={ORDER}", attributes)
    assert counted, attributes
    return tuple(map(tuple, ordered(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2])).tolist()))


def ordered(sizes: str, axes: str | None) -> np.ndarray:
    """All devices in the order that [2,4]T(1,0) stands for."""
    shape = tuple(map(int, sizes.split(",")))
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose(tuple(map(int, axes.split(",")))) if axes else devices).ravel()


def between_clips(mesh: Mesh, found: Collective) -> bool:
    """Whether devices exchange something that have different clips: those with other places along data or fsdp."""
    numbers = [device.id for device in mesh.devices.flat]
    clips = {number: place // mesh.shape["tensor"] for place, number in enumerate(numbers)}
    return any(len({clips[device] for device in group}) > 1 for group in found.groups)


def batch_size(mesh: Mesh, accumulation: int = 1) -> int:
    """A batch of which every device has CLIPS clips, and so has every micro-batch."""
    return CLIPS * mesh.shape["data"] * mesh.shape["fsdp"] * accumulation


def carrying_clips(mesh: Mesh, text: str) -> list[str]:
    """The collectives that bring something of one clip to a device that has other clips, as lines to read.

    The program is one of a batch of `batch_size`. What has clips for an axis, however that is folded into others, has a
    multiple of CLIPS elements: on a device, and gathered. Nothing else has: no kernel, gradient, statistic or scalar.
    Devices that share the same clips and compute parts of them (the axis `tensor`) may exchange these.
    """
    return [
        f"{found.kind} of {shape} by {found.name}"
        for found in listed(text)
        if between_clips(mesh, found)
        for shape in found.shapes
        if math.prod(shape) % CLIPS == 0
    ]
