"""Converts the audio encoder of a Qwen3-Omni checkpoint to a model directory. It needs no PyTorch.

omnicodec convert qwen3-aut --checkpoint Qwen/Qwen3-Omni-30B-A3B-Instruct --out models/qwen3_aut
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters.reference import LINEAR, weights
from omnicodec_jax.converters.tensors import KeyEntry, config_of, from_entries
from omnicodec_jax.converters.transformers_directory import locate, naming, read_config, read_tensors, require_options
from omnicodec_jax.model_directory import CONFIG
from omnicodec_jax.pretrained.qwen3_aut import CHUNK_FRAMES, Qwen3AuTConfig

NESTED = {"thinker_config": "thinker.", "audio_config": "audio_tower."}
"""The sections of config.json around the section of the encoder, and the prefix of its tensors' keys in each."""

CONV_2D = (3, 2, 1, 0)
"""Axes of a 2-D convolution's kernel: [out, in, frequency, time] → [time, frequency, in, out]."""

CONFIG_NAMES = {
    "num_mel_bins": "num_mel_bins",
    "conv_channels": "downsample_hidden_size",
    "d_model": "d_model",
    "num_heads": "encoder_attention_heads",
    "num_layers": "encoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
    "output_dim": "output_dim",
}
"""Our names of the options in config.json, with transformers' names."""
LAYER_DENSE = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.out_proj": "attention.out",
    "fc1": "linear_1",
    "fc2": "linear_2",
}
LAYER_NORMS = {"self_attn_layer_norm": "norm_1", "final_layer_norm": "norm_2"}


def load_audio_tower(checkpoint: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the audio encoder of a checkpoint. Only the files that hold the encoder are opened or downloaded.

    Args:
        checkpoint: Directory or hub id of all of Qwen3-Omni, of its thinker, or of the encoder alone.

    Returns:
        The config with the names of transformers, and the state dict as numpy arrays in the number format of the file
        (bfloat16 is that of ml_dtypes).

    Raises:
        ConversionError: With the file that cannot be read.
    """
    config, prefix = read_config(locate(checkpoint, CONFIG), "qwen3_aut"), ""
    for section, before in NESTED.items():
        if section in config:
            config, prefix = config[section], prefix + before
    return config, read_tensors(checkpoint, [prefix])


def config_from_transformers(mapping: Mapping[str, Any]) -> Qwen3AuTConfig:
    """Returns the config that the encoder's section of config.json describes.

    Raises ConversionError for what is not supported, KeyError for an option that is absent, and ConfigError for values
    that do not fit together.
    """
    require_options(mapping, {"activation_function": "gelu", "n_window": CHUNK_FRAMES // 2})
    window_chunks = config_files.convert(int, mapping["n_window_infer"], "n_window_infer") // CHUNK_FRAMES
    return config_of(Qwen3AuTConfig, CONFIG_NAMES, mapping, window_chunks=window_chunks)


def norm(key: str, module: str, layer: int | None = None) -> Iterator[KeyEntry]:
    """Yields the entries of a layer norm's scale and bias."""
    yield KeyEntry(f"{key}.weight", f"params.{module}.scale", layer=layer)
    yield KeyEntry(f"{key}.bias", f"params.{module}.bias", layer=layer)


def key_table(config: Qwen3AuTConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor of the encoder. Its positions are computed and not stored."""
    entries = [*weights("conv_out", "front_end.out", LINEAR, bias=False), *norm("ln_post", "norm")]
    for i in (1, 2, 3):
        entries += weights(f"conv2d{i}", f"front_end.conv_{i}", CONV_2D)
    for i in (1, 2):
        entries += weights(f"proj{i}", f"proj_{i}", LINEAR)
    for i in range(config.num_layers):
        for theirs, ours in LAYER_DENSE.items():
            dense = weights(f"layers.{i}.{theirs}", f"layers.{ours}", LINEAR)
            entries += [entry._replace(layer=i) for entry in dense]
        for theirs, ours in LAYER_NORMS.items():
            entries += norm(f"layers.{i}.{theirs}", f"layers.{ours}", layer=i)
    return entries


def main(checkpoint: str, out: Path) -> None:
    """Take the audio encoder (AuT) out of a Qwen3-Omni checkpoint.

    Args:
        checkpoint: Directory or hub id of all of Qwen3-Omni, of its thinker, or of the encoder alone.
        out: Model directory to write.
    """
    mapping, state_dict = load_audio_tower(checkpoint)
    with naming(checkpoint):
        config = config_from_transformers(mapping)
    variables = from_entries(state_dict, key_table(config), config)
    model_directory.save(out, config, variables)
    print(f"{out}: {len(state_dict)} tensors, model {model_directory.model_hash(config, variables)}")
