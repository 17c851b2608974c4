"""The key table of the codec: it maps the reference implementation's state dict to our variables, in both directions.

Source: ASLP-lab/OmniCodec at commit 7e18277; its blocks come from kyutai's moshi. PyTorch stores linear kernels as
[out, in], convolutions as [out, in, k] and transposed ones as [in, out / groups, k]; our arrays are channels-last.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omnicodec_jax.config import (
    AcousticConfig,
    CodecConfig,
    SEANetConfig,
    SemanticConfig,
    TransformerConfig,
)
from omnicodec_jax.converters.tensors import KeyEntry, config_of, from_entries, to_entries
from omnicodec_jax.errors import ConfigError

DROPPED = ("qwen_encoder.", "transform.")
"""Prefixes of keys that are left out on purpose: the frozen audio encoder, and a layer that is never used."""

SEANET_NAMES = {
    name: name
    for name in (
        *("n_filters", "ratios", "n_residual_layers", "kernel_size", "residual_kernel_size", "last_kernel_size"),
        *("dilation_base", "compress"),
    )
}
TRANSFORMER_NAMES = {
    name: name for name in ("num_heads", "num_layers", "dim_feedforward", "context", "max_period", "layer_scale")
}
"""Our names of the options in the reference's config, which are its own names."""
SEMANTIC_NAMES = {
    "feature_dim": "semantic_feature_dim",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
}
ACOUSTIC_NAMES = {"num_quantizers": "n_q", "codebook_size": "bins", "codebook_dim": "dimension"}
"""Our names of the options of the quantizers, with its names."""
EARLIER_NAMES = {
    "proj_qwen2se_emb": "proj_gt_se_emb",
    "proj_se_quant2ac_emb": "proj_se_q_ac_emb",
    "proj_se_quant2ac_quant": "proj_se_q_ac_q",
    "proj_se_quant2qwen": "proj_se_q_gt",
}
"""Names that adapters and projections had before 2026-04-18, and the names that they have since."""

LINEAR, CONV, CONV_TRANSPOSE, DEPTHWISE_TRANSPOSE = (1, 0), (2, 1, 0), (2, 0, 1), (2, 1, 0)
"""Axes of the kernels of each kind of layer, for `KeyEntry.axes`."""


def weights(key: str, module: str, axes: tuple[int, ...], bias: bool = True) -> Iterator[KeyEntry]:
    """Yields the entries of a layer's weight and bias."""
    yield KeyEntry(f"{key}.weight", f"params.{module}.kernel", axes)
    if bias:
        yield KeyEntry(f"{key}.bias", f"params.{module}.bias")


def seanet_entries(config: SEANetConfig, encoder: str, decoder: str, conv: str, convtr: str) -> Iterator[KeyEntry]:
    """Yields the entries of SEANet's encoder and decoder.

    Args:
        config: The sizes of SEANet.
        encoder: What stands before the index of an encoder layer.
        decoder: What stands before the index of a decoder layer.
        conv: What stands after the index of a convolution.
        convtr: What stands after the index of a transposed convolution.
    """

    def residual(key: str, module: str) -> Iterator[KeyEntry]:
        yield from weights(f"{key}.block.1.{conv}", f"{module}.conv_1", CONV)
        yield from weights(f"{key}.block.3.{conv}", f"{module}.conv_2", CONV)

    # In the reference, activations count as layers, too.
    stages, blocks = len(config.ratios), config.n_residual_layers
    last = stages * (blocks + 2) + 2
    yield from weights(f"{encoder}0.{conv}", "encoder.conv_in", CONV)
    yield from weights(f"{encoder}{last}.{conv}", "encoder.conv_out", CONV)
    yield from weights(f"{decoder}0.{conv}", "decoder.conv_in", CONV)
    yield from weights(f"{decoder}{last}.{conv}", "decoder.conv_out", CONV)
    for stage in range(stages):
        down = (stage + 1) * (blocks + 2)
        up = 2 + stage * (blocks + 2)
        yield from weights(f"{encoder}{down}.{conv}", f"encoder.stage_{stage}_down", CONV)
        yield from weights(f"{decoder}{up}.{convtr}", f"decoder.stage_{stage}_up", CONV_TRANSPOSE)
        for j in range(blocks):
            yield from residual(f"{encoder}{down - 1 - blocks + j}", f"encoder.stage_{stage}_residual_{j}")
            yield from residual(f"{decoder}{up + 1 + j}", f"decoder.stage_{stage}_residual_{j}")


