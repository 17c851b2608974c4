"""WavLM against transformers, from checkpoints that transformers wrote."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from golden import ROOT, needs_golden, relative_error
from safetensors.numpy import load_file, save_file

from omnicodec_jax import model_directory
from omnicodec_jax.converters import wavlm as convert_wavlm
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig, relative_buckets

BASE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
BASE |= {"conv_dim": (16, 12, 12, 12, 12, 12, 20), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 3}
BASE |= {"num_buckets": 32, "max_bucket_distance": 40}
LARGE = BASE | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
LARGE |= {"conv_dim": (16, 12, 20), "conv_kernel": (10, 8, 9), "conv_stride": (5, 8, 8)}
MIXED = LARGE | {"do_stable_layer_norm": False, "conv_bias": True, "num_conv_pos_embeddings": 7, "layer_norm_eps": 1e-3}
VARIANTS = {"base": BASE, "large": LARGE, "mixed": MIXED}


class Pair(NamedTuple):
    theirs: transformers.WavLMModel
    config: WavLMConfig
    variables: dict[str, Any]

    def their_hidden_states(self, audio: torch.Tensor) -> list[torch.Tensor]:
        """transformers 5 leaves the last one of `hidden_states` without its norm, earlier versions did not."""
        output = self.theirs(audio, output_hidden_states=True)
        return [*output.hidden_states[:-1], output.last_hidden_state]

    def hidden_states(self, audio: np.ndarray, **options) -> tuple[jax.Array, ...]:
        return jax.jit(WavLM(self.config, **options).apply)(self.variables, jnp.asarray(audio))


def random_wavlm(**options) -> transformers.WavLMModel:
    """Weights under which no part fades out: gates, position biases and attention that differ from step to step."""
    model = transformers.WavLMModel(transformers.WavLMConfig(**options)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        normal = torch.randn(tensor.shape, generator=generator)
        if name.endswith("rel_attn_embed.weight"):
            tensor.copy_(normal)
        elif "gru_rel_pos_const" in name or name.endswith(("layer_norm.weight", "original0")):
            tensor.copy_(1 + 0.2 * normal)
        elif name.endswith("bias"):
            tensor.copy_(0.2 * normal)
        elif name.endswith(("weight", "original1")):
            tensor.copy_(1.5 * normal / tensor[0].numel() ** 0.5)
    return model


def make_pair(directory, **options) -> Pair:
    theirs = random_wavlm(**options)
    theirs.save_pretrained(directory / "theirs")
    convert_wavlm.main(checkpoint=directory / "theirs", out=directory / "ours")
    config, variables = model_directory.load(directory / "ours")
    return Pair(theirs, config, jax.tree.map(jnp.asarray, variables))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {name: make_pair(tmp_path_factory.mktemp(name), **options) for name, options in VARIANTS.items()}


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Speech and music, 2.1 s: further apart than the last bucket begins, and no whole number of steps."""
    names = ("speech_french_patte_pente", "music_metal")
    files = [audio_files.load(ROOT / f"omnicodec_jax/clips/{name}.flac", 16_000).samples for name in names]
    return np.stack([samples[4000:37_777] for samples in files])


