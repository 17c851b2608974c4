"""The language model that judges tokens, a decoder of the Qwen2 kind (arXiv 2407.10671 §2.2), and what it is shown.

The model computes what `transformers.Qwen2ForCausalLM` does, but for the order of the channels in queries and keys:
`rotary` turns neighbours, where that turns halves. Matrix products of the layers are in `dtype`; the residual stream,
norms, rotations, softmax and logits are float32.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from omnicodec_jax.config import LanguageModelConfig
from omnicodec_jax.config.language_model import LayoutName
from omnicodec_jax.corpus import delayed, flat
from omnicodec_jax.models.conv import Activations, Dense
from omnicodec_jax.models.transformer import rotary

EMBEDDING_DEVIATION = 0.02
"""Standard deviation of the first embeddings, Qwen2's `initializer_range`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How frames of K codes become steps of C ids, and which of the model's logits stand for which codes.

    The codes of a codebook have ids of their own, from the sum of the codebooks before it. A code is predicted among
    those of its codebook alone, since whose turn it is is known.
    """

    name: LayoutName
    codebook_sizes: tuple[int, ...]

    @property
    def blank(self) -> int:
        """Id of what is no code: the step before the first, what a delay leaves open, padding. Never predicted."""
        return sum(self.codebook_sizes)

    @property
    def vocabulary(self) -> int:
        """All ids."""
        return self.blank + 1

    def steps(self, codes: np.ndarray, frames: int) -> np.ndarray:
        """[n, K] → int32 [T + 1, C], T + 1 the same for every n up to `frames`: a blank step, then the codes."""
        ids = np.full((frames, len(self.codebook_sizes)), self.blank, np.int32)
        ids[: len(codes)] = flat(codes, list(self.codebook_sizes)).reshape(codes.shape)
        rows = {"flat": ids.reshape(-1, 1), "delayed": delayed(ids, self.blank), "parallel": ids}[self.name]
        return np.concatenate([np.full_like(rows[:1], self.blank), rows])

    def blanks(self, frames: int) -> np.ndarray:
        """The same for no codes."""
        return self.steps(np.zeros((0, len(self.codebook_sizes)), np.uint16), frames)

    def cross_entropy(
        self, logits: Float[Array, "B T V"], targets: Int[Array, "B T C"]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
        """Of each row and codebook, the sum over its codes in nats, and how many there are."""
        width, ends = len(self.codebook_sizes), np.cumsum([0, *self.codebook_sizes]).tolist()
        turns = width // targets.shape[2]  # steps of a frame
        logits = logits.reshape(logits.shape[0], -1, turns, self.vocabulary)
        targets = targets.reshape(targets.shape[0], -1, width)
        labels = targets - np.array(ends[:-1], np.int32).reshape(1, 1, -1)
        nats = [
            # Any label will do for blanks: they do not count.
            optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :, k % turns, ends[k] : ends[k + 1]], jnp.minimum(labels[:, :, k], size - 1)
            )
            for k, size in enumerate(self.codebook_sizes)
        ]
        counted = (targets != self.blank).astype(jnp.float32)
        return (jnp.stack(nats, axis=-1) * counted).sum(1), counted.sum(1)


class Attention(nn.Module):
    """Causal self-attention of grouped queries."""

    config: LanguageModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """A step sees itself and all before it."""
        batch, steps, width = x.shape
        config = self.config
        positions = jnp.broadcast_to(jnp.arange(steps), (batch, steps))

        def heads(name: str, count: int) -> Float[Array, "B H T D"]:
            y = Dense(count * width // config.num_heads, dtype=self.dtype, name=name)(x)
            return jnp.swapaxes(y.reshape(batch, steps, count, -1), 1, 2)

        groups = config.num_key_value_heads
        q = rotary(heads("query", config.num_heads), positions, config.max_period)
        q = q.reshape(batch, groups, -1, steps, q.shape[-1])
        k = rotary(heads("key", groups), positions, config.max_period)
        v = heads("value", groups)
        # Logits and softmax are float32 whatever the compute type.
        logits = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        visible = jnp.tril(jnp.ones((1, 1, 1, steps, steps), bool))
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf)).astype(v.dtype)
        mixed = jnp.einsum("bgrqk,bgkd->bqgrd", weights, v).reshape(batch, steps, width)
        return Dense(width, use_bias=False, dtype=self.dtype, name="out")(mixed)


class Layer(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += linear_2(silu(gate(y)) · linear_1(y)) with y = norm(x)."""

    config: LanguageModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations) -> tuple[Activations, None]:
        """The second result is what `nn.scan` would collect: nothing."""
        config, dense = self.config, partial(Dense, use_bias=False, dtype=self.dtype)
        norm = partial(nn.RMSNorm, epsilon=config.norm_epsilon)
        y = Attention(config, self.dtype, name="attention")(norm(name="norm_1")(x))
        x = x + y.astype(jnp.float32)
        y = norm(name="norm_2")(x)
        gate = jax.nn.silu(dense(config.intermediate_size, name="gate_linear_1")(y))
        y = dense(x.shape[-1], name="linear_2")(gate * dense(config.intermediate_size, name="linear_1")(y))
        return x + y.astype(jnp.float32), None


class LanguageModel(nn.Module):
    """Embeddings, layers, logits; what a `Layout` makes of codes goes in, and what it takes codes from comes out.

    `remat` keeps only what goes into each layer for the gradient, and computes the rest anew.
    """

    config: LanguageModelConfig
    vocabulary: int
    """V"""
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, ids: Int[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Logits of the step after each; the embeddings of a step's C ids are summed."""
        config = self.config
        initial = nn.initializers.normal(EMBEDDING_DEVIATION)
        embedding = self.param("embedding", initial, (self.vocabulary, config.hidden_size))
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_layers)
        x, _ = stack(config, self.dtype, name="layers")(jnp.sum(embedding[ids], axis=2))
        x = nn.RMSNorm(epsilon=config.norm_epsilon, name="norm")(x)
        return x @ embedding.T if config.tie_embeddings else Dense(self.vocabulary, use_bias=False, name="head")(x)
