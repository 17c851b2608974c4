"""The discriminators against the reference implementation and PyTorch."""

import importlib.util
import json
from functools import cache
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import needs_golden, relative_error
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from omnicodec_jax import config, model_directory
from omnicodec_jax.converters import discriminators as convert_discriminators
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.discriminators import DiscriminatorOutputs, Discriminators, sub_discriminators
from omnicodec_jax.discriminators.conv import Conv
from omnicodec_jax.dsp import resample

GOLDEN = config.DiscriminatorConfig(
    stft=config.STFTDiscriminatorConfig(filters=4),
    waveform=config.WaveformDiscriminatorConfig(periods=(2, 3), windows=(334, 542)),
    wavlm=config.WavLMDiscriminatorConfig(channels=8, hidden_size=24, hidden_states=3),
)
TINY = config.DiscriminatorConfig(
    stft=config.STFTDiscriminatorConfig(filters=4, windows=(32,)),
    waveform=config.WaveformDiscriminatorConfig(periods=(3,), rates=(2,), windows=(100,), channels=64),
    wavlm=config.WavLMDiscriminatorConfig(channels=4, hidden_size=6, hidden_states=2),
)
NETWORKS = {"net_msstftd": "msstftd", "net_dacd": "dacd", "net_wld": "wavlm_discriminator"}


def golden_weights(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State dict of one network beside the codec, and the file that describes them all."""
    spec = importlib.util.spec_from_file_location("golden_weights", golden.DIRECTORY / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    described = json.loads((golden.DIRECTORY / "tiny_12hz_discriminators.json").read_text())
    seed = described["seeds"][name]
    return {key: weights.tensor(key, tuple(shape), seed) for key, shape in described[name].items()}, described


@cache
def golden_state_dict() -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{key}": value for prefix, name in NETWORKS.items() for key, value in golden_weights(name)[0].items()
    }


def golden_variables() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, convert_discriminators.from_state_dict(golden_state_dict(), GOLDEN))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def random_variables() -> dict[str, Any]:
    """Random variables of TINY, whose gains differ from the norms."""
    shapes = model_directory.expected_tensors(Discriminators(TINY))
    leaves = {name: jnp.asarray(normal(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    return model_directory.unflatten(leaves)


def to_torch(x: jax.Array, *axes: int) -> torch.Tensor:
    """With the last axis (or two) first, as PyTorch has channels."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), axes or (-1, -2), (1,) if axes else (0, 1)).copy())


def tiny_inputs() -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return jnp.asarray(normal(2, 1, 1200)), tuple(jnp.asarray(normal(2, 9, 6, seed=i)) for i in range(2))


# -- The reference


@cache
def golden_outputs(audio: str) -> DiscriminatorOutputs:
    arrays = golden.load().arrays
    hidden_states = tuple(jnp.asarray(arrays[f"wavlm.hidden.{i}"]) for i in range(3))
    return jax.jit(Discriminators(GOLDEN).apply)(golden_variables(), jnp.asarray(arrays[audio]), hidden_states)


@needs_golden
@pytest.mark.parametrize(("kind", "audio"), [("real", "audio"), ("fake", "train.reconstruction")])
@pytest.mark.parametrize(("family", "network", "count"), [("stft", "msstftd", 6), ("waveform", "dacd", 4)])
def test_logits_are_those_of_the_reference(family, network, count, kind, audio):
    """50 001 samples: one too many for a period of 2, and no remainder for one of 3."""
    outputs = golden_outputs(audio)[family]
    assert len(outputs) == count
    for i, output in enumerate(outputs):
        theirs = golden.load().arrays[f"disc.{network}.{kind}.{i}"][:, 0]
        period = family == "waveform" and i < 2
        assert relative_error(output.logits[..., 0], theirs.swapaxes(1, 2) if period else theirs) < 1e-4


@needs_golden
def test_feature_maps_are_as_many_as_the_reference_has():
    counts = {
        family: [len(output.feature_maps) for output in outputs] for family, outputs in golden_outputs("audio").items()
    }
    assert counts == {"stft": [5] * 6, "waveform": [5, 5, 25, 25], "wavlm": [3]}


def test_discriminators_have_the_parameters_of_the_reference():
    shapes = model_directory.expected_tensors(Discriminators(config.DiscriminatorConfig()))
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        _, family, part, *_ = name.split(".")
        for key in (family, f"{family}.{part}"):
            counts[key] = counts.get(key, 0) + int(np.prod(shape))
    assert {key: counts[key] for key in ("stft", "waveform", "wavlm")} == {
        "stft": 566_796,
        "waveform": 43_462_420,
        "wavlm": 1_173_634,
    }
    assert {counts[key] for key in counts if key.startswith("stft.")} == {94_466}
    assert {counts[key] for key in counts if key.startswith("waveform.period")} == {8_221_154}
    assert {counts[key] for key in counts if key.startswith("waveform.window")} == {471_330}


# -- Frames of odd sizes


@pytest.mark.parametrize(("window", "frames"), [(334, 2892), (542, 1778), (876, 1095), (1418, 678), (2296, 419)])
def test_resolution_has_the_frames_of_the_reference(window, frames):
    """10 s; 876 - 219 is odd, which costs a frame."""
    waveform = config.WaveformDiscriminatorConfig(periods=(), windows=(window,), channels=64)
    model = Discriminators(config.DiscriminatorConfig(stft=None, waveform=waveform, wavlm=None))
    outputs = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 1, 240_000)))[0]
    assert outputs["waveform"][0].logits.shape[:2] == (1, frames)


