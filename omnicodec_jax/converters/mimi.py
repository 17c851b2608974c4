"""Converts Mimi from the layout of transformers to a model directory, and back.

omnicodec convert mimi --checkpoint kyutai/mimi --out models/mimi
omnicodec convert mimi --checkpoint models/mimi --out mimi_for_transformers --to-transformers
"""

import json
import operator
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
    config_of,
    from_entries,
    name_groups,
    read_state_dict,
    to_entries,
    unwrap,
)
from omnicodec_jax.converters.transformers_directory import naming, read_config, require_options
from omnicodec_jax.files import rewriting, save_tensors

CONFIG_NAMES = {
    "sample_rate": "sampling_rate",
    "dimension": "hidden_size",
    "num_semantic_quantizers": "num_semantic_quantizers",
    "num_quantizers": "num_quantizers",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
}
SEANET_NAMES = {
    "n_filters": "num_filters",
    "ratios": "upsampling_ratios",
    "n_residual_layers": "num_residual_layers",
    "kernel_size": "kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "last_kernel_size": "last_kernel_size",
    "dilation_base": "dilation_growth_rate",
    "compress": "compress",
}
TRANSFORMER_NAMES = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "dim_feedforward": "intermediate_size",
    "context": "sliding_window",
    "max_period": "rope_theta",
    "layer_scale": "layer_scale_initial_scale",
}
"""Our names of the options in config.json, with transformers' names."""
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
    require_options(mapping, {"model_type": "mimi"})
    fixed = {"audio_channels": 1, "use_causal_conv": True, "pad_mode": "constant", "trim_right_ratio": 1.0}
    fixed |= {"use_conv_shortcut": False, "hidden_act": "gelu", "norm_eps": 1e-5, "attention_bias": False}
    fixed |= {"num_key_value_heads": mapping["num_attention_heads"], "upsample_groups": mapping["hidden_size"]}
    fixed |= {"vector_quantization_hidden_dimension": mapping["codebook_dim"]}
    require_options(mapping, fixed)
    rope = mapping.get("rope_parameters") or {"rope_theta": mapping.get("rope_theta", 10000.0)}
    seanet = config_of(SEANetConfig, SEANET_NAMES, mapping)
    transformer = config_of(TransformerConfig, TRANSFORMER_NAMES, {**mapping, **rope})
    return config_of(MimiConfig, CONFIG_NAMES, mapping, seanet=seanet, transformer=transformer)


def config_to_transformers(config: MimiConfig) -> dict[str, Any]:
    """Returns what config.json says of the model in transformers: the inverse of `config_from_transformers`.

    Raises ConversionError for options that transformers has no room for.
    """
    usual = MimiConfig()
    for name, value in {"input_peak": usual.input_peak, "codebook.epsilon": usual.codebook.epsilon}.items():
        if (found := operator.attrgetter(name)(config)) != value:
            raise ConversionError(f"{name} = {found!r}: transformers' Mimi has {value!r}, and no option for it")
    seanet, transformer = config.seanet, config.transformer
    return {
        "model_type": "mimi",
        "architectures": ["MimiModel"],
        "dtype": "float32",
        "sampling_rate": config.sample_rate,
        "frame_rate": config.frame_rate,
        "audio_channels": 1,
        "hidden_size": config.dimension,
        "num_filters": seanet.n_filters,
        "num_residual_layers": seanet.n_residual_layers,
        "upsampling_ratios": list(seanet.ratios),
        "kernel_size": seanet.kernel_size,
        "last_kernel_size": seanet.last_kernel_size,
        "residual_kernel_size": seanet.residual_kernel_size,
        "dilation_growth_rate": seanet.dilation_base,
        "compress": seanet.compress,
        "use_causal_conv": True,
        "use_conv_shortcut": False,
        "pad_mode": "constant",
        "trim_right_ratio": 1.0,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "vector_quantization_hidden_dimension": config.codebook_dim,
        "num_quantizers": config.num_quantizers,
        "num_semantic_quantizers": config.num_semantic_quantizers,
        "upsample_groups": config.dimension,
        "num_hidden_layers": transformer.num_layers,
        "intermediate_size": transformer.dim_feedforward,
        "num_attention_heads": transformer.num_heads,
        "num_key_value_heads": transformer.num_heads,
        "head_dim": config.dimension // transformer.num_heads,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": transformer.context,
        "rope_theta": transformer.max_period,
        "layer_scale_initial_scale": transformer.layer_scale,
    }


