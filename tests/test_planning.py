"""Compiling for TPUs that are not there, and what is read from a compiled program."""

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import normal

from omnicodec_jax.errors import ConfigError
from omnicodec_jax.planning import chips, hlo
from omnicodec_jax.planning.chips import CHIPS, Chip, Topology
from omnicodec_jax.planning.compiling import CompiledProgram, compile_for, missing_memory
from omnicodec_jax.planning.step_plan import StepPlan

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra `tpu`")
ROOT = Path(__file__).parents[1]
CHIP = Chip(flops=1e12, bandwidth=1e9, memory=2**20)


def totals(function, *arguments, **options) -> hlo.Totals:
    return hlo.totals(jax.jit(function, **options).lower(*arguments).compile().as_text() or "")


# -- What a program does


def test_flops_of_products_count_every_turn_of_a_loop():
    def ten_times(x):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x), None), x, None, length=10)[0]

    assert totals(ten_times, jnp.ones((16, 16))).flops == 10 * 2 * 16**3


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2,), "padding": [(3, 1)]},
        {"window_strides": (1,), "padding": [(4, 0)], "rhs_dilation": (2,)},
        {"window_strides": (1,), "padding": [(1, 2)], "lhs_dilation": (3,)},
    ],
)
def test_flops_of_convolutions_leave_out_padding_and_dilation(options):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    x, kernel = normal(2, 20, 4), normal(3, 4, 6)
    ones = convolve(jnp.ones_like(x), jnp.ones_like(kernel))  # how many terms each sum has
    assert totals(convolve, x, kernel).flops == 2 * ones.sum()


def test_bytes_accessed_are_what_goes_in_and_comes_out():
    assert totals(lambda x, y: x * y + 1, normal(8, 128), normal(8, 128)).bytes_accessed == 3 * 8 * 128 * 4


def test_slices_of_a_loop_are_not_the_whole_array_each_time():
    def sum_rows(x):
        return jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(1024), x)[0]

    x = normal(64, 1024)
    assert totals(sum_rows, x).bytes_accessed < 6 * x.nbytes


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), (AxisType.Auto,))


def test_collectives_count_by_kind_and_as_often_as_they_run(mesh):
    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=(P(), P("x")), check_vma=False)
    def collect(x):  # a device's part: 4 KiB
        total = jax.lax.scan(lambda carry, _: (jax.lax.psum(jnp.tanh(carry), "x"), None), x, None, length=5)[0]
        return jax.lax.all_gather(x, "x", tiled=True), total

    assert totals(collect, normal(8, 1024)).collectives == {"all-reduce": 5 * 4096, "all-gather": 8 * 4096}


def test_no_collectives_where_nothing_is_exchanged(mesh):
    rows = NamedSharding(mesh, P("x"))
    assert totals(jnp.sin, normal(8, 16), in_shardings=rows, out_shardings=rows).collectives == {}


# -- The plan of a step


def compiled(memory: int) -> CompiledProgram:
    text = jax.jit(lambda x: x @ x.T).lower(jnp.ones((32, 64))).compile().as_text()
    return CompiledProgram(arguments=32 * 64 * 4, memory=memory, text=text or "")


def test_plan_has_the_roofline_of_the_chip():
    found = StepPlan.from_program(compiled(2**15), CHIP, seconds_of_audio=60.0)
    assert (found.arguments, found.temporaries) == (2**13, 3 * 2**13)
    assert found.totals.flops == 2 * 32 * 32 * 64
    assert found.step_seconds == found.totals.bytes_accessed / CHIP.bandwidth > found.totals.flops / CHIP.flops
    for words in ("GiB of 0.00", "bound by", "collectives     none", "hours of audio"):
        assert words in str(found)


class Lowered(jax.stages.Lowered):
    """A program that is not compiled to its end."""

    def __init__(self, compile: Callable[[Path], None]):
        self._compile = compile

    def compile(self, options: Any, **_: object) -> None:
        self._compile(Path(options["xla_dump_to"]))


def dump(folder: Path, memory: int) -> None:
    """Writes what libtpu dumps of a program that takes so many bytes."""
    parts = {
        "": "HloModule jit_step",
        "-memory-usage-report": f"Memory Space: default (color=0)\nTotal bytes: {memory} ({memory}B)\n\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 7 (7B)\n",
        "-buffer-assignment": "allocation 0: size 90, page 0, parameter 1, shape |f32[9]| at ShapeIndex {}:\n"
        "allocation 1: size 10, page 0, parameter 0, shape |f32[1]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 200, page 0, preallocated-temp:\n value: <0 parameter 3 @0> (size=90,offset=0)\n",
        "_after_buffer_assignment": "",
    }
    for name, text in parts.items():
        (folder / f"module_0000.jit_step.after_optimizations{name}.txt").write_text(text)


def test_program_is_read_when_its_memory_is_assigned():
    machine_code = threading.Event()

    def compile(folder: Path) -> None:
        dump(folder, 300)
        machine_code.wait()

    found = compile_for(CHIP, Lowered(compile))
    assert found == CompiledProgram(arguments=100, memory=300, text="HloModule jit_step")
    machine_code.set()


def test_what_does_not_fit_is_refused_with_the_shortfall():
    with pytest.raises(ConfigError, match=r"does not fit: 0\.25 GiB more"):
        compile_for(CHIP, Lowered(lambda folder: dump(folder, 2**20 + 2**28)))


def test_what_the_compiler_gives_up_is_refused_alike():
    def give_up(_: Path) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Used 17.75G of 15.75G hbm. Exceeded hbm capacity by 2.0G."
        )

    with pytest.raises(ConfigError, match=r"does not fit: 2\.00 GiB more"):
        compile_for(CHIPS["v5e"], Lowered(give_up))


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: memory required for HLO temporaries (17.75G) exceeds available HBM (15.75G).", 2.0),
        ("RESOURCE_EXHAUSTED: Used 16.00G of 15.75G hbm. Exceeded hbm capacity by 256.00M.", 0.25),
        ("INTERNAL: something else", None),
    ],
)
def test_shortfall_is_read_from_what_the_compiler_says(message, gib):
    assert missing_memory(message, CHIPS["v5e"]) == gib


def test_unknown_chip_is_named():
    with pytest.raises(ConfigError, match=r"v9:2x2: must be one of v4, v5e, v5p, v6e"):
        Topology.parse("v9:2x2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu is not installed; in the checkout, pip install -e '\.\[tpu\]'"):
        Topology.parse("v5e:2x2")


# -- Compiling for a TPU


@needs_libtpu
def test_topology_that_libtpu_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="v5e:3x5"):
        Topology.parse("v5e:3x5")


@needs_libtpu
@pytest.mark.parametrize(
    ("config", "axis"),
    [
        ("tests/tiny_experiment.py", "--run.mesh.fsdp"),
        pytest.param("language_model_demo", "--mesh.fsdp", marks=pytest.mark.slow),
    ],
)
def test_step_is_planned_for_a_tpu(config, axis):
    command = [sys.executable, "-m", "omnicodec_jax", "plan", "--config", config, "--topology", "v5e:2x2", axis, "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    for words in ("GiB of 15.75", "all-gather", "bound by", "hours of audio a day and chip"):
        assert words in done.stdout
