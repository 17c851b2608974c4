"""Finds the part of a config that a model's hash covers: what changes what the model computes."""

import dataclasses
import json
from typing import Any

TRAINING_ONLY = {"training_only": True}
"""Metadata of a field that changes how a model is trained and not what it computes of audio or tokens."""

Names = dict[str, Any]
"""Names of fields, in their order. A field that is a config itself has the names of its own fields."""


def covered(config: Any, model_type: str) -> str:
    """Returns the part of a config that a model's hash covers, as JSON: values other than the defaults.

    Fields that only training reads are left out. A new option with a default does not change the result. The default of
    an existing option must never change, since it stands for values that files leave out.
    """
    return json.dumps({"model_type": model_type, **_unusual(config)}, sort_keys=True)


def _unusual(config: Any, usual: Any = None) -> dict[str, Any]:
    """Returns the fields of a config that differ from `usual`, by default the config of its class with all defaults."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = default_of(field) if usual is None else getattr(usual, field.name)
        if field.metadata.get("training_only") or value == default:
            continue
        if not dataclasses.is_dataclass(value):
            found[field.name] = _plain(value)
        elif type(value) is not type(default):
            found[field.name] = _unusual(value)
        elif inner := _unusual(value, default):
            found[field.name] = inner
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _unusual(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return float(value) if type(value) is int else value  # 10000 is the same as 10000.0


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of a dataclass's field; dataclasses.MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# -- Version 0.1


def covered_by_0_1(config: Any, model_type: str) -> str | None:
    """Returns the text that the hashes of version 0.1 covered: all of its config.json.

    Returns None for a model that version 0.1 could not have had: one of a later kind, or one in which a later option
    has another value than its default.
    """
    names = NAMES_OF_0_1.get(model_type)
    if names is None or (unusual := _unusual(config)) != _only(names, unusual):
        return None
    return json.dumps({"model_type": model_type, **_only(names, dataclasses.asdict(config))}, indent=2) + "\n"


def _only(names: Names, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that are named, in the order of the names."""
    return {
        name: _only(inner, values[name]) if isinstance(values[name], dict) else values[name]
        for name, inner in names.items()
        if name in values
    }


def _names(text: str, **inner: Names) -> Names:
    return {name: inner.get(name, {}) for name in text.split()}


_BACKBONE = "sample_rate dimension seanet transformer codebook input_peak"
_PARTS = {
    "seanet": _names(
        "n_filters ratios n_residual_layers kernel_size residual_kernel_size last_kernel_size dilation_base compress"
    ),
    "transformer": _names("num_heads num_layers dim_feedforward context max_period layer_scale"),
    "codebook": _names("decay epsilon dead_threshold check_every kmeans_iterations"),
    "semantic": _names("source feature_dim codebook_size codebook_dim"),
    "acoustic": _names("num_quantizers codebook_size codebook_dim min_quantizers"),
}
NAMES_OF_0_1: dict[str, Names] = {
    "omnicodec": _names(f"{_BACKBONE} semantic acoustic adapter_1 wavlm_dim", **_PARTS),
    "mimi": _names(f"{_BACKBONE} num_semantic_quantizers num_quantizers codebook_size codebook_dim", **_PARTS),
    "qwen3_aut": _names(
        "num_mel_bins conv_channels d_model num_heads num_layers dim_feedforward window_chunks output_dim"
    ),
    "wavlm": _names(
        "dimension num_layers num_heads dim_feedforward conv_channels conv_kernels conv_strides conv_bias conv_norm "
        "position_kernel position_groups num_buckets max_bucket_distance stable_layer_norm norm_epsilon"
    ),
    "discriminators": _names(
        "stft waveform wavlm",
        stft=_names("windows filters negative_slope"),
        waveform=_names("periods rates windows channels"),
        wavlm=_names("channels hidden_size hidden_states"),
    ),
}
"""Fields of the configs of version 0.1, in their order. This is history: options that come later do not belong here."""
