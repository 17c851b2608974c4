"""The model of `converters/pytorch` with our weights: in memory, and as a directory that transformers reads.

The weights have the authors' keys. A directory holds, beside config.json and model.safetensors, the code of the model,
so that `AutoModel.from_pretrained(directory, trust_remote_code=True)` needs torch and transformers alone.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.config import CodecConfig, DiscriminatorConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import discriminators, reference, whisper
from omnicodec_jax.converters.tensors import (
    ConversionError,
    config_of,
    import_torch,
    leaves,
    read_state_dict,
    to_entries,
)
from omnicodec_jax.converters.transformers_directory import read_tensors
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.files import rewriting, save_tensors
from omnicodec_jax.pretrained.encoder_layer import sinusoids
from omnicodec_jax.pretrained.whisper import WhisperConfig
from omnicodec_jax.semantic import read_encoder_of

CODE = Path(__file__).parent / "pytorch"
POSITIONS = 1500
"""Number of positions that Whisper has, those of 30 s."""
FILES = ("configuration_omnicodec.py", "feature_extraction_omnicodec.py", "modeling_omnicodec.py")
"""The files of code in a directory."""
CHECKPOINT = "omnicodec.pth"
"""The checkpoint in a directory for the authors' own program, which reads no safetensors."""
PREPROCESSOR = "preprocessor_config.json"
DISCRIMINATORS = "discriminators"
"""The name of the discriminators in a directory: .json their config, .safetensors their weights."""
CLASSES = {"AutoConfig": "configuration_omnicodec.OmniCodecConfig", "AutoModel": "modeling_omnicodec.OmniCodecModel"}
EXTRACTOR = {"AutoFeatureExtractor": "feature_extraction_omnicodec.OmniCodecFeatureExtractor"}

NAMES = {
    "sampling_rate": "sample_rate",
    "hidden_size": "dimension",
    "num_filters": "seanet.n_filters",
    "num_residual_layers": "seanet.n_residual_layers",
    "upsampling_ratios": "seanet.ratios",
    "kernel_size": "seanet.kernel_size",
    "residual_kernel_size": "seanet.residual_kernel_size",
    "last_kernel_size": "seanet.last_kernel_size",
    "dilation_growth_rate": "seanet.dilation_base",
    "compress": "seanet.compress",
    "num_hidden_layers": "transformer.num_layers",
    "num_attention_heads": "transformer.num_heads",
    "intermediate_size": "transformer.dim_feedforward",
    "sliding_window": "transformer.context",
    "rope_theta": "transformer.max_period",
    "layer_scale_initial_scale": "transformer.layer_scale",
    "semantic_source": "semantic.source",
    "semantic_feature_dim": "semantic.feature_dim",
    "semantic_codebook_size": "semantic.codebook_size",
    "semantic_codebook_dim": "semantic.codebook_dim",
    "num_acoustic_quantizers": "acoustic.num_quantizers",
    "codebook_size": "acoustic.codebook_size",
    "codebook_dim": "acoustic.codebook_dim",
    "codebook_epsilon": "codebook.epsilon",
    "use_adapter_1": "adapter_1",
    "wavlm_dim": "wavlm_dim",
    "input_peak": "input_peak",
}
"""The options of `OmniCodecConfig`, and the places of ours that they stand for."""
SEMANTIC_COUNT = "num_semantic_quantizers"
"""The option that says whether there is a semantic branch."""
FOR_TRAINING = "training_options"
"""The option that holds the options which only training reads, by our names."""
FRONT_END = "log_mel."
"""The prefix of the names of filters, which are not weights."""
FROZEN = "frozen_encoder."
"""The prefix of the names of the semantic branch's encoder, which is not a part of the codec."""
Whisper = tuple[WhisperConfig, Mapping[str, Any]]
"""Config and variables of an encoder of Whisper."""
WHISPER = {
    "num_mel_bins": "num_mel_bins",
    "d_model": "d_model",
    "encoder_layers": "num_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "dim_feedforward",
}
"""The options of transformers' `WhisperConfig`, and ours that they stand for."""


