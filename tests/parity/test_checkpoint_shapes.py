"""What comes as a checkpoint: wrapped, nested, doubled, damaged. Taken as it is meant, or refused in one line."""

import argparse
import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from tiny import OMNICODEC, variables

from omnicodec_jax import model_directory
from omnicodec_jax.config import AcousticConfig
from omnicodec_jax.converters import from_torch, mimi, qwen3_aut, reference
from omnicodec_jax.converters.tensors import ConversionError, read_state_dict

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 551000000\n"


@cache
def tensors() -> dict[str, torch.Tensor]:
    state_dict = reference.to_state_dict(variables(OMNICODEC), OMNICODEC)
    return {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}


@cache
def average() -> dict[str, torch.Tensor]:
    return {key: 0.5 * value for key, value in tensors().items()}


def under(prefix: str, state_dict: dict) -> dict:
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"from omnicodec_jax.config import *\n\nconfig = Config(codec={OMNICODEC!r})\n")
    return path


def converted(tmp_path, config, loaded, **options):
    """Weight of one layer of what becomes of it."""
    torch.save(loaded, tmp_path / "model.pth")
    from_torch.main(checkpoint=tmp_path / "model.pth", config=config, out=tmp_path / "out", **options)
    return model_directory.load(tmp_path / "out")[1]["params"]["adapter_2"]["bias"]


SHAPES = {
    "of parameters": lambda: {key: torch.nn.Parameter(value) for key, value in tensors().items()},
    "of data parallelism": lambda: under("module.", tensors()),
    "of torch.compile": lambda: under("_orig_mod.", tensors()),
    "of both": lambda: under("module._orig_mod.", tensors()),
    "compiled in parts": lambda: {key.replace("encoder.", "encoder._orig_mod.", 1): v for key, v in tensors().items()},
    "of Lightning": lambda: {
        "state_dict": under("codec.", tensors()) | {"loss.window": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "with numbers beside it": lambda: tensors() | {"step": 3, "sha": "abc"},
    "of DeepSpeed": lambda: {"module": tensors(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "of an average of PyTorch": lambda: under("module.", tensors()) | {"n_averaged": torch.tensor(3)},
    "two levels down": lambda: {"checkpoint": {"model": tensors()}, "epoch": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_is_found_whatever_holds_it(tmp_path, config, shape):
    bias = converted(tmp_path, config, SHAPES[shape]())
    np.testing.assert_array_equal(bias, tensors()["proj_se_q_ac_q.bias"])


TWICE = {
    "'ema', 'model'": lambda: {"model": tensors(), "ema": average(), "step": 3},
    "'state_dict.ema_model', 'state_dict.online_model'": lambda: {
        "state_dict": under("online_model.", tensors()) | under("ema_model.", average())
    },
    "'', 'ema'": lambda: tensors() | under("ema.", average()),
}


@pytest.mark.parametrize("names", TWICE)
def test_average_beside_the_model_is_taken_when_it_is_named(tmp_path, config, capsys, names):
    with pytest.raises(ConversionError, match=rf"model\.pth: holds the model 2 times, as {names}: choose .* --part"):
        converted(tmp_path, config, TWICE[names]())
    for name, expected in zip(names.replace("'", "").split(", "), (average(), tensors()), strict=True):
        if names.startswith("''"):
            expected = average() if name else tensors()
        bias = converted(tmp_path, config, TWICE[names](), part=name)
        np.testing.assert_array_equal(bias, expected["proj_se_q_ac_q.bias"])
        assert f"left out on purpose: {len(tensors())} tensors (" in capsys.readouterr().out
    with pytest.raises(ConversionError, match=f"holds no model as 'mean', but {names}"):
        converted(tmp_path, config, TWICE[names](), part="mean")


def test_tensor_that_is_there_under_two_names_is_refused(tmp_path, config):
    with pytest.raises(ConversionError, match=r"proj_se_q_ac_q\.bias: is there twice"):
        converted(tmp_path, config, tensors() | {"module.proj_se_q_ac_q.bias": torch.zeros(16)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, config, value):
    bad = tensors()["proj_se_q_ac_q.bias"].clone()
    bad[:2] = value
    with pytest.raises(ConversionError, match=r"model\.pth: 1 key\(s\) .* not finite: proj_se_q_ac_q\.bias in 2 of 16"):
        converted(tmp_path, config, tensors() | {"proj_se_q_ac_q.bias": bad})
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_config_is_one_line_that_says_so(tmp_path, config):
    acoustic = AcousticConfig(num_quantizers=16, codebook_size=16, codebook_dim=8, min_quantizers=2)
    text = config.read_text().replace(repr(OMNICODEC.acoustic), repr(acoustic))
    config.write_text(text)
    with pytest.raises(
        ConversionError, match=r"36 key\(s\) do not fit \(wrong config\?\): 36 missing, such as acoustic"
    ) as error:
        converted(tmp_path, config, tensors())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_file_that_git_lfs_did_not_fetch_is_named_so(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ConversionError, match=f"{name}: a pointer of Git LFS.* git lfs pull"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_shard_of_qwen_that_git_lfs_did_not_fetch_is_named_so(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_omni_moe"}')
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ConversionError, match=f"{name}: a pointer of Git LFS"):
        qwen3_aut.load_audio_tower(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: {"model": tensors(), "args": argparse.Namespace(lr=1)},
            "holds a argparse.Namespace beside its tensors",
        ),
        (lambda: torch.nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear beside its tensors"),
    ],
)
def test_objects_of_python_are_refused_without_the_advice_to_run_them(tmp_path, make, message):
    torch.save(make(), tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=message) as error:
        read_state_dict(tmp_path / "model.pth")
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoint_that_is_cut_off_is_one_line(tmp_path):
    torch.save(tensors(), tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match=r"model\.pth: cut off, or not a file that PyTorch has written") as error:
        read_state_dict(tmp_path / "model.pth")
    assert "\n" not in str(error.value)


def test_directory_in_the_place_of_a_checkpoint_is_named_so(tmp_path):
    with pytest.raises(ConversionError, match="a directory; give the checkpoint in it"):
        read_state_dict(tmp_path)


def test_half_precision_safetensors_are_read(tmp_path):
    save_torch_file({"a": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (value,) = read_state_dict(tmp_path / "model.safetensors").values()
    np.testing.assert_array_equal(value.astype(np.float32), np.ones(3))


def test_mimi_of_wrong_tensors_is_one_line_with_the_file(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    config = {"sampling_rate": 24000, "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [3, 2]}
    config |= {"num_residual_layers": 1, "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 3}
    config |= {"dilation_growth_rate": 2, "compress": 2, "num_attention_heads": 2, "num_hidden_layers": 1}
    config |= {"intermediate_size": 32, "sliding_window": 8, "layer_scale_initial_scale": 0.01, "codebook_size": 16}
    config |= {"num_semantic_quantizers": 1, "num_quantizers": 3, "codebook_dim": 8, "model_type": "mimi"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"key\(s\) do not fit \(wrong config\?\)") as error:
        mimi.main(checkpoint=tmp_path, out=tmp_path / "out")
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
