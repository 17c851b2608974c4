"""Gradient accumulation: a batch that is too large to run at once is cut into micro-batches."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from omnicodec_jax.training.packing import Tree

TrainBatch = dict[str, Array]
"""A batch as `data.pipeline.Batches` gives it.

"audio" [B, 1, T]; "features" [B, S, F] where they are stored; "replaced" [B], see `data.pipeline.Samples`."""


class MicroBatch(NamedTuple):
    """A part of a batch that runs by itself, or several of them, stacked along a new first axis."""

    batch: TrainBatch
    number: Array


class UpdatesCodebooks(Protocol):
    """A result of the codec's forward in training, which holds the updated codebooks."""

    @property
    def codebooks(self) -> Tree:
        """The codebooks after their update."""
        ...


F = TypeVar("F", bound=UpdatesCodebooks)
T = TypeVar("T")


def split(batch: TrainBatch, count: int) -> MicroBatch:
    """Splits a batch into `count` stacked micro-batches.

    Every micro-batch gets one of each `count` neighbouring rows, so that rows stay on their devices.
    """
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
    return MicroBatch(parts, jnp.arange(count))


def first(micro_batches: MicroBatch) -> MicroBatch:
    """Takes the first of stacked micro-batches."""
    return jax.tree.map(lambda x: x[0], micro_batches)


def mean_over(
    micro_batches: MicroBatch, run_codec: Callable[[Tree, MicroBatch], F], use: Callable[[F], T], codebooks: Tree
) -> tuple[Tree, T]:
    """Runs the micro-batches one after the other. Returns the codebooks after the last, and the mean of the results.

    `run_codec` updates the codebooks, which the next micro-batch starts from. The result of a micro-batch is the value
    that `use` returns for its forward pass.
    """

    def run(codebooks: Tree, micro: MicroBatch) -> tuple[Tree, T]:
        forward = run_codec(codebooks, micro)
        return forward.codebooks, use(forward)

    if (count := micro_batches.number.size) == 1:
        return run(codebooks, first(micro_batches))

    def add(carry: tuple[Tree, T], micro: MicroBatch) -> tuple[tuple[Tree, T], None]:
        codebooks, mean = carry
        codebooks, result = run(codebooks, micro)
        return (codebooks, jax.tree.map(lambda x, y: x + y / count, mean, result)), None

    shapes = jax.eval_shape(run, codebooks, first(micro_batches))[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, (codebooks, zeros), micro_batches)[0]
