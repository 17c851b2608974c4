"""Turns codes into the ids that the language model reads, by one of three layouts of frames of K codes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from omnicodec_jax.config.language_model import LayoutName
from omnicodec_jax.corpus import delayed, flat


@dataclasses.dataclass(frozen=True)
class Layout:
    """A rule that turns frames of K codes into steps of C ids, and says which logits stand for which codes.

    Every codebook has ids of its own, which follow those of the codebooks before it. It is always known which codebook
    comes next, so a code is predicted among the codes of its codebook alone.
    """

    name: LayoutName
    codebook_sizes: tuple[int, ...]

    @property
    def blank(self) -> int:
        """The id that stands where there is no code: before the first step, in gaps that a delay leaves, in padding.

        The model never predicts it.
        """
        return sum(self.codebook_sizes)

    @property
    def vocabulary(self) -> int:
        """The number of ids, the blank included."""
        return self.blank + 1

    def steps(self, codes: np.ndarray, frames: int) -> np.ndarray:
        """Returns the ids of some codes, after one blank step and padded with blanks.

        Args:
            codes: [n, K], with n up to `frames`.
            frames: The number of frames that the codes are padded to.

        Returns:
            int32 [T + 1, C], where T depends on `frames` and the layout alone.
        """
        ids = np.full((frames, len(self.codebook_sizes)), self.blank, np.int32)
        ids[: len(codes)] = flat(codes, list(self.codebook_sizes)).reshape(codes.shape)
        rows = {"flat": ids.reshape(-1, 1), "delayed": delayed(ids, self.blank), "parallel": ids}[self.name]
        return np.concatenate([np.full_like(rows[:1], self.blank), rows])

    def blanks(self, frames: int) -> np.ndarray:
        """Returns the blank ids that `steps` returns if there are no codes: int32 [T + 1, C]."""
        return self.steps(np.zeros((0, len(self.codebook_sizes)), np.uint16), frames)

    def codes(self, steps: np.ndarray, frames: int) -> np.ndarray:
        """Returns the codes of the first frames in the ids of `steps`: uint16 [frames, K]. No code may be blank."""
        width, rows = len(self.codebook_sizes), np.asarray(steps)[1:]
        if self.name == "delayed":
            rows = np.stack([rows[k : k + frames, k] for k in range(width)], axis=1)
        first = np.cumsum([0, *self.codebook_sizes[:-1]])
        return (rows.reshape(-1, width)[:frames] - first).astype(np.uint16)

    def cross_entropy(
        self, logits: Float[Array, "B T V"], targets: Int[Array, "B T C"]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
        """Returns the cross-entropy of codes by the logits that predict them, for each row and codebook.

        Returns:
            The cross-entropy in nats, summed over the codes, and the number of these codes. Blanks do not count.
        """
        width, ends = len(self.codebook_sizes), np.cumsum([0, *self.codebook_sizes]).tolist()
        steps_per_frame = width // targets.shape[2]
        logits = logits.reshape(logits.shape[0], -1, steps_per_frame, self.vocabulary)
        targets = targets.reshape(targets.shape[0], -1, width)
        labels = targets - np.array(ends[:-1], np.int32).reshape(1, 1, -1)
        nats = [
            # The label of a blank may be anything, since blanks do not count.
            optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :, k % steps_per_frame, ends[k] : ends[k + 1]], jnp.minimum(labels[:, :, k], size - 1)
            )
            for k, size in enumerate(self.codebook_sizes)
        ]
        counted = (targets != self.blank).astype(jnp.float32)
        return (jnp.stack(nats, axis=-1) * counted).sum(1), counted.sum(1)
