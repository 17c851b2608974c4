"""The language model that predicts tokens: a decoder of the Qwen2 kind (arXiv 2407.10671 §2.2).

It computes what `transformers.Qwen2ForCausalLM` computes. Only the order of the channels in queries and keys differs:
`rotary` rotates pairs of neighbouring channels, transformers pairs one channel of each half. Matrix products of the
layers are in `dtype`; the residual stream, norms, rotations, softmax and logits are float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from omnicodec_jax.config import LanguageModelConfig
from omnicodec_jax.models.conv import Activations, Dense
from omnicodec_jax.models.transformer import rotary

EMBEDDING_DEVIATION = 0.02
"""The standard deviation of the embeddings before training: Qwen2's `initializer_range`."""


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    config: LanguageModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Returns the result of attention. Every step attends to itself and to all steps before it."""
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
    """A pre-norm block: x += attention(norm(x)); x += linear_2(silu(gate(y)) · linear_1(y)) with y = norm(x)."""

    config: LanguageModelConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Activations) -> tuple[Activations, None]:
        """Returns the residual stream after the layer, and None, since `nn.scan` wants a second result."""
        config, dense = self.config, partial(Dense, use_bias=False, dtype=self.dtype)
        norm = partial(nn.RMSNorm, epsilon=config.norm_epsilon)
        y = Attention(config, self.dtype, name="attention")(norm(name="norm_1")(x))
        x = x + y.astype(jnp.float32)
        y = norm(name="norm_2")(x)
        gate = jax.nn.silu(dense(config.intermediate_size, name="gate_linear_1")(y))
        y = dense(x.shape[-1], name="linear_2")(gate * dense(config.intermediate_size, name="linear_1")(y))
        return x + y.astype(jnp.float32), None


class LanguageModel(nn.Module):
    """A decoder that reads the steps of a `Layout` and returns the logits of the next step."""

    config: LanguageModelConfig
    vocabulary: int
    """The number V of ids."""
    dtype: DTypeLike = jnp.float32
    """The number format of the layers' matrix products."""
    remat: bool = False
    """Whether only the input of each layer is kept for the backward pass, which computes other activations again."""

    @nn.compact
    def __call__(self, ids: Int[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Returns for every step the logits of the step after it. The embeddings of a step's C ids are summed."""
        config = self.config
        initial = nn.initializers.normal(EMBEDDING_DEVIATION)
        embedding = self.param("embedding", initial, (self.vocabulary, config.hidden_size))
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_layers)
        x, _ = stack(config, self.dtype, name="layers")(jnp.sum(embedding[ids], axis=2))
        x = nn.RMSNorm(epsilon=config.norm_epsilon, name="norm")(x)
        return x @ embedding.T if config.tie_embeddings else Dense(self.vocabulary, use_bias=False, name="head")(x)