def config_to_transformers(config: CodecConfig, encoder: WhisperConfig | None = None) -> dict[str, Any]:
    """Returns the options of `OmniCodecConfig` for a config of ours, and for an encoder that goes along."""
    values = dict(leaves(dataclasses.asdict(config)))
    options = {theirs: values.pop(ours) for theirs, ours in NAMES.items() if ours in values}
    options[SEMANTIC_COUNT] = int(config.semantic is not None)
    values.pop("semantic", None)
    options["num_mel_bins"] = _mel_bins(config, encoder)
    if encoder is not None:
        options["encoder_config"] = {theirs: getattr(encoder, ours) for theirs, ours in WHISPER.items()}
        options["encoder_window_seconds"] = encoder.window_seconds
    return options | {FOR_TRAINING: values}


def _mel_bins(config: CodecConfig, encoder: WhisperConfig | None) -> int:
    """Returns the number of bins of the log-mel that a codec's features are computed of."""
    if encoder is not None:
        return encoder.num_mel_bins
    whisper = config.semantic is not None and config.semantic.source == "whisper"
    return WhisperConfig().num_mel_bins if whisper else dsp.MEL_BINS


def config_from_transformers(options: Mapping[str, Any], where: str) -> CodecConfig:
    """Returns our config for the options in a config.json. Raises ConfigError that names `where`."""
    values: dict[str, Any] = {}
    named = {ours: options[theirs] for theirs, ours in NAMES.items() if theirs in options}
    for name, value in (named | dict(options.get(FOR_TRAINING, {}))).items():
        section, _, field = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[field] = value
    if not options.get(SEMANTIC_COUNT, 1):
        values["semantic"] = None
    return config_files.from_dict({"model_type": "omnicodec", **values}, {"omnicodec": CodecConfig}, where)


def state_dict(
    config: CodecConfig, variables: Mapping[str, Any], encoder: Whisper | None = None
) -> dict[str, np.ndarray]:
    """Returns the state dict of `OmniCodecModel`: the authors' one, the filters of the log-mel, and Whisper's encoder
    if one goes along."""
    tensors = reference.to_state_dict(variables, config)
    if config.semantic is None:
        return tensors
    bins = _mel_bins(config, None if encoder is None else encoder[0])
    filters = dsp.mel_filterbank(dsp.MEL_SAMPLE_RATE, dsp.MEL_WINDOW, bins)
    tensors[f"{FRONT_END}filters"] = np.ascontiguousarray(filters)
    if config.sample_rate != dsp.MEL_SAMPLE_RATE:
        kernel, _ = dsp.soxr_filters(*dsp.whole_periods(config.sample_rate, dsp.MEL_SAMPLE_RATE))
        tensors[f"{FRONT_END}resampler"] = np.ascontiguousarray(kernel[:, 0])
    if encoder is not None:
        whisper_config, weights = encoder
        theirs = to_entries(weights, whisper.key_table(whisper_config))
        theirs[whisper.POSITIONS] = sinusoids(POSITIONS, whisper_config.d_model)
        tensors |= {f"{FROZEN}{key}": np.ascontiguousarray(value) for key, value in theirs.items()}
    return tensors


def build(config: CodecConfig, variables: Mapping[str, Any], encoder: Whisper | None = None) -> Any:
    """Makes an `OmniCodecModel` with the weights of our variables, in float32 and for inference.

    An encoder of Whisper goes along, so that the model computes its semantic features.
    """
    torch = import_torch()
    from omnicodec_jax.converters.pytorch.configuration_omnicodec import OmniCodecConfig
    from omnicodec_jax.converters.pytorch.modeling_omnicodec import OmniCodecModel

    options = config_to_transformers(config, None if encoder is None else encoder[0])
    model = OmniCodecModel(OmniCodecConfig(**options))
    tensors = {key: torch.tensor(value) for key, value in state_dict(config, variables, encoder).items()}
    model.load_state_dict(tensors)
    return model.eval()


def read_whisper(directory: Path, config: CodecConfig) -> Whisper | None:
    """Reads the encoder of Whisper of a codec's semantic branch; None: the directory holds none."""
    if not (directory / model_directory.CONFIG).is_file():
        return None
    encoder, variables = read_encoder_of(directory, config.semantic)
    return (encoder, variables) if isinstance(encoder, WhisperConfig) else None


