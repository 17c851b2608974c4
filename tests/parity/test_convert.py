"""Checkpoints of the reference implementation: there and back without a bit changed, or refused with every reason."""

import pickle

import golden
import numpy as np
import pytest
import torch
import yaml
from golden import needs_golden
from safetensors.numpy import load_file, save_file

from omnicodec_jax import model_directory
from omnicodec_jax.converters import from_torch, reference, to_torch
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.errors import ConfigError

DEAD = "transform."
"""A layer that the reference holds but never uses."""


def living(state_dict: dict) -> dict:
    return {key: value for key, value in state_dict.items() if not key.startswith(DEAD)}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == np.float32
        assert ours[key].tobytes() == value.tobytes(), key
        assert ours[key].shape == value.shape, key


@needs_golden
def test_state_dict_comes_back_bit_for_bit_under_the_reference_keys():
    data = golden.load()
    variables = reference.from_state_dict(data.state_dict, data.config)
    assert_same(reference.to_state_dict(variables, data.config), living(data.state_dict))


@needs_golden
def test_earlier_names_of_the_adapters_mean_the_same():
    data = golden.load()
    earlier = {now: then for then, now in reference.EARLIER_NAMES.items()}
    renamed = {
        ".".join([earlier.get(key.split(".")[0], key.split(".")[0]), *key.split(".")[1:]]): value
        for key, value in data.state_dict.items()
    }
    assert len(renamed.keys() - data.state_dict.keys()) == 8
    variables = reference.from_state_dict(renamed, data.config)
    assert_same(reference.to_state_dict(variables, data.config), living(data.state_dict))


@needs_golden
def test_frozen_audio_encoder_is_left_out():
    data = golden.load()
    with_encoder = data.state_dict | {"qwen_encoder.conv.weight": np.zeros(3, np.float32)}
    variables = reference.from_state_dict(with_encoder, data.config)
    assert_same(reference.to_state_dict(variables, data.config), living(data.state_dict))


@needs_golden
def test_one_error_lists_every_key_that_does_not_fit():
    data = golden.load()
    broken = dict(data.state_dict)
    del broken["decoder.model.0.conv.conv.bias"], broken["acoustic_quantizer.vq.layers.3._codebook.embedding_sum"]
    broken["encoder.model.99.weight"] = np.zeros(1, np.float32)
    broken["proj_wavlm.weight"] = broken["proj_wavlm.weight"].T
    broken["proj_se_quant2ac_emb.bias"] = broken["proj_se_q_ac_emb.bias"]
    with pytest.raises(ConversionError) as caught:
        reference.from_state_dict(broken, data.config)
    message = str(caught.value)
    assert message.startswith("5 key(s)")
    for line in (
        "missing: decoder.model.0.conv.conv.bias",
        "missing: acoustic_quantizer.vq.layers.3._codebook.embedding_sum",
        "unexpected: encoder.model.99.weight",
        "misshapen: proj_wavlm.weight is [32, 24], the config wants [24, 32]",
        "doubled: proj_se_q_ac_emb.bias (as proj_se_quant2ac_emb.bias too)",
    ):
        assert line in message


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(golden.load().yaml))
    return path


def save_bare(state_dict, path):
    torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, path)


def save_under_model(state_dict, path):
    torch.save({"model": {key: torch.from_numpy(value) for key, value in state_dict.items()}, "step": 3}, path)


def read_torch(path):
    return {key: value.numpy() for key, value in torch.load(path, weights_only=True).items()}