# -- PyTorch


class MultiScale(nn.Module):
    """DAC's discriminator at one rate, from its paper's repository's facts: kernels, strides, groups."""

    def __init__(self, rate: int):
        super().__init__()
        self.rate = rate
        layers = [(1, 16, 15, 1, 1), (16, 64, 41, 4, 4), (64, 256, 41, 4, 16), (256, 1024, 41, 4, 64)]
        layers += [(1024, 1024, 41, 4, 256), (1024, 1024, 5, 1, 1)]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(i, o, k, stride, k // 2, groups=groups)) for i, o, k, stride, groups in layers
        )
        self.conv_post = weight_norm(nn.Conv1d(1024, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x - x.mean(-1, keepdim=True)
        x = 0.8 * x / (x.abs().amax(-1, keepdim=True) + 1e-9)
        maps = [torch.from_numpy(np.array(resample(jnp.asarray(x.numpy()), self.rate, 1)))]
        for layer in self.convs:
            maps.append(F.leaky_relu(layer(maps[-1]), 0.1))
        return [*maps[1:], self.conv_post(maps[-1])]


def test_rate_is_the_multi_scale_discriminator_in_torch():
    rate = 2
    torch.manual_seed(0)
    theirs = MultiScale(rate)
    state_dict = {}
    for key, value in theirs.state_dict().items():
        name = key.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        layer, index, *rest = name.split(".")
        name = f"convs.{index}.0.{rest[0]}" if layer == "convs" else name
        gain = 1.5 if name.endswith("weight_g") else 1  # the initial gain would hide a missing normalisation
        state_dict[f"net_dacd.discriminator.discriminators.0.{name}"] = gain * value.numpy()
    theirs.load_state_dict({k: v * (1.5 if "original0" in k else 1) for k, v in theirs.state_dict().items()})
    waveform = config.WaveformDiscriminatorConfig(periods=(), rates=(rate,), windows=())
    ours = config.DiscriminatorConfig(stft=None, waveform=waveform, wavlm=None)
    variables = convert_discriminators.from_state_dict(state_dict, ours)
    x = normal(2, 1, 700) + 0.5
    (output,) = jax.jit(Discriminators(ours).apply)(variables, jnp.asarray(x))["waveform"]
    with torch.no_grad():
        maps = theirs(torch.from_numpy(x))
    for mine, other in zip([*output.feature_maps, output.logits], maps, strict=True):
        assert relative_error(mine.swapaxes(1, 2), other.numpy()) < 1e-5


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "dilation", "groups", "shape"),
    [((3, 9), 1, 1, 1, (5, 20)), ((3, 9), 2, 1, 1, (5, 20)), ((3, 9), 2, 4, 1, (11, 21)), ((3, 9), 2, 2, 1, (7, 4))]
    + [
        ((3, 3), 1, 1, 1, (4, 6)),
        ((5,), 3, 1, 1, (17,)),
        ((41,), 4, 1, 2, (50,)),
        ((5,), 3, 1, 2, (3,)),
        ((1,), 1, 1, 1, (3,)),
    ],
)
def test_convolution_is_that_of_torch(size, stride, dilation, groups, shape, normed):
    module = Conv(6, size, stride, dilation, groups, weight_norm=normed)
    x = jnp.asarray(normal(2, *shape, 4))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = {name: jnp.asarray(normal(*leaf.shape, seed=i)) for i, (name, leaf) in enumerate(shapes.items())}
    ours = jax.jit(module.apply)({"params": params}, x)
    weight = to_torch(params["kernel"])
    if normed:
        weight = torch._weight_norm(weight, to_torch(params["gain"]), 0)
    bias = torch.from_numpy(np.array(params["bias"]))
    strides = (1,) * (len(size) - 1) + (stride,)
    dilations = (dilation,) + (1,) * (len(size) - 1)
    padding = tuple(k // 2 * d for k, d in zip(size, dilations, strict=True))
    conv = F.conv1d if len(size) == 1 else F.conv2d
    theirs = conv(to_torch(x, -1), weight, bias, strides, padding, dilations, groups)
    assert relative_error(to_torch(ours, -1), theirs.numpy()) < 1e-5


def test_initial_weights_are_those_of_torch():
    params = jax.jit(Conv(2000, (3, 9)).init)(jax.random.key(0), jnp.zeros((1, 4, 10, 5)))["params"]
    theirs = nn.Conv2d(5, 2000, (3, 9))
    for mine, other in ((params["kernel"], theirs.weight), (params["bias"], theirs.bias)):
        assert float(mine.std()) == pytest.approx(other.std().item(), rel=0.05)
        assert float(jnp.abs(mine).max()) == pytest.approx(other.abs().max().item(), rel=0.01)
    norms = np.linalg.norm(np.asarray(params["kernel"]).reshape(-1, 2000), axis=0)
    np.testing.assert_allclose(params["gain"].ravel(), norms, rtol=1e-5)


# -- Laws


@cache
def tiny_outputs() -> DiscriminatorOutputs:
    return jax.jit(Discriminators(TINY).apply)(random_variables(), *tiny_inputs())


def assert_close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(mine, np.asarray(other)) < 1e-5


def test_sub_discriminators_one_by_one_give_what_they_give_together():
    """By their own parameters, in the same order."""
    params, pieces = random_variables()["params"], []
    for sub in sub_discriminators(TINY):
        discriminate = jax.jit(Discriminators(sub.config).apply)
        (outputs,) = discriminate({"params": sub.select(params)}, *tiny_inputs()).values()
        pieces += outputs
    assert_close(pieces, [output for family in tiny_outputs().values() for output in family])


def test_bfloat16_convolutions_leave_parameters_and_logits_in_float32():
    model = Discriminators(TINY, dtype=jnp.bfloat16)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *tiny_inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    for output in [output for family in outputs.values() for output in family]:
        assert output.logits.dtype == jnp.float32
    for output in outputs["stft"] + outputs["waveform"]:
        assert {leaf.dtype for leaf in output.stored_maps} == {jnp.dtype(jnp.bfloat16)}
    small = config.DiscriminatorConfig(stft=TINY.stft, waveform=None, wavlm=None)
    (rounded,) = jax.jit(Discriminators(small, dtype=jnp.bfloat16).apply)(random_variables(), *tiny_inputs())["stft"]
    assert 0 < relative_error(rounded.logits, np.asarray(tiny_outputs()["stft"][0].logits)) < 0.1


def test_gradient_of_a_bias_is_no_sum_of_bfloat16_numbers():
    """Which would stop at 256, where 1 is half the distance to the next number."""
    module, x = Conv(1, (1,), dtype=jnp.bfloat16), jnp.zeros((1, 4096, 1))
    params = {"kernel": jnp.ones((1, 1, 1)), "gain": jnp.ones((1, 1, 1)), "bias": jnp.zeros(1)}
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x).astype(jnp.float32))))(params)
    assert gradient["bias"] == 4096


