"""The output of a sub-discriminator."""

import math
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from omnicodec_jax.discriminators.cells import CELL, from_cells


class DiscriminatorOutput(struct.PyTreeNode):
    """Logits and feature maps of one sub-discriminator on one batch of audio. Its leaves may be shapes or gradients."""

    logits: Any
    """float32 [B, ...]. The discriminator is trained towards 1 on real audio and towards 0 on fake audio."""
    stored_maps: tuple[Any, ...]
    """The feature maps [B, ...] as they are in memory: those of spectra in cells (cells.py), all others as they are."""
    bins: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    """Number of bins of each feature map; None if they are not those of a spectrum."""

    @property
    def feature_maps(self) -> tuple[Float[Array, "B ..."], ...]:
        """The activations that the feature matching loss compares. The logits are not among them."""
        if self.bins is None:
            return self.stored_maps
        return tuple(from_cells(x, bins) for x, bins in zip(self.stored_maps, self.bins, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each feature map; zeros that fill up cells do not count."""
        if self.bins is None:
            return tuple(math.prod(x.shape) for x in self.stored_maps)
        shapes = [(*x.shape[:2], bins, x.shape[3] // CELL) for x, bins in zip(self.stored_maps, self.bins, strict=True)]
        return tuple(map(math.prod, shapes))
