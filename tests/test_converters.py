"""What a converter says of a checkpoint that it does not take."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from omnicodec_jax import model_directory
from omnicodec_jax.codec_directory import load_codec
from omnicodec_jax.config import Config, MimiConfig
from omnicodec_jax.converters import from_torch, mimi, qwen3_aut, semantic_features, to_torch, wavlm, whisper
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.errors import ConfigError, ModelError, OmniCodecError, TokenError
from omnicodec_jax.names import an
from omnicodec_jax.semantic import read_encoder
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.training import frozen, start

pytestmark = pytest.mark.quick


def run(convert: Callable[..., Any], checkpoint: Path, out: Path) -> None:
    """Calls a converter. Those that take hub ids take them, and directories, as strings."""
    convert(checkpoint=inspect.signature(convert).parameters["checkpoint"].annotation(checkpoint), out=out)


FROM_TORCH_WITH_CONFIG = partial(from_torch.main, config=Path("demo"))


@pytest.mark.parametrize(
    ("convert", "kind", "hint"),
    [
        (mimi.main, "wavlm", "; omnicodec convert wavlm takes such a checkpoint"),
        (wavlm.main, "whisper", "; omnicodec convert whisper takes such a checkpoint"),
        (whisper.main, "mimi", "; omnicodec convert mimi takes such a checkpoint"),
        (mimi.main, "encodec", ""),
        (qwen3_aut.main, "mimi", "; omnicodec convert mimi takes such a checkpoint"),
        (qwen3_aut.main, "whisper", "; omnicodec convert whisper takes such a checkpoint"),
        (from_torch.main, "mimi", "; omnicodec convert mimi takes such a checkpoint"),
        (from_torch.main, "wavlm", "; omnicodec convert wavlm takes such a checkpoint"),
        (FROM_TORCH_WITH_CONFIG, "whisper", "; omnicodec convert whisper takes such a checkpoint"),
        (FROM_TORCH_WITH_CONFIG, "qwen3_omni_moe", "; omnicodec convert qwen3-aut takes such a checkpoint"),
    ],
)
def test_checkpoint_of_another_model_names_the_command_that_takes_it(
    convert: Callable[..., Any], kind: str, hint: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConversionError) as caught:
        run(convert, tmp_path, tmp_path / "ours")
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: model_type = '{kind}'")
    assert str(caught.value).endswith(f" is supported{hint}")


@pytest.mark.parametrize(
    ("name", "convert", "missing"),
    [
        ("mimi", mimi.main, "num_attention_heads"),
        ("whisper", whisper.main, "num_mel_bins"),
        ("qwen3_omni_moe", qwen3_aut.main, "n_window_infer"),
    ],
)
def test_option_that_is_absent_is_said_with_the_directory(
    name: str, convert: Callable[..., Any], missing: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=f"^{tmp_path}: its config.json has no '{missing}'"):
        run(convert, tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("convert", [mimi.main, wavlm.main, whisper.main, qwen3_aut.main, from_torch.main])
def test_model_directory_is_told_from_a_checkpoint(convert: Callable[..., Any], tmp_path: Path):
    model_directory.save(tmp_path, tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    with pytest.raises(ConversionError, match=f"^{tmp_path}: an omnicodec model that is converted already"):
        run(convert, tmp_path, tmp_path / "ours")


TO_TORCH, START_FROM = partial(to_torch.main, out=Path("unused")), partial(start._load, Config())


@pytest.mark.parametrize(
    ("load", "kind", "said"),
    [
        (read_encoder, "mimi", "not an audio encoder; omnicodec convert whisper or omnicodec convert qwen3-aut makes"),
        (read_encoder, "llama", "not an audio encoder; omnicodec convert whisper"),
        (partial(semantic_features.open_encoder, dtype="float32"), "wavlm", "not an audio encoder"),
        (load_codec, "whisper", "not a codec; omnicodec convert from-torch or omnicodec convert mimi makes one"),
        (partial(frozen._load_wavlm, Config()), "whisper", "not WavLM; omnicodec convert wavlm makes one"),
        (START_FROM, "wavlm", "not a codec; omnicodec"),
        (TO_TORCH, "mimi", "not an OmniCodec or its discriminators; omnicodec convert from-torch makes one"),
    ],
)
def test_no_conversion_is_advised_to_a_model_that_would_be_refused_then(
    load: Callable[[Any], Any], kind: str, said: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))
    with pytest.raises(ModelError) as caught:
        load(tmp_path if load in (START_FROM, TO_TORCH) else str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: {an(kind)} model, {said}")


def test_checkpoint_of_ctranslate2_names_its_converter(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"alignment_heads": [], "suppress_ids": []}))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=f"run: omnicodec convert whisper --checkpoint {tmp_path} "):
        read_encoder(tmp_path)


def test_a_model_does_not_take_the_place_of_what_it_is_made_of(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"alignment_heads": [], "suppress_ids": []}))
    (tmp_path / "model.bin").write_bytes(b"")
    for kind in ("omnicodec", "whisper"):
        with pytest.raises(ModelError, match="a model of the kind whisper of CTranslate2, which would be lost"):
            model_directory.refuse_other_kind(tmp_path, kind)
    bare, link = tmp_path / "bare" / "model.safetensors", tmp_path / "link"
    bare.parent.mkdir()
    save_file({"encoder.weight": np.zeros(3, np.float32)}, bare)
    link.symlink_to(bare.parent)
    before = bare.read_bytes()
    with pytest.raises(OmniCodecError, match="is the input itself, which would be lost; choose another output"):
        from_torch.main(bare, link, config=Path("demo"))
    assert bare.read_bytes() == before


def test_file_of_weights_names_the_directory_that_it_is_in(tmp_path: Path):
    model_directory.save(tmp_path, tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    with pytest.raises(ModelError, match=f"a file, where a model is a directory; give {tmp_path}$"):
        load_codec(tmp_path / "model.safetensors")


@pytest.mark.parametrize("convert", [mimi.main, wavlm.main, whisper.main, qwen3_aut.main])
def test_directory_without_a_config_is_named_without_an_errno(convert: Callable[..., Any], tmp_path: Path):
    with pytest.raises(ConversionError) as caught:
        run(convert, tmp_path, tmp_path / "ours")
    assert str(tmp_path) in str(caught.value)
    assert "Errno" not in str(caught.value)


def misshapen(key: str, others: dict[str, tuple[int, ...]], fold: Callable[[dict[str, np.ndarray]], Any]) -> str:
    """What is said of tensors that do not fit each other."""
    with pytest.raises(ConversionError) as caught:
        fold({f"{key}.{name}": np.ones(shape, np.float32) for name, shape in others.items()})
    return str(caught.value)


@pytest.mark.parametrize("shape", [(7, 16), (16, 8), (256,)])
def test_matrices_of_attention_that_do_not_fit_each_other_are_named(shape: tuple[int, ...]):
    shapes = {"q_proj.weight": shape, "k_proj.weight": (16, 16), "v_proj.weight": (16, 16)}
    said = misshapen("layers.0.self_attn", shapes, partial(mimi.pack_attention, num_heads=2))
    assert said.startswith(f"misshapen: layers.0.self_attn: {list(shape)}, [16, 16], [16, 16]")


@pytest.mark.parametrize(("gain", "direction"), [((1, 1, 3), (16, 8, 8)), ((1, 1, 8), (8, 8))])
def test_gain_and_direction_that_do_not_fit_each_other_are_named(gain: tuple[int, ...], direction: tuple[int, ...]):
    said = misshapen(wavlm.POSITION_CONV, {"weight_g": gain, "weight_v": direction}, wavlm.fold_weight_norm)
    assert said == f"misshapen: {wavlm.POSITION_CONV}: gain {list(gain)}, direction {list(direction)}"


MIMI = mimi.config_to_transformers(MimiConfig())
WHISPER = {"model_type": "whisper", **dict.fromkeys(whisper.CONFIG_NAMES.values(), 8)}
QWEN = {**dict.fromkeys(qwen3_aut.CONFIG_NAMES.values(), 8), "n_window_infer": 800}


@pytest.mark.parametrize(
    ("read", "mapping", "wrong"),
    [
        (mimi.config_from_transformers, MIMI, {"codebook_size": None}),
        (mimi.config_from_transformers, MIMI, {"num_hidden_layers": 8.0}),
        (mimi.config_from_transformers, MIMI, {"upsampling_ratios": 8}),
        (wavlm.config_from_transformers, {"model_type": "wavlm"}, {"num_hidden_layers": "12"}),
        (whisper.config_from_transformers, WHISPER, {"encoder_layers": "4"}),
        (qwen3_aut.config_from_transformers, QWEN, {"encoder_layers": "4"}),
        (qwen3_aut.config_from_transformers, QWEN, {"n_window_infer": "800"}),
    ],
)
def test_option_of_the_wrong_type_is_named(read: Callable[..., Any], mapping: dict[str, Any], wrong: dict[str, Any]):
    read(mapping)
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"^{name} = {value!r}: must be "):
        read(mapping | wrong)


@pytest.mark.parametrize("convert", [mimi.main, wavlm.main, whisper.main, qwen3_aut.main])
def test_config_that_is_no_object_is_named(convert: Callable[..., Any], tmp_path: Path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConversionError, match=f"^{tmp_path / 'config.json'}: holds no JSON object"):
        run(convert, tmp_path, tmp_path / "ours")


def test_index_that_says_nothing_of_the_files_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(WHISPER))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"model\.safetensors\.index\.json: has no weight_map"):
        run(whisper.main, tmp_path, tmp_path / "ours")


def test_file_of_weights_is_told_from_a_token_file(tmp_path: Path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TokenError, match="not a token file of omnicodec encode: it has no metadata of one"):
        TokenFile.load(tmp_path / "model.safetensors")
