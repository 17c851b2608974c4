"""Continuous batching: a few compiled programs for sequences of any length and any number.

A step of a causal model has a fixed shape, rows x block. Each row of the batch is a lane: it feeds one sequence to the
model, block after block, and takes the next sequence when that one ends:

    row 0   ├─ clip a ─┼─ clip a ─┼ clip a ┼ clip d ┼─ …
    row 1   ├─ clip b ─┼─ clip c ─┼─ clip c ─┼ clip c ┼─ …

Where a sequence is cut depends on its length alone: into long blocks first, and the rest into shorter ones, so that
little is padded. The result of a row depends on its own sequence alone. Since a compiler may round differently for
every shape, every device runs the same few shapes, and more devices run more copies of them.
"""

import abc
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnicodec_jax import exact
from omnicodec_jax.model_directory import Variables
from omnicodec_jax.models.conv import STREAM

ACCELERATOR_ROWS = 64
"""The number of lanes on each GPU or TPU. A CPU has one lane, which fills all cores; more would spill its caches."""
CPU_BLOCKS = (120, 30, 6)
"""The lengths in frames of blocks on a CPU. A step reads all weights, which takes a CPU as long as twelve frames."""
ACCELERATOR_BLOCKS = (16,)
"""The length in frames of blocks on a GPU or TPU, where many rows share the cost of reading the weights."""
ACCELERATOR_VECTORS = (32,)
"""The length in feature vectors of blocks of the semantic branch on a GPU or TPU. A step of the branch reads and writes
the attention's keys and values of 250 vectors, which takes as long for 16 new vectors as for 32."""
STEPS_AHEAD = 2
"""The number of steps that are handed to the devices before the result of the first of them is fetched."""

END: Any = object()
"""The value that `next` returns after the last sequence."""
StreamState = dict[str, Any]
"""The state that a batch of streams carries from block to block: the collection `STREAM` of a model."""
BlockInputs = tuple[np.ndarray | np.generic, ...]
"""The inputs of a method for one row, or for all rows of the batch."""
Key = TypeVar("Key")


class InputSequence(abc.ABC):
    """Gives the inputs of a model for one clip of any length, block by block."""

    @property
    @abc.abstractmethod
    def num_frames(self) -> int:
        """The length of the sequence, in the frames that blocks are measured in."""

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """The length of the result along its time axis. Outputs of the model beyond it come from padding."""

    @property
    @abc.abstractmethod
    def num_valid(self) -> float:
        """The number of frames that hold input rather than padding; the last one may count in part."""

    @abc.abstractmethod
    def block(self, start: int, size: int) -> BlockInputs:
        """Returns the inputs of one row for `size` frames from frame `start` on, padded beyond the end."""


class Lane(NamedTuple):
    """A row of the batch, with its sequence and the block of it that comes next."""

    key: Any
    """The caller's key of the sequence."""
    sequence: InputSequence
    start: int
    """The first frame of the block."""
    size: int
    """The number of frames of the block."""
    outputs: list[np.ndarray]
    """The results of the blocks before this one."""

    @property
    def num_valid(self) -> float:
        """The number of frames of the block that hold input rather than padding."""
        return float(min(max(self.sequence.num_valid - self.start, 0.0), self.size))


