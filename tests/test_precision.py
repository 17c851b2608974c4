"""Computing in bfloat16, and computing anew what is not kept for the gradient."""

import dataclasses
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from step_parts import PARTS, SAMPLES
from tiny import HOP, MIMI, normal, variables
from tiny import OMNICODEC as TWO_LAYERS

from omnicodec_jax import losses
from omnicodec_jax.config import SEANetConfig
from omnicodec_jax.models.codec import CodecOutput, OmniCodec
from omnicodec_jax.models.conv import Dense, elu
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.mimi import Mimi
from omnicodec_jax.models.seanet import SEANetDecoder, SEANetEncoder

OMNICODEC = dataclasses.replace(
    TWO_LAYERS,
    seanet=dataclasses.replace(TWO_LAYERS.seanet, ratios=(6,)),
    transformer=dataclasses.replace(TWO_LAYERS.transformer, num_layers=1),
)
"""One layer of everything: quick to compile."""
BATCH, FRAMES, STEPS = 2, 9, 10
AUDIO, FEATURES = normal(BATCH, 1, FRAMES * HOP - 5), normal(BATCH, STEPS, OMNICODEC.semantic.feature_dim, seed=1)
CODES = jnp.asarray(np.random.default_rng(0).integers(0, 16, (BATCH, 5, FRAMES)), jnp.int32)
PARAMS, CODEBOOKS = variables(OMNICODEC)["params"], variables(OMNICODEC)["codebooks"]
MODELS = {
    "float32": OmniCodec(OMNICODEC),
    "float32 remat": OmniCodec(OMNICODEC, remat=True),
    "bfloat16": OmniCodec(OMNICODEC, jnp.bfloat16),
    "bfloat16 remat": OmniCodec(OMNICODEC, jnp.bfloat16, remat=True),
}


def loss(name: str, params: Any) -> tuple[jax.Array, tuple[CodecOutput, Any]]:
    """Every part of a training forward, and what it leaves in the codebooks."""
    output, learnt = MODELS[name].apply(
        {"params": params, "codebooks": CODEBOOKS},
        AUDIO,
        FEATURES,
        mutable=["codebooks"],
        rngs={"codebooks": jax.random.key(0)},
    )
    total = jnp.mean((output.audio - AUDIO) ** 2) + output.acoustic.commitment + output.semantic.commitment
    total = total + losses.self_guidance(output, "l2") + losses.semantic_reconstruction(output, FEATURES)
    return total + jnp.mean(output.wavlm_projection**2), (output, learnt)


@cache
def trained(name: str):
    """Loss, output, codebooks and gradients."""
    (value, aux), gradients = jax.jit(jax.value_and_grad(partial(loss, name), has_aux=True))(PARAMS)
    return jax.device_get((value, *aux, gradients))


def difference(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference over that of the values, of all leaves together."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# -- bfloat16


def deterministic_parts(model: OmniCodec, audio: jax.Array, features: jax.Array, codes: jax.Array):
    """Everything before the quantizers and everything after them, where no code can flip."""
    return {
        "latent": model.acoustic_latent(audio),
        "semantic": model.semantic_hidden(features),
        "audio": model.decode(codes),
    }


@cache
def compiled(name: str):
    return jax.jit(partial(MODELS[name].apply, method=deterministic_parts))


def parts(name: str, params: Any = PARAMS) -> dict[str, np.ndarray]:
    return jax.device_get(compiled(name)({"params": params, "codebooks": CODEBOOKS}, AUDIO, FEATURES, CODES))


@pytest.mark.parametrize("part", ["latent", "semantic", "audio"])
def test_bfloat16_is_within_two_percent_of_float32(part):
    assert 0 < difference(parts("bfloat16")[part], parts("float32")[part]) < 0.02


def test_bfloat16_gradients_are_within_ten_percent_of_float32():
    """Some codes may flip in between."""
    assert 0 < difference(trained("bfloat16")[3], trained("float32")[3]) < 0.1


def test_most_codes_are_those_of_float32():
    assert (trained("bfloat16")[1].codes == trained("float32")[1].codes).mean() > 0.9


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 remat"])
def test_outputs_codebooks_and_gradients_are_float32_whatever_is_computed_in(name):
    (_, (output, learnt)), gradients = jax.eval_shape(jax.value_and_grad(partial(loss, name), has_aux=True), PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves((output._replace(acoustic=None, semantic=None), gradients))} == {
        jnp.dtype("float32")
    }
    for leaf in jax.tree.leaves((output.acoustic._replace(codes=None), output.semantic._replace(codes=None), learnt)):
        assert leaf.dtype == jnp.float32


def test_gradients_of_bfloat16_are_finite():
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained("bfloat16")[3]))


