"""What a converter says of a checkpoint that it does not take."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from omnicodec_jax.converters import mimi, qwen3_aut, wavlm, whisper
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.errors import TokenError
from omnicodec_jax.token_file import TokenFile

pytestmark = pytest.mark.quick


def run(convert: Callable[..., Any], checkpoint: Path, out: Path) -> None:
    """Calls a converter. Those that take hub ids take them, and directories, as strings."""
    convert(checkpoint=inspect.signature(convert).parameters["checkpoint"].annotation(checkpoint), out=out)


@pytest.mark.parametrize(
    ("convert", "kind", "hint"),
    [
        (mimi.main, "wavlm", "; omnicodec convert wavlm takes such a checkpoint"),
        (wavlm.main, "whisper", "; omnicodec convert whisper takes such a checkpoint"),
        (whisper.main, "mimi", "; omnicodec convert mimi takes such a checkpoint"),
        (mimi.main, "encodec", ""),
    ],
)
def test_checkpoint_of_another_model_names_the_command_that_takes_it(
    convert: Callable[..., Any], kind: str, hint: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConversionError) as caught:
        run(convert, tmp_path, tmp_path / "ours")
    assert f"model_type = '{kind}'" in str(caught.value)
    assert str(caught.value).endswith(f" is supported{hint}")


@pytest.mark.parametrize("convert", [mimi.main, wavlm.main, whisper.main, qwen3_aut.main])
def test_directory_without_a_config_is_named_without_an_errno(convert: Callable[..., Any], tmp_path: Path):
    with pytest.raises(ConversionError) as caught:
        run(convert, tmp_path, tmp_path / "ours")
    assert str(tmp_path) in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_file_of_weights_is_told_from_a_token_file(tmp_path: Path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TokenError, match="not a token file of omnicodec encode: it has no metadata of one"):
        TokenFile.load(tmp_path / "model.safetensors")