def stream_step(
    model: nn.Module,
    method: Any,
    variables: Variables,
    state: StreamState,
    fresh: jax.Array | None,
    held: jax.Array | None,
    *inputs: jax.Array,
) -> tuple[jax.Array, StreamState]:
    """Computes one block of each row of a batch of streams.

    Args:
        model: A causal model.
        method: The method of the model to apply.
        variables: Parameters and codebooks of the model.
        state: The state that the streams carry from block to block, one row each; empty if all streams begin.
        fresh: Booleans [B] that mark rows whose stream begins with this block; None if there are none.
        held: Booleans [B] that mark rows whose state stays as it is and whose output is not used; None if there are
            none. None is faster than an array without a mark.
        inputs: Inputs of the method, [B, …] each.

    Returns:
        The output of the method, [B, …], and the state for the next block.
    """

    def choose(rows: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)

    carried = state
    if fresh is not None:
        carried = jax.tree.map(lambda leaf: choose(fresh, jnp.zeros_like(leaf), leaf), state)
    output, after = model.apply({**variables, **carried}, *inputs, method=method, mutable=[STREAM])
    after = dict(after)
    return output, after if held is None or not state else jax.tree.map(partial(choose, held), state, after)


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of devices with one axis, over which the rows of a batch are spread."""
    return Mesh(np.array(devices), ("rows",))


def replicate(variables: Variables, devices: Sequence[Any]) -> Variables:
    """Puts weights on every device. Weights that are there already are not copied, so that batchers share them."""
    return jax.device_put(variables, NamedSharding(mesh_of(devices), PartitionSpec()))


class BatchStep(NamedTuple):
    """The step of one method of a model. All batchers over the same devices share it, so that it is compiled once."""

    on_one_device: Callable[..., tuple[jax.Array, StreamState]]
    """The function `stream_step` over the rows of one device, not jitted."""
    on_all_devices: Callable[..., tuple[jax.Array, StreamState]]
    """The function `stream_step` over the rows of all devices, jitted; the state that is passed in is donated:
    (variables, state, fresh, held, *inputs) → (output, state)."""


@lru_cache(maxsize=32)
def batch_step(model: nn.Module, method: Any, mesh: Mesh) -> BatchStep:
    """Makes the step of a model's method over a mesh of one axis, `rows`. The first call of the step compiles it."""
    everywhere, rows = PartitionSpec(), PartitionSpec("rows")
    on_one_device = partial(stream_step, model, method)

    def on_all_devices(variables: Variables, state: StreamState, *rest: jax.Array) -> tuple[jax.Array, StreamState]:
        specs = (everywhere, rows, *(rows for _ in rest))
        sharded = jax.shard_map(on_one_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return sharded(variables, state, *rest)

    out_shardings = NamedSharding(mesh, rows)
    platform = mesh.devices.flat[0].platform
    return BatchStep(on_one_device, exact.jit(on_all_devices, platform, donate_argnums=1, out_shardings=out_shardings))


def map_present(function: Callable[..., Any], items: Iterable[tuple[Any, ...] | None]) -> Iterator[Any]:
    """Yields the result of a function for each item, and None for None, which stands for an item that must wait."""
    return (None if item is None else function(*item) for item in items)


class ContinuousBatcher:
    """Applies a causal method of a model to any number of sequences, on all rows of all devices at once."""

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
        """Takes a model and the devices to run it on; nothing is compiled before the first sequence.

        Args:
            model: A causal model.
            method: The method of the model to apply.
            variables: Parameters and codebooks of the model.
            axis: Time axis of the method's output for one row.
            devices: Devices of this process, all of one kind.
            clock: Measures how long the devices have nothing to do.
            blocks: Possible lengths of a block in frames, the longest first, each a multiple of the next. By default
                `CPU_BLOCKS` or `ACCELERATOR_BLOCKS`.
        """
        self._axis, self._clock = axis, clock
        on_cpu = devices[0].platform == "cpu"
        self.rows = len(devices) * (1 if on_cpu else ACCELERATOR_ROWS)
        self._blocks = blocks or (CPU_BLOCKS if on_cpu else ACCELERATOR_BLOCKS)
        mesh = mesh_of(devices)
        self._variables = replicate(variables, devices)
        self._sharding = NamedSharding(mesh, PartitionSpec("rows"))
        self._step_on_one_device, self.step = batch_step(model, method, mesh)
        self._state_shapes: Any = None
        """The shapes of a state. They are kept, since tracing the model for them takes longer than a short clip."""
        self.forget()

    def forget(self) -> None:
        """Sets the counts of frames back to zero."""
        self.frames = 0
        """The number of frames that were computed, those of idle rows included."""
        self.valid = 0.0
        """The number of computed frames that held input rather than padding."""

    @overload
    def run(self, sequences: Iterable[tuple[Key, InputSequence]]) -> Iterator[tuple[Key, np.ndarray]]: ...
    @overload
    def run(self, sequences: Iterable[tuple[Key, InputSequence] | None]) -> Iterator[tuple[Key, np.ndarray] | None]: ...
    def run(self, sequences: Iterable[tuple[Key, InputSequence] | None]) -> Iterator[tuple[Key, np.ndarray] | None]:
        """Runs sequences through the model.

        Args:
            sequences: Keys of the caller's choice and sequences. The next one is asked for only when a row is free.
                None stands for a sequence that must wait: rows stay idle until the next step.

        Yields:
            Each key with the output of its sequence, in the order in which the sequences end. None if no sequence is
            running, and the next one must wait.
        """
        source = iter(sequences)
        lanes: list[Lane | None] = [None] * self.rows
        state: StreamState | None = None
        under_way: deque[tuple[jax.Array, list[Lane | None]]] = deque()
        is_over = False
        while True:
            waits = is_over
            for row, lane in enumerate(lanes):
                if lane is None and not waits:
                    item = next(source, END)
                    if item is END or item is None:
                        waits, is_over = True, item is END
                    else:
                        key, sequence = item
                        lanes[row] = self._begin(key, sequence)
            sizes = [lane.size for lane in lanes if lane is not None]
            if sizes:
                size = max(sizes, key=sizes.count)
                running = [lane if lane is not None and lane.size == size else None for lane in lanes]
                output, state = self._step(state, running, size)
                under_way.append((output, running))
                lanes = [lane if ran is None else self._go_on(ran) for lane, ran in zip(lanes, running, strict=True)]
            if len(under_way) > STEPS_AHEAD or not sizes:
                if under_way:
                    yield from self._finished(*under_way.popleft())
                elif is_over:
                    return
                else:
                    yield None

    def _begin(self, key: Any, sequence: InputSequence) -> Lane:
        """Returns a lane at the first block of a sequence."""
        return Lane(key, sequence, start=0, size=self._block_size(sequence.num_frames), outputs=[])

    def _go_on(self, lane: Lane) -> Lane | None:
        """Returns a lane at the next block of its sequence; None if the sequence has ended."""
        start = lane.start + lane.size
        left = lane.sequence.num_frames - start
        return lane._replace(start=start, size=self._block_size(left)) if left > 0 else None

    def _block_size(self, left: int) -> int:
        """Returns the longest block that pads the remaining frames no more than the shortest block would."""
        padded = -(-left // self._blocks[-1]) * self._blocks[-1]
        return next(size for size in self._blocks if size <= padded)

    def _step(
        self, state: StreamState | None, lanes: Sequence[Lane | None], size: int
    ) -> tuple[jax.Array, StreamState]:
        """Starts the computation of one block of `size` frames of each lane. Rows without a lane keep their state."""
        inputs = self._inputs(lanes)
        fresh = np.array([lane is None or lane.start == 0 for lane in lanes])
        held = np.array([lane is None for lane in lanes])
        arguments = jax.device_put((fresh, held, *inputs), self._sharding)
        state = self._zeros(inputs) if state is None else state
        output, state = self.step(self._variables, state, *arguments)
        if self._clock is not None:
            self._clock.started(output)
        self.frames += self.rows * size
        self.valid += sum(lane.num_valid for lane in lanes if lane is not None)
        return output, state

    def _inputs(self, lanes: Sequence[Lane | None]) -> BlockInputs:
        rows = [None if lane is None else lane.sequence.block(lane.start, lane.size) for lane in lanes]
        idle = tuple(np.zeros_like(part) for part in next(row for row in rows if row is not None))
        return tuple(np.stack(parts) for parts in zip(*(row or idle for row in rows), strict=True))

    def _zeros(self, inputs: BlockInputs) -> StreamState:
        if self._state_shapes is None:
            rows = np.ones(self.rows, np.bool_)
            self._state_shapes = jax.eval_shape(self._step_on_one_device, self._variables, {}, rows, rows, *inputs)[1]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding), self._state_shapes)

    def _finished(self, output: jax.Array, lanes: list[Lane | None]) -> Iterator[tuple[Any, np.ndarray]]:
        """Fetches the output of a step, and yields the results of the sequences that ended with it."""
        for lane, row in zip(lanes, np.asarray(output), strict=True):
            if lane is None:
                continue
            lane.outputs.append(row)
            if lane.start + lane.size >= lane.sequence.num_frames:
                whole = np.concatenate(lane.outputs, axis=self._axis)
                lane.outputs.clear()
                yield lane.key, whole[(slice(None),) * self._axis + (slice(lane.sequence.num_outputs),)]


