"""Gradients of a batch that is too large to run at once: the mean over its micro-batches."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from omnicodec_jax.training.packing import Tree

Batch = dict[str, Array]
"""What `data.pipeline.Batches` gives: audio [B, 1, T]; features [B, S, F] where they are stored; replaced [B]."""


class MicroBatch(NamedTuple):
    """A part of a batch that runs by itself."""

    batch: Batch
    number: Array


class Learnt(Protocol):
    """What a codec's forward gives, among others."""

    @property
    def codebooks(self) -> Tree:
        """As they are after it."""
        ...


F = TypeVar("F", bound=Learnt)
T = TypeVar("T")


def split(batch: Batch, count: int) -> MicroBatch:
    """Micro-batches, stacked: of `count` neighbours each gets one, so that rows stay on their devices."""
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
    return MicroBatch(parts, jnp.arange(count))


def first(micro_batches: MicroBatch) -> MicroBatch:
    """Of those that are stacked."""
    return jax.tree.map(lambda x: x[0], micro_batches)


def mean_over(
    micro_batches: MicroBatch, forward: Callable[[Tree, MicroBatch], F], use: Callable[[F], T], codebooks: Tree
) -> tuple[Tree, T]:
    """The codebooks as they are after one micro-batch after the other, and the mean of what is made of each forward."""

    def run(codebooks: Tree, micro: MicroBatch) -> tuple[Tree, T]:
        made = forward(codebooks, micro)
        return made.codebooks, use(made)

    if (count := micro_batches.number.size) == 1:
        return run(codebooks, first(micro_batches))

    def add(carry: tuple[Tree, T], micro: MicroBatch) -> tuple[tuple[Tree, T], None]:
        codebooks, mean = carry
        codebooks, result = run(codebooks, micro)
        return (codebooks, jax.tree.map(lambda x, y: x + y / count, mean, result)), None

    shapes = jax.eval_shape(run, codebooks, first(micro_batches))[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, (codebooks, zeros), micro_batches)[0]
