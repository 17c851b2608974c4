"""Compiling for TPUs and GPUs that are not there, and the plans that are made of that."""

import importlib.util
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omnicodec_jax.cli.plan import plan
from omnicodec_jax.config import MeshConfig, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import ConfigError, UsageError
from omnicodec_jax.planning import chips, tokenization
from omnicodec_jax.planning.chips import Topology
from omnicodec_jax.planning.compiling import OF_TPUS, CompiledProgram, compile_for, missing_memory
from omnicodec_jax.planning.speeds import TPUS, Chip
from omnicodec_jax.planning.step_plan import StepPlan, table

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra `plan`")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's plugin for CUDA, the extra `plan`"
)
ROOT = Path(__file__).parents[1]
SPEEDS = {"bfloat16": 2e12, "float32 default": 1e12, "float32 highest": 1e11}
CHIP = Chip(SPEEDS, bandwidth=1e9, memory=2**20, links=1e9)
ALONE = Topology(CHIP, [None], 1)


# -- The plan of a step


def compiled(memory: int) -> CompiledProgram:
    text = jax.jit(lambda x: x @ x.T).lower(jnp.ones((32, 64))).compile().as_text()
    return CompiledProgram(arguments=32 * 64 * 4, memory=memory, text=text or "")


def test_plan_has_the_roofline_of_the_chip():
    found = StepPlan.from_program(compiled(2**15), ALONE, seconds_of_audio=60.0)
    assert (found.arguments, found.temporaries) == (2**13, 3 * 2**13)
    assert found.totals.flops == 2 * 32 * 32 * 64
    assert found.step_seconds == found.totals.bytes_accessed / CHIP.bandwidth > found.totals.flops / 1e12
    for words in ("GiB of 0.00", "bound by", "collectives     none", "hours of audio"):
        assert words in str(found)


class Lowered(jax.stages.Lowered):
    """A program that is not compiled to its end."""

    def __init__(self, compile: Callable[[Path], None]):
        self._compile = compile

    def compile(self, options: Any, **_: object) -> None:
        self._compile(Path(options["xla_dump_to"]))


def dump(folder: Path, memory: int, stage: str = "after_optimizations") -> None:
    """Writes what libtpu dumps of a program that takes so many bytes."""
    parts = {
        "": "HloModule jit_step",
        "-memory-usage-report": f"Memory Space: default (color=0)\nTotal bytes: {memory} ({memory}B)\n\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 7 (7B)\n",
        "-buffer-assignment": "allocation 0: size 90, page 0, parameter 1, shape |f32[9]| at ShapeIndex {}:\n"
        "allocation 1: size 10, page 0, parameter 0, shape |f32[1]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 200, page 0, preallocated-temp:\n value: <0 parameter 3 @0> (size=90,offset=0)\n",
    }
    for name, text in parts.items():
        (folder / f"module_0000.jit_step.{stage}{name}.txt").write_text(text)
    (folder / "module_0000.jit_step.debug_options").write_text("version: 3")


@pytest.mark.parametrize(
    ("chip", "stage"),
    [(CHIP, "after_optimizations"), (CHIP._replace(target="a GPU"), "sm_9.0a_gpu_after_optimizations")],
)
def test_program_is_read_when_its_memory_is_assigned(chip, stage):
    machine_code, written = threading.Event(), threading.Event()

    def compile(folder: Path) -> None:
        dump(folder, 300, stage)
        machine_code.wait(timeout=30)
        written.set()

    found = compile_for(chip, Lowered(compile))
    assert not written.is_set()
    assert found == CompiledProgram(arguments=100, memory=300, text="HloModule jit_step")
    machine_code.set()


def test_files_are_whole_when_the_options_are_written_after_them(tmp_path):
    dump(tmp_path, 300)
    (options,) = tmp_path.glob("*.debug_options")
    (report,) = tmp_path.glob("*-memory-usage-report.txt")
    assert OF_TPUS.is_done(tmp_path)
    earlier = report.stat().st_mtime_ns - 10**9
    os.utime(options, ns=(earlier, earlier))  # those of the stage before
    assert not OF_TPUS.is_done(tmp_path)


def test_what_does_not_fit_is_refused_with_the_shortfall():
    with pytest.raises(ConfigError, match=r"does not fit: 0\.25 GiB more"):
        compile_for(CHIP, Lowered(lambda folder: dump(folder, 2**20 + 2**28)))


