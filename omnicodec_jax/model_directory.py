"""A model on disk: `config.json` and `model.safetensors`, in a directory or on the Hugging Face hub."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from omnicodec_jax import shipped
from omnicodec_jax.buckets import BucketPath, as_path, on_disk
from omnicodec_jax.config import CodecConfig, DiscriminatorConfig, MimiConfig, identity
from omnicodec_jax.config import files as config_files
from omnicodec_jax.discriminators import Discriminators
from omnicodec_jax.errors import ModelError
from omnicodec_jax.files import refuse_lfs_pointer, rewriting, save_tensors
from omnicodec_jax.models.backbone import PARTS
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.mimi import Mimi
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.names import an
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuT, Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.pretrained.whisper import WhisperConfig, WhisperEncoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ENCODER = "encoder"
"""Folder in a codec's model directory that may hold the frozen encoder of its semantic branch, as a model directory."""
DISCRIMINATORS = "discriminators"
"""Folder in a codec's model directory that may hold the discriminators of its training, as a model directory."""
SCALE = ".int8_scale"
"""The suffix that makes the name of an int8 array to the name of its scale."""
Number = Literal["float32", "float16", "int8"]
"""The number formats in which weights can be stored."""

CONVERTERS = {
    "wavlm": "omnicodec convert wavlm",
    "mimi": "omnicodec convert mimi",
    "qwen3_aut": "omnicodec convert qwen3-aut",
    "omnicodec": "omnicodec convert from-torch",
    "whisper": "omnicodec convert whisper",
}
"""The commands that convert checkpoints of transformers, by the kind of the model."""
QWEN3_OMNI = "qwen3_omni"
"""How the model_type begins in a config.json of Qwen3-Omni, or of a part of it, in transformers. Others are those of
`CONVERTERS`."""
PYTORCH = (".pth", ".pt", ".ckpt", ".bin")
CTRANSLATE2 = "model.bin"
"""The file in which CTranslate2 keeps a model, such as a Whisper. Its config.json names no model_type."""
THEIRS = {"architectures", "transformers_version"}
"""Fields of a config.json that transformers has written."""

Variables = Mapping[str, Any]


class Kind(NamedTuple):
    """A kind of model: its config, and the module built of that."""

    config: type
    module: Callable[[Any], nn.Module]


KINDS = {
    "omnicodec": Kind(CodecConfig, OmniCodec),
    "mimi": Kind(MimiConfig, Mimi),
    "qwen3_aut": Kind(Qwen3AuTConfig, Qwen3AuT),
    "wavlm": Kind(WavLMConfig, WavLM),
    "whisper": Kind(WhisperConfig, WhisperEncoder),
    "discriminators": Kind(DiscriminatorConfig, Discriminators),
}
"""Each kind of model, by the model_type that config.json names."""


class Role(NamedTuple):
    """A use of a model, and the kinds of model that serve for it."""

    name: str
    kinds: tuple[str, ...]

    def refuse(self, directory: Path, kind: str) -> None:
        """Raises ModelError for a directory with a model of a kind that is none of these."""
        if kind not in self.kinds:
            commands = " or ".join(CONVERTERS[own] for own in self.kinds if own in CONVERTERS)
            raise ModelError(f"{directory}: {an(kind)} model, not {self.name}; {commands} makes one")


CODEC = Role("a codec", ("omnicodec", "mimi"))
AUDIO_ENCODER = Role("an audio encoder", ("whisper", "qwen3_aut"))
WAVLM = Role("WavLM", ("wavlm",))


def model_type(config: Any) -> str:
    """Returns the model type that config.json has for a config."""
    return next(name for name, kind in KINDS.items() if kind.config is type(config))


def build(config: Any, **options: Any) -> Any:
    """Makes the module that a config describes; `options` are other fields of the module, such as `dtype`."""
    return KINDS[model_type(config)].module(config, **options)


def to_json(config: Any) -> str:
    """Makes the text of config.json: the config, its model type and the format."""
    return config_files.to_json(config, model_type(config))


def from_json(text: str, where: str = CONFIG) -> Any:
    """Reads the text of a config.json of this or an earlier version. Raises ConfigError that names `where`."""
    return config_files.from_json(text, {name: kind.config for name, kind in KINDS.items()}, where)


def flatten(variables: Variables) -> dict[str, Any]:
    """Returns the leaves by dotted names, as in the weights file: "params.encoder.conv_in.kernel"."""
    leaves: dict[str, Any] = flatten_dict(dict(variables), sep=".")
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a nested dict of arrays under dotted names: the inverse of `flatten`."""
    return unflatten_dict(dict(leaves), sep=".")


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the name and the shape of every tensor in a model's weights file."""
    template = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in flatten(template).items()}


