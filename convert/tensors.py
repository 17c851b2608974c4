"""Tensors from one layout to another by a table of entries, strict in both directions."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.model_directory import build, expected_tensors, flatten, unflatten


class ConversionError(OmniCodecError):
    """A state dict that does not fit; the message lists every key that is wrong."""


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
    state_dict: Mapping[str, np.ndarray], entries: Iterable[Entry], config: Any, doubled: Iterable[str] = ()
) -> dict[str, Any]:
    """Variables of a model, float32. Raises ConversionError with all missing, unexpected and misshapen keys."""
    ours = {name: np.zeros(shape, np.float32) for name, shape in expected_tensors(build(config)).items()}
    entries, problems = list(entries), [f"doubled: {key}" for key in doubled]
    for entry in entries:
        if entry.key not in state_dict:
            problems.append(f"missing: {entry.key}")
            continue
        value = np.asarray(state_dict[entry.key], np.float32)
        target = ours[entry.name] if entry.layer is None else ours[entry.name][entry.layer, ...]
        expected = _to_theirs(target, entry).shape
        if value.shape != expected:
            problems.append(f"misshapen: {entry.key} is {list(value.shape)}, the config wants {list(expected)}")
            continue
        target[...] = (value if entry.axes is None else value.transpose(entry.axes)).reshape(target.shape)
    known = {entry.key for entry in entries}
    problems += [f"unexpected: {key}" for key in state_dict if key not in known]
    if problems:
        raise ConversionError(f"{len(problems)} key(s) do not fit:\n  " + "\n  ".join(problems))
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
