"""Continuous batching: a few compiled programs for sequences of any length and any number.

A step of a causal model has a fixed shape, rows x block. Each row is a lane that works through its own sequence, block
after block, and takes the next sequence when that one ends:

    row 0   ├─ clip a ─┼─ clip a ─┼ clip a ┼ clip d ┼─ …
    row 1   ├─ clip b ─┼─ clip c ─┼─ clip c ─┼ clip c ┼─ …

Where a sequence is cut depends on its length alone: into long blocks, and the rest into shorter ones, so that little
is padded. What a row gives depends on its own sequence alone. A compiler may round differently for every shape; so
there are but these shapes on every device, and more devices run more of the same.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnicodec_jax.models.conv import STREAM

ACCELERATOR_ROWS = 64
"""Lanes of a GPU or TPU. A CPU has one: that fills the cores, and more would only spill the caches."""
CPU_BLOCKS = (120, 30, 6)
"""Frames of a block. A step costs a CPU as much as twelve frames do, since it reads all weights."""
ACCELERATOR_BLOCKS = (16,)
"""Many rows share that cost."""
STEPS_AHEAD = 2
"""Steps that are under way before the result of the first of them is fetched."""

Variables = dict[str, Any]
State = dict[str, Any]
Inputs = tuple[np.ndarray | np.generic, ...]


class Work(NamedTuple):
    """A sequence."""

    key: Any
    """Comes back with the result."""
    frames: int
    """What it is cut along."""
    block: Callable[[int, int], Inputs]
    """A row's inputs of `size` frames from `start` on; beyond the end, padding."""
    steps: int
    """Valid steps of the result."""
    valid: float
    """Frames that are no padding, to the fraction."""


class Lane(NamedTuple):
    """A row at one of its blocks."""

    work: Work
    start: int
    size: int
    outputs: list[np.ndarray]
    """Of the blocks before."""


def advance(
    model: nn.Module,
    method: Any,
    variables: Variables,
    state: State,
    fresh: jax.Array | None,
    held: jax.Array | None,
    *inputs: jax.Array,
) -> tuple[jax.Array, State]:
    """One block of each row: the outputs, and the state for the next.

    fresh [B]: rows that begin anew. held [B]: rows whose state stays as it is, and whose output says nothing. None: no
    row; to look at the state takes its time.
    """

    def choose(rows: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)

    carried = state
    if fresh is not None:
        carried = jax.tree.map(lambda leaf: choose(fresh, jnp.zeros_like(leaf), leaf), state)
    output, after = model.apply({**variables, **carried}, *inputs, method=method, mutable=[STREAM])
    after = dict(after)
    return output, after if held is None or not state else jax.tree.map(partial(choose, held), state, after)


def _mesh(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices), ("rows",))


def replicated(variables: Variables, devices: Sequence[Any]) -> Variables:
    """Puts weights on every device; those that are there already are not copied, so that several `Lanes` share them."""
    return jax.device_put(variables, NamedSharding(_mesh(devices), PartitionSpec()))


class Program(NamedTuple):
    """What all `Lanes` of one model over the same devices share, so that it is traced and compiled once."""

    advance: Callable[..., Any]
    """`advance` of the model, of one device's rows."""
    step: Callable[..., tuple[jax.Array, State]]
    """The same, jitted, over the rows of all devices: (variables, state, fresh, held, *inputs) → (output, state). The
    state that goes in is given away."""


