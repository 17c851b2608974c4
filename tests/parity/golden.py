"""Outputs of the reference implementation for a tiny model, and that model here.

They lie in shared/golden beside the repository; tests marked with `needs_golden` are skipped where it is absent.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnicodec_jax.config import CodecConfig
from omnicodec_jax.converters import reference
from omnicodec_jax.models.codec import CodecOutput, OmniCodec

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT.parent / "shared" / "golden"

needs_golden = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="no golden data: shared/golden is absent")


class Golden(NamedTuple):
    yaml: dict[str, Any]
    """Config in the reference's own words."""
    config: CodecConfig
    state_dict: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    steps: list[dict[str, Any]]
    """Loss terms of three training steps."""

    def inputs(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.arrays["audio"]), jnp.asarray(self.arrays["semantic_features"])

    def variables(self) -> dict[str, Any]:
        return jax.tree.map(jnp.asarray, reference.from_state_dict(self.state_dict, self.config))


@cache
def load() -> Golden:
    spec = importlib.util.spec_from_file_location("golden_weights", DIRECTORY / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    described = json.loads((DIRECTORY / "tiny_12hz.json").read_text())
    state_dict = {
        key: weights.tensor(key, tuple(shape), described["seed"]) for key, shape in described["state_dict"].items()
    }
    with np.load(DIRECTORY / "tiny_12hz.npz") as file:
        arrays = dict(file)
    steps = json.loads((DIRECTORY / "tiny_12hz_train_steps.json").read_text())
    return Golden(described["config"], reference.config_from_reference(described["config"]), state_dict, arrays, steps)


@cache
def evaluation() -> tuple[CodecOutput, dict[str, Any]]:
    """The whole forward in evaluation mode, and the output of each top-level module, [B, T, C]."""
    golden = load()

    def forward(variables, audio, features):
        return OmniCodec(golden.config).apply(
            variables, audio, features, capture_intermediates=True, mutable=["intermediates"]
        )

    output, state = jax.jit(forward)(golden.variables(), *golden.inputs())
    calls = {name: found["__call__"][0] for name, found in state["intermediates"].items() if name != "__call__"}
    calls["encoder"] = calls["encoder"][0]  # beside it are the valid lengths
    return output, calls


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