def save(directory: str | os.PathLike[str], config: Any, variables: Variables, number: Number = "float32") -> None:
    """Writes both files, each whole or not at all; the weights first, so that a config marks a complete model.

    Args:
        directory: Directory to write to; it is made if it is not there.
        config: The model's config.
        variables: Its weights.
        number: What they are stored as, to be computed with in float32. int8: arrays of one axis stay float32, and
            others get a float32 scale for each channel, their last axis.

    Raises:
        ModelError: If a weight is NaN or infinite or too large for float16, or the directory holds a model of another
            kind.
    """
    directory = as_path(directory)
    refuse_other_kind(directory, model_type(config))
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in flatten(variables).items():
        tensors |= _stored(name, np.asarray(leaf), number)
    with rewriting(directory / WEIGHTS) as path:
        save_tensors(tensors, path)
    with rewriting(directory / CONFIG) as path:
        path.write_text(to_json(config))


def remove(directory: Path) -> None:
    """Removes a model directory's two files, where they are there, and nothing else that lies there."""
    for name in (CONFIG, WEIGHTS):
        (directory / name).unlink(missing_ok=True)


def refuse_other_kind(directory: Path, kind: str, theirs: bool = False) -> None:
    """Raises ModelError for a directory that holds a model of another type, or in another format, than what is to be
    written there. It may be what the new one is made from, or a codec in the place of whose encoder that is to go.

    Args:
        directory: Where a model is to be written.
        kind: Its model type.
        theirs: Whether it is in the format of transformers.
    """
    try:
        mapping = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return  # nothing that would be lost
    mapping = mapping if isinstance(mapping, dict) else {}
    held, maker = mapping.get("model_type", kind), "transformers" if THEIRS & mapping.keys() else "this package"
    if _is_ctranslate2(directory, mapping):
        held, maker = "whisper", "CTranslate2"
    if (held, maker) != (kind, "transformers" if theirs else "this package"):
        raise ModelError(
            f"{directory}: holds a model of the kind {held} of {maker}, which would be lost; choose another directory"
        )


def copy(source: Path, target: Path) -> None:
    """Copies a model directory's two files, each whole or not at all, and nothing else that lies there."""
    for name in (WEIGHTS, CONFIG):
        with on_disk(source / name) as here, rewriting(target / name) as temporary:
            shutil.copyfile(here, temporary)


def _stored(name: str, value: np.ndarray, number: Number) -> dict[str, np.ndarray]:
    """Returns what the weights file holds of an array."""
    if not np.isfinite(value).all():
        raise ModelError(f"{name}: holds weights that are NaN or infinite")
    if number == "int8" and value.ndim > 1:
        # Where layers are stacked, each has scales of its own. Of both ways, the one is taken that is closer: it gives
        # back weights that were int8 before, whichever way they were.
        ways = [_quantized(value, axes) for axes in (tuple(range(value.ndim - 1)), -2)]
        rows, scale = min(ways, key=lambda way: float(np.square(way[0] * way[1] - value).sum()))
        return {name: rows, name + SCALE: scale}
    if number != "float16":
        return {name: value}
    if np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"{name}: holds weights that are too large for float16")
    return {name: value.astype(np.float16)}