def test_parameters_are_the_same_whatever_is_computed_in():
    shapes = [jax.eval_shape(partial(init_variables, model), jax.random.key(0)) for model in MODELS.values()]
    assert all(other == shapes[0] for other in shapes[1:])


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of all that are nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(nested)


def types(equation: Any) -> set[str]:
    return {str(operand.aval.dtype) for operand in equation.invars}


@cache
def forward() -> tuple[Any, ...]:
    return tuple(equations(jax.make_jaxpr(partial(loss, "bfloat16"))(PARAMS).jaxpr))


def test_exponentials_angles_and_roots_are_float32():
    kept = {"exp", "log", "sin", "cos", "rsqrt", "sqrt", "reduce_max", "argmin"}
    found = [equation for equation in forward() if equation.primitive.name in kept]
    assert {equation.primitive.name for equation in found} >= {"exp", "sin", "rsqrt", "reduce_max", "argmin"}
    assert not any("bfloat16" in types(equation) for equation in found)


def test_sums_over_time_are_float32_forwards_and_backwards():
    both = equations(jax.make_jaxpr(jax.grad(partial(loss, "bfloat16"), has_aux=True))(PARAMS).jaxpr)
    sums = [equation for equation in both if equation.primitive.name == "reduce_sum"]
    long = [e for e in sums if e.invars[0].aval.size >= FRAMES * e.outvars[0].aval.size]
    assert long
    assert not any("bfloat16" in types(equation) for equation in long)


def test_matrix_products_are_bfloat16_but_for_codebooks_and_the_way_from_and_to_audio():
    products = [equation for equation in forward() if equation.primitive.name == "dot_general"]
    float32 = [equation for equation in products if types(equation) != {"bfloat16"}]
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert len(float32) < len(products) / 2
    assert all(equation.params["precision"] == highest for equation in float32)
    convolutions = [equation for equation in forward() if equation.primitive.name == "conv_general_dilated"]
    float32 = [equation for equation in convolutions if types(equation) != {"bfloat16"}]
    assert [equation.outvars[0].aval.shape[2] for equation in float32] == [OMNICODEC.seanet.n_filters, 1]
    assert all(equation.params["precision"] == highest for equation in float32)


@pytest.mark.parametrize("part", PARTS)
def test_float32_products_of_a_step_in_bfloat16_are_full_float32(part):
    """Where a step in bfloat16 computes in float32, it is meant: on a TPU it would be bfloat16 otherwise.

    In the gradient of attention, what comes from the float32 logits meets bfloat16; that product is as it comes.
    """
    audio = jax.ShapeDtypeStruct((2, 1, SAMPLES), np.float32)
    gradients = jax.grad(partial(PARTS[part].compute, jnp.bfloat16), argnums=(0, 1))
    traced = equations(jax.make_jaxpr(gradients)(PARTS[part].variables(), audio).jaxpr)
    products = [e for e in traced if e.primitive.name in ("dot_general", "conv_general_dilated")]
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert products
    assert {e.params["precision"] for e in products if types(e) == {"float32"}} <= {highest}


def test_mimi_gives_float32_audio():
    model = Mimi(MIMI, jnp.bfloat16)
    codes = jax.eval_shape(partial(model.apply, method="encode"), variables(MIMI), AUDIO)
    audio = jax.eval_shape(partial(model.apply, method="decode"), variables(MIMI), codes)
    assert (codes.dtype, audio.dtype) == (jnp.int32, jnp.float32)


