"""Reads checkpoints, and converts tensors from one layout to another by a key table, strictly in both directions."""

import pickle
import re
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from omnicodec_jax.buckets import on_disk
from omnicodec_jax.config import files as config_files
from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.files import refuse_lfs_pointer
from omnicodec_jax.model_directory import build, expected_tensors, flatten, unflatten
from omnicodec_jax.models.quantize import COUNTER
from omnicodec_jax.version import with_extra

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Words that data parallelism, compilation, sharding and rematerialisation of PyTorch put into the names of tensors."""
LISTED = 8
"""The largest number of names that a message lists."""

C = TypeVar("C")
StateDict = Mapping[str, np.ndarray]
"""Tensors by their names."""


class ConversionError(OmniCodecError):
    """Says why a checkpoint cannot be read, or which of its tensors do not fit."""


# -- Files


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a .safetensors file, or of a file that PyTorch has written, without running code from it.

    A tensor in nested dicts gets a dotted name, such as "model.encoder.weight". Values that are not tensors are passed
    over.

    Raises:
        ConversionError: If the file cannot be read, or holds no tensors.
    """
    if path.is_dir():
        raise ConversionError(f"{path}: a directory; give the checkpoint in it")
    if not path.is_file():
        raise ConversionError(f"{path}: no such checkpoint")
    refuse_lfs_pointer(path, ConversionError)
    if path.suffix == ".safetensors":
        try:
            with on_disk(path) as here:
                return load_file(here)
        except SafetensorError as error:
            raise ConversionError(f"{path}: not a readable safetensors file: {error}") from None
    torch = import_torch()
    try:
        with on_disk(path) as here:
            loaded = torch.load(here, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: {_cannot_be_unpickled(str(error))}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path}: cut off, or not a file that PyTorch has written: {reason}") from None
    tensors = {key: value for key, value in leaves(loaded) if isinstance(value, torch.Tensor)}
    if not isinstance(loaded, Mapping) or not tensors:
        raise ConversionError(f"{path}: no state dict, nor a dict that holds one")
    return {key: value.detach().float().numpy() for key, value in tensors.items()}


def import_torch() -> ModuleType:
    """Returns the module torch. Raises ConversionError with the way to install it."""
    try:
        import torch
    except ImportError:
        raise ConversionError(f"this needs PyTorch: {with_extra('torch')}; or use .safetensors") from None
    return torch


def _cannot_be_unpickled(message: str) -> str:
    """Returns what to do about a file that cannot be unpickled.

    PyTorch's own message advises to run whatever code is in the file.
    """
    if found := re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?:GLOBAL )?([\w]+\.[\w.]+)", message):
        return (
            f"holds a {found[1]} beside its tensors, which cannot be read without running code from the file; where "
            "you trust it, load it with PyTorch and save the model's state_dict() alone"
        )
    return "not a checkpoint that can be read without running code from it"


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values in nested dicts with their dotted names."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{name}.{key}" if name else str(key))


# -- Names