@lru_cache(maxsize=32)
def program(model: nn.Module, method: Any, mesh: Mesh) -> Program:
    """The program of a model's method over a mesh of one axis, `rows`; nothing is compiled before its first step."""
    everywhere, rows = PartitionSpec(), PartitionSpec("rows")
    advance_rows = partial(advance, model, method)

    def step(variables: Variables, state: State, *rest: jax.Array) -> tuple[jax.Array, State]:
        specs = (everywhere, rows, *(rows for _ in rest))
        run = jax.shard_map(advance_rows, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return run(variables, state, *rest)

    return Program(advance_rows, jax.jit(step, donate_argnums=1, out_shardings=NamedSharding(mesh, rows)))


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
        blocks: tuple[int, ...] | None = None,
    ):
        """axis: time axis of a row's output. blocks: sizes, the largest first, each a multiple of the next."""
        self._axis, self._clock = axis, clock
        on_cpu = devices[0].platform == "cpu"
        self.rows = len(devices) * (1 if on_cpu else ACCELERATOR_ROWS)
        self._blocks = blocks or (CPU_BLOCKS if on_cpu else ACCELERATOR_BLOCKS)
        mesh = _mesh(devices)
        self._variables = replicated(variables, devices)
        self._sharding = NamedSharding(mesh, PartitionSpec("rows"))
        self._advance, self.step = program(model, method, mesh)
        self._shapes: Any = None
        """Of a state. Tracing the model for them takes longer than a short clip does, so it is done once."""
        self.forget()

    def forget(self) -> None:
        """Counts from here on."""
        self.frames, self.valid = 0, 0.0
        """Frames computed, those of idle rows too; how many of them were no padding."""

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Any, np.ndarray]]:
        """Keys and results [… steps …], as they end; `works` is read no further than there are free rows."""
        source, lanes = iter(works), [None] * self.rows
        state: State | None = None
        under_way: deque[tuple[jax.Array, list[Lane | None]]] = deque()
        while True:
            lanes = [lane or self._next(source) for lane in lanes]
            sizes = [lane.size for lane in lanes if lane is not None]
            if sizes:
                size = max(sizes, key=sizes.count)
                running = [lane if lane is not None and lane.size == size else None for lane in lanes]
                fresh = np.array([lane is None or lane.start == 0 for lane in running])
                held = np.array([lane is None for lane in running])
                inputs = self._inputs(running)
                state = self._zeros(inputs) if state is None else state
                arguments = jax.device_put((fresh, held, *inputs), self._sharding)
                output, state = self.step(self._variables, state, *arguments)
                if self._clock is not None:
                    self._clock.started(output)
                self.frames += self.rows * size
                self.valid += sum(_valid(lane) for lane in running if lane is not None)
                under_way.append((output, running))
                lanes = [lane if ran is None else self._after(ran) for lane, ran in zip(lanes, running, strict=True)]
            if len(under_way) > STEPS_AHEAD or not sizes:
                if not under_way:
                    return
                yield from self._finished(*under_way.popleft())

    def _next(self, source: Iterator[Work]) -> Lane | None:
        """The first block of the next sequence."""
        work = next(source, None)
        return None if work is None else Lane(work, 0, self._size(work.frames), [])

    def _after(self, lane: Lane) -> Lane | None:
        """The next block of the same sequence."""
        start = lane.start + lane.size
        left = lane.work.frames - start
        return lane._replace(start=start, size=self._size(left)) if left > 0 else None

    def _size(self, left: int) -> int:
        """Of the next block: the largest that pads no more than the smallest would."""
        padded = -(-left // self._blocks[-1]) * self._blocks[-1]
        return next(size for size in self._blocks if size <= padded)

    def _inputs(self, lanes: Sequence[Lane | None]) -> Inputs:
        rows = [None if lane is None else lane.work.block(lane.start, lane.size) for lane in lanes]
        idle = tuple(np.zeros_like(part) for part in next(row for row in rows if row is not None))
        return tuple(np.stack(parts) for parts in zip(*(row or idle for row in rows), strict=True))

    def _zeros(self, inputs: Inputs) -> State:
        if self._shapes is None:
            rows = np.ones(self.rows, np.bool_)
            self._shapes = jax.eval_shape(self._advance, self._variables, {}, rows, rows, *inputs)[1]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding), self._shapes)

    def _finished(self, output: jax.Array, lanes: list[Lane | None]) -> Iterator[tuple[Any, np.ndarray]]:
        """Fetches a step's output, and gives the results of the sequences that ended with it."""
        for lane, row in zip(lanes, np.asarray(output), strict=True):
            if lane is None:
                continue
            lane.outputs.append(row)
            if lane.start + lane.size >= lane.work.frames:
                whole = np.concatenate(lane.outputs, axis=self._axis)
                lane.outputs.clear()
                yield lane.work.key, whole[(slice(None),) * self._axis + (slice(lane.work.steps),)]


def _valid(lane: Lane) -> float:
    """Frames of a lane's block that are no padding."""
    return float(min(max(lane.work.valid - lane.start, 0.0), lane.size))


class Use(NamedTuple):
    """What the devices did."""

    frames: int = 0
    """Computed, those of idle rows too."""
    valid: float = 0.0
    """How many of them were no padding."""
    idle: float = 0.0
    """Seconds without anything to do,"""
    seconds: float = 0.0
    """of these, from the first step to the last."""

    def __add__(self, other: "Use") -> "Use":
        return Use(
            self.frames + other.frames,
            self.valid + other.valid,
            self.idle + other.idle,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        padding = 1 - self.valid / max(1, self.frames)
        return f"padding {padding:.1%}, device idle {self.idle / max(self.seconds, 1e-9):.1%}"


class Clock:
    """Measures how long devices had nothing to do, from the first step to the last that has ended."""

    def __init__(self):
        self._steps: queue.SimpleQueue[tuple[float, jax.Array, _Times]] = queue.SimpleQueue()
        self.forget()
        threading.Thread(target=self._watch, daemon=True).start()

    def forget(self) -> None:
        """Begins anew with the next step; steps that are still under way do not count."""
        self._times = _Times()

    def started(self, output: jax.Array) -> None:
        """Takes note of a step that has been handed to the devices."""
        self._steps.put((time.perf_counter(), output, self._times))

    def _watch(self) -> None:
        while True:
            start, output, times = self._steps.get()
            with contextlib.suppress(Exception):  # a step that fails raises where its output is fetched
                jax.block_until_ready(output)
            times.add(start, time.perf_counter())
            del output, times

    @property
    def times(self) -> tuple[float, float]:
        """Seconds without anything to do; seconds between the first step's start and the end of the last."""
        return self._times.seen


class _Times:
    """Steps since a clock began. `seen` is replaced as a whole, as another thread reads it."""

    def __init__(self):
        self._first: float | None = None
        self._last = 0.0
        self.seen = (0.0, 0.0)

    def add(self, start: float, end: float) -> None:
        """Counts a step that has ended; the idle time before it counts no sooner than it does."""
        if self._first is None:
            self._first = self._last = start
        idle = self.seen[0] + max(0.0, start - self._last)
        self._last = max(self._last, end)
        self.seen = idle, self._last - self._first