@pytest.mark.parametrize("family", ["stft", "waveform", "wavlm"])
def test_family_can_be_left_out_and_be_applied_alone(family):
    families = {"stft": None, "waveform": None, "wavlm": None, family: getattr(TINY, family)}
    variables = {"params": {family: random_variables()["params"][family]}}
    outputs = jax.jit(Discriminators(config.DiscriminatorConfig(**families)).apply)(variables, *tiny_inputs())
    assert list(outputs) == [family]
    assert_close(outputs[family], tiny_outputs()[family])


def test_wavlm_discriminator_without_hidden_states_is_refused():
    model = Discriminators(config.DiscriminatorConfig(stft=None, waveform=None))
    with pytest.raises(ValueError, match="hidden_states"):
        model.init(jax.random.key(0), tiny_inputs()[0])


# -- Conversion and files


def test_conversion_there_and_back_is_exact():
    state_dict = convert_discriminators.to_state_dict(random_variables(), TINY)
    back = convert_discriminators.from_state_dict(state_dict, TINY)
    jax.tree.map(np.testing.assert_array_equal, back, random_variables())
    assert state_dict["net_msstftd.discriminators.0.convs.1.conv.weight_g"].shape == (4, 1, 1, 1)
    assert state_dict["net_dacd.discriminator.discriminators.0.convs.0.0.weight_v"].shape == (2, 1, 5, 1)


@needs_golden
def test_conversion_there_and_back_is_exact_for_the_reference_state_dict():
    state_dict = golden_state_dict()
    back = convert_discriminators.to_state_dict(golden_variables(), GOLDEN)
    assert back.keys() == state_dict.keys()
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value)


def test_state_dict_that_does_not_fit_is_refused_with_every_key():
    state_dict = convert_discriminators.to_state_dict(random_variables(), TINY)
    del state_dict["net_wld.pre.bias"]
    state_dict["net_wld.pre.weight_g"] = np.ones((4, 1), np.float32)
    state_dict["net_wld.head"] = np.ones(1, np.float32)
    with pytest.raises(ConversionError) as caught:
        convert_discriminators.from_state_dict(state_dict, TINY)
    for line in ("missing: net_wld.pre.bias", "misshapen: net_wld.pre.weight_g is [4, 1]", "unexpected: net_wld.head"):
        assert line in str(caught.value)


def test_model_directory_holds_the_discriminators(tmp_path):
    model_directory.save(tmp_path, TINY, random_variables())
    loaded, variables = model_directory.load(tmp_path)
    assert loaded == TINY
    jax.tree.map(np.testing.assert_array_equal, variables, random_variables())
