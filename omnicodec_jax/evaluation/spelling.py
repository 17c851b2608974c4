"""A small network that spells what is said in a clip from its codes, trained by CTC (Graves et al., 2006)."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH = 96
"""The width of the embeddings of codes and of the hidden layer."""
CONTEXT = 0.4
"""The seconds that the network sees around a frame, at every frame rate."""
LETTERS_PER_SECOND = 50
"""The number of letters or blanks that the network can spell in a second, which is more than anyone speaks."""
BATCH, STEPS, LEARNING_RATE, WEIGHT_DECAY = 16, 600, 1e-2, 1e-2

Params = dict[str, jax.Array]


def plain(text: str) -> str:
    """Returns the words of a text in small letters, without punctuation and without marks on letters."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = (sign for sign in letters if not unicodedata.combining(sign))
    return " ".join(re.sub(r"[^\w']|_", " ", "".join(kept)).split())


def learn(
    examples: Sequence[tuple[np.ndarray, str]], sizes: Sequence[int], frame_rate: float, steps: int = STEPS
) -> Callable[[np.ndarray], str]:
    """Trains the network, and returns it as a function from codes [K, N] to the text that it spells.

    Args:
        examples: Codes [K, N] of clips, with what is said in them.
        sizes: The number of entries of each codebook.
        frame_rate: The number of frames a second.
        steps: The number of training steps.
    """
    alphabet = sorted(set("".join(text for _, text in examples)))
    per_frame = math.ceil(LETTERS_PER_SECOND / frame_rate)
    rng = np.random.default_rng(0)
    params = _initial(rng, sizes, frame_rate, per_frame * (len(alphabet) + 1))
    letters = {letter: number for number, letter in enumerate(alphabet, 1)}  # 0 is the blank
    spelt = [np.array([letters[letter] for letter in text], np.int32) for _, text in examples]
    seen = [_entries(codes, sizes) for codes, _ in examples]
    frames, length = max(map(len, seen)), max(map(len, spelt))
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)

    def loss(params: Params, batch: tuple[jax.Array, ...]) -> jax.Array:
        codes, absent, text, beyond = batch
        logits = _logits(params, codes, per_frame)
        return optax.ctc_loss(logits, jnp.repeat(absent, per_frame, axis=1), text, beyond).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, batch: tuple[jax.Array, ...]) -> tuple[Params, Any]:
        gradient = jax.grad(loss)(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, state = optimizer.update(gradient, state, params)
        moved: Any = optax.apply_updates(params, updates)
        return moved, state

    state = optimizer.init(params)
    for _ in range(steps):
        chosen = rng.choice(len(examples), min(BATCH, len(examples)), replace=False)
        codes, absent = _padded([seen[number] for number in chosen], frames)
        text, beyond = _padded([spelt[number] for number in chosen], length)
        params, state = step(params, state, (codes, absent, text, beyond))
    spell = jax.jit(partial(_logits, per_frame=per_frame))

    def spelling(codes: np.ndarray) -> str:
        size = -(-codes.shape[1] // frames) * frames  # so that a few shapes are compiled, and not one for each clip
        padded, _ = _padded([_entries(codes, sizes)], size)
        best = np.asarray(spell(params, padded))[0].argmax(-1)[: codes.shape[1] * per_frame]
        kept = best[np.flatnonzero(np.diff(best, prepend=0))]
        return "".join(alphabet[number - 1] for number in kept if number).strip()

    return spelling


def _initial(rng: np.random.Generator, sizes: Sequence[int], frame_rate: float, outputs: int) -> Params:
    """Returns random parameters of the network."""
    kernel = 2 * round(CONTEXT * frame_rate / 2) + 1
    shapes = {"embeddings": (sum(sizes), WIDTH), "kernel": (kernel, WIDTH, WIDTH), "out": (WIDTH, outputs)}
    scales = {"embeddings": len(sizes) ** -0.5, "kernel": (kernel * WIDTH) ** -0.5, "out": WIDTH**-0.5}
    random = {
        name: jnp.asarray(scales[name] * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()
    }
    return {**random, "bias": jnp.zeros(WIDTH), "out_bias": jnp.zeros(outputs)}


def _logits(params: Params, entries: jax.Array, per_frame: int) -> jax.Array:
    """Returns the logits of the blank and the letters: [B, N, K] → [B, N · per_frame, letters + 1]."""
    hidden = params["embeddings"][entries].sum(axis=2)
    layout = ("NTC", "TIO", "NTC")
    hidden += jax.lax.conv_general_dilated(hidden, params["kernel"], (1,), "SAME", dimension_numbers=layout)
    hidden = jax.nn.gelu(hidden + params["bias"][None, None])
    logits = hidden @ params["out"] + params["out_bias"][None, None]
    return logits.reshape(logits.shape[0], logits.shape[1] * per_frame, -1)


def _entries(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Returns codes [K, N] as row numbers [N, K] of the table that holds the embeddings of all codebooks."""
    return (codes + np.cumsum([0, *sizes[:-1]])[:, None]).T.astype(np.int32)


def _padded(rows: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns arrays as one [B, size, …], padded with zeros, and a mask float32 [B, size] that is 1 in the padding."""
    filled = np.zeros((len(rows), size, *rows[0].shape[1:]), rows[0].dtype)
    absent = np.ones((len(rows), size), np.float32)
    for number, row in enumerate(rows):
        filled[number, : len(row)], absent[number, : len(row)] = row, 0
    return filled, absent
