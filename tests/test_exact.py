"""Tokenizing, decoding, streams and exported programs ask for full float32 on every platform, and for fixed sums."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export
from jax.sharding import Mesh
from step_parts import ENCODER, WHISPER
from tiny_experiment import config as TINY

from omnicodec_jax import blocks, codec_lanes, exact, lanes, model_directory, semantic, stablehlo, streaming, tokenizer
from omnicodec_jax.config import Precision
from omnicodec_jax.corpus.tokenize import Job, check, keep
from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.errors import DataError
from omnicodec_jax.models import conv
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.semantic import EncoderConfig, FeatureExtractor
from omnicodec_jax.streaming import session_step
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import validation
from omnicodec_jax.training.gan import Gan

ROWS, FRAMES = 2, 40
"""More frames than a short block has, for which some layers do something else."""
STATED = "HIGHEST"
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|dot|convolution|dynamic_conv)")


def products(text: str) -> list[str]:
    """The matrix products and convolutions of a StableHLO program, a line each."""
    return [line for line in text.splitlines() if PRODUCT.search(line)]


def less_precise(text: str) -> list[str]:
    """Those that do not ask for full precision of both operands."""
    return [line for line in products(text) if line.count(STATED) != 2]


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@cache
def codec(kind: str, precision: Precision = "float32") -> OmniCodecTokenizer:
    config = tiny.MIMI if kind == "mimi" else tiny.OMNICODEC
    return OmniCodecTokenizer(config, tiny.variables(config), precision=precision)


def inputs(kind: str, what: str, frames: int) -> tuple[Any, ...]:
    if what == "decode":
        return (shaped(ROWS, 4, frames, dtype=jnp.int32),)
    if what == "semantic_hidden":
        return (shaped(ROWS, frames, tiny.OMNICODEC.semantic.feature_dim),)
    block = (shaped(ROWS, 1, frames * tiny.HOP), shaped(ROWS, dtype=jnp.int32))
    return block if kind == "mimi" else (*block, shaped(ROWS, frames, tiny.OMNICODEC.dimension))


def method(kind: str, what: str) -> Any:
    methods = {"encode": blocks.encode_block, "semantic_hidden": OmniCodec.semantic_hidden}
    return methods.get(what) or type(codec(kind).model).decode


def step_arguments(kind: str, what: str, frames: int) -> tuple[Any, ...]:
    """Arguments of a step of a stream: variables, state, fresh, held, inputs."""
    rows, given = shaped(ROWS, dtype=jnp.bool_), inputs(kind, what, frames)
    step = partial(lanes.stream_step, codec(kind).model, method(kind, what))
    state = jax.eval_shape(step, codec(kind).variables, {}, rows, rows, *given)[1]
    return codec(kind).variables, state, rows, rows, *given


def lowered(function: Any, *arguments: Any) -> list[str]:
    """A program for TPUs, and one for GPUs."""
    traced = function.trace(*arguments)
    return [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cuda")]


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("rows",))


def batched(kind: str, what: str) -> list[str]:
    step = lanes.batch_step(codec(kind).model, method(kind, what), one_device()).on_all_devices
    return lowered(step, *step_arguments(kind, what, FRAMES))


def streamed(kind: str, what: str) -> list[str]:
    return lowered(session_step(codec(kind).model, method(kind, what)), *step_arguments(kind, what, 1))


def exported(kind: str, what: stablehlo.What) -> list[str]:
    """One program for both platforms, which holds what either of them runs."""
    function, arguments = stablehlo.program(codec(kind), what, 2.0)
    weights = model_directory.flatten(codec(kind).variables)
    return [export.export(function, platforms=["tpu", "cuda"])(weights, *arguments).mlir_module()]


def log_mel() -> list[str]:
    return lowered(FeatureExtractor(None, jax.devices()[:1])._log10_mel, shaped(16_000))


def encoder(config: EncoderConfig, frames: int, *carried: jax.ShapeDtypeStruct) -> list[str]:
    """A frozen encoder, as whole clips are given to it: log-mel, its lengths, and what else it takes."""
    model = model_directory.build(config)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    step = lanes.batch_step(model, type(model).__call__, one_device()).on_all_devices
    rows, mel = shaped(ROWS, dtype=jnp.bool_), shaped(ROWS, frames, config.num_mel_bins)
    return lowered(step, shapes, {}, rows, rows, mel, shaped(ROWS, dtype=jnp.int32), *carried)


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    **{f"offline {what}": partial(batched, "omnicodec", what) for what in ("encode", "decode", "semantic_hidden")},
    **{f"live {what}": partial(streamed, "omnicodec", what) for what in ("encode", "decode", "semantic_hidden")},
    **{f"exported {what}": partial(exported, "omnicodec", what) for what in ("decoder", "decoder-step", "encoder")},
    **{f"Mimi {what}": partial(batched, "mimi", what) for what in ("encode", "decode")},
    "log-mel": log_mel,
    "Qwen3-Omni's encoder": partial(encoder, ENCODER, 800, shaped(ROWS, dtype=jnp.bool_)),
    "Whisper's encoder": partial(encoder, WHISPER, 200),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_product_is_full_float32_on_tpus_and_gpus(program):
    for text in PROGRAMS[program]():
        assert products(text)
        assert less_precise(text) == []


STRIDES = re.compile(r"stride = \[(\d+)")


@pytest.mark.parametrize("program", ["offline encode", "live encode", "exported encoder", "Mimi encode"])
def test_no_convolution_has_a_stride_on_gpus_and_tpus(program):
    """cuDNN's choice for one took five sixths of an encoder's time on an H100."""
    for text in PROGRAMS[program]():
        assert {int(stride) for line in products(text) for stride in STRIDES.findall(line)} <= {1}


def test_strides_are_found():
    x, kernel = shaped(1, 64, 8), shaped(8, 8, 16)
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(4,), padding="VALID")
    text = jax.jit(partial(convolve, dimension_numbers=("NWC", "WIO", "NWC"))).lower(x, kernel).as_text()
    assert STRIDES.findall(text) == ["4"]


@pytest.mark.parametrize(("stride", "left"), [(1, 2), (4, 4), (4, 0)])
def test_convolutions_are_the_same_as_products(stride, left):
    taps = 3 if stride == 1 else 2 * stride
    x, kernel = tiny.normal(2, 64, 8), tiny.normal(taps, 8, 16, seed=1)
    sizes = {"stride": stride, "dilation": 1, "left": left, "right": 0}

    def result_and_gradients(convolve: Any) -> Any:
        y, vjp = jax.vjp(partial(convolve, **sizes), x, kernel)
        return y, *vjp(jnp.sin(y))

    for ours, expected in zip(*map(result_and_gradients, (conv.conv1d_as_product, conv.conv1d)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


def test_a_program_that_asks_for_nothing_is_found():
    text = jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text()
    assert less_precise(text) == products(text) != []


def test_validation_hears_what_a_tokenizer_would_encode(monkeypatch):
    """It runs what training computes in bfloat16, or in float32 that is rounded, at full float32."""
    asked = []
    monkeypatch.setattr(validation, "_evaluate", lambda *_, **__: asked.append(jax.config.jax_default_matmul_precision))
    validation.Validator(Gan(TINY), one_device(), Samples.__new__(Samples))._evaluate()
    assert asked == ["highest"]


@pytest.mark.parametrize("module", [lanes, codec_lanes, streaming, semantic, tokenizer, blocks])
def test_programs_that_make_tokens_are_jitted_to_be_exact(module: ModuleType):
    assert not re.search(r"jax\.jit\b", inspect.getsource(module))


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("gpu", exact.DETERMINISTIC), ("cuda", exact.DETERMINISTIC), ("cpu", None), ("tpu", None)],
)
def test_sums_are_in_the_same_order_every_time_on(monkeypatch, platform, expected):
    given = []
    monkeypatch.setattr(exact.jax, "jit", lambda function, **options: given.append(options["compiler_options"]))
    exact.jit(jnp.sum, platform)
    assert given == [expected]


def test_compiler_knows_the_options_that_are_for_gpus():
    jax.jit(jnp.sum, compiler_options=exact.DETERMINISTIC)(np.ones(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(jnp.sum, compiler_options={"xla_gpu_no_such_option": True})(np.ones(3))


# -- bfloat16, for who asks for it


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_bfloat16_is_computed_where_it_is_asked_for_and_only_there(what):
    model = codec("omnicodec", "bfloat16").model
    step = session_step(model, method("omnicodec", what))
    rows, given = shaped(ROWS, dtype=jnp.bool_), inputs("omnicodec", what, FRAMES)
    found = products(step.lower(codec("omnicodec").variables, {}, rows, None, *given).as_text())
    in_bfloat16 = [line for line in found if line.count("bf16") >= 2]
    assert len(in_bfloat16) > len(found) / 2
    assert all(line.count(STATED) == 2 for line in found if line not in in_bfloat16)


def test_tokenizer_says_what_it_computes_in():
    in_full, faster = codec("omnicodec"), codec("omnicodec", "bfloat16")
    assert (in_full.precision, faster.precision) == ("float32", "bfloat16")
    assert in_full.model_hash == faster.model_hash
    assert in_full.encoder_precision is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoder_computes_in_what_is_asked_for_and_is_the_same_encoder(monkeypatch, precision):
    given = []
    monkeypatch.setattr(codec_lanes, "FeatureExtractor", lambda encoder, *_: given.append(encoder))
    branch = dataclasses.replace(tiny.OMNICODEC.semantic, source="qwen3_aut", feature_dim=ENCODER.output_dim)
    config = dataclasses.replace(tiny.OMNICODEC, semantic=branch)
    frozen = (ENCODER, {"params": {"kernel": np.ones((2, 2), np.float32)}})
    made = OmniCodecTokenizer(config, tiny.variables(config), frozen, encoder_precision=precision)
    assert made.encoder_precision == precision
    ((_, variables),) = given
    assert str(variables["params"]["kernel"].dtype) == precision
    assert made.encoder_hash == model_directory.model_hash(*frozen)


def test_precision_of_the_encoder_is_part_of_what_tokens_are(tmp_path):
    job = Job(sources={}, out=tmp_path, model="any")
    keep(job, {"encoder": "0123456789abcdef"})  # as it was before it could be chosen
    check(job, {"encoder": "0123456789abcdef", "encoder_dtype": "float32"})
    with pytest.raises(DataError, match=r"encoder_dtype = 'float32', now 'bfloat16'"):
        check(job, {"encoder": "0123456789abcdef", "encoder_dtype": "bfloat16"})