class Use(NamedTuple):
    """The counts of what devices have computed, and of how long they had nothing to do."""

    frames: int = 0
    """The number of frames that were computed, those of idle rows included."""
    valid: float = 0.0
    """The number of computed frames that held input rather than padding."""
    idle: float = 0.0
    """The seconds during which the devices had nothing to do."""
    seconds: float = 0.0
    """The seconds from the start of the first step to the end of the last step."""

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
    """Measures how long devices have nothing to do between the first step and the last step that has ended."""

    def __init__(self):
        # Python waits for an executor's threads before it ends. Another thread that freed arrays later would abort.
        self._thread = ThreadPoolExecutor(1, "clock")
        self.forget()

    def forget(self) -> None:
        """Sets the times back to zero. Steps that are still running do not count any more."""
        self._times = _Times()

    def started(self, output: jax.Array) -> None:
        """Notes that a step has been handed to the devices."""
        self._thread.submit(_wait, time.perf_counter(), output, self._times)

    @property
    def times(self) -> tuple[float, float]:
        """The idle seconds, and the seconds from the start of the first step to the end of the last step."""
        return self._times.seen


def _wait(start: float, output: jax.Array, times: "_Times") -> None:
    """Waits until a step has ended, and adds it to the times."""
    with contextlib.suppress(Exception):  # a step that fails raises where its output is fetched
        jax.block_until_ready(output)
    times.add(start, time.perf_counter())


class _Times:
    """The sums of the times of steps. `seen` is replaced as a whole, since another thread reads it."""

    def __init__(self):
        self._first: float | None = None
        self._last = 0.0
        self.seen = (0.0, 0.0)

    def add(self, start: float, end: float) -> None:
        """Adds a step that has ended, together with the idle time before it."""
        if self._first is None:
            self._first = self._last = start
        idle = self.seen[0] + max(0.0, start - self._last)
        self._last = max(self._last, end)
        self.seen = idle, self._last - self._first