@needs_golden
@pytest.mark.parametrize(
    ("name", "save", "exported", "read"),
    [
        ("model.pth", save_under_model, "out.pth", read_torch),
        ("bare.pth", save_bare, "out.safetensors", load_file),
        ("model.safetensors", save_file, "out.pt", read_torch),
    ],
)
def test_commands_take_a_checkpoint_there_and_back_bit_for_bit(tmp_path, yaml_file, name, save, exported, read):
    data = golden.load()
    save(data.state_dict, tmp_path / name)
    from_torch.main(checkpoint=tmp_path / name, config=yaml_file, out=tmp_path / "model")
    to_torch.main(model=tmp_path / "model", out=tmp_path / exported)
    first = (tmp_path / exported).read_bytes()
    to_torch.main(model=tmp_path / "model", out=tmp_path / exported)
    assert (tmp_path / exported).read_bytes() == first
    assert_same(read(tmp_path / exported), living(data.state_dict))


@needs_golden
def test_model_directory_holds_the_reference_config(tmp_path, yaml_file):
    save_bare(golden.load().state_dict, tmp_path / "bare.pth")
    from_torch.main(checkpoint=tmp_path / "bare.pth", config=yaml_file, out=tmp_path / "model")
    assert model_directory.load(tmp_path / "model")[0] == golden.load().config


@needs_golden
def test_half_precision_checkpoint_becomes_float32(tmp_path):
    state_dict = {key: torch.from_numpy(value).bfloat16() for key, value in golden.load().state_dict.items()}
    torch.save(state_dict, tmp_path / "half.pth")
    read = from_torch.read_state_dict(tmp_path / "half.pth")
    assert {value.dtype for value in read.values()} == {np.dtype(np.float32)}


@needs_golden
def test_export_to_an_unknown_format_is_refused_and_leaves_nothing(tmp_path):
    data = golden.load()
    model_directory.save(tmp_path / "model", data.config, reference.from_state_dict(data.state_dict, data.config))
    with pytest.raises(ConversionError, match="out.bin"):
        to_torch.main(model=tmp_path / "model", out=tmp_path / "out.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_golden
@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("seanet", "norm", "weight_norm"), ("seanet", "causal", False), ("transformer", "gating", "silu")]
    + [("transformer", "d_model", 64), ("acoustic_quantizer", "input_dimension", 48)],
)
def test_reference_config_that_cannot_be_had_is_refused_by_name_and_value(section, name, value):
    mapping = golden.load().yaml
    with pytest.raises(ConfigError, match=rf"{section}\.{name} = {value!r}"):
        reference.config_from_reference(mapping | {section: mapping[section] | {name: value}})


@needs_golden
@pytest.mark.parametrize(
    ("section", "name", "value"),  # YAML reads 1e4 as a text
    [("transformer", "max_period", "1e4"), ("seanet", "ratios", 8), ("acoustic_quantizer", "n_q", "8")],
)
def test_reference_config_with_a_value_of_the_wrong_type_is_refused_by_name_and_value(section, name, value):
    mapping = golden.load().yaml
    with pytest.raises(ConfigError, match=rf"^{name} = {value!r}: must be "):
        reference.config_from_reference(mapping | {section: mapping[section] | {name: value}})


@needs_golden
def test_reference_config_without_a_key_is_refused_by_name():
    mapping = golden.load().yaml
    seanet = {name: value for name, value in mapping["seanet"].items() if name != "ratios"}
    with pytest.raises(ConfigError, match="ratios"):
        reference.config_from_reference(mapping | {"seanet": seanet})


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("dump", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol=2))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, dump):
    checkpoint, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    dump({"model": Trap(sprung)}, checkpoint)
    with pytest.raises(ConversionError, match="trap.pth"):
        from_torch.read_state_dict(checkpoint)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("noise.pth", b"\x01\x02nothing"),
        ("noise.safetensors", b"\x01\x02nothing"),
        ("gone.pth", None),
    ],
)
def test_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=name):
        from_torch.read_state_dict(tmp_path / name)


@pytest.mark.parametrize("loaded", [[torch.zeros(1)], {"model": {"epoch": 3}}, torch.zeros(2)])
def test_file_that_holds_no_state_dict_is_refused_by_name(tmp_path, loaded):
    torch.save(loaded, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match=r"other\.pth"):
        from_torch.read_state_dict(tmp_path / "other.pth")