def transformer_entries(config: TransformerConfig, name: str) -> Iterator[KeyEntry]:
    """Yields the entries of a transformer. The reference packs query, key and value and rotates pairs as we do."""
    for i in range(config.num_layers):
        key, layer = f"{name}.transformer.layers.{i}", f"params.{name}.layer_{i}"
        yield KeyEntry(f"{key}.self_attn.in_proj_weight", f"{layer}.attention.qkv.kernel", LINEAR)
        yield KeyEntry(f"{key}.self_attn.out_proj.weight", f"{layer}.attention.out.kernel", LINEAR)
        for n in (1, 2):
            yield KeyEntry(f"{key}.norm{n}.weight", f"{layer}.norm_{n}.scale")
            yield KeyEntry(f"{key}.norm{n}.bias", f"{layer}.norm_{n}.bias")
            yield KeyEntry(f"{key}.linear{n}.weight", f"{layer}.linear_{n}.kernel", LINEAR)
            yield KeyEntry(f"{key}.layer_scale_{n}.scale", f"{layer}.layer_scale_{n}.scale")


def codebook_entries(key: str, quantizer: str, layer: int, names: Mapping[str, str]) -> Iterator[KeyEntry]:
    """Yields the entries of the codebook of a layer. `names` maps our field names to theirs."""
    for ours, theirs in names.items():
        yield KeyEntry(f"{key}.{theirs}", f"codebooks.{quantizer}.{ours}", layer=layer)


CODEBOOK_NAMES = {
    "initialized": "_initialized",
    "cluster_usage": "cluster_usage",
    "embedding_sum": "embedding_sum",
}
"""The fields of a codebook, with the names that the reference has for them."""


def key_table(config: CodecConfig) -> list[KeyEntry]:
    """Returns an entry for every tensor that both sides have."""
    entries = [*seanet_entries(config.seanet, "encoder.model.", "decoder.model.", "conv.conv", "convtr.convtr")]
    transformers = ["encoder_transformer", "decoder_transformer"]
    entries += [
        KeyEntry("downsample.conv.conv.conv.weight", "params.downsample.kernel", CONV),
        KeyEntry("upsample.convtr.convtr.convtr.weight", "params.upsample.kernel", DEPTHWISE_TRANSPOSE),
        *weights("acoustic_quantizer.input_proj", "acoustic_quantizer.project_in", CONV, bias=False),
        *weights("acoustic_quantizer.output_proj", "acoustic_quantizer.project_out", CONV, bias=False),
    ]
    for i in range(config.acoustic.num_quantizers):
        key = f"acoustic_quantizer.vq.layers.{i}._codebook"
        entries += codebook_entries(key, "acoustic_quantizer", i, CODEBOOK_NAMES)
    if config.semantic is not None:
        transformers += ["semantic_encoder", "semantic_decoder"]
        projections = {"proj_gt_se_emb": "semantic_in", "proj_se_q_ac_q": "adapter_2", "proj_se_q_gt": "semantic_out"}
        if config.adapter_1:
            projections["proj_se_q_ac_emb"] = "adapter_1"
        if config.wavlm_dim is not None:
            projections["proj_wavlm"] = "wavlm_head"
        for theirs, ours in projections.items():
            entries += weights(theirs, ours, LINEAR)
        for name in ("project_in", "project_out"):
            entries += weights(f"semantic_quantizer.{name}", f"semantic_quantizer.{name}", LINEAR)
        entries += codebook_entries("semantic_quantizer._codebook", "semantic_quantizer", 0, CODEBOOK_NAMES)
    for name in transformers:
        entries += transformer_entries(config.transformer, name)
    return entries


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: CodecConfig) -> dict[str, Any]:
    """Converts the reference's state dict to our variables. Raises ConversionError with every key that does not fit."""
    renamed: dict[str, np.ndarray] = {}
    doubled: list[str] = []
    for key, value in state_dict.items():
        if key.startswith(DROPPED):
            continue
        module, dot, rest = key.partition(".")
        name = EARLIER_NAMES.get(module, module) + dot + rest
        if name in renamed:
            doubled.append(f"{name} (as {key} too)")
        renamed[name] = value
    return from_entries(renamed, key_table(config), config, doubled)