def _quantized(value: np.ndarray, axes: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values, and the float32 scale that all numbers along some axes share.

    A scale has 17 significant bits, so that its products with int8 values are exact, and quantized weights that are
    loaded and saved again stay as they are.
    """
    fraction, exponent = np.frexp(np.abs(value).max(axis=axes, keepdims=True).astype(np.float64) / 127)
    scale = np.ldexp(np.ceil(fraction * 2**17) / 2**17, exponent)
    scale = np.maximum(scale, 2.0**-100).astype(np.float32)
    return np.rint(value / scale).astype(np.int8), scale


def _dequantized(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of a weights file as float32."""
    quantized = {name for name, value in tensors.items() if value.dtype == np.int8 and name + SCALE in tensors}
    plain = {name: value for name, value in tensors.items() if name.removesuffix(SCALE) not in quantized}
    return {
        **{name: value.astype(np.float32, copy=False) for name, value in plain.items()},
        **{name: tensors[name] * tensors[name + SCALE] for name in quantized},
    }


def load(directory: str | os.PathLike[str], role: Role | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads config and variables (numpy) of a model directory, whose model must be of the role, if there is one.

    Raises ConfigError for a config.json that cannot be read, ModelError for files that are missing or damaged, and for
    weights that do not fit the config, with every tensor that is missing, unknown, misshapen or not finite.
    """
    directory = as_path(directory)
    _refuse_unconverted(directory, role)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: no model here: {name} is missing")
    refuse_lfs_pointer(directory / WEIGHTS, ModelError)
    try:
        text = (directory / CONFIG).read_text()
    except UnicodeDecodeError as error:
        raise ModelError(f"{directory / CONFIG}: not text: {error}") from None
    config = from_json(text, str(directory / CONFIG))
    if role is not None:
        role.refuse(directory, model_type(config))
    try:
        with on_disk(directory / WEIGHTS) as file:
            tensors = _dequantized(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{directory / WEIGHTS}: not a readable safetensors file: {error}") from None
    expected = expected_tensors(build(config))
    problems = [f"missing: {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {name}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"misshapen: {name} is {list(tensors[name].shape)}, the config wants {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [f"not finite: {name}" for name, value in tensors.items() if not np.isfinite(value).all()]
    if problems:
        raise ModelError(f"{directory}: weights do not fit the config:\n  " + "\n  ".join(sorted(problems)))
    return config, unflatten(tensors)


def kind_of(model_type: Any) -> str:
    """Returns the kind of model that a config.json calls so, here or in transformers."""
    kind = str(model_type)
    return "qwen3_aut" if kind.startswith(QWEN3_OMNI) else kind


def unconverted(directory: Path) -> str | None:
    """Returns the kind of the model that a directory holds in the format of transformers or CTranslate2; None: it holds
    none, or cannot be read."""
    try:
        mapping = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if isinstance(mapping, dict) and THEIRS & mapping.keys():
        return kind_of(mapping.get("model_type"))
    return "whisper" if isinstance(mapping, dict) and _is_ctranslate2(directory, mapping) else None


def _is_ctranslate2(directory: Path, mapping: Mapping[str, Any]) -> bool:
    """Returns whether a directory with this config.json is a model of CTranslate2."""
    return "model_type" not in mapping and (directory / CTRANSLATE2).is_file()


def _refuse_unconverted(directory: Path, role: Role | None) -> None:
    """Raises ModelError for a checkpoint as others save it, with the command that converts it if it is of the role."""
    if (kind := unconverted(directory)) is not None:
        if role is not None:
            role.refuse(directory, kind)
        if kind not in CONVERTERS:
            raise ModelError(f"{directory}: {an(kind)} model of transformers, which nothing here converts")
        command, checkpoint = CONVERTERS[kind], directory
    elif (directory / CONFIG).is_file():
        return
    elif files := sorted(path for path in directory.glob("*") if path.suffix in PYTORCH):
        checkpoint, command = files[0], "omnicodec convert from-torch --config RECIPE"
    else:
        return
    raise ModelError(
        f"{directory}: a checkpoint that is not converted yet; run: {command} --checkpoint {checkpoint} "
        "--out DIR, and give DIR"
    )


def resolve(
    name: str | os.PathLike[str], revision: str | None = None, files: Sequence[str] = (CONFIG, WEIGHTS)
) -> Path:
    """Returns the directory of a model: `name` itself, that of a model which comes with the package (`shipped.MODELS`),
    or where the files of the hub's `owner/name` were downloaded to.

    Raises ModelError if there is no such model.
    """
    path = as_path(name)
    if path.is_dir():
        return path
    if str(name) in shipped.MODELS:
        return shipped.MODELS[str(name)]
    if path.is_file():
        advice = "omnicodec convert from-torch makes one of a checkpoint"
        if (path.parent / CONFIG).is_file():
            advice = f"give {path.parent}"
        raise ModelError(f"{name}: a file, where a model is a directory; {advice}")
    name = str(name)
    if name.count("/") != 1 or isinstance(path, BucketPath) or name.startswith((".", "~", "/")):
        raise ModelError(f"{name}: no such model directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: no such model directory, and not to be had from the hub: {reason}") from None


def model_hash(config: Any, variables: Variables, known: str | None = None, known_tokens: str | None = None) -> str:
    """Computes the hash that identifies a model: equal for models that compute the same, whatever file they came from.

    Args:
        config: The model's config. The hash covers what differs from the defaults in the fields that change what the
            model computes.
        variables: Its weights; the hash covers all of them.
        known: A hash that tokens, a run or stored features carry.
        known_tokens: The `tokens_hash` that tokens carry beside it; None: they have none.

    Returns:
        16 hex digits; `known`, if version 0.1 gave that hash to this model, or if what has it makes the same tokens.
    """
    hash = _digest(identity.covered(config, model_type(config)), variables)
    if known is None or known == hash:
        return hash
    if known_tokens is not None and known_tokens == tokens_hash(config, variables):
        return known
    return known if known == hash_of_0_1(config, variables) else hash


def compute_alike(one: Any, other: Any) -> bool:
    """Returns whether models of two configs compute the same with equal weights."""
    return identity.covered(one, model_type(one)) == identity.covered(other, model_type(other))


def tokens_hash(config: Any, variables: Variables) -> str:
    """Computes the hash of the parts of a codec that make tokens; models that differ in their decoders alone share it.

    It covers the options that `model_hash` covers, and the weights of the encoder, the quantizers and the codebooks.
    Returns 16 hex digits.
    """
    makers = {*PARTS["encoder"], *PARTS["quantizer"]}
    params = {name: tree for name, tree in variables["params"].items() if name in makers}
    return _digest(identity.covered(config, model_type(config)), {"params": params, CODEBOOKS: variables[CODEBOOKS]})


def hash_of_0_1(config: Any, variables: Variables) -> str | None:
    """Computes the hash that version 0.1 gave to a model; None for a model that it could not have had."""
    text = identity.covered_by_0_1(config, model_type(config))
    return None if text is None else _digest(text, variables)


def _digest(text: str, variables: Variables) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for name, leaf in sorted(flatten(variables).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()
