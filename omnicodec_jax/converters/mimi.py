"""Converts a Mimi checkpoint in the layout of transformers to a model directory.

omnicodec convert mimi --checkpoint kyutai/mimi --out models/mimi
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import model_directory
from omnicodec_jax.config import MimiConfig, SEANetConfig, TransformerConfig
from omnicodec_jax.converters.reference import (
    CODEBOOK_NAMES,
    CONV,
    DEPTHWISE_TRANSPOSE,
    LINEAR,
    codebook_entries,
    seanet_entries,
    weights,
)
from omnicodec_jax.converters.tensors import (
    ConversionError,
    KeyEntry,
    from_entries,
    name_groups,
    read_state_dict,
    unwrap,
)

LAYER_NAMES = {
    "self_attn.o_proj.weight": "attention.out.kernel",
    "mlp.fc1.weight": "linear_1.kernel",
    "mlp.fc2.weight": "linear_2.kernel",
    "input_layernorm.weight": "norm_1.scale",
    "input_layernorm.bias": "norm_1.bias",
    "post_attention_layernorm.weight": "norm_2.scale",
    "post_attention_layernorm.bias": "norm_2.bias",
    "self_attn_layer_scale.scale": "layer_scale_1.scale",
    "mlp_layer_scale.scale": "layer_scale_2.scale",
}


def config_from_transformers(mapping: Mapping[str, Any]) -> MimiConfig:
    """Returns the config that a checkpoint's config.json describes.

    Raises ConversionError for variants of the architecture that no published Mimi has.
    """
    fixed = {"audio_channels": 1, "use_causal_conv": True, "pad_mode": "constant", "trim_right_ratio": 1.0}
    fixed |= {"use_conv_shortcut": False, "hidden_act": "gelu", "norm_eps": 1e-5, "attention_bias": False}
    fixed |= {"num_key_value_heads": mapping["num_attention_heads"], "upsample_groups": mapping["hidden_size"]}
    fixed |= {"vector_quantization_hidden_dimension": mapping["codebook_dim"], "model_type": "mimi"}
    for name, value in fixed.items():
        if mapping.get(name, value) != value:
            raise ConversionError(f"config.json: {name} = {mapping[name]!r}: only {value!r} is supported")
    rope = mapping.get("rope_parameters") or {"rope_theta": mapping.get("rope_theta", 10000.0)}
    return MimiConfig(
        sample_rate=mapping["sampling_rate"],
        dimension=mapping["hidden_size"],
        seanet=SEANetConfig(
            n_filters=mapping["num_filters"],
            ratios=tuple(mapping["upsampling_ratios"]),
            n_residual_layers=mapping["num_residual_layers"],
            kernel_size=mapping["kernel_size"],
            residual_kernel_size=mapping["residual_kernel_size"],
            last_kernel_size=mapping["last_kernel_size"],
            dilation_base=mapping["dilation_growth_rate"],
            compress=mapping["compress"],
        ),
        transformer=TransformerConfig(
            num_heads=mapping["num_attention_heads"],
            num_layers=mapping["num_hidden_layers"],
            dim_feedforward=mapping["intermediate_size"],
            context=mapping["sliding_window"],
            max_period=float(rope["rope_theta"]),
            layer_scale=mapping["layer_scale_initial_scale"],
        ),
        num_semantic_quantizers=mapping["num_semantic_quantizers"],
        num_quantizers=mapping["num_quantizers"],
        codebook_size=mapping["codebook_size"],
        codebook_dim=mapping["codebook_dim"],
    )


def key_table(config: MimiConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor of a checkpoint whose attention is packed."""
    entries = [*seanet_entries(config.seanet, "encoder.layers.", "decoder.layers.", "conv", "conv")]
    entries.append(KeyEntry("downsample.conv.weight", "params.downsample.kernel", CONV))
    entries.append(KeyEntry("upsample.conv.weight", "params.upsample.kernel", DEPTHWISE_TRANSPOSE))
    acoustic = config.num_quantizers - config.num_semantic_quantizers
    for kind, layers in {"semantic": config.num_semantic_quantizers, "acoustic": acoustic}.items():
        key, quantizer = f"quantizer.{kind}_residual_vector_quantizer", f"{kind}_quantizer"
        entries += weights(f"{key}.input_proj", f"{quantizer}.project_in", CONV, bias=False)
        entries += weights(f"{key}.output_proj", f"{quantizer}.project_out", CONV, bias=False)
        names = CODEBOOK_NAMES | {"initialized": "initialized", "embedding_sum": "embed_sum"}
        for i in range(layers):
            entries += codebook_entries(f"{key}.layers.{i}.codebook", quantizer, i, names)
    for name in ("encoder_transformer", "decoder_transformer"):
        for i in range(config.transformer.num_layers):
            key, layer = f"{name}.layers.{i}", f"params.{name}.layer_{i}"
            entries.append(KeyEntry(f"{key}.{PACKED}", f"{layer}.attention.qkv.kernel", LINEAR))
            for theirs, ours in LAYER_NAMES.items():
                entries.append(
                    KeyEntry(f"{key}.{theirs}", f"{layer}.{ours}", LINEAR if ours.endswith("kernel") else None)
                )
    return entries


PACKED = "self_attn.qkv.weight"
"""The key that `pack_attention` gives to the packed matrix of query, key and value."""


def pack_attention(state_dict: Mapping[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """Packs the kernels of query, key and value into one, and reorders the channels for our rotary embedding.

    transformers rotates the pairs of channels (i, i + D/2) of a head. This package rotates (2i, 2i + 1), as the
    original Mimi does.
    """
    packed = dict(state_dict)
    for key in state_dict:
        if not key.endswith("self_attn.q_proj.weight"):
            continue
        prefix = key.removesuffix("self_attn.q_proj.weight")
        names = [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"]
        if any(name not in packed for name in names):
            continue  # `from_entries` reports it with all other missing keys
        q, k, v = (packed.pop(name) for name in names)

        def neighbours(weight: np.ndarray) -> np.ndarray:
            halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape)

        packed[prefix + PACKED] = np.concatenate([neighbours(q), neighbours(k), v])
    return packed


def main(checkpoint: Path, out: Path) -> None:
    """Convert a Mimi checkpoint, such as kyutai/mimi, to a model directory.

    Args:
        checkpoint: Directory with config.json and model.safetensors, as transformers saves it, or a hub id.
        out: Model directory to write.
    """
    directory = model_directory.resolve(checkpoint)
    if not (directory / "config.json").is_file():
        raise ConversionError(f"{directory}: no config.json here; give a directory that transformers saved")
    try:
        config = config_from_transformers(json.loads((directory / "config.json").read_text()))
    except (KeyError, json.JSONDecodeError) as error:
        raise ConversionError(f"{directory / 'config.json'}: not the config of a Mimi model: {error!r}") from None
    tensors, entries = read_state_dict(directory / model_directory.WEIGHTS), key_table(config)
    try:
        state_dict, left_out = unwrap(tensors, [entry.key for entry in entries])
        variables = from_entries(pack_attention(state_dict, config.transformer.num_heads), entries, config)
    except ConversionError as error:
        raise ConversionError(f"{directory}: {error}") from None
    model_directory.save(out, config, variables)
    print(f"{out}: model {model_directory.model_hash(config, variables)}")
    if left_out:
        print(f"left out on purpose: {name_groups(left_out)}")
