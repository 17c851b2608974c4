"""Converts a WavLM checkpoint in the layout of transformers to a model directory.

omnicodec convert wavlm --checkpoint microsoft/wavlm-base-plus --out models/wavlm
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.converters.reference import CONV, LINEAR, weights
from omnicodec_jax.converters.tensors import ConversionError, KeyEntry, config_of, from_entries, read_state_dict, unwrap
from omnicodec_jax.converters.transformers_directory import naming, read_config, require_options
from omnicodec_jax.pretrained.wavlm import WavLMConfig

CONFIG_NAMES = {
    "dimension": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "dim_feedforward": "intermediate_size",
    "conv_channels": "conv_dim",
    "conv_kernels": "conv_kernel",
    "conv_strides": "conv_stride",
    "conv_bias": "conv_bias",
    "conv_norm": "feat_extract_norm",
    "position_kernel": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_bucket_distance": "max_bucket_distance",
    "stable_layer_norm": "do_stable_layer_norm",
    "norm_epsilon": "layer_norm_eps",
}
"""Our names of the options that config.json may have, with transformers' names. The defaults are the same."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names that the file of weights can have."""
MASK = "masked_spec_embed"
"""The key of the embedding that pretraining puts in the place of masked steps."""
POSITION_CONV = "encoder.pos_conv_embed.conv"
"""The key of the positional convolution."""
WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
"""Names of gain and direction, in earlier and in later versions of PyTorch."""


def config_from_transformers(mapping: Mapping[str, Any]) -> WavLMConfig:
    """Returns the config that a checkpoint's config.json describes.

    Raises ConversionError if it is no WavLM, or has options that are not supported.
    """
    fixed = {"model_type": "wavlm", "hidden_act": "gelu", "feat_extract_activation": "gelu", "add_adapter": False}
    require_options(mapping, fixed)
    return config_of(WavLMConfig, {ours: name for ours, name in CONFIG_NAMES.items() if name in mapping}, mapping)


def norm(key: str, module: str) -> Iterator[KeyEntry]:
    """Yields the entries of a norm's scale and bias."""
    yield KeyEntry(f"{key}.weight", f"params.{module}.scale")
    yield KeyEntry(f"{key}.bias", f"params.{module}.bias")


def key_table(config: WavLMConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor of the network after `fold_weight_norm`."""
    entries = [
        *norm("feature_projection.layer_norm", "feature_norm"),
        *weights("feature_projection.projection", "feature_projection", LINEAR),
        *weights(POSITION_CONV, "position_conv", CONV),
        *norm("encoder.layer_norm", "norm"),
        KeyEntry("encoder.layers.0.attention.rel_attn_embed.weight", "params.position_table"),
    ]
    for i in range(len(config.conv_channels)):
        key = f"feature_extractor.conv_layers.{i}"
        entries += weights(f"{key}.conv", f"feature_encoder.conv_{i}", CONV, bias=config.conv_bias)
        if i == 0 or config.conv_norm == "layer":
            entries += norm(f"{key}.layer_norm", f"feature_encoder.norm_{i}")
    for i in range(config.num_layers):
        key, layer = f"encoder.layers.{i}", f"layer_{i}"
        for theirs, ours in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items():
            entries += weights(f"{key}.attention.{theirs}", f"{layer}.attention.{ours}", LINEAR)
        entries += weights(f"{key}.attention.gru_rel_pos_linear", f"{layer}.attention.gate", LINEAR)
        entries.append(KeyEntry(f"{key}.attention.gru_rel_pos_const", f"params.{layer}.attention.gate_scale"))
        entries += norm(f"{key}.layer_norm", f"{layer}.norm_1")
        entries += norm(f"{key}.final_layer_norm", f"{layer}.norm_2")
        entries += weights(f"{key}.feed_forward.intermediate_dense", f"{layer}.feed_forward.linear_1", LINEAR)
        entries += weights(f"{key}.feed_forward.output_dense", f"{layer}.feed_forward.linear_2", LINEAR)
    return entries


def separate(state_dict: Mapping[str, np.ndarray], config: WavLMConfig) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the network's tensors under its own keys, and the keys of the others: a head, the mask embedding."""
    own, left_out = unwrap(state_dict, [entry.key for entry in key_table(config)])
    if own.pop(MASK, None) is not None:
        left_out += [key for key in state_dict if key.endswith(MASK)]
    return own, left_out


def fold_weight_norm(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Computes the kernel of the positional convolution from gain and direction. It has a gain for each tap."""
    folded = dict(state_dict)
    for names in WEIGHT_NORM:
        gain, direction = (f"{POSITION_CONV}.{name}" for name in names)
        if gain in folded and direction in folded:
            kernel, scale = folded.pop(direction).astype(np.float64), folded.pop(gain)
            if kernel.ndim != 3 or scale.shape != (1, 1, kernel.shape[2]):
                raise ConversionError(
                    f"misshapen: {POSITION_CONV}: gain {list(scale.shape)}, direction {list(kernel.shape)}"
                )
            kernel *= scale / np.sqrt((kernel**2).sum(axis=(0, 1), keepdims=True))
            folded[f"{POSITION_CONV}.weight"] = kernel.astype(np.float32)
    return folded


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: WavLMConfig) -> dict[str, Any]:
    """Converts transformers' state dict to our variables. Raises ConversionError with every key that does not fit."""
    return from_entries(fold_weight_norm(separate(state_dict, config)[0]), key_table(config), config)


def main(checkpoint: Path, out: Path) -> None:
    """Convert a WavLM checkpoint, such as microsoft/wavlm-base-plus, to a model directory.

    Args:
        checkpoint: Directory with config.json and model.safetensors or pytorch_model.bin, or a hub id.
        out: Model directory to write.
    """
    directory = model_directory.resolve(checkpoint, files=(model_directory.CONFIG, *WEIGHTS))
    mapping = read_config(directory, "wavlm")
    with naming(directory):
        config = config_from_transformers(mapping)
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise ConversionError(f"{directory}: neither {' nor '.join(WEIGHTS)} is here")
    state_dict = read_state_dict(path)
    try:
        variables = from_state_dict(state_dict, config)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    model_directory.save(out, config, variables)
    print(f"{out}: model {model_directory.model_hash(config, variables)}")
    if left_out := separate(state_dict, config)[1]:
        print(f"left out on purpose, as only training or another task needs it: {', '.join(left_out)}")
