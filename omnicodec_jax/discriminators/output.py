"""The output of a sub-discriminator."""

import math
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from omnicodec_jax.discriminators.cells import CELL, from_cells


class DiscriminatorOutput(struct.PyTreeNode):
    """Logits and feature maps of one sub-discriminator on one batch of audio. The leaves may be shapes or gradients."""

    logits: Any
    """The logits, float32 [B, ...]. The discriminator learns to give 1 for real audio and 0 for fake audio."""
    stored_maps: tuple[Any, ...]
    """The feature maps [B, ...] in the form that they have in memory: those of spectra are in cells (cells.py)."""
    bins: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    """The number of bins of each feature map; None if they are not those of a spectrum."""

    @property
    def feature_maps(self) -> tuple[Float[Array, "B ..."], ...]:
        """The activations that the feature matching loss compares. The logits are not among them."""
        if self.bins is None:
            return self.stored_maps
        return tuple(from_cells(x, bins) for x, bins in zip(self.stored_maps, self.bins, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each feature map, without the zeros that pad cells."""
        if self.bins is None:
            return tuple(math.prod(x.shape) for x in self.stored_maps)
        shapes = [(*x.shape[:2], bins, x.shape[3] // CELL) for x, bins in zip(self.stored_maps, self.bins, strict=True)]
        return tuple(map(math.prod, shapes))