def test_what_the_compiler_gives_up_is_refused_alike():
    def give_up(_: Path) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Used 17.75G of 15.75G hbm. Exceeded hbm capacity by 2.0G."
        )

    with pytest.raises(ConfigError, match=r"does not fit: 2\.00 GiB more"):
        compile_for(TPUS["v5e"], Lowered(give_up))


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: memory required for HLO temporaries (17.75G) exceeds available HBM (15.75G).", 2.0),
        ("RESOURCE_EXHAUSTED: Used 16.00G of 15.75G hbm. Exceeded hbm capacity by 256.00M.", 0.25),
        ("INTERNAL: something else", None),
    ],
)
def test_shortfall_is_read_from_what_the_compiler_says(message, gib):
    assert missing_memory(message, TPUS["v5e"]) == gib


# -- Names of topologies


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "a100", "a100:", "a100:0", "h100:x8", "h100:8x", "v5e", "v5e:4*4", "a100:two", "0xv5e:2x2", "2xa100:4"],
)
def test_name_that_is_no_topology_is_refused_with_examples(name):
    words = (
        rf"--topology {re.escape(name)}: must be a chip and a number of them, such as v5e:4x4, .*a100:8 .* v5p, .*h100"
    )
    with pytest.raises(ConfigError, match=words):
        Topology.parse(name)


@pytest.mark.parametrize("name", ["a100:9", "h100:4x16", "h100:2x2x2"])
def test_host_has_eight_gpus_at_most(name):
    with pytest.raises(
        ConfigError, match=f"{name}: a host has 1 to 8 GPUs; several hosts are hosts x GPUs, such as 4x8"
    ):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("name", "asked", "per_host"),
    [("a100:8", ("1x1x8", "cuda"), 8), ("h100:4x8", ("1x4x8", "cuda"), 8), ("a100-40gb:2x4", ("1x2x4", "cuda"), 4)],
)
def test_gpus_are_hosts_and_gpus_of_a_host(monkeypatch, name, asked, per_host):
    monkeypatch.setattr(chips, "_require", lambda *modules: None)
    seen = []

    def devices(name, known, platform, topology, target_config):
        seen.append((topology, platform))
        assert f"device_memory_size: {42331013120 if '40gb' in name else 8}" in target_config
        return [None] * math.prod(map(int, topology.split("x")))

    monkeypatch.setattr(chips, "_devices", devices)
    found = Topology.parse(name)
    assert seen == [asked]
    assert found.per_host == per_host
    assert len(found.devices) == math.prod(map(int, asked[0].split("x")))


def test_memory_of_a_gpu_is_what_jax_takes_of_it(monkeypatch):
    monkeypatch.setattr(chips, "_require", lambda *modules: None)
    monkeypatch.setattr(chips, "_devices", lambda *_, **options: [None])
    assert Topology.parse("a100:1").chip.memory == 0.75 * 85100068864
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert Topology.parse("a100:1").chip.memory == pytest.approx(0.9 * 85100068864)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # as for JAX, which asks for the other variable then
    assert Topology.parse("a100:1").chip.memory == 0.75 * 85100068864
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert Topology.parse("a100:1").chip.memory == 0.5 * 85100068864


@needs_cuda
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("XLA_CLIENT_MEM_FRACTION", "abc", "could not convert string to float: 'abc'"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "abc", 'XLA_PYTHON_CLIENT_ALLOCATOR env var must be .*, got "abc"'),
    ],
)
def test_what_the_plugin_says_that_cannot_plan_is_one_line(variable, value, words):
    done = ended("--config", "demo", "--topology", "a100:1", **{variable: value})
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: --topology a100:1: topology not implemented for cuda; {words}\n", done.stderr)


@pytest.mark.parametrize(("name", "missing"), [("v5e:2x2", "libtpu"), ("a100:4", "jax_cuda13_plugin")])
def test_what_to_install_is_named_where_a_compiler_is_missing(monkeypatch, name, missing):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=rf"^{missing} is not installed; in the checkout, pip install -e '\.\[plan\]', or ",
    ):
        Topology.parse(name)


def test_tokenizing_of_several_programs_is_as_fast_as_all_of_them_one_after_the_other():
    plan = StepPlan.from_program(compiled(2**15), ALONE, seconds_of_audio=60.0)
    shown = table({"encoder": plan, "codec": plan})
    speed = 60 / plan.step_seconds
    assert f"{speed:15.0f}" in shown
    assert f"{speed / 2:.0f} x real time at best" in shown