def assert_close(ours: tuple[jax.Array, ...], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.dtype == jnp.float32
        assert relative_error(mine, other.detach().numpy()) < 1e-4, i


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hidden_state_is_that_of_transformers(pairs, audio, variant):
    pair = pairs[variant]
    theirs = pair.their_hidden_states(torch.from_numpy(audio))
    assert theirs[0].shape[1] == 105
    assert_close(pair.hidden_states(audio), theirs)


@pytest.mark.parametrize("steps", [1, 2])
def test_shortest_audio(pairs, audio, steps):
    pair = pairs["large"]
    assert (pair.config.receptive_field, WavLMConfig().receptive_field) == (365, 400)
    clip = audio[:, : 365 + 320 * (steps - 1)]
    assert_close(pair.hidden_states(clip), pair.their_hidden_states(torch.from_numpy(clip)))


@pytest.mark.parametrize(("rows", "longest"), [(320, 800), (32, 80), (8, 32), (64, 1024)])
def test_buckets_are_those_of_transformers(rows, longest):
    steps = 900
    module = transformers.models.wavlm.modeling_wavlm.WavLMAttention(4, 1, num_buckets=rows, max_distance=longest)
    theirs = module._relative_positions_bucket(torch.arange(steps)[None] - torch.arange(steps)[:, None])
    ours = relative_buckets(steps, rows, longest)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert len(np.unique(ours)) == rows - 1  # no key lies after its query at distance 0


def input_gradient(pair: Pair, audio: np.ndarray, **options) -> jax.Array:
    def loss(variables, audio):
        hidden_states = WavLM(pair.config, **options).apply(variables, audio)
        return sum(jnp.sum(jnp.sin(3 * hidden)) for hidden in hidden_states)

    return jax.jit(jax.grad(loss, argnums=1))(pair.variables, jnp.asarray(audio))


@pytest.mark.parametrize("variant", ["base", "large"])
def test_gradient_with_respect_to_the_audio_is_that_of_autograd(pairs, audio, variant):
    clip = torch.from_numpy(audio[:, :8000]).requires_grad_()
    torch.stack([torch.sin(3 * hidden).sum() for hidden in pairs[variant].their_hidden_states(clip)]).sum().backward()
    assert relative_error(input_gradient(pairs[variant], audio[:, :8000]), clip.grad.numpy()) < 1e-4


def test_rematerialised_layers_keep_no_attention_maps_and_give_the_same_gradient(pairs, audio):
    pair, clip = pairs["base"], audio[:, :8000]
    assert relative_error(input_gradient(pair, clip, remat=True), np.asarray(input_gradient(pair, clip))) < 1e-5

    def attention_maps(remat: bool) -> int:
        """How many of them are kept for the backward pass."""
        model = WavLM(pair.config, remat=remat)
        _, pull_back = jax.eval_shape(lambda x: jax.vjp(lambda x: model.apply(pair.variables, x), x), jnp.asarray(clip))
        kept = [leaf.shape for leaf in jax.tree.leaves(pull_back)]
        return sum(math.prod(shape[:-4]) for shape in kept if shape[-4:] == (2, 4, 24, 24))

    assert attention_maps(remat=True) == 0
    assert attention_maps(remat=False) >= pair.config.num_layers


@pytest.mark.parametrize("variant", ["base", "large"])
def test_bfloat16_is_near(pairs, audio, variant):
    pair = pairs[variant]
    for low, full in zip(pair.hidden_states(audio, dtype=jnp.bfloat16), pair.hidden_states(audio), strict=True):
        assert low.dtype == jnp.float32
        error = float(jnp.linalg.norm(low - full) / jnp.linalg.norm(full))
        assert 1e-4 < error < 0.05


def test_base_plus_has_as_many_parameters_as_transformers_counts():
    shapes = model_directory.expected_tensors(WavLM(WavLMConfig()))
    folded_gain, mask = 128, 768
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 94_381_936 - folded_gain - mask


@pytest.mark.slow
def test_base_plus_gives_what_transformers_gives(tmp_path, audio):
    pair = make_pair(tmp_path)
    assert pair.config == WavLMConfig()
    assert_close(pair.hidden_states(audio), pair.their_hidden_states(torch.from_numpy(audio)))


def golden_wavlm() -> tuple[WavLMConfig, dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("golden_weights", golden.DIRECTORY / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    described = json.loads((golden.DIRECTORY / "tiny_12hz_discriminators.json").read_text())
    seed = described["seeds"]["wavlm"]
    state_dict = {key: weights.tensor(key, tuple(shape), seed) for key, shape in described["wavlm"].items()}
    config = convert_wavlm.config_from_transformers(described["wavlm_config"])
    return config, jax.tree.map(jnp.asarray, convert_wavlm.from_state_dict(state_dict, config))


@needs_golden
def test_golden_hidden_states():
    arrays = golden.load().arrays
    config, variables = golden_wavlm()
    hidden_states = jax.jit(WavLM(config).apply)(variables, jnp.asarray(arrays["wavlm.audio_16k"][:, 0]))
    assert len(hidden_states) == 3
    for i, hidden in enumerate(hidden_states):
        assert relative_error(hidden, arrays[f"wavlm.hidden.{i}"]) < 1e-4


# -- Checkpoints


@pytest.fixture
def checkpoint(pairs, tmp_path):
    """Directory as transformers saves it."""
    pairs["base"].theirs.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_config(checkpoint, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | values
    (checkpoint / "config.json").write_text(json.dumps(config))


def assert_converts_to(pair: Pair, checkpoint) -> None:
    out = checkpoint.parent / "ours"
    convert_wavlm.main(checkpoint=checkpoint, out=out)
    config, variables = model_directory.load(out)
    assert config == pair.config
    jax.tree.map(np.testing.assert_array_equal, variables, dict(pair.variables))


@pytest.mark.parametrize("spelling", convert_wavlm.WEIGHT_NORM)
@pytest.mark.parametrize("file", convert_wavlm.WEIGHTS)
def test_either_spelling_of_weight_norm_in_either_file(pairs, checkpoint, spelling, file):
    tensors = load_file(checkpoint / "model.safetensors")
    for ours in convert_wavlm.WEIGHT_NORM:
        for name, other in zip(ours, spelling, strict=True):
            if (value := tensors.pop(f"{convert_wavlm.POSITION_CONV}.{name}", None)) is not None:
                tensors[f"{convert_wavlm.POSITION_CONV}.{other}"] = value
    (checkpoint / "model.safetensors").unlink()
    if file.endswith(".safetensors"):
        save_file(tensors, checkpoint / file)
    else:
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, checkpoint / file)
    assert_converts_to(pairs["base"], checkpoint)


def test_network_of_a_model_with_a_head_is_taken_out_of_it(pairs, checkpoint, capsys):
    tensors = {f"wavlm.{key}": value for key, value in load_file(checkpoint / "model.safetensors").items()}
    tensors["lm_head.weight"] = np.zeros((3, 24), np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    assert_converts_to(pairs["base"], checkpoint)
    dropped = capsys.readouterr().out.rpartition("left out")[2]
    assert "wavlm.masked_spec_embed" in dropped
    assert "lm_head.weight" in dropped
    assert "encoder" not in dropped


def test_checkpoint_with_wrong_tensors_is_refused_with_every_key(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["encoder.layers.0.attention.rel_attn_embed.weight"]
    del tensors["encoder.pos_conv_embed.conv.parametrizations.weight.original0"]
    tensors["feature_projection.projection.bias"] = np.zeros(5, np.float32)
    tensors["encoder.layers.2.layer_norm.bias"] = np.zeros(24, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert_wavlm.main(checkpoint=checkpoint, out=tmp_path / "ours")
    for line in (
        "missing: encoder.layers.0.attention.rel_attn_embed.weight",
        "missing: encoder.pos_conv_embed.conv.weight",
        "unexpected: encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        "misshapen: feature_projection.projection.bias is [5], the config wants [24]",
        "unexpected: encoder.layers.2.layer_norm.bias",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_type", "wav2vec2"), ("model_type", None), ("hidden_act", "relu"), ("feat_extract_activation", "silu")]
    + [("add_adapter", True)],
)
def test_unsupported_variant_is_refused_by_name_and_value(checkpoint, tmp_path, name, value):
    edit_config(checkpoint, **{name: value})
    with pytest.raises(ConversionError, match=f"{name} = {value!r}"):
        convert_wavlm.main(checkpoint=checkpoint, out=tmp_path / "ours")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 5), ("position_groups", 7), ("num_buckets", 30), ("max_bucket_distance", 80), ("num_layers", 0)]
    + [("conv_strides", (5, 2)), ("conv_kernels", ()), ("conv_channels", (0,) * 7)],
)
def test_config_that_cannot_be_is_refused_by_its_field(field, value):
    with pytest.raises(ConfigError, match=f"WavLMConfig.{field} = "):
        WavLMConfig(**{field: value})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_directory_without_a_checkpoint_is_refused_by_what_is_missing(checkpoint, tmp_path, name):
    (checkpoint / name).unlink()
    with pytest.raises(ConversionError, match=name.replace(".", r"\.")):
        convert_wavlm.main(checkpoint=checkpoint, out=tmp_path / "ours")


def test_hub_id_that_is_not_to_be_had_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nobody/wavlm"):
        convert_wavlm.main(checkpoint=Path("nobody/wavlm"), out=tmp_path / "ours")