def to_state_dict(variables: Mapping[str, Any], config: CodecConfig) -> dict[str, np.ndarray]:
    """Converts our variables to the reference's state dict, without the groups that `from_state_dict` drops."""
    return to_entries(variables, key_table(config))


def config_from_reference(mapping: Mapping[str, Any]) -> CodecConfig:
    """Returns the config that a YAML file of the reference describes.

    The reference takes two widths from its frozen networks. The mapping may have them beside the reference's own keys:
    `semantic_feature_dim` (default: 2048) and `wavlm_dim` (default: 768).

    Args:
        mapping: The YAML file, parsed.

    Raises:
        ConfigError: For an option that this package does not have, and a value that it cannot take.
    """
    sections = ("seanet", "transformer", "semantic_quantizer", "acoustic_quantizer")
    if not isinstance(mapping, Mapping) or not all(isinstance(mapping.get(name, {}), Mapping) for name in sections):
        raise ConfigError(f"not a config of the reference: needs the sections {', '.join(sections)}")
    try:
        seanet, transformer = mapping["seanet"], mapping["transformer"]
        semantic, acoustic = mapping["semantic_quantizer"], mapping["acoustic_quantizer"]
        own = {"semantic_feature_dim": 2048, "wavlm_dim": 768, **mapping, "dimension": seanet["dimension"]}
        residual = config_of(AcousticConfig, ACOUSTIC_NAMES, acoustic, min_quantizers=1)
        config = config_of(
            CodecConfig,
            {name: name for name in ("sample_rate", "dimension", "wavlm_dim")},
            own,
            seanet=config_of(SEANetConfig, SEANET_NAMES, seanet),
            transformer=config_of(TransformerConfig, TRANSFORMER_NAMES, transformer),
            semantic=config_of(SemanticConfig, SEMANTIC_NAMES, {**own, **semantic}),
            acoustic=dataclasses.replace(residual, min_quantizers=min(8, residual.num_quantizers)),
        )
    except KeyError as error:
        raise ConfigError(f"the reference's config has no {error}") from None
    fixed = {
        "seanet": {"channels": 1, "causal": True, "norm": "none", "pad_mode": "constant", "true_skip": True}
        | {"activation": "ELU", "disable_norm_outer_blocks": 0},
        "transformer": {"d_model": config.dimension, "causal": True, "gating": "none", "norm": "layer_norm"}
        | {"positional_embedding": "rope", "input_dimension": config.dimension}
        | {"output_dimensions": [config.dimension]},
        "semantic_quantizer": {"dim": config.dimension},
        "acoustic_quantizer": {"input_dimension": config.dimension, "output_dimension": config.dimension},
    }
    for section, expected in fixed.items():
        for name, value in expected.items():
            if mapping[section].get(name, value) != value:
                raise ConfigError(f"{section}.{name} = {mapping[section][name]!r}: only {value!r} is supported")
    if "frame_rate" in mapping and mapping["frame_rate"] != config.frame_rate:
        raise ConfigError(f"frame_rate = {mapping['frame_rate']}: the strides make it {config.frame_rate}")
    return config
