"""Exported programs run without this package's models, and give what these give."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from omnicodec_jax.errors import ModelError
from omnicodec_jax.model_directory import build, flatten
from omnicodec_jax.stablehlo import export_stablehlo
from omnicodec_jax.streaming import StreamingDecoder
from omnicodec_jax.tokenizer import OmniCodecTokenizer

STRANGER = """
import sys
from pathlib import Path
import jax, numpy as np
from safetensors.numpy import load_file
program = jax.export.deserialize(Path(sys.argv[1]).read_bytes())
weights, inputs = load_file(Path(sys.argv[1]).with_suffix(".safetensors")), np.load(sys.argv[2])
if sys.argv[1].endswith("step.stablehlo"):
    shapes = program.in_tree.unflatten(program.in_avals)[0][1]
    codes, outputs = inputs["codes"], []
    state = {name: np.zeros((len(codes), *leaf.shape[1:]), leaf.dtype) for name, leaf in shapes.items()}
    for n in range(codes.shape[2]):
        audio, state = program.call(weights, state, np.full(len(codes), n == 0), codes[:, :, n : n + 1])
        outputs.append(audio)
    output = np.concatenate(outputs, axis=2)
else:
    output = np.asarray(program.call(weights, *(inputs[name] for name in inputs)))
np.save(sys.argv[3], output)
assert not any(name.startswith(("omnicodec_jax", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return OmniCodecTokenizer.from_pretrained(demo_model)


def inputs_of(what: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if what == "encoder":
        audio = rng.normal(0, 0.1, (2, 1, 12_000)).astype(np.float32)
        return {"audio": audio, "features": rng.normal(size=(2, 7, 1024)).astype(np.float32)}
    return {"codes": rng.integers(0, 256, (2, 9, 7)).astype(np.int32)}


@pytest.mark.parametrize("what", ["decoder", "decoder-step", "encoder"])
def test_a_stranger_runs_it(tokenizer, tmp_path, what):
    inputs = inputs_of(what)
    export_stablehlo(tokenizer, what, 0.5, tmp_path / f"{what}.stablehlo")
    np.savez(tmp_path / "in.npz", **inputs)
    command = [sys.executable, "-c", STRANGER, f"{what}.stablehlo", "in.npz", "out.npy"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "out.npy")
    if what == "decoder-step":
        decode = StreamingDecoder(tokenizer, sessions=2)
        expected = np.concatenate([decode(inputs["codes"][:, :, n : n + 1]) for n in range(7)], axis=2)
    else:
        model = build(tokenizer.config)
        method = what.removesuffix("r").removesuffix("e") + "e"
        expected = jax.jit(lambda v, *x: model.apply(v, *x, method=method))(tokenizer.variables, *inputs.values())
    assert found.shape == expected.shape
    if what == "encoder":
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.abs(found - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


def test_weights_are_saved_as_they_are_in_whatever_order_they_lie_in_memory(tmp_path):
    tokenizer = OmniCodecTokenizer(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    tokenizer.variables = jax.tree.map(np.asfortranarray, tokenizer.variables)  # as a device may give them
    export_stablehlo(tokenizer, "decoder", 0.1, tmp_path / "decoder.stablehlo")
    saved = load_file(tmp_path / "decoder.safetensors")
    for name, weights in flatten(tokenizer.variables).items():
        np.testing.assert_array_equal(saved[name], weights)


def test_other_suffixes_are_refused(tokenizer, tmp_path):
    with pytest.raises(ModelError, match="must end in .stablehlo"):
        export_stablehlo(tokenizer, "decoder", 1.0, tmp_path / "decoder.bin")