# -- Directories


def save(directory: Path, config: CodecConfig, variables: Mapping[str, Any], encoder: Whisper | None = None) -> int:
    """Writes a directory, config.json last, so that it marks a complete one. Returns the number of tensors.

    An encoder of Whisper goes along, so that the model computes its semantic features.
    """
    tensors = state_dict(config, variables, encoder)
    with rewriting(directory / model_directory.WEIGHTS) as path:
        save_tensors(tensors, path, {"format": "pt"})
    for name in FILES:
        with rewriting(directory / name) as path:
            path.write_bytes((CODE / name).read_bytes())
    extractor = {"feature_extractor_type": "OmniCodecFeatureExtractor", "auto_map": EXTRACTOR}
    extractor |= {"sampling_rate": config.sample_rate, "input_peak": config.input_peak}
    described = {"architectures": ["OmniCodecModel"], "auto_map": CLASSES, "model_type": "omnicodec"}
    described |= {"dtype": "float32", **config_to_transformers(config, None if encoder is None else encoder[0])}
    for name, values in ((PREPROCESSOR, extractor), (model_directory.CONFIG, described)):
        with rewriting(directory / name) as path:
            path.write_text(json.dumps(values, indent=2) + "\n")
    return len(tensors)


def save_discriminators(directory: Path, config: DiscriminatorConfig, variables: Mapping[str, Any]) -> None:
    """Writes discriminators with the authors' keys into a directory of `save`, and their config."""
    with rewriting(directory / f"{DISCRIMINATORS}.safetensors") as path:
        save_tensors(discriminators.to_state_dict(variables, config), path, {"format": "pt"})
    with rewriting(directory / f"{DISCRIMINATORS}.json") as path:
        path.write_text(model_directory.to_json(config))


def remove_discriminators(directory: Path) -> None:
    """Removes what `save_discriminators` has written, if it has."""
    for suffix in ("json", "safetensors"):
        (directory / f"{DISCRIMINATORS}.{suffix}").unlink(missing_ok=True)


def load(directory: Path, options: Mapping[str, Any]) -> tuple[CodecConfig, dict[str, np.ndarray], Whisper | None]:
    """Reads a directory that `save`, or `save_pretrained` of the model there, has written.

    Args:
        directory: Where it is.
        options: Its config.json, parsed.

    Returns:
        The codec's config and state dict, and the encoder of Whisper that goes along, if one does.

    Raises:
        ConversionError: If files are missing or cannot be read, or it is the directory of another model.
        ConfigError: If the config is none of an OmniCodec.
    """
    path = directory / model_directory.CONFIG
    if SEMANTIC_COUNT not in options:
        raise ConversionError(f"{directory}: not what omnicodec convert to-torch has written")
    tensors = read_tensors(directory, [""])  # which `save_pretrained` may have put into several files
    weights = {key: value for key, value in tensors.items() if not key.startswith((FRONT_END, FROZEN))}
    frozen = {key.removeprefix(FROZEN): value for key, value in tensors.items() if key.startswith(FROZEN)}
    return config_from_transformers(options, str(path)), weights, _whisper_from_transformers(options, frozen)


def _whisper_from_transformers(options: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Whisper | None:
    """Returns the encoder of Whisper that the options describe; None: they describe none."""
    described = options.get("encoder_config")
    if described is None:
        return None
    try:
        config = config_of(
            WhisperConfig, whisper.CONFIG_NAMES, described, window_seconds=options["encoder_window_seconds"]
        )
    except KeyError as error:
        raise ConversionError(f"encoder_config: not that of Whisper's encoder: it has no {error}") from None
    return config, whisper.from_state_dict(tensors, config)


def load_discriminators(directory: Path) -> tuple[DiscriminatorConfig, dict[str, np.ndarray]] | None:
    """Reads config and state dict of a directory's discriminators; None: it has none. Raises as `load` does."""
    path = directory / f"{DISCRIMINATORS}.json"
    if not path.is_file():
        return None
    config = model_directory.from_json(path.read_text(), str(path))
    if not isinstance(config, DiscriminatorConfig):
        raise ConfigError(f"{path}: not the config of discriminators")
    return config, read_state_dict(path.with_suffix(".safetensors"))
