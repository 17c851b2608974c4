"""`omnicodec export`: StableHLO programs that run without this package, their weights beside them.

What such a program takes and gives; docs/export.md runs them:

    decoder        weights, codes int32 [B, K, N]                          → audio [B, 1, N·hop]
    decoder-step   weights, state, fresh bool [B], codes int32 [B, K, 1]   → audio [B, 1, hop], state
    encoder        weights, audio [B, 1, T] (, features [B, S, F])         → codes int32 [B, K, N]

`fresh` marks the rows that begin anew, whatever their state was: the first state may hold zeros, of the shapes that
the program names.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export as jax_export
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omnicodec_jax import model_directory
from omnicodec_jax.data.features import num_vectors
from omnicodec_jax.dsp import FRAMES_PER_FEATURE, MEL_HOP, MEL_SAMPLE_RATE
from omnicodec_jax.errors import ModelError
from omnicodec_jax.files import rewriting
from omnicodec_jax.lanes import advance
from omnicodec_jax.tokenizer import OmniCodecTokenizer

What = Literal["decoder-step", "decoder", "encoder"]
PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"
MODEL = "model"
"""What the metadata of the weights says: the hash of the model."""

Flat = dict[str, Any]
"""Arrays under dotted names."""


def export(tokenizer: OmniCodecTokenizer, what: What, seconds: float, out: Path) -> str:
    """Writes a StableHLO program, and its weights beside it as safetensors.

    Args:
        tokenizer: The model.
        what: "decoder", "encoder", or "decoder-step" for one frame of a live stream.
        seconds: Length of the clips that the encoder takes and the decoder gives; the batch may have any size.
        out: The program; it must end in .stablehlo.

    Returns:
        The program's signature, to be read by people.

    Raises:
        ModelError: If `out` ends in something else, or something else would lose its name to the weights.

    Examples:
        >>> from omnicodec_jax.tokenizer import OmniCodecTokenizer
        >>> tokenizer = OmniCodecTokenizer.from_pretrained("models/untrained")
        >>> export(tokenizer, "decoder", 1.0, Path("decoder.stablehlo"))
        '(weights, … [batch, 9, 13] int32) → [batch, 1, 24960]'
    """
    if out.suffix != SUFFIX:
        raise ModelError(f"{out}: must end in {SUFFIX}")
    beside = out.with_suffix(".safetensors")
    if beside.is_file() and not _is_export(beside):
        raise ModelError(f"{beside}: is there already, and no exported program's weights; give --out another name")
    weights = {name: np.asarray(leaf) for name, leaf in _flatten(tokenizer.variables).items()}
    function, arguments = _program(tokenizer, what, seconds)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    program = jax_export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)
    with rewriting(beside) as temporary:
        save_file(weights, temporary, {MODEL: tokenizer.model_hash})
    with rewriting(out) as temporary:
        temporary.write_bytes(program.serialize())
    inputs = [f"{list(leaf.shape)} {leaf.dtype}" for leaf in jax.tree.leaves(arguments[-2:])]
    return f"(weights, … {', '.join(inputs)}) → {', '.join(str(list(leaf.shape)) for leaf in program.out_avals[:1])}"


def _is_export(path: Path) -> bool:
    """Whether a file holds weights that `export` has written."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).keys() == {MODEL}
    except SafetensorError:
        return False


def _program(tokenizer: OmniCodecTokenizer, what: What, seconds: float) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of the weights and other arguments, and the shapes of these."""
    model, config = model_directory.build(tokenizer.config), tokenizer.config
    batch = jax_export.symbolic_shape("batch")[0]
    samples = round(seconds * config.sample_rate)
    frames = 1 if what == "decoder-step" else tokenizer.num_frames(samples)
    codes = jax.ShapeDtypeStruct((batch, tokenizer.num_quantizers, frames), jnp.int32)

    def decode(weights: Flat, codes: jax.Array) -> jax.Array:
        return model.apply(_unflatten(weights), codes, method="decode")

    def step(weights: Flat, state: Flat, fresh: jax.Array, codes: jax.Array) -> tuple[jax.Array, Flat]:
        audio, after = advance(model, type(model).decode, _unflatten(weights), _unflatten(state), fresh, None, codes)
        return audio, _flatten(after)

    def encode(weights: Flat, audio: jax.Array, *features: jax.Array) -> jax.Array:
        return model.apply(_unflatten(weights), audio, *features, method="encode")

    if what == "decoder":
        return decode, (codes,)
    if what == "decoder-step":
        fresh = jax.ShapeDtypeStruct((batch,), jnp.bool_)
        variables = jax.eval_shape(lambda: tokenizer.variables)
        run = partial(advance, model, type(model).decode)
        state = jax.eval_shape(run, variables, {}, fresh, None, codes)[1]
        return step, (_flatten(state), fresh, codes)
    audio = jax.ShapeDtypeStruct((batch, 1, samples), jnp.float32)
    if tokenizer.semantic is None:
        return encode, (audio,)
    vectors = num_vectors(samples)
    if tokenizer.semantic.source == "log_mel":
        vectors = -(-(samples * MEL_SAMPLE_RATE // config.sample_rate // MEL_HOP) // FRAMES_PER_FEATURE)
    return encode, (audio, jax.ShapeDtypeStruct((batch, vectors, tokenizer.semantic.feature_dim), jnp.float32))


def _flatten(tree: Any) -> Flat:
    return flatten_dict(tree, sep=".")


def _unflatten(flat: Flat) -> Any:
    return unflatten_dict(flat, sep=".")
