"""Many small arrays as one: what is done alike to every array of a network is compiled once for all small ones.

A network has hundreds of arrays, three in four of them small. XLA compiles clipping, moments, decay and the check of a
step for each array by itself, which came to two fifths of a training step's program.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from omnicodec_jax.distributed import sharding

Tree = Any
Packed = dict[str, dict[str, Array]]
"""Of each top-level module, its large arrays by name, and all others end to end as SMALL, in the tree's order."""
SMALL = "small"


def pack(tree: Tree) -> Packed:
    """What is never shared out over devices (`sharding.SMALLEST`) as one vector for each top-level module."""
    packed: Packed = {}
    for module, arrays in tree.items():
        named = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(arrays)}
        large = {name: leaf for name, leaf in named.items() if leaf.size >= sharding.SMALLEST}
        small = [leaf.ravel() for leaf in named.values() if leaf.size < sharding.SMALLEST]
        packed[module] = large | ({SMALL: jnp.concatenate(small)} if small else {})
    return packed


def unpack(packed: Packed, like: Tree) -> Tree:
    """The tree again; like: any of its names and shapes."""
    return {module: _unpack(packed[module], arrays) for module, arrays in like.items()}


def _unpack(packed: dict[str, Array], like: Tree) -> Tree:
    leaves, structure = jax.tree.flatten_with_path(like)
    small = [leaf for _, leaf in leaves if leaf.size < sharding.SMALLEST]
    ends = np.cumsum([leaf.size for leaf in small])
    parts = iter(jnp.split(packed[SMALL], ends[:-1]) if small else ())
    restored = [
        packed[_name(path)] if leaf.size >= sharding.SMALLEST else next(parts).reshape(leaf.shape)
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(structure, restored)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
