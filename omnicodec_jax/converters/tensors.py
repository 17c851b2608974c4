"""Checkpoints as they come, and tensors from one layout to another by a table of entries, strict in both directions."""

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.files import is_lfs_pointer
from omnicodec_jax.model_directory import build, expected_tensors, flatten, unflatten

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What data parallelism, compilation, sharding and rematerialisation in PyTorch put into the names of a model."""
LISTED = 8
"""Names that a message has at most."""

StateDict = Mapping[str, np.ndarray]


class ConversionError(OmniCodecError):
    """A checkpoint that cannot be read, or whose tensors do not fit."""


# -- Files


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a .safetensors file, or of one that PyTorch has written; never runs code from the file.

    Those in dicts have dotted names: "model.encoder.weight". What is no tensor is passed over. Raises ConversionError.
    """
    if path.is_dir():
        raise ConversionError(f"{path}: a directory; give the checkpoint in it")
    if not path.is_file():
        raise ConversionError(f"{path}: no such checkpoint")
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path}: not a readable safetensors file: {error}") from None
    torch = import_torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: {_cannot_be_unpickled(str(error))}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path}: cut off, or not a file that PyTorch has written: {reason}") from None
    tensors = {key: value for key, value in _leaves(loaded) if isinstance(value, torch.Tensor)}
    if not isinstance(loaded, Mapping) or not tensors:
        raise ConversionError(f"{path}: no state dict, nor a dict that holds one")
    return {key: value.detach().float().numpy() for key, value in tensors.items()}


def refuse_pointer(path: Path) -> None:
    """Raises ConversionError for what Git LFS leaves in the place of a file."""
    if is_lfs_pointer(path):
        raise ConversionError(f"{path}: a pointer of Git LFS, not the file itself; run: git lfs pull")


def import_torch() -> ModuleType:
    """PyTorch, or a ConversionError that says how to get it."""
    try:
        import torch
    except ImportError:
        raise ConversionError("this needs PyTorch: pip install -e '.[torch]', or use .safetensors") from None
    return torch


def _cannot_be_unpickled(message: str) -> str:
    """What to do about it; PyTorch's own advice is to run whatever code is in the file."""
    if found := re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?:GLOBAL )?([\w]+\.[\w.]+)", message):
        return (
            f"holds a {found[1]} beside its tensors, which cannot be read without running code from the file; where "
            "you trust it, load it with PyTorch and save the model's state_dict() alone"
        )
    return "not a checkpoint that can be read without running code from it"


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


# -- Names


def unwrap(
    state_dict: StateDict, keys: Iterable[str], part: str | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The one model in a checkpoint under its own names, and the names of what is left out.

    keys: some names of the model's tensors, most of them at least. part: what comes before them in the checkpoint;
    None: whatever does. Raises ConversionError if the model is there several times, or not as that part.
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
    return ".".join(word for word in words if word not in WRAPPERS)


def summary(keys: Sequence[str]) -> str:
    """How many tensors, and how their names begin."""
    beginnings = sorted({key.partition(".")[0] for key in keys})
    shown = ", ".join(f"{name}.*" for name in beginnings[:LISTED]) + (", …" if beginnings[LISTED:] else "")
    return f"{len(keys)} tensors ({shown})"


# -- Layouts


class Entry(NamedTuple):
    """One tensor: its key there, its name here, and the axes that turn one into the other."""

    key: str
    name: str
    axes: tuple[int, ...] | None = None
    """Permutation from theirs to ours; a kernel of one step loses its first axis where ours has none."""
    layer: int | None = None
    """Index in our stacked array."""


COUNTER = "steps_until_check"
"""The one field of ours that PyTorch's checkpoints do not hold; it starts anew."""


def from_entries(
    state_dict: StateDict, entries: Iterable[Entry], config: Any, doubled: Iterable[str] = ()
) -> dict[str, Any]:
    """Variables of a model, float32. Raises ConversionError for missing, unexpected, misshapen and infinite tensors."""
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
    counters = {name for name in ours if name.endswith(COUNTER)}
    if uncovered := ours.keys() - {entry.name for entry in entries} - counters:
        raise AssertionError(f"the key table leaves out {sorted(uncovered)}")
    for name in counters:
        ours[name][...] = config.codebook.check_every
    return unflatten(ours)


def to_entries(variables: Mapping[str, Any], entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """State dict under the entries' names and in their layout."""
    ours = flatten(variables)
    state_dict = {}
    for entry in entries:
        value = np.asarray(ours[entry.name])
        value = value if entry.layer is None else value[entry.layer, ...]
        state_dict[entry.key] = np.ascontiguousarray(_to_theirs(value, entry))
    return state_dict


def _to_theirs(value: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.axes is None:
        return np.atleast_1d(value)
    value = value[None] if value.ndim < len(entry.axes) else value
    return value.transpose(np.argsort(entry.axes))


def _misfits(problems: list[tuple[str, str]]) -> str:
    """What does not fit, in one line: each key if they are few."""
    if len(problems) <= LISTED:
        return f"{len(problems)} key(s) do not fit: " + "; ".join(f"{kind}: {key}" for kind, key in problems)
    kinds: dict[str, list[str]] = {}
    for kind, key in problems:
        kinds.setdefault(kind, []).append(key)
    parts = [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items()]
    return f"{len(problems)} key(s) do not fit (wrong config?): " + "; ".join(parts)