def test_stream_carries_what_is_computed_in():
    decode = partial(MODELS["bfloat16"].apply, method="decode", mutable=["stream"])
    audio, after = jax.eval_shape(decode, {"params": PARAMS, "codebooks": CODEBOOKS}, CODES)
    pasts = [leaf for path, leaf in jax.tree.leaves_with_path(after) if path[-1].key == "past"]
    assert audio.dtype == jnp.float32
    assert {str(leaf.dtype) for leaf in pasts} == {"bfloat16", "float32"}  # float32 on the way from and to audio
    assert jax.tree.structure(jax.eval_shape(decode, {**variables(OMNICODEC), **after}, CODES)[1]) == (
        jax.tree.structure(after)
    )


def test_parameters_stored_in_bfloat16_compute_as_their_values_in_float32():
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-5), parts("float32", stored), parts("float32", same)
    )


def test_elu_of_small_bfloat16_numbers_is_not_lost():
    x = jnp.asarray([-1e-3, -1e-2, -1.0, 0.0, 2.0], jnp.bfloat16)
    np.testing.assert_allclose(elu(x).astype(jnp.float32), jax.nn.elu(x.astype(jnp.float32)), rtol=2**-8)


def test_gradient_of_elu_is_that_of_the_function():
    x = jnp.linspace(-4, 4, 51)
    np.testing.assert_allclose(jax.vmap(jax.grad(elu))(x), jax.vmap(jax.grad(jax.nn.elu))(x), rtol=0, atol=1e-6)


def test_gradient_of_a_bias_is_no_sum_of_bfloat16_numbers():
    """Which would stop at 256, where 1 is half the distance to the next number."""
    layer, x = Dense(1, dtype=jnp.bfloat16), jnp.zeros((1, 4096, 1))
    params = layer.init(jax.random.key(0), x)
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(layer.apply(params, x).astype(jnp.float32))))(params)
    assert gradients["params"]["bias"] == 4096


# -- Rematerialisation


def test_gradients_computed_anew_are_those_that_were_kept_for():
    assert difference(trained("float32 remat")[3], trained("float32")[3]) < 1e-6
    assert difference(trained("float32 remat")[1], trained("float32")[1]) < 1e-6


def kept_bytes(function: Any, *arguments: Any) -> int:
    """What lies between the forward and the backward pass, apart from the arguments.

    Told by the trace: XLA for CPU puts together again what was split, so that its programs' memory tells nothing.
    """
    pullback = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)) - sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments)
    )


def seanet_bytes(dtype: Any, remat: bool) -> int:
    """Kept by an encoder and decoder of 8 channels at full rate, for half a second."""
    config, samples = SEANetConfig(n_filters=8, ratios=(5, 4), n_residual_layers=2), 12_000
    encoder, decoder = SEANetEncoder(config, 64, dtype, remat), SEANetDecoder(config, dtype, remat)
    audio, latent = jnp.zeros((1, samples, 1)), jnp.zeros((1, -(-samples // config.hop_length), 64))
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: (encoder.init(key, audio), decoder.init(key, latent)))

    def reconstruct(params: Any, audio: jax.Array) -> jax.Array:
        return decoder.apply(params[1], encoder.apply(params[0], audio)[0])  # type: ignore[return-value]

    return kept_bytes(reconstruct, params, audio)


def test_seanet_keeps_an_eighth_of_its_activations_with_remat_and_half_in_bfloat16():
    plain = seanet_bytes(jnp.float32, remat=False)
    assert seanet_bytes(jnp.float32, remat=True) < plain / 8
    assert seanet_bytes(jnp.bfloat16, remat=False) < 0.6 * plain


def test_guide_keeps_nothing_with_remat():
    """As much is kept as with a constant in its place."""

    def training(guide: jax.Array | None, params: Any) -> jax.Array:
        output = MODELS["float32 remat"].apply({"params": params, "codebooks": CODEBOOKS}, AUDIO, FEATURES)
        return jnp.mean((output.hidden_quantized - (output.hidden_guide if guide is None else guide)) ** 2)

    constant = normal(BATCH, 2 * FRAMES, OMNICODEC.dimension)
    kept = [kept_bytes(partial(training, guide), PARAMS) for guide in (None, constant)]
    assert kept[0] == kept[1]
