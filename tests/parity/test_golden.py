"""The model against the reference implementation's own outputs."""

import dataclasses
from functools import cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import needs_golden, relative_error

from omnicodec_jax import losses
from omnicodec_jax.models.codec import OmniCodec

pytestmark = needs_golden

MODULES = ["encoder", "encoder_transformer", "downsample", "semantic_encoder", "upsample", "semantic_decoder"]
MODULES += ["decoder_transformer", "decoder"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_gives_what_the_reference_gives(module):
    theirs = golden.load().arrays[f"mid.{module}.0"]
    assert relative_error(np.swapaxes(golden.evaluation()[1][module], 1, 2), theirs) < 1e-4


@pytest.mark.parametrize(
    ("name", "ours"),
    {
        "mid.decoder_transformer.1": lambda output: output.hidden_guide.swapaxes(1, 2),
        "eval.reconstruction": lambda output: output.audio,
        "eval.semantic_quantized": lambda output: output.semantic.output.swapaxes(1, 2),
        "eval.wavlm_projection": lambda output: output.wavlm_projection.swapaxes(1, 2),
        "eval.self_guidance_loss": lambda output: losses.self_guidance(output, "l1"),
        "eval.semantic_loss": lambda output: losses.semantic_reconstruction(output, golden.load().inputs()[1]),
    }.items(),
)
def test_forward_gives_what_the_reference_gives(name, ours):
    assert relative_error(ours(golden.evaluation()[0]), golden.load().arrays[name]) < 1e-4


def reference_codes(group: str, suffix: str = "") -> np.ndarray:
    arrays = golden.load().arrays
    return np.concatenate([arrays[f"{group}.semantic{suffix}"][:, None], arrays[f"{group}.acoustic{suffix}"]], axis=1)


def test_forward_chooses_the_reference_codes():
    np.testing.assert_array_equal(golden.evaluation()[0].codes, reference_codes("eval", "_codes"))


def test_encode_chooses_the_reference_codes():
    data = golden.load()
    encode = jax.jit(partial(OmniCodec(data.config).apply, method="encode"))
    np.testing.assert_array_equal(encode(data.variables(), *data.inputs()), reference_codes("tokens"))


@pytest.mark.parametrize(
    ("name", "codebooks"), [("wav", 13), ("wav_4_acoustic", 5), ("wav_1_acoustic", 2), ("semantic_only", 1)]
)
def test_decode_of_any_prefix_of_the_codebooks_gives_the_reference_audio(name, codebooks):
    data = golden.load()
    codes = jnp.asarray(reference_codes("tokens")[:, :codebooks], jnp.int32)
    decode = jax.jit(partial(OmniCodec(data.config).apply, method="decode"))
    assert relative_error(decode(data.variables(), codes), data.arrays[f"decode.{name}"]) < 1e-4


# -- Training


@cache
def first_training_step():
    """Forward of the first step with the layers that it drew, and the codebooks after it."""
    data = golden.load()
    codebook = dataclasses.replace(data.config.codebook, dead_threshold=0.0)
    model = OmniCodec(dataclasses.replace(data.config, codebook=codebook))
    step = jax.jit(partial(model.apply, mutable=["codebooks"]))
    num_quantizers = jnp.int32(data.steps[0]["n_q"])
    return step(data.variables(), *data.inputs(), num_quantizers, rngs={"codebooks": jax.random.key(0)})


def test_training_forward_reconstructs_as_the_reference_does():
    assert relative_error(first_training_step()[0].audio, golden.load().arrays["train.reconstruction"]) < 1e-4


@pytest.mark.parametrize(
    ("term", "ours"),
    {
        "self_guidance": lambda output: losses.self_guidance(output, "l1"),
        "semantic": lambda output: losses.semantic_reconstruction(output, golden.load().inputs()[1]),
        "commit_acoustic": lambda output: output.acoustic.commitment,
        "commit_semantic": lambda output: output.semantic.commitment,
    }.items(),
)
def test_loss_terms_of_the_first_training_step_are_the_reference_terms(term, ours):
    assert float(ours(first_training_step()[0])) == pytest.approx(golden.load().steps[0][term], rel=1e-4)


def quantizer_input(name: str) -> np.ndarray:
    """What a quantizer's first codebook sees, [M, D], from the reference's own intermediates."""
    data = golden.load()
    arrays, weights = data.arrays, data.state_dict
    if name == "semantic_quantizer":
        hidden = arrays["mid.semantic_encoder.0"].swapaxes(1, 2)  # as many steps as frames: nothing to interpolate
        x = hidden @ weights["semantic_quantizer.project_in.weight"].T + weights["semantic_quantizer.project_in.bias"]
    else:
        latent, semantic = (arrays[key].swapaxes(1, 2) for key in ("mid.downsample.0", "eval.semantic_quantized"))
        adapter_1 = semantic @ weights["proj_se_q_ac_emb.weight"].T + weights["proj_se_q_ac_emb.bias"]
        x = (latent - adapter_1) @ weights["acoustic_quantizer.input_proj.weight"][:, :, 0].T
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


@pytest.mark.parametrize("name", ["semantic_quantizer", "acoustic_quantizer"])
def test_codebooks_after_a_training_step_are_moving_averages_in_active_layers_only(name):
    data = golden.load()
    before = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), data.variables()["codebooks"][name])
    usage, sums = before["cluster_usage"].copy(), before["embedding_sum"].copy()
    residual = quantizer_input(name)
    for i in range(1 if name == "semantic_quantizer" else int(data.steps[0]["n_q"])):
        entries = before["embedding_sum"][i] / np.maximum(before["cluster_usage"][i], 1e-5)[:, None]
        codes = ((residual[:, None] - entries) ** 2).sum(-1).argmin(1)
        for code in range(len(usage[i])):
            members = residual[codes == code]
            usage[i, code] = 0.99 * usage[i, code] + 0.01 * len(members)
            sums[i, code] = 0.99 * sums[i, code] + 0.01 * members.sum(0)
        residual = residual - entries[codes]

    after = first_training_step()[1]["codebooks"][name]
    np.testing.assert_allclose(after["cluster_usage"], usage, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after["embedding_sum"], sums, rtol=0, atol=1e-5)
