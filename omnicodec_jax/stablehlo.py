"""StableHLO programs that run without this package, with their weights beside them: `omnicodec export`.

The programs take and give the following; docs/export.md runs them:

    decoder        weights, codes int32 [B, K, N]                          → audio [B, 1, N·hop]
    decoder-step   weights, state, fresh bool [B], codes int32 [B, K, 1]   → audio [B, 1, hop], state
    encoder        weights, audio [B, 1, T] (, features [B, S, F])         → codes int32 [B, K, N]

`fresh` marks the rows that begin anew, whatever their state was. The first state may therefore hold zeros, of the
shapes that the program names.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from safetensors import SafetensorError, safe_open

from omnicodec_jax import model_directory
from omnicodec_jax.buckets import on_disk
from omnicodec_jax.data.audio import MIN_SECONDS
from omnicodec_jax.errors import ModelError
from omnicodec_jax.exact import full_float32
from omnicodec_jax.files import rewriting, save_tensors
from omnicodec_jax.lanes import stream_step
from omnicodec_jax.semantic import num_vectors
from omnicodec_jax.tokenizer import OmniCodecTokenizer

What = Literal["decoder-step", "decoder", "encoder"]
"""The part of a codec that a program computes."""
PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that every program runs on."""
SUFFIX = ".stablehlo"
MODEL = "model"
"""The key of the model's hash in the metadata of the weights."""

Flat = dict[str, Any]
"""A tree of arrays as one dict, whose keys are the names on the path to each array, joined by dots."""


def export_stablehlo(tokenizer: OmniCodecTokenizer, what: What, seconds: float, out: Path) -> str:
    """Writes a StableHLO program, and its weights beside it as safetensors.

    Args:
        tokenizer: The codec.
        what: "decoder", "encoder", or "decoder-step" for one frame of a live stream.
        seconds: Length of the clips that the encoder takes and the decoder gives. The batch may have any size.
        out: File to write the program to; it must end in .stablehlo.

    Returns:
        The signature of the program, as text for people.

    Raises:
        ModelError: If `out` does not end in .stablehlo, or the weights would replace another file.

    Examples:
        >>> from omnicodec_jax.tokenizer import OmniCodecTokenizer
        >>> tokenizer = OmniCodecTokenizer.from_pretrained("models/untrained")
        >>> export_stablehlo(tokenizer, "decoder", 1.0, Path("decoder.stablehlo"))
        '(weights, … [batch, 9, 13] int32) → [batch, 1, 24960]'
    """
    if out.suffix != SUFFIX:
        raise ModelError(f"{out}: must end in {SUFFIX}")
    beside = out.with_suffix(".safetensors")
    if beside.is_file() and not _is_export(beside):
        raise ModelError(f"{beside}: is there already, and no exported program's weights; give --out another name")
    weights = {name: np.asarray(leaf) for name, leaf in model_directory.flatten(tokenizer.variables).items()}
    function, arguments = program(tokenizer, what, seconds)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    exported = jax_export.export(function, platforms=PLATFORMS)(shapes, *arguments)
    with rewriting(beside) as temporary:
        save_tensors(weights, temporary, {MODEL: tokenizer.model_hash})
    with rewriting(out) as temporary:
        temporary.write_bytes(exported.serialize())
    inputs = [f"{list(leaf.shape)} {leaf.dtype}" for leaf in jax.tree.leaves(arguments[-2:])]
    return f"(weights, … {', '.join(inputs)}) → {', '.join(str(list(leaf.shape)) for leaf in exported.out_avals[:1])}"


def _is_export(path: Path) -> bool:
    """Returns whether a file holds weights that `export_stablehlo` has written."""
    try:
        with on_disk(path) as here, safe_open(here, "np") as file:
            return (file.metadata() or {}).keys() == {MODEL}
    except SafetensorError:
        return False


def program(tokenizer: OmniCodecTokenizer, what: What, seconds: float) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted function that is exported, and the shapes of its arguments after the weights."""
    function, arguments = _function(tokenizer, what, seconds)
    return jax.jit(full_float32(function)), arguments


def _function(tokenizer: OmniCodecTokenizer, what: What, seconds: float) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Makes a function of the weights and of other arguments, and the shapes of these other arguments."""
    model, config = tokenizer.model, tokenizer.config
    batch = jax_export.symbolic_shape("batch")[0]
    if not MIN_SECONDS <= seconds < float("inf"):
        raise ModelError(f"--seconds {seconds:g}: must be {MIN_SECONDS:g} or more")
    samples = round(seconds * config.sample_rate)
    frames = 1 if what == "decoder-step" else tokenizer.num_frames(samples)
    codes = jax.ShapeDtypeStruct((batch, tokenizer.num_quantizers, frames), jnp.int32)

    def decode(weights: Flat, codes: jax.Array) -> jax.Array:
        return model.apply(model_directory.unflatten(weights), codes, method="decode")

    def step(weights: Flat, state: Flat, fresh: jax.Array, codes: jax.Array) -> tuple[jax.Array, Flat]:
        audio, after = stream_step(
            model,
            type(model).decode,
            model_directory.unflatten(weights),
            model_directory.unflatten(state),
            fresh,
            None,
            codes,
        )
        return audio, model_directory.flatten(after)

    def encode(weights: Flat, audio: jax.Array, *features: jax.Array) -> jax.Array:
        return model.apply(model_directory.unflatten(weights), audio, *features, method="encode")

    if what == "decoder":
        return decode, (codes,)
    if what == "decoder-step":
        fresh = jax.ShapeDtypeStruct((batch,), jnp.bool_)
        variables = jax.eval_shape(lambda: tokenizer.variables)
        run = partial(stream_step, model, type(model).decode)
        state = jax.eval_shape(run, variables, {}, fresh, None, codes)[1]
        return step, (model_directory.flatten(state), fresh, codes)
    audio = jax.ShapeDtypeStruct((batch, 1, samples), jnp.float32)
    if tokenizer.semantic is None:
        return encode, (audio,)
    vectors = num_vectors(str(tokenizer.feature_source), samples, config.sample_rate)
    return encode, (audio, jax.ShapeDtypeStruct((batch, vectors, tokenizer.semantic.feature_dim), jnp.float32))
