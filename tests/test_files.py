"""Files that are whole or not there, and who may read them."""

import json
import os
import stat

import numpy as np
import pytest
from tiny import OMNICODEC, variables

from omnicodec_jax import model_directory
from omnicodec_jax.errors import ModelError
from omnicodec_jax.token_file import TokenFile

TOKENS = TokenFile(
    codes=np.zeros((2, 3), np.uint16), model="m", frame_rate=12.5, sample_rate=24_000, num_samples=5760, gain=1.0
)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_models_and_tokens_can_be_read_by_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        model_directory.save(tmp_path, OMNICODEC, variables(OMNICODEC))
        TOKENS.save(tmp_path / "tokens.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", "tokens.safetensors"), oct(mode))


@pytest.mark.parametrize(
    ("kind", "converter"),
    [
        ("wavlm", "wavlm"),
        ("mimi", "mimi"),
        ("qwen3_omni_moe", "qwen3-aut"),
        ("qwen3_omni_moe_audio_encoder", "qwen3-aut"),
    ],
)
def test_checkpoint_of_transformers_names_its_converter(tmp_path, kind, converter):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"], "hidden_size": 8}))
    with pytest.raises(ModelError, match=rf"not converted yet; run: omnicodec convert {converter} --checkpoint "):
        model_directory.load(tmp_path)


def test_other_models_of_transformers_are_refused_by_their_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "5"}))
    with pytest.raises(ModelError, match="a llama model of transformers, which nothing here converts"):
        model_directory.load(tmp_path)


def test_checkpoint_of_pytorch_names_its_converter(tmp_path):
    (tmp_path / "omnicodec.pth").write_bytes(b"")
    with pytest.raises(ModelError, match=r"omnicodec convert from-torch .* --checkpoint .*omnicodec\.pth"):
        model_directory.load(tmp_path)
    with pytest.raises(ModelError, match=r"omnicodec\.pth: a file, .* omnicodec convert from-torch"):
        model_directory.resolve(tmp_path / "omnicodec.pth")


def test_model_that_git_lfs_did_not_fetch_is_named_so(tmp_path):
    model_directory.save(tmp_path, OMNICODEC, variables(OMNICODEC))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        model_directory.load(tmp_path)
