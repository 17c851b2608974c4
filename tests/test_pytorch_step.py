"""The step that is measured beside ours in PyTorch is the same one, and another one is not measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from omnicodec_jax.errors import OmniCodecError

pytest.importorskip("torch")
from benchmarks.pytorch_step import COMPARED, Step, check_same, make_work, ours, pytorch

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests/tiny_experiment.py")


@pytest.mark.slow  # two programs to compile
def test_steps_of_both_have_the_same_losses_and_gradients():
    work = make_work(TINY, 2, 0.24)
    steps = {name: [step() for step in [make(work)] * COMPARED] for name, make in (("ours", ours), ("torch", pytorch))}
    check_same(steps)
    first, second, third = (step.loss for step in steps["ours"])
    assert abs(second - first) > 0.01 * first  # the codebooks have moved
    assert abs(third - second) > 0.01 * second  # and the weights


@pytest.mark.parametrize("other", [Step(1.0, 2.01), Step(1.01, 2.0), Step(float("nan"), 2.0)])
def test_other_work_is_not_measured(other):
    with pytest.raises(OmniCodecError, match="PyTorch: .* not the same work"):
        check_same({"ours": [Step(1.0, 2.0)], "PyTorch": [other]})


@pytest.mark.slow  # three processes
def test_all_systems_are_measured():
    options = ["--config", TINY, "--clips", "2", "--seconds", "0.24", "--repeats", "1"]
    command = [sys.executable, "-m", "benchmarks.pytorch_step", *options]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["ours", "PyTorch", "PyTorch, freed memory kept"]
