"""Converts Whisper's audio encoder to a model directory. It needs neither PyTorch nor CTranslate2.

omnicodec convert whisper --checkpoint openai/whisper-tiny.en --out models/whisper
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.buckets import as_path
from omnicodec_jax.converters import ctranslate2
from omnicodec_jax.converters.qwen3_aut import LAYER_DENSE, LAYER_NORMS, norm
from omnicodec_jax.converters.reference import CONV, LINEAR, weights
from omnicodec_jax.converters.tensors import ConversionError, KeyEntry, config_of, from_entries
from omnicodec_jax.converters.transformers_directory import locate, naming, read_config, read_tensors, require_options
from omnicodec_jax.files import refuse_lfs_pointer
from omnicodec_jax.model_directory import CONFIG, CTRANSLATE2, Number
from omnicodec_jax.pretrained.encoder_layer import sinusoids
from omnicodec_jax.pretrained.whisper import WhisperConfig

PREFIXES = ("model.encoder.", "encoder.", "")
"""The prefixes of the names of the encoder's tensors: in a model that transcribes, in one without a head, and in the
encoder by itself."""
POSITIONS = "embed_positions.weight"
"""The key of the position embedding, which is computed here and not stored."""
ROUNDING = 5e-3
"""How far the stored positions may be from the computed ones: bfloat16's rounding."""

CONFIG_NAMES = {
    "num_mel_bins": "num_mel_bins",
    "d_model": "d_model",
    "num_heads": "encoder_attention_heads",
    "num_layers": "encoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
}
"""Our names of the options in config.json, with transformers' names."""
NAMES = {
    "position_encodings/encodings": POSITIONS,
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "gamma": "weight",
    "beta": "bias",
    "/": ".",
}
"""CTranslate2's names of parts, with those of transformers."""
PACKED = "self_attention/linear_0/"
"""CTranslate2's name of query, key and value, which are one matrix and one bias."""


def config_from_transformers(mapping: Mapping[str, Any]) -> WhisperConfig:
    """Returns the config that a checkpoint's config.json describes.

    Raises ConversionError for what is no Whisper or not supported, KeyError for an option that is absent, and
    ConfigError for values that do not fit together.
    """
    require_options(mapping, {"model_type": "whisper", "activation_function": "gelu", "scale_embedding": False})
    return config_of(WhisperConfig, CONFIG_NAMES, mapping)


def key_table(config: WhisperConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor of the encoder but its positions."""
    entries = [*norm("layer_norm", "norm")]
    for i in (1, 2):
        entries += weights(f"conv{i}", f"conv_{i}", CONV)
    for i in range(config.num_layers):
        for theirs, ours in LAYER_DENSE.items():
            dense = weights(f"layers.{i}.{theirs}", f"layers.{ours}", LINEAR, bias=ours != "attention.key")
            entries += [entry._replace(layer=i) for entry in dense]
        for theirs, ours in LAYER_NORMS.items():
            entries += norm(f"layers.{i}.{theirs}", f"layers.{ours}", layer=i)
    return entries


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: WhisperConfig) -> dict[str, Any]:
    """Converts the tensors of transformers' encoder to our variables.

    Raises ConversionError with every key that does not fit, and for positions that are not Whisper's sinusoids.
    """
    tensors = dict(state_dict)
    if (positions := tensors.pop(POSITIONS, None)) is not None:
        expected = sinusoids(len(positions), config.d_model)
        if positions.shape != expected.shape or np.abs(positions.astype(np.float32) - expected).max() > ROUNDING:
            raise ConversionError(f"{POSITIONS}: other positions than Whisper's sinusoids, which are not supported")
    return from_entries(tensors, key_table(config), config)


# -- CTranslate2


def read_ctranslate2(path: Path) -> tuple[WhisperConfig, dict[str, np.ndarray]]:
    """Reads the encoder of a Whisper model of CTranslate2.

    Args:
        path: Its model.bin.

    Returns:
        The config, and the tensors with the names of transformers, float32.

    Raises:
        ConversionError: If it is another model, or damaged.
    """
    model = ctranslate2.read(path)
    if model.layout != "WhisperSpec":
        raise ConversionError(f"{path}: a model of CTranslate2 of the kind {model.layout}, not Whisper")
    tensors: dict[str, np.ndarray] = {}
    try:
        for name, value in model.weights("encoder/").items():
            tensors |= _unpacked(name, value) if PACKED in name else {_name(name): value}
        width, bins, _ = tensors["conv1.weight"].shape
        return WhisperConfig(
            num_mel_bins=bins,
            d_model=width,
            num_heads=int(model.variables["encoder/num_heads"]),
            num_layers=len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
            dim_feedforward=len(tensors["layers.0.fc1.weight"]),
        ), tensors
    except (KeyError, ValueError) as error:
        raise ConversionError(f"{path}: not an encoder of Whisper: {error}") from None


def _name(name: str) -> str:
    """Returns transformers' name of a tensor: "layer_0/ffn/linear_0/weight" is "layers.0.fc1.weight"."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return re.sub(r"^layer_(\d+)\.", r"layers.\1.", name)


def _unpacked(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts the rows of query, key and value out of their matrix or bias. Whisper's keys have no bias: it is zero."""
    layer, kind = name.split(PACKED)
    parts = dict(zip("qkv", np.split(value, 3), strict=True))
    if kind == "bias" and not parts["k"].any():
        del parts["k"]
    return {_name(f"{layer}self_attn/{part}_proj/{kind}"): rows for part, rows in parts.items()}


def main(checkpoint: str, out: Path, number: Number = "float32") -> None:
    """Take the audio encoder out of a Whisper model.

    Args:
        checkpoint: Directory or hub id of a Whisper model in the format of transformers (openai/whisper-tiny.en) or of
            CTranslate2, which faster-whisper reads (Systran/faster-whisper-tiny.en); or the file model.bin of the
            latter.
        out: Model directory to write.
        number: Number format that the weights are stored in. The encoder computes in float32 all the same. int8 has a
            scale for each channel.
    """
    path = as_path(checkpoint)
    directory = path.parent if path.is_file() else locate(checkpoint, CONFIG, CTRANSLATE2)
    file = path if path.is_file() else directory / CTRANSLATE2
    if file.is_file():
        refuse_lfs_pointer(file, ConversionError)
        config, state_dict = read_ctranslate2(file)
    else:
        mapping = read_config(directory, "whisper")
        with naming(directory):
            config = config_from_transformers(mapping)
        state_dict = read_tensors(checkpoint, PREFIXES)
    model_directory.save(out, config, from_state_dict(state_dict, config), number)
    print(f"{out}: {len(state_dict)} tensors, model {model_directory.model_hash(*model_directory.load(out))}")
