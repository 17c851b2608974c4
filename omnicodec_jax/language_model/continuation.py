"""Continuation of tokens: a language model draws the codes of the frames that follow those of a clip.

The model draws the ids of one step of the `Layout` that it has learnt, and reads them in the next step. The whole
window is computed anew for every step, which takes little time with a small model and a short window.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omnicodec_jax.config.checks import require
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import DataError
from omnicodec_jax.language_model.layout import Layout
from omnicodec_jax.language_model.learning import Learnt
from omnicodec_jax.language_model.training import Trainer
from omnicodec_jax.training.packing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The way in which a code is drawn from the probabilities of its codebook's entries."""

    temperature: float = 1.0
    """The number that the logits are divided by. 0: the likeliest code is taken."""
    top_k: int | None = None
    """The number of likeliest codes from which one is drawn; None: all can be drawn."""

    def __post_init__(self):
        require(0 <= self.temperature < float("inf"), self, "temperature", "0 or more, and finite")
        require(self.top_k is None or self.top_k >= 1, self, "top_k", "1 or more, or None")

    def __call__(self, key: PRNGKeyArray, logits: Float[Array, "C V"]) -> Int[Array, " C"]:
        """Draws an id for each row of logits. The logits of ids that must not be drawn are minus infinity."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if self.top_k is not None:
            likeliest, _ = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))
            logits = jnp.where(logits < likeliest[:, -1:], -jnp.inf, logits)
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


def draw(learnt: Learnt, codes: np.ndarray, frames: int, seed: int = 0, sampling: Sampling | None = None) -> np.ndarray:
    """Draws the codes of the frames that follow some codes.

    A window of the language model holds the frames that it continues and those that it draws. If there are more codes
    than half a window, only the last are read. More frames than half a window are drawn in pieces, each of which
    continues the one before.

    Args:
        learnt: The language model.
        codes: Integers [N, K'], with at least as many codebooks as the model knows. N = 0: nothing is continued.
        frames: The number M of frames to draw.
        seed: The seed of the draws.
        sampling: How a code is drawn; by default from the probabilities as they are.

    Returns:
        uint16 [M, K], where K is the number of codebooks that the model knows.

    Raises:
        DataError: For codes that are not those of the model's codebooks.

    Examples:
        >>> learnt = learn(Path("data/tokens"), files.load_as((PerplexityConfig,), "language_model_demo"))
        >>> draw(learnt, TokenSource("data/tokens")[0].codes, frames=25, sampling=Sampling(temperature=0.9)).shape
        (25, 8)
    """
    trainer, sampling = learnt.trainer, sampling or Sampling()
    said, window = _checked(trainer.layout, codes), trainer.config.window_frames
    piece = -(-window // 2)
    program = jax.jit(_fill, static_argnums=(0, 1), out_shardings=sharding.replicated(learnt.mesh))
    for start in range(0, frames, piece):
        count = min(piece, frames - start)
        read = said[max(0, len(said) - (window - piece)) :]
        ids = trainer.layout.steps(read, window)
        lowest = trainer.layout.steps(np.zeros_like(said, shape=(len(read) + count, said.shape[1])), window)
        key = jax.random.fold_in(jax.random.key(seed), start)
        filled = np.asarray(program(trainer, sampling, learnt.params, ids, lowest, key))
        said = np.concatenate([said, trainer.layout.codes(filled, len(read) + count)[len(read) :]])
    return said[len(said) - max(0, frames) :]


def _checked(layout: Layout, codes: np.ndarray) -> np.ndarray:
    """Returns the codes of a layout's codebooks, uint16 [N, K]. Raises DataError if the layout cannot have them."""
    width = len(layout.codebook_sizes)
    if codes.ndim != 2 or codes.shape[1] < width:
        raise DataError(f"codes of shape {list(codes.shape)}: must be [N, {width}], as the language model has learnt")
    codes = codes[:, :width]
    if not ((codes >= 0) & (codes < np.array(layout.codebook_sizes))).all():
        raise DataError(f"codes beyond codebooks of {layout.codebook_sizes} entries: another codec's?")
    return codes.astype(np.uint16)


def _fill(
    trainer: Trainer,
    sampling: Sampling,
    params: Tree,
    ids: Int[Array, "S C"],
    lowest: Int[Array, "S C"],
    key: PRNGKeyArray,
) -> Int[Array, "S C"]:
    """Returns a window whose missing codes were drawn, step by step.

    Args:
        trainer: The language model.
        sampling: How a code is drawn.
        params: The model's parameters.
        ids: The window, with blanks where codes are to be drawn.
        lowest: The lowest id that each code of the window can have, and blanks where the window has no code.
        key: The random key of the draws.
    """
    layout, numbers = trainer.layout, jnp.arange(trainer.layout.vocabulary)[None]
    ends = np.cumsum(layout.codebook_sizes)
    highest = jnp.asarray(np.append(ends, layout.vocabulary), jnp.int32)[jnp.searchsorted(ends, lowest, side="right")]
    wanted = (ids == layout.blank) & (lowest != layout.blank)
    steps = jnp.arange(len(ids))
    last = jnp.max(jnp.where(wanted.any(axis=1), steps, 0))
    first = jnp.min(jnp.where(wanted.any(axis=1), steps, len(ids)))

    def one_step(step: Array, ids: Int[Array, "S C"]) -> Int[Array, "S C"]:
        logits = trainer.logits(params, ids[None, :-1])[0, step - 1]
        can_be = (numbers >= lowest[step][:, None]) & (numbers < highest[step][:, None])
        drawn = sampling(jax.random.fold_in(key, step), jnp.where(can_be, logits, -jnp.inf))
        return ids.at[step].set(jnp.where(wanted[step], drawn, ids[step]))

    return jax.lax.fori_loop(first, last + 1, one_step, ids)