def unwrap(
    state_dict: StateDict, keys: Iterable[str], part: str | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Finds the one model in a checkpoint, whatever stands before the names of its tensors.

    Args:
        state_dict: The checkpoint.
        keys: The names of the model's tensors, or most of them.
        part: What stands before the names in the checkpoint, such as "ema"; None: it is found out.

    Returns:
        The model's tensors under their own names, and the names of the tensors that are left out.

    Raises:
        ConversionError: If the checkpoint holds the model several times and `part` is None, or not as that part.
    """
    known, found = set(keys), Counter[str]()
    for key in state_dict:
        words = key.split(".")
        starts = (i for i, word in enumerate(words) if word not in WRAPPERS and _plain(words[i:]) in known)
        found.update(".".join(words[:i]) for i in starts)
    most = max(found.values(), default=0)
    copies = sorted(prefix for prefix, count in found.items() if 2 * count > most)
    names = ", ".join(repr(copy) for copy in copies)
    if part is None and len(copies) > 1:
        raise ConversionError(f"holds the model {len(copies)} times, as {names}: choose one with --part")
    if part is not None and part not in copies:
        raise ConversionError(f"holds no model as {part!r}, but {names or 'none at all'}")
    prefix = part if part is not None else copies[0] if copies else ""
    others = tuple(f"{copy}." for copy in copies if copy not in ("", prefix))
    own: dict[str, np.ndarray] = {}
    left_out: list[str] = []
    for key, value in state_dict.items():
        if (prefix and not key.startswith(f"{prefix}.")) or (others and key.startswith(others)):
            left_out.append(key)
            continue
        name = _plain(key.removeprefix(f"{prefix}.").split("."))
        if name in own:
            raise ConversionError(f"{name}: is there twice, as {key} too")
        own[name] = value
    return own, left_out


def _plain(words: Sequence[str]) -> str:
    """Returns a dotted name without the words in `WRAPPERS`."""
    return ".".join(word for word in words if word not in WRAPPERS)


def name_groups(keys: Sequence[str]) -> str:
    """Returns how many tensors there are and how their names begin, such as "12 tensors (encoder.*, decoder.*)"."""
    beginnings = sorted({key.partition(".")[0] for key in keys})
    shown = ", ".join(f"{name}.*" for name in beginnings[:LISTED]) + (", …" if beginnings[LISTED:] else "")
    return f"{len(keys)} tensors ({shown})"


# -- Configs


def config_of(kind: type[C], names: Mapping[str, str], mapping: Mapping[str, Any], **more: Any) -> C:
    """Makes a config from one that has other names for its options.

    Args:
        kind: The class of the config.
        names: Its fields, with the mapping's names for them. Fields that are not named have their defaults.
        mapping: The other config, parsed.
        more: Values of other fields.

    Returns:
        The config. Lists have become tuples, and whole numbers floats where the field is one.

    Raises:
        KeyError: For an option that the mapping does not have.
        ConfigError: For a value of the wrong type or out of range.
    """
    hints = typing.get_type_hints(kind)
    values = {name: config_files.convert(hints[name], mapping[theirs], theirs) for name, theirs in names.items()}
    return kind(**values, **more)


# -- Layouts


class KeyEntry(NamedTuple):
    """A row of a key table: the names of a tensor on both sides, and how one layout becomes the other."""

    key: str
    """The name of the tensor in their state dict."""
    name: str
    """The dotted name of the tensor in our variables."""
    axes: tuple[int, ...] | None = None
    """The permutation from their axes to ours. Where ours has one axis fewer, their first axis has one element."""
    layer: int | None = None
    """The index in our array, where ours stacks the layers."""


def from_entries(
    state_dict: StateDict, entries: Iterable[KeyEntry], config: Any, doubled: Iterable[str] = ()
) -> dict[str, Any]:
    """Converts a state dict to the variables of a model.

    Args:
        state_dict: Their tensors.
        entries: The key table.
        config: The config of the model.
        doubled: Keys that occur twice under different names; they are reported with the other problems.

    Returns:
        The variables, float32.

    Raises:
        ConversionError: With every tensor that is missing, unexpected, misshapen or not finite.
    """
    ours = {name: np.zeros(shape, np.float32) for name, shape in expected_tensors(build(config)).items()}
    entries, problems = list(entries), [("doubled", key) for key in doubled]
    for entry in entries:
        if entry.key not in state_dict:
            problems.append(("missing", entry.key))
            continue
        value = np.asarray(state_dict[entry.key], np.float32)
        target = ours[entry.name] if entry.layer is None else ours[entry.name][entry.layer, ...]
        expected = _to_theirs(target, entry).shape
        if value.shape != expected:
            problem = f"{entry.key} is {list(value.shape)}, the config wants {list(expected)}"
            problems.append(("misshapen", problem))
            continue
        if not np.isfinite(value).all():
            problems.append(("not finite", f"{entry.key} in {np.sum(~np.isfinite(value))} of {value.size} numbers"))
        target[...] = (value if entry.axes is None else value.transpose(entry.axes)).reshape(target.shape)
    known = {entry.key for entry in entries}
    problems += [("unexpected", key) for key in state_dict if key not in known]
    if problems:
        raise ConversionError(_misfits(problems))
    counters = {name for name in ours if name.endswith(COUNTER)}  # PyTorch's checkpoints have none: they start anew
    if uncovered := ours.keys() - {entry.name for entry in entries} - counters:
        raise AssertionError(f"the key table leaves out {sorted(uncovered)}")
    for name in counters:
        ours[name][...] = config.codebook.check_every
    return unflatten(ours)


def to_entries(variables: Mapping[str, Any], entries: Iterable[KeyEntry]) -> dict[str, np.ndarray]:
    """Converts variables to a state dict with the names and the layout of the entries."""
    ours = flatten(variables)
    state_dict = {}
    for entry in entries:
        value = np.asarray(ours[entry.name])
        value = value if entry.layer is None else value[entry.layer, ...]
        state_dict[entry.key] = np.ascontiguousarray(_to_theirs(value, entry))
    return state_dict


def _to_theirs(value: np.ndarray, entry: KeyEntry) -> np.ndarray:
    """Returns an array of ours in their layout."""
    if entry.axes is None:
        return np.atleast_1d(value)
    value = value[None] if value.ndim < len(entry.axes) else value
    return value.transpose(np.argsort(entry.axes))


def _misfits(problems: list[tuple[str, str]]) -> str:
    """Returns one line about the tensors that do not fit. It names all of them if they are few."""
    if len(problems) <= LISTED:
        return f"{len(problems)} key(s) do not fit: " + "; ".join(f"{kind}: {key}" for kind, key in problems)
    kinds: dict[str, list[str]] = {}
    for kind, key in problems:
        kinds.setdefault(kind, []).append(key)
    parts = [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items()]
    return f"{len(problems)} key(s) do not fit (wrong config?): " + "; ".join(parts)