def feature_extractor(config: MimiConfig) -> dict[str, Any]:
    """Returns what preprocessor_config.json says of the audio that goes into the model in transformers."""
    return {
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": config.sample_rate,
    }


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
        if q.ndim != 2 or not q.shape == k.shape == v.shape or len(q) % (2 * num_heads):
            shapes = ", ".join(str(list(weight.shape)) for weight in (q, k, v))
            raise ConversionError(f"misshapen: {prefix}self_attn: {shapes}, the matrices of query, key and value")

        def neighbours(weight: np.ndarray) -> np.ndarray:
            halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape)

        packed[prefix + PACKED] = np.concatenate([neighbours(q), neighbours(k), v])
    return packed


def unpack_attention(state_dict: Mapping[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """Splits the packed weights of attention again: the inverse of `pack_attention`."""
    unpacked: dict[str, np.ndarray] = {}
    for key, value in state_dict.items():
        if not key.endswith(PACKED):
            unpacked[key] = value
            continue

        def halves(weight: np.ndarray) -> np.ndarray:
            neighbours = weight.reshape(num_heads, -1, 2, weight.shape[1])
            return neighbours.swapaxes(1, 2).reshape(weight.shape)

        q, k, v = np.split(value, 3)
        for part, weight in zip("qkv", (halves(q), halves(k), v), strict=True):
            unpacked[f"{key.removesuffix(PACKED)}self_attn.{part}_proj.weight"] = np.ascontiguousarray(weight)
    return unpacked


def to_state_dict(variables: Mapping[str, Any], config: MimiConfig) -> dict[str, np.ndarray]:
    """Returns a model's tensors as transformers names them. A WavLM head, which only training needs, is left out."""
    return unpack_attention(to_entries(variables, key_table(config)), config.transformer.num_heads)


def main(checkpoint: Path, out: Path, to_transformers: bool = False) -> None:
    """Convert a Mimi checkpoint, such as kyutai/mimi, to a model directory, or back.

    Args:
        checkpoint: Directory with config.json and model.safetensors, as transformers saves it, or a hub id.
        out: Model directory to write.
        to_transformers: Convert in the other direction: --checkpoint is a model directory, and --out becomes one that
            `transformers.MimiModel.from_pretrained` loads.
    """
    (_to_transformers if to_transformers else _from_transformers)(checkpoint, out)


def _to_transformers(model: Path, out: Path) -> None:
    config, variables = model_directory.load(model_directory.resolve(model), model_directory.Role("Mimi", ("mimi",)))
    model_directory.refuse_other_kind(out, "mimi", theirs=True)
    texts = {"config.json": config_to_transformers(config), "preprocessor_config.json": feature_extractor(config)}
    with rewriting(out / model_directory.WEIGHTS) as path:
        save_tensors(to_state_dict(variables, config), path, {"format": "pt"})
    for name, values in texts.items():
        with rewriting(out / name) as path:
            path.write_text(json.dumps(values, indent=2) + "\n")
    print(f"{out}: Mimi for transformers, of model {model_directory.model_hash(config, variables)}")


def _from_transformers(checkpoint: Path, out: Path) -> None:
    directory = model_directory.resolve(checkpoint)
    mapping = read_config(directory, "mimi")
    with naming(directory):
        config = config_from_transformers(mapping)
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