# -- Compiling for TPUs and GPUs


@pytest.fixture
def uncached():
    """No cache of compiled programs: what is found there is not compiled, so that nothing is known of it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@needs_libtpu
def test_gradient_is_planned_for_two_slices_with_what_goes_between_them_apart(uncached):
    found = Topology.parse("2xv5e:2x2")
    assert (len(found.devices), found.per_host) == (8, 4)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), found.devices)
    held, rows = NamedSharding(mesh, P("fsdp")), sharding.batch_sharding(mesh)

    def gradient(kernel: jax.Array, x: jax.Array) -> jax.Array:
        with sharding.in_force(mesh):
            whole = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))
            return jax.grad(lambda kernel: jnp.square(jnp.tanh(x @ kernel)).sum())(whole)

    shapes = [((1024, 1024), held), ((64, 1024), rows)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=each) for shape, each in shapes]
    lowered = jax.jit(gradient, in_shardings=(held, rows), out_shardings=held).lower(*arguments)
    plan = StepPlan.from_program(compile_for(found.chip, lowered), found, 1.0)
    (between,) = [exchange for exchange in plan.totals.exchanges if exchange.is_slow(plan.per_host)]
    assert (between.kind, between.slices, between.size) == ("all-reduce", 2, 1024 * 1024 * 4 // 4)
    assert "\n  between slices  all-reduce 0.001 GB, 0.3 ms of these" in str(plan)


def test_slices_of_chips_whose_network_is_not_known_are_refused(monkeypatch):
    monkeypatch.setattr(chips, "_require", lambda *modules: None)
    with pytest.raises(ConfigError, match=r"--topology 2xv4:2x2x1: nothing is published on the network between slices"):
        Topology.parse("2xv4:2x2x1")


@needs_libtpu
@pytest.mark.parametrize("kind", TPUS)
def test_every_chip_of_a_slice_is_a_device_of_the_mesh(kind):
    """The two cores of a v4 chip would be two devices, of which JAX makes no mesh."""
    found = Topology.parse(f"{kind}:2x4" if len(TPUS[kind].largest) == 2 else f"{kind}:2x2x2")
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), found.devices)
    assert (len(found.devices), mesh.shape["data"], mesh.shape["fsdp"]) == (8, 2, 4)


@pytest.mark.parametrize(
    ("name", "largest"),
    [("v5e:16x32", "16x16"), ("v5e:100x100", "16x16"), ("v5e:4x4x4", "16x16"), ("v5p:2x2x32", "16x20x28")],
)
def test_slice_that_is_larger_than_there_are_is_refused(monkeypatch, name, largest):
    monkeypatch.setattr(chips, "_require", lambda *modules: None)
    with pytest.raises(ConfigError, match=f"--topology {name}: the largest slice of these chips is {largest}"):
        Topology.parse(name)


@needs_libtpu
def test_plan_is_stopped_without_a_trace_of_libtpu():
    code = "import os; Topology.parse('v5e:2x2'); os.kill(os.getpid(), 15)"
    code = f"from omnicodec_jax.planning.chips import Topology; {code}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -15
    assert "stack trace" not in done.stderr


@needs_libtpu
def test_topology_that_libtpu_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="v5e:3x5"):
        Topology.parse("v5e:3x5")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("v5e:1x1", marks=needs_libtpu),
        pytest.param("a100:1", marks=needs_cuda),
        pytest.param("h100:1", marks=needs_cuda),
    ],
)
def test_plan_of_a_small_program_is_what_its_arrays_take(uncached, name):
    found = Topology.parse(name)
    held = NamedSharding(Mesh(np.array(found.devices), ("x",)), P())
    x = jax.ShapeDtypeStruct((1000, 40), jnp.float32, sharding=held)
    program = compile_for(found.chip, jax.jit(lambda x: jnp.tanh(x) + 1).lower(x))
    plan = StepPlan.from_program(program, found, 1.0)
    size = 40 * (1024 if name == "v5e:1x1" else 1000) * 4  # a TPU fills up the 1000 to whole tiles
    assert plan.arguments == size
    assert size <= plan.temporaries < 1.1 * size + 4096
    assert plan.totals.bytes_accessed == 2 * size


@needs_cuda
@pytest.mark.parametrize("name", ["a100:2x4", "h100:2x4"])
def test_gradient_is_planned_for_gpus_of_two_hosts(uncached, name):
    found = Topology.parse(name)
    mesh = Mesh(np.array(found.devices), ("x",))

    def gradient(kernel, x):
        def loss(kernel):
            y = jax.lax.conv_general_dilated(x, kernel, (2,), [(3, 2)], dimension_numbers=("NWC", "WIO", "NWC"))
            return jnp.square(y).sum()

        return jax.grad(loss)(kernel)

    shapes = [((7, 16, 32), P()), ((16, 64, 16), P("x"))]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, held)) for shape, held in shapes
    ]
    plan = StepPlan.from_program(compile_for(found.chip, jax.jit(gradient).lower(*arguments)), found, 1.0)
    taps = 7 * 32 - 3 - 1 - 1  # less those in padding
    assert plan.totals.flops == pytest.approx(2 * (2 * 2 * 16 * 32 * taps), rel=0.05)
    assert plan.totals.collectives == {"all-reduce": 7 * 16 * 32 * 2}
    assert plan.exchange_seconds == pytest.approx(2 * 7 / 8 * 7 * 16 * 32 * 2 / (4 * found.chip.network))
    assert "NVIDIA's libraries choose their algorithms on the device" in str(plan)


@pytest.mark.parametrize(
    ("config", "topology", "options"),
    [
        pytest.param("tests/tiny_experiment.py", "v5e:2x2", ["--run.mesh.fsdp", "4"], marks=needs_libtpu),
        pytest.param("language_model_demo", "v5e:2x2", ["--mesh.fsdp", "4"], marks=needs_libtpu),
        pytest.param("language_model_demo", "a100:4", ["--mesh.fsdp", "4"], marks=[needs_cuda, pytest.mark.slow]),
        pytest.param(
            "tests/tiny_experiment.py", "a100:4", ["--run.mesh.fsdp", "4"], marks=[needs_cuda, pytest.mark.slow]
        ),
    ],
)
def test_step_is_planned_for_chips_that_are_not_there(config, topology, options):
    done = command("--config", config, "--topology", topology, "--by-part", *options)
    memory = "GiB of 15.75" if topology.startswith("v5e") else "GiB of 59.44"
    part = "OmniCodec" if "tiny" in config else "optimizer"
    for words in (
        memory,
        "all-gather",
        "bound by",
        "x real time",
        "hours of audio a day and chip",
        part,
        "dot_general",
    ):
        assert words in done


@pytest.mark.parametrize(
    "topology",
    [pytest.param("v5e:1x1", marks=[needs_libtpu, pytest.mark.slow]), pytest.param("a100:1", marks=needs_cuda)],
)
def test_tokenizing_is_planned_for_chips_that_are_not_there(topology):
    done = command(
        "--what", "tokenizing", "--config", "tests/tiny_experiment.py", "--topology", topology, "--rows", "4"
    )
    for words in (
        "semantic branch",
        "codec",
        "x real time at best",
        "hours of audio a day and chip",
    ):
        assert words in done


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("released_12hz", ["Qwen3-Omni's encoder", "semantic branch", "codec"]),
        ("demo", ["semantic branch", "codec"]),
    ],
)
def test_tokenizing_is_every_program_that_a_clip_passes_through(recipe, names):
    codec = config_files.load(recipe).codec
    programs = tokenization.programs(tokenization.Work(codec, 64, 16), jax.devices())
    assert list(programs) == names
    assert programs["codec"].seconds == 64 * 16 / 12.5
    assert programs["semantic branch"].seconds == 64 * 32 / (12.5 if recipe == "demo" else 13)
    if recipe != "demo":
        assert programs["Qwen3-Omni's encoder"].seconds == 64 * 8


@pytest.mark.parametrize("options", [{"rows": 0}, {"block": -1}])
def test_step_without_clips_is_refused(options):
    ((name, count),) = options.items()
    with pytest.raises(ConfigError, match=f"^--{name} {count}: must be 1 or more$"):
        tokenization.plan_tokenization(config_files.load("demo").codec, "a100:1", **options)


def test_tokens_of_a_language_model_are_not_planned():
    with pytest.raises(UsageError, match="--what tokenizing: --config language_model is a language model"):
        plan(config="language_model", topology="a100:1", what="tokenizing", settings=PerplexityConfig())


def ended(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "omnicodec_jax", "plan", *options]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def command(*options: str) -> str:
    done = ended(*options)
    assert done.returncode == 0, done.stderr
    return done.stdout
