"""Continuous batching: one compiled program for sequences of any length and any number.

A step of a causal model has a fixed shape, rows x block. Each row is a lane that works through its own sequence, block
after block, and takes the next sequence when that one ends, so that nothing is padded but the last block of each:

    row 0   ├─ clip a ─┼─ clip a ─┼─ clip a ┄┼─ clip d ─┼─ …
    row 1   ├─ clip b ┄┼─ clip c ─┼─ clip c ─┼─ clip c ─┼─ …

What a row gives depends on its own sequence alone. A compiler may round differently for every shape; so the shape on a
device is always the same, and more devices run more of the same.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnicodec_jax.models.conv import STREAM

ACCELERATOR_ROWS = 64
"""Lanes of a GPU or TPU. A CPU has one: that fills the cores, and more would only spill the caches."""
STEPS_AHEAD = 2
"""Steps that are under way before the result of the first of them is fetched."""

Variables = dict[str, Any]
State = dict[str, Any]
Inputs = tuple[np.ndarray | np.generic, ...]


class Work(NamedTuple):
    """A sequence in blocks."""

    key: Any
    """Comes back with the result."""
    blocks: int
    block: Callable[[int], Inputs]
    """A row's inputs in its i-th block, always of the same shapes."""
    steps: int
    """Valid steps of the result, over all blocks."""
    valid: float
    """Share of the blocks' inputs that is no padding."""


class Lane(NamedTuple):
    """What a row did in one step."""

    work: Work
    position: int
    outputs: list[np.ndarray]


def advance(
    model: nn.Module, method: Any, variables: Variables, state: State, fresh: jax.Array, *inputs: jax.Array
) -> tuple[jax.Array, State]:
    """One block of each row: the outputs, and the state for the next. Rows that are `fresh` [B] begin anew."""

    def restart(leaf: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros_like(leaf), leaf)

    carried = jax.tree.map(restart, state)
    output, after = model.apply({**variables, **carried}, *inputs, method=method, mutable=[STREAM])
    return output, dict(after)


class Lanes:
    """Runs sequences through `advance`, on all rows of all devices at once."""

    def __init__(
        self,
        model: nn.Module,
        method: Any,
        variables: Variables,
        axis: int,
        devices: Sequence[Any],
        clock: "Clock | None" = None,
    ):
        """axis: time axis of a row's output."""
        self._axis, self._clock = axis, clock
        self.rows = len(devices) * (1 if devices[0].platform == "cpu" else ACCELERATOR_ROWS)
        mesh = Mesh(np.array(devices), ("rows",))
        everywhere, rows = PartitionSpec(), PartitionSpec("rows")
        self._variables = jax.device_put(variables, NamedSharding(mesh, everywhere))
        self._sharding = NamedSharding(mesh, rows)

        def step(variables: Variables, state: State, fresh: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, State]:
            run = jax.shard_map(
                partial(advance, model, method),
                mesh=mesh,
                in_specs=(everywhere, rows, rows, *(rows for _ in inputs)),
                out_specs=rows,
                check_vma=False,
            )
            return run(variables, state, fresh, *inputs)

        self._advance = partial(advance, model, method)
        self.step = jax.jit(step, donate_argnums=1, out_shardings=self._sharding)
        self.blocks, self.valid = 0, 0.0
        """Computed so far, those of idle rows too; how many of them were no padding."""

    def forget(self) -> None:
        """Counts blocks from here on."""
        self.blocks, self.valid = 0, 0.0

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Any, np.ndarray]]:
        """Keys and results [… steps …], as they end; `works` is read no further than there are free rows."""
        source, lanes = iter(works), [None] * self.rows
        state: State | None = None
        under_way: deque[tuple[jax.Array, list[Lane | None]]] = deque()
        while True:
            lanes = [self._next(lane, source) for lane in lanes]
            busy = any(lanes)
            if busy:
                inputs = self._inputs(lanes)
                fresh = np.array([lane is None or lane.position == 0 for lane in lanes])
                state = self._zeros(inputs) if state is None else state
                output, state = self.step(self._variables, state, *jax.device_put((fresh, *inputs), self._sharding))
                if self._clock is not None:
                    self._clock.started(output)
                self.blocks += self.rows
                under_way.append((output, lanes))
            if len(under_way) > STEPS_AHEAD or not busy:
                if not under_way:
                    return
                yield from self._finished(*under_way.popleft())

    def _next(self, lane: Lane | None, source: Iterator[Work]) -> Lane | None:
        """The row's next block: of its own sequence, or the first of the next one."""
        if lane is not None and lane.position + 1 < lane.work.blocks:
            return lane._replace(position=lane.position + 1)
        work = next(source, None)
        if work is None:
            return None
        self.valid += work.valid * work.blocks
        return Lane(work, 0, [])

    def _inputs(self, lanes: Sequence[Lane | None]) -> Inputs:
        rows = [None if lane is None else lane.work.block(lane.position) for lane in lanes]
        idle = tuple(np.zeros_like(part) for part in next(row for row in rows if row is not None))
        return tuple(np.stack(parts) for parts in zip(*(row or idle for row in rows), strict=True))

    def _zeros(self, inputs: Inputs) -> State:
        fresh = np.ones(self.rows, np.bool_)
        shapes = jax.eval_shape(self._advance, self._variables, {}, fresh, *inputs)[1]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding), shapes)

    def _finished(self, output: jax.Array, lanes: list[Lane | None]) -> Iterator[tuple[Any, np.ndarray]]:
        """Fetches a step's output, and gives the results of the sequences that ended with it."""
        for lane, row in zip(lanes, np.asarray(output), strict=True):
            if lane is None:
                continue
            lane.outputs.append(row)
            if lane.position + 1 == lane.work.blocks:
                whole = np.concatenate(lane.outputs, axis=self._axis)
                yield lane.work.key, whole[(slice(None),) * self._axis + (slice(lane.work.steps),)]


class Use(NamedTuple):
    """What the devices did."""

    blocks: int = 0
    """Computed, those of idle rows too."""
    valid: float = 0.0
    """How many of them were no padding."""
    idle: float = 0.0
    """Seconds without anything to do,"""
    seconds: float = 0.0
    """of these, from the first step to the last."""

    def __add__(self, other: "Use") -> "Use":
        return Use(
            self.blocks + other.blocks,
            self.valid + other.valid,
            self.idle + other.idle,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        padding = 1 - self.valid / max(1, self.blocks)
        return f"padding {padding:.1%}, device idle {self.idle / max(self.seconds, 1e-9):.1%}"


class Clock:
    """How long devices had nothing to do, from the first step to the last."""

    def __init__(self):
        self.forget()
        self._outputs: queue.SimpleQueue[tuple[float, jax.Array]] = queue.SimpleQueue()
        threading.Thread(target=self._watch, daemon=True).start()

    def forget(self) -> None:
        """Begins anew with the next step."""
        self.idle, self._first, self._last = 0.0, None, 0.0

    def started(self, output: jax.Array) -> None:
        """A step that has been handed to the devices."""
        self._outputs.put((time.perf_counter(), output))

    def _watch(self) -> None:
        while True:
            start, output = self._outputs.get()
            if self._first is None:
                self._first = self._last = start
            self.idle += max(0.0, start - self._last)
            jax.block_until_ready(output)
            self._last = time.perf_counter()
            del output

    @property
    def seconds(self) -> float:
        """Between the first step's start and the last one's end."""
        return 0.0 if self._first is None else self._last - self._first
