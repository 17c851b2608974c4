"""The initial values of a model: random parameters, and codebooks that k-means fits to real batches."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from omnicodec_jax.exact import full_float32
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.mimi import Mimi
from omnicodec_jax.models.quantize import CODEBOOKS, Codebook, fit_residual_codebooks

LOG = logging.getLogger(__name__)

COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that run once: hundreds of random draws compile in a third of the time on a CPU."""

AUDIO_RMS = 0.08
"""The typical root mean square of speech, music and sound that are not silent."""

SECONDS_BETWEEN_LINES = 10
"""The shortest time between two lines of the log about the fit."""

T = TypeVar("T")

Batch = tuple[Float[ArrayLike, "B 1 T"], Float[ArrayLike, "B S F"] | None]
"""Audio, and its semantic features if the model has a semantic branch."""


def init_variables(model: nn.Module, key: PRNGKeyArray) -> dict[str, Any]:
    """Draws the variables {"params", "codebooks"} of a module: PyTorch's initial distributions, and empty codebooks.

    Call it inside `on_cpu`, which compiles it: without a compilation, the draws take minutes.
    """
    return dict(model.init(key, *model.example_inputs()))  # type: ignore[attr-defined]


def on_cpu(draw: Callable[[PRNGKeyArray], T], key: PRNGKeyArray) -> T:
    """Calls a function that draws random weights, compiled for the CPU, and returns its arrays as numpy arrays.

    For a GPU, the same program takes minutes to compile, since each draw is a kernel of its own. Also, a seed gives the
    same weights whatever the devices are. Where JAX may not use the CPU (JAX_PLATFORMS=cuda), its default device is
    used.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    data, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)

    def draw_from(data: jax.Array) -> T:
        return draw(jax.random.wrap_key_data(data, impl=kind))

    with jax.default_device(device):
        return jax.device_get(jax.jit(draw_from, compiler_options=COMPILE_QUICKLY)(data))


def preserve_variance(params: Any) -> Any:
    """Widens random kernels by √3, to U(±√3/√fan_in), so that a layer keeps the variance of its input.

    The first kernel is also divided by `AUDIO_RMS`. Otherwise the values would be so small that the ELUs are nearly
    linear for them, and the encoder would take long to learn anything about the spectrum.
    """

    def widened(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        *module, name = (key.key for key in path)  # type: ignore[attr-defined]
        if name != "kernel":
            return leaf
        return leaf * math.sqrt(3) / (AUDIO_RMS if module == ["encoder", "conv_in"] else 1)

    return jax.tree.map_with_path(widened, params)


def initialize_codebooks(
    model: OmniCodec | Mimi, variables: dict[str, Any], batches: Iterable[Batch], key: PRNGKeyArray
) -> dict[str, Any]:
    """Fits the semantic codebook, and then each acoustic codebook to what those before it leave (spec §8.4).

    Args:
        model: The codec.
        variables: The codec's parameters, and codebooks of the right shapes.
        batches: Audio and semantic features. Together they should hold ten times as many frames as a codebook has
            entries. They may be sharded: the fit is over all of them.
        key: Random key of k-means.

    Returns:
        The variables with fitted codebooks.
    """

    def call(method: str) -> Callable[..., Any]:
        return jax.jit(full_float32(partial(model.apply, method=method)))

    inputs = call("codebook_inputs")
    parts = [inputs(variables, *batch) for batch in batches]
    latent, hidden = jax.tree.map(lambda *leaves: jnp.concatenate([_one_row(leaf) for leaf in leaves], axis=1), *parts)
    semantic_key, acoustic_key = jax.random.split(key)
    progress = FitProgress(model.config.num_quantizers)
    held = dict(variables[CODEBOOKS])

    def fit(name: str, key: PRNGKeyArray, vectors: jax.Array) -> None:
        books = fit_residual_codebooks(key, vectors, Codebook(**held[name]), model.config.codebook, progress.one_more)
        held[name] = books._asdict()

    codes = None
    if hidden is not None:
        fit("semantic_quantizer", semantic_key, call("semantic_vectors")(variables, hidden))
        variables = {**variables, CODEBOOKS: held}
        codes = call("encode_semantic")(variables, hidden)
    fit("acoustic_quantizer", acoustic_key, call("acoustic_vectors")(variables, latent, codes))
    # Counts and sums are scaled to those of one batch, which does not change the entries. With the counts of many
    # batches, the moving averages would hardly follow the encoder for hundreds of steps, and no entry would count as
    # dead.
    for statistics in held.values():
        statistics.update({name: statistics[name] / len(parts) for name in ("embedding_sum", "cluster_usage")})
    return {**variables, CODEBOOKS: held}


class FitProgress:
    """A log of how many codebooks are fitted, and how long the others will take."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._began = self._shown = time.perf_counter()

    def one_more(self) -> None:
        """Counts a codebook that has been fitted."""
        self._done, now = self._done + 1, time.perf_counter()
        if now - self._shown > SECONDS_BETWEEN_LINES and self._done < self._total:
            left = (now - self._began) / self._done * (self._total - self._done)
            LOG.info("codebooks: %d of %d fitted, %.0f s left", self._done, self._total, left)
            self._shown = now


def _one_row(x: Float[Array, "B N D"]) -> Float[Array, "1 M D"]:
    return x.reshape(1, -1, x.shape[-1])
