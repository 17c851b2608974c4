"""Residual vector quantization (RVQ) with codebooks that follow moving averages (spec §1.8–1.9, §8.3–8.4).

The codebooks are not parameters. They are in the mutable collection "codebooks", in float32, stacked over the layers.
If a quantizer is applied with `mutable=["codebooks"]`, it learns from the batch; otherwise it only looks up entries.
Under jit, sums over a sharded batch are sums over the global batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import Precision, stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from omnicodec_jax.config import AcousticConfig, CodebookConfig
from omnicodec_jax.models.conv import Dense

CODEBOOKS = "codebooks"
"""The name of the collection that holds the codebooks."""
COUNTER = "steps_until_check"
"""The name of the statistic of a codebook that only training reads."""
ENOUGH = 0.01
"""The share by which an iteration of k-means must lower the error for another one to follow. More iterations would not
help, since training goes on moving the entries."""

Vectors = Float[Array, "M D"]


class Codebook(NamedTuple):
    """The statistics of one codebook, or of Q stacked codebooks. An entry is embedding_sum / cluster_usage."""

    embedding_sum: Float[Array, "*Q K D"]
    """The moving average of the sum of the vectors in a batch that each entry is nearest to."""
    cluster_usage: Float[Array, "*Q K"]
    """The moving average of the number of vectors in a batch that each entry is nearest to."""
    initialized: Float[Array, "*Q"]
    """A number that is 1 once the codebook has been fitted, and 0 before that."""
    steps_until_check: Float[Array, "*Q"]
    """The number of training steps until dead entries are replaced the next time."""

    def embedding(self, config: CodebookConfig) -> Float[Array, "*Q K D"]:
        """Computes the entries of the codebook."""
        return self.embedding_sum / jnp.maximum(self.cluster_usage, config.epsilon)[..., None]


def nearest(x: Vectors, embedding: Float[Array, "K D"]) -> Int[Array, " M"]:
    """Finds the index of the entry with the least Euclidean distance to each vector."""
    products = jnp.matmul(x, embedding.T, precision=Precision.HIGHEST)
    return jnp.argmin(jnp.sum(embedding**2, axis=-1)[None] - 2 * products, axis=-1)


def cluster_sums(x: Vectors, codes: Int[Array, " M"], size: int) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """Counts the vectors that each code got, and sums them."""
    assigned = jax.nn.one_hot(codes, size)
    return assigned.sum(0), jnp.matmul(assigned.T, x, precision=Precision.HIGHEST)


def sample(key: PRNGKeyArray, x: Vectors, count: int) -> Float[Array, "K D"]:
    """Draws `count` of the vectors; none is drawn twice if there are enough."""
    # Indices are drawn rather than vectors. To shuffle the vectors, devices would have to exchange all of them.
    return x[jax.random.choice(key, x.shape[0], (count,), replace=x.shape[0] < count)]


def ema_update(
    codebook: Codebook, x: Vectors, codes: Int[Array, " M"], key: PRNGKeyArray, config: CodebookConfig
) -> tuple[Codebook, Float[Array, ""]]:
    """Updates a codebook in a training step on a batch of vectors.

    Every `check_every` steps, entries of little usage are replaced by random vectors of the batch, with the mean usage.
    Then usage and sums decay towards those of the batch.

    Args:
        codebook: One codebook, not stacked.
        x: Vectors of the batch, [M, D].
        codes: Entry that each vector is assigned to, [M].
        key: Random key of the replacements.
        config: Decay, threshold and interval.

    Returns:
        The updated codebook, and the share of entries that were replaced.
    """
    size = codebook.cluster_usage.shape[0]
    counts, sums = cluster_sums(x, codes, size)

    due = codebook.steps_until_check <= 1
    mean_usage = codebook.cluster_usage.mean()
    dead = due & (codebook.cluster_usage < config.dead_threshold * mean_usage)
    fresh = jax.lax.cond(dead.any(), lambda: sample(key, x, size), lambda: jnp.zeros((size, x.shape[1])))
    usage = jnp.where(dead, mean_usage, codebook.cluster_usage)
    embedding_sum = jnp.where(dead[:, None], mean_usage * fresh, codebook.embedding_sum)

    updated = Codebook(
        embedding_sum=config.decay * embedding_sum + (1 - config.decay) * sums,
        cluster_usage=config.decay * usage + (1 - config.decay) * counts,
        initialized=codebook.initialized,
        steps_until_check=jnp.where(due, config.check_every, codebook.steps_until_check - 1),
    )
    return updated, dead.mean()


def kmeans(
    key: PRNGKeyArray, x: Vectors, size: int, iterations: int, enough: float = 0.0
) -> tuple[Float[Array, "K D"], Float[Array, " K"]]:
    """Clusters vectors by Lloyd's k-means, which starts from random ones of the vectors.

    A cluster that becomes empty starts again from a random vector.

    Args:
        key: Random key.
        x: Vectors [M, D].
        size: Number of clusters, K.
        iterations: Largest number of iterations.
        enough: Share by which an iteration must lower the error for another one to follow.

    Returns:
        Means [K, D], and the number of vectors in each cluster [K].
    """

    def scattered(x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes `cluster_sums` a hundred times faster on a CPU; on a GPU, the order of summation would vary."""
        return jax.ops.segment_sum(jnp.ones(x.shape[0]), codes, size), jax.ops.segment_sum(x, codes, size)

    def settle(means: jax.Array, key: PRNGKeyArray | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the means and counts of the vectors nearest to the given means, and the error of the given means."""
        codes = nearest(x, means)
        counts, sums = jax.lax.platform_dependent(x, codes, cpu=scattered, default=partial(cluster_sums, size=size))
        empty = means if key is None else sample(key, x, size)
        moved = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], empty)
        return moved, counts, jnp.mean((x - means[codes]) ** 2)

    def worthwhile(carry: tuple[jax.Array, ...]) -> jax.Array:
        number, _, before, error = carry
        return (number < iterations) & (error < (1 - enough) * before)

    def iterate(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, means, _, before = carry
        means, _, error = settle(means, keys[number + 1])
        return number + 1, means, before, error

    keys = jax.random.split(key, iterations + 1)
    start = sample(keys[0], x, size)
    largest = jnp.float32(jnp.finfo(jnp.float32).max)
    _, means, _, _ = jax.lax.while_loop(worthwhile, iterate, (jnp.int32(0), start, jnp.float32(jnp.inf), largest))
    return settle(means, None)[:2]


def fit_residual_codebooks(
    key: PRNGKeyArray, x: Vectors, codebooks: Codebook, config: CodebookConfig, fitted: Callable[[], None] | None = None
) -> Codebook:
    """Fits stacked codebooks by k-means, one after the other, each to the residuals that those before it leave of `x`.

    Args:
        key: Random key.
        x: Vectors [M, D]. M should be about ten times the number of entries. Fewer vectors are memorised, and leave
            no residuals for the next codebook to learn from.
        codebooks: Codebooks of the wanted shape.
        config: Options of the fit.
        fitted: Called after each codebook; an exception that it raises ends the work between two of them.
    """
    layers: list[Codebook] = []
    for layer_key in jax.random.split(key, codebooks.initialized.shape[0]):
        layer, x = _fit_codebook(layer_key, x, codebooks.cluster_usage.shape[1], config)
        layers.append(jax.block_until_ready(layer))
        if fitted is not None:
            fitted()
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@partial(jax.jit, static_argnames=("size", "config"))
def _fit_codebook(key: PRNGKeyArray, x: Vectors, size: int, config: CodebookConfig) -> tuple[Codebook, Vectors]:
    """Fits one codebook, and computes the residuals of the vectors."""
    means, counts = kmeans(key, x, size, config.kmeans_iterations, ENOUGH)
    usage = jnp.maximum(counts, 1)
    layer = Codebook(means * usage[:, None], usage, jnp.ones(()), jnp.full((), config.check_every, jnp.float32))
    return layer, x - means[nearest(x, means)]


def draw_num_quantizers(key: PRNGKeyArray, config: AcousticConfig) -> Int[Array, ""]:
    """Draws the number of codebooks that quantizer dropout leaves on in a step, uniformly over the config's range."""
    return jax.random.randint(key, (), config.min_quantizers, config.num_quantizers + 1)


class Quantized(NamedTuple):
    """The result of a quantizer in training."""

    output: Float[Array, "B N D"]
    """The quantized vectors, with straight-through gradients."""
    codes: Int[Array, "B Q N"]
    """The codes of all codebooks; -1 for those that quantizer dropout left out."""
    commitment: Float[Array, ""]
    """The commitment loss: the mean over codebooks that are on of the mean squared distance to the sum up to each."""
    usage_entropy: Float[Array, " Q"]
    """The entropy of each codebook's usage, divided by that of uniform usage: 1 is uniform usage, 0 is collapse."""
    replaced: Float[Array, " Q"]
    """The share of each codebook's entries that were dead and replaced in this step."""


class ResidualVectorQuantizer(nn.Module):
    """A residual vector quantizer: Q codebooks between two projections, each of which quantizes the residual so far.

    With Q = 1 it is a plain vector quantizer. The projections compute in `dtype`, everything else in float32.
    """

    num_quantizers: int
    codebook_size: int
    codebook_dim: int
    features: int
    config: CodebookConfig
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    learns: bool = True
    """Whether the codebooks learn in training."""

    def setup(self):
        self.project_in = Dense(self.codebook_dim, use_bias=self.use_bias, dtype=self.dtype)
        self.project_out = Dense(self.features, use_bias=self.use_bias, dtype=self.dtype)
        q, k, d = self.num_quantizers, self.codebook_size, self.codebook_dim
        self.embedding_sum = self.variable(CODEBOOKS, "embedding_sum", jnp.zeros, (q, k, d))
        self.cluster_usage = self.variable(CODEBOOKS, "cluster_usage", jnp.ones, (q, k))
        self.initialized = self.variable(CODEBOOKS, "initialized", jnp.zeros, (q,))
        self.steps_until_check = self.variable(CODEBOOKS, COUNTER, jnp.full, (q,), self.config.check_every, jnp.float32)

    @property
    def _codebooks(self) -> Codebook:
        return stop_gradient(Codebook(*(getattr(self, name).value for name in Codebook._fields)))

    def _store(self, state: Codebook) -> None:
        for name, value in state._asdict().items():
            getattr(self, name).value = value

    def encode(self, x: Float[Array, "B N D"]) -> Int[Array, "B Q N"]:
        """Quantizes vectors to the codes of all Q codebooks."""
        return self._quantize(self.project_in(x).astype(jnp.float32), None, None)[0]

    def decode(self, codes: Int[Array, "B k N"]) -> Float[Array, "B N D"]:
        """Sums the vectors of codes of the first k codebooks, and projects the sum."""
        count = codes.shape[1]
        usage = jnp.maximum(self.cluster_usage.value, self.config.epsilon)

        # Codebooks are added one after the other: one gather over all of them is twenty times slower on a CPU.
        def add(total: jax.Array, layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            chosen, sums, usage = layer
            return total + sums[chosen] / usage[chosen][..., None], None

        zeros = jnp.zeros((codes.shape[0], codes.shape[2], self.codebook_dim))
        layers = (jnp.swapaxes(codes, 0, 1), self.embedding_sum.value[:count], usage[:count])
        return self.project_out(jax.lax.scan(add, zeros, layers)[0]).astype(jnp.float32)

    def vectors(self, x: Float[Array, "B N D"]) -> Float[Array, "M V"]:
        """Projects x to the vectors that the codebooks quantize, as rows, for `fit_residual_codebooks`."""
        return self.project_in(x).astype(jnp.float32).reshape(-1, self.codebook_dim)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        num_quantizers: int | Int[Array, ""] | None = None,
        bypassed: Bool[Array, " B"] | None = None,
    ) -> Quantized:
        """Quantizes vectors in training.

        Args:
            x: float32 [B, N, D].
            num_quantizers: Number of codebooks that are on (quantizer dropout), which may be traced; None: all.
            bypassed: Rows whose output is made of the vectors before quantization; None: no rows.
        """
        active = self.num_quantizers if num_quantizers is None else num_quantizers
        if isinstance(active, int) and not 1 <= active <= self.num_quantizers:
            raise ValueError(f"num_quantizers = {active}: must be between 1 and {self.num_quantizers}")
        learning = self.learns and self.is_mutable_collection(CODEBOOKS) and not self.is_initializing()
        x = self.project_in(x).astype(jnp.float32)

        codes, quantized, loss, mean_quantized, replaced = self._quantize(
            stop_gradient(x), active, self.make_rng(CODEBOOKS) if learning else None
        )
        # The loss is mean_i mean((x - Q_i)²), where Q_i is the sum of the entries up to codebook i. Its gradient needs
        # only the mean of the Q_i. So the loop in `_quantize` is not differentiated, and codebooks that are left out
        # cost nothing.
        gradient = 2 / x.size * (stop_gradient(x) - mean_quantized)
        commitment = loss + jnp.sum(gradient * (x - stop_gradient(x)))

        usage = self.cluster_usage.value / self.cluster_usage.value.sum(-1, keepdims=True)
        entropy = -jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-20)), axis=-1) / jnp.log(self.codebook_size)
        error = stop_gradient(quantized - x)
        error = error if bypassed is None else jnp.where(bypassed[:, None, None], 0.0, error)
        output = self.project_out(x + error).astype(jnp.float32)
        return Quantized(output, codes, commitment, entropy, replaced)

    def _quantize(self, x: Float[Array, "B N D"], active: int | jax.Array | None, key: PRNGKeyArray | None):
        """Runs the codebooks that are on, and lets them learn if a key is given.

        Returns:
            Codes, quantized vectors, commitment loss, mean of the sums up to each codebook, shares of entries replaced.
        """
        batch, frames, width = x.shape
        active = self.num_quantizers if active is None else active
        vectors = x.reshape(-1, width)

        def layer(i: jax.Array, carry: tuple) -> tuple:
            codebooks, codes, quantized, total, loss, replaced = carry
            codebook = jax.tree.map(lambda stacked: stacked[i], codebooks)
            embedding = codebook.embedding(self.config)
            residual = vectors - quantized
            chosen = nearest(residual, embedding)
            if key is not None:
                codebook, share = ema_update(codebook, residual, chosen, jax.random.fold_in(key, i), self.config)
                codebooks = jax.tree.map(lambda stacked, new: stacked.at[i].set(new), codebooks, codebook)
                replaced = replaced.at[i].set(share)
            quantized = quantized + embedding[chosen]
            loss = loss + jnp.mean((vectors - quantized) ** 2)
            return codebooks, codes.at[i].set(chosen), quantized, total + quantized, loss, replaced

        codes = jnp.full((self.num_quantizers, vectors.shape[0]), -1, jnp.int32)
        zeros, per_layer = jnp.zeros_like(vectors), jnp.zeros((self.num_quantizers,))
        carry = (self._codebooks, codes, zeros, zeros, jnp.zeros(()), per_layer)
        codebooks, codes, quantized, total, loss, replaced = jax.lax.fori_loop(0, active, layer, carry)
        if key is not None:
            self._store(codebooks)
        codes = codes.reshape(-1, batch, frames).transpose(1, 0, 2)
        share = 1 / jnp.asarray(active, jnp.float32)
        return codes, quantized.reshape(x.shape), loss * share, total.reshape(x.shape) * share, replaced
