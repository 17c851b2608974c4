"""Laws of the whole model: self-guidance, ablations, lengths, prefixes; and what the recipes say."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HOP, normal, variables
from tiny import OMNICODEC as TWO_LAYERS

from omnicodec_jax import losses
from omnicodec_jax.config import CodecConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.models.codec import CodecOutput, OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
BATCH, FRAMES, SAMPLES, STEPS = 2, 9, 9 * HOP - 5, 10
"""Neither a whole number of frames, nor as many semantic feature vectors as frames."""

OMNICODEC = dataclasses.replace(
    TWO_LAYERS,
    seanet=dataclasses.replace(TWO_LAYERS.seanet, ratios=(6,)),
    transformer=dataclasses.replace(TWO_LAYERS.transformer, num_layers=1),
)
"""One layer of everything: quick to compile."""
ABLATIONS = {
    "complete": OMNICODEC,
    "no semantic branch": dataclasses.replace(OMNICODEC, semantic=None, wavlm_dim=None),
    "no adapter 1": dataclasses.replace(OMNICODEC, adapter_1=False),
}


def inputs(config: CodecConfig, samples: int = SAMPLES) -> tuple[jax.Array, jax.Array | None]:
    features = None if config.semantic is None else normal(BATCH, STEPS, config.semantic.feature_dim, seed=1)
    return normal(BATCH, 1, samples), features


def forward(config: CodecConfig, params: dict, *args, key: jax.Array | None = None) -> CodecOutput:
    """Learns if given a key."""
    given = {"params": params, "codebooks": variables(config)["codebooks"]}
    if key is None:
        return OmniCodec(config).apply(given, *args)
    return OmniCodec(config).apply(given, *args, mutable=["codebooks"], rngs={"codebooks": key})[0]


# -- Semantic dropout


def test_clips_whose_semantic_vectors_are_left_out_do_not_hear_them():
    audio, features = inputs(OMNICODEC)

    @jax.jit
    def decoded(features: jax.Array) -> CodecOutput:
        kept = jnp.asarray([False, True])
        return forward(OMNICODEC, variables(OMNICODEC)["params"], audio, features, None, kept)

    one, other = decoded(features), decoded(features + 1)
    np.testing.assert_array_equal(one.audio[0], other.audio[0])
    np.testing.assert_array_equal(one.acoustic.codes[0], other.acoustic.codes[0])
    assert not np.array_equal(one.audio[1], other.audio[1])
    assert not np.array_equal(one.acoustic.codes[1], other.acoustic.codes[1])
    assert not np.array_equal(one.semantic.codes[0], other.semantic.codes[0])  # the semantic codebook learns from all


def test_clips_that_bypass_the_quantizer_are_decoded_from_vectors_that_it_has_not_changed():
    held, (audio, features) = variables(OMNICODEC), inputs(OMNICODEC)
    model = OmniCodec(OMNICODEC)

    @jax.jit
    def by_hand() -> jax.Array:
        def audio_of(model: OmniCodec) -> jax.Array:
            latent = model.acoustic_latent(audio)
            vector = model.semantic_quantizer(model.semantic_frames(features, latent.shape[1])).output
            quantizer = model.acoustic_quantizer
            unchanged = quantizer.project_out(quantizer.project_in(model.decouple(latent, vector)))
            joined = model.recombine(unchanged, model.semantic_image(vector))
            return model.synthesize(model.decoder_transformer(model.upsample(joined)))[:, :, :SAMPLES]

        return model.apply(held, method=audio_of)

    @jax.jit
    def decoded(bypassed: jax.Array) -> CodecOutput:
        return forward(OMNICODEC, held["params"], audio, features, None, None, bypassed)

    some, none = (decoded(jnp.asarray(clips)) for clips in ([True, False], [False, False]))
    np.testing.assert_allclose(some.audio[0], by_hand()[0], rtol=0, atol=1e-5)
    assert not np.allclose(some.audio[0], none.audio[0], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(some.audio[1], none.audio[1])
    np.testing.assert_array_equal(some.acoustic.codes, none.acoustic.codes)  # codebooks learn from all clips


# -- Self-guidance


def test_no_gradient_flows_through_the_guide():
    def loss(params):
        output = forward(OMNICODEC, params, *inputs(OMNICODEC))
        # neither through the loss nor through the output itself
        fixed = output._replace(hidden_quantized=jax.lax.stop_gradient(output.hidden_quantized))
        return losses.self_guidance(fixed, "l2") + jnp.sum(output.hidden_guide)

    gradients = jax.device_get(jax.jit(jax.grad(loss))(variables(OMNICODEC)["params"]))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_self_guidance_pulls_the_quantized_branch_towards_the_guide(norm):
    output = run("complete")[2]
    difference = np.asarray(output.hidden_quantized) - np.asarray(output.hidden_guide)

    def loss(hidden):
        return losses.self_guidance(output._replace(hidden_quantized=hidden), norm)

    value, gradient = jax.jit(jax.value_and_grad(loss))(output.hidden_quantized)
    assert float(value) == pytest.approx(np.abs(difference).mean() if norm == "l1" else (difference**2).mean())
    expected = np.sign(difference) if norm == "l1" else 2 * difference
    np.testing.assert_allclose(gradient, expected / difference.size, rtol=1e-5)


def test_guide_keeps_nothing_for_the_backward_pass():
    """As much is kept as with a constant in its place."""

    def kept(guide: jax.Array | None) -> int:
        def loss(params):
            output = forward(OMNICODEC, params, *inputs(OMNICODEC))
            return jnp.mean((output.hidden_quantized - (output.hidden_guide if guide is None else guide)) ** 2)

        pullback = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], variables(OMNICODEC)["params"])
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept(None) == kept(normal(BATCH, 2 * FRAMES, OMNICODEC.dimension))


def test_guide_is_the_decoder_transformer_on_the_latent_before_quantization():
    def by_hand(model: OmniCodec, audio: jax.Array) -> jax.Array:
        latent = jax.image.resize(
            model.acoustic_latent(audio), (BATCH, 2 * FRAMES, OMNICODEC.dimension), "linear", antialias=False
        )
        return model.decoder_transformer(latent)

    audio, features = inputs(OMNICODEC)
    model, given = OmniCodec(OMNICODEC), variables(OMNICODEC)
    guide = jax.jit(lambda given: model.apply(given, audio, features).hidden_guide)(given)
    expected = jax.jit(partial(model.apply, method=by_hand))(given, audio)
    np.testing.assert_allclose(guide, expected, rtol=0, atol=1e-5)


# -- Ablations


@cache
def run(name: str) -> tuple[jax.Array, jax.Array, CodecOutput]:
    """Codes, their audio, and the forward without learning, compiled as one."""
    config = ABLATIONS[name]
    model = OmniCodec(config)

    @jax.jit
    def everything(given):
        codes = model.apply(given, *inputs(config), method="encode")
        return codes, model.apply(given, codes, method="decode"), model.apply(given, *inputs(config))

    return everything(variables(config))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_encodes_to_its_codebooks_and_decodes_to_whole_frames(name):
    codes, decoded, _ = jax.device_get(run(name))
    sizes = np.array(ABLATIONS[name].codebook_sizes)
    assert codes.shape == (BATCH, sizes.size, FRAMES)
    assert (codes >= 0).all()
    assert (codes < sizes[:, None]).all()
    assert decoded.shape == (BATCH, 1, FRAMES * HOP)


@pytest.mark.parametrize("name", ABLATIONS)
def test_forward_without_learning_is_encode_and_decode_cut_to_the_input(name):
    codes, decoded, output = run(name)
    np.testing.assert_array_equal(output.codes, codes)
    np.testing.assert_allclose(output.audio, decoded[:, :, :SAMPLES], rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient_from_some_loss():
    def loss(params):
        audio, features = inputs(OMNICODEC)
        output = forward(OMNICODEC, params, audio, features, 2, key=jax.random.key(0))
        total = jnp.mean((output.audio - audio) ** 2) + output.acoustic.commitment + output.semantic.commitment
        total = total + losses.self_guidance(output, "l2") + losses.semantic_reconstruction(output, features)
        return total + jnp.mean(output.wavlm_projection**2)

    gradients = jax.device_get(jax.jit(jax.grad(loss))(variables(OMNICODEC)["params"]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


def test_variants_differ_by_what_was_left_out_alone():
    modules = {name: set(variables(config)["params"]) for name, config in ABLATIONS.items()}
    assert modules["complete"] - modules["no adapter 1"] == {"adapter_1"}
    semantic = {"semantic_in", "semantic_encoder", "semantic_quantizer", "semantic_decoder", "semantic_out"}
    assert modules["complete"] - modules["no semantic branch"] == semantic | {"adapter_1", "adapter_2", "wavlm_head"}


def test_without_features_a_model_with_a_semantic_branch_says_that_it_needs_them():
    with pytest.raises(ValueError, match="semantic_features"):
        OmniCodec(OMNICODEC).apply(variables(OMNICODEC), inputs(OMNICODEC)[0], method="encode")


# -- Lengths and prefixes


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 10 * HOP, 10 * HOP + 7])
def test_any_length_gives_frames_rounded_up_and_audio_of_that_length(samples):
    model, arguments = OmniCodec(OMNICODEC), (variables(OMNICODEC), *inputs(OMNICODEC, samples))
    frames = -(-samples // HOP)
    assert jax.eval_shape(partial(model.apply, method="encode"), *arguments).shape == (BATCH, 5, frames)
    output = jax.eval_shape(model.apply, *arguments)
    assert output.audio.shape == (BATCH, 1, samples)
    assert output.semantic_features.shape == arguments[2].shape


def test_6_25_hz_strides_make_frames_of_3840_samples():
    seanet = dataclasses.replace(OMNICODEC.seanet, ratios=(12, 8, 5, 4))
    config = dataclasses.replace(OMNICODEC, seanet=seanet)
    assert (config.hop_length, config.frame_rate) == (3840, 6.25)
    model, arguments = OmniCodec(config), (variables(config), *inputs(config, 240_000))
    codes = jax.eval_shape(partial(model.apply, method="encode"), *arguments)
    assert codes.shape == (BATCH, 5, 63)
    assert jax.eval_shape(partial(model.apply, method="decode"), arguments[0], codes).shape == (BATCH, 1, 241_920)


@pytest.mark.parametrize(
    ("name", "codebooks"),
    [("complete", 1), ("complete", 2), ("complete", 4), ("complete", 5)]
    + [("no semantic branch", 1), ("no semantic branch", 4)],
)
def test_latent_of_any_prefix_is_the_sum_of_its_entries(name, codebooks):
    config = ABLATIONS[name]
    given = variables(config)
    codes = np.random.default_rng(0).integers(0, 16, (BATCH, codebooks, FRAMES))

    def entries(quantizer: str, layer: int, codes: np.ndarray) -> np.ndarray:
        book = jax.tree.map(lambda stacked: np.asarray(stacked[layer]), given["codebooks"][quantizer])
        return (book["embedding_sum"] / book["cluster_usage"][:, None])[codes]

    def dense(x: np.ndarray, *path: str) -> np.ndarray:
        params = given["params"]
        for step in path:
            params = params[step]
        return x @ np.asarray(params["kernel"]) + np.asarray(params.get("bias", 0))

    expected, acoustic = np.zeros((BATCH, FRAMES, config.dimension)), codes
    if config.semantic is not None:
        semantic, acoustic = (
            dense(entries("semantic_quantizer", 0, codes[:, 0]), "semantic_quantizer", "project_out"),
            codes[:, 1:],
        )
        expected = dense(semantic, "adapter_2")
    for layer in range(acoustic.shape[1]):
        expected = expected + dense(
            entries("acoustic_quantizer", layer, acoustic[:, layer]), "acoustic_quantizer", "project_out"
        )
    latent = jax.jit(partial(OmniCodec(config).apply, method="dequantize"))(given, jnp.asarray(codes, jnp.int32))
    np.testing.assert_allclose(latent, expected, rtol=0, atol=1e-5)


# -- Recipes


@pytest.mark.parametrize(
    ("name", "layers", "rate", "bitrate", "blocks"),
    [
        ("released_12hz", 32, 12.5, 4537.5, 4),
        ("released_6hz", 32, 6.25, 2268.75, 4),
        ("paper_12hz", 31, 12.5, 4400, 1),
        ("paper_6hz", 31, 6.25, 2200, 1),
        ("demo", 8, 12.5, 900, 1),
    ],
)
def test_recipe_has_its_codebooks_rate_and_bit_rate(name, layers, rate, bitrate, blocks):
    codec = config_files.load(CONFIGS / f"{name}.py").codec
    tokenizer = OmniCodecTokenizer(codec, {})
    assert codec.acoustic.num_quantizers == layers
    assert tokenizer.num_quantizers == layers + 1
    assert tokenizer.frame_rate == rate
    assert tokenizer.bitrate == pytest.approx(bitrate)
    assert codec.seanet.n_residual_layers == blocks
    assert f"{bitrate:g} bit/s" in (CONFIGS / f"{name}.py").read_text()


RELEASED = {"mel": 15, "semantic": 50, "commitment_semantic": 10, "commitment_acoustic": 10, "self_guidance": 0.5}
RELEASED |= {"self_guidance_norm": "l1", "adversarial": 1, "wavlm_distillation": 50, "feature_matching_stft": 2}
RELEASED |= {"feature_matching_waveform": 1, "feature_matching_wavlm": 1, "wavlm_distillation_kind": "speechtokenizer"}
PAPER = {"mel": 15, "semantic": 1, "commitment_semantic": 1, "commitment_acoustic": 1, "self_guidance": 0.1}
PAPER |= {"self_guidance_norm": "l2", "adversarial": 1, "wavlm_distillation": 0, "feature_matching_stft": 1}
PAPER |= {"feature_matching_waveform": 1, "feature_matching_wavlm": 1, "wavlm_distillation_kind": "speechtokenizer"}


@pytest.mark.parametrize(
    ("name", "weights"),
    [("released_12hz", RELEASED), ("released_6hz", RELEASED), ("paper_12hz", PAPER), ("paper_6hz", PAPER)],
)
def test_recipe_weighs_the_losses_as_its_source_does(name, weights):
    weights = {**weights, "latent_cepstrum": 0, "semantic_perceptual": 0}  # terms of our own
    assert dataclasses.asdict(config_files.load(CONFIGS / f"{name}.py").loss) == weights


TRANSFORMERS = ("encoder_transformer", "decoder_transformer")
SCHEDULES = {
    "released_12hz": (1000, 2_000_000, 1.0, 1, TRANSFORMERS, 240_000),
    "released_6hz": (1000, 2_000_000, 1.0, 1, TRANSFORMERS, 64 * 3840),
    "paper_12hz": (2500, 500_000, 0.5, 2, (*TRANSFORMERS, "semantic_encoder", "semantic_decoder"), 240_000),
    "paper_6hz": (2500, 500_000, 0.5, 2, (*TRANSFORMERS, "semantic_encoder", "semantic_decoder"), 64 * 3840),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_recipe_trains_as_its_source_does(name):
    config = config_files.load(CONFIGS / f"{name}.py")
    optimizer = config.optimizer
    schedule = (optimizer.warmup_steps, optimizer.total_steps, optimizer.cosine_cycles, optimizer.accumulation)
    assert (*schedule, optimizer.weight_decay_modules, config.data.segment_samples) == SCHEDULES[name]
    assert (optimizer.learning_rate, optimizer.betas, optimizer.epsilon) == (1e-4, (0.5, 0.9), 1e-8)
    clip = 2.0 if name.startswith("released") else 1.0  # on a loss that the released code halves
    assert (optimizer.weight_decay, optimizer.clip_value, config.data.batch_size) == (0.05, clip, 24)
