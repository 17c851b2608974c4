"""What is installed: exact versions from the lock, within the ranges that are promised, and quietly."""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from omnicodec_jax import compilation_cache, machine

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DIRECT = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
PINNED = {}
for pin in map(Requirement, re.findall(r"^[\w.-]+==.*$", LOCK, re.MULTILINE)):
    PINNED.setdefault(pin.name, []).append(pin)


@pytest.mark.parametrize("wanted", [*DIRECT, *(wanted for extra in EXTRAS.values() for wanted in extra)])
def test_lock_has_a_version_in_range_of_everything_that_is_asked_for(wanted):
    requirement = Requirement(wanted)
    pins = PINNED[requirement.name.lower()]
    for pin in pins:
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version), f"{wanted}: {pin} in requirements.lock; make lock"


def test_compilers_for_gpus_come_in_the_versions_of_jax():
    ranges = {asked.name: asked.specifier for asked in map(Requirement, [*DIRECT, *EXTRAS["plan"]]) if asked.specifier}
    assert ranges["jax-cuda13-plugin"] == ranges["jax-cuda13-pjrt"] == ranges["jax"]


def test_lock_names_versions_only():
    lines = [line for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
    assert all(re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+( ; .*)?$", line) for line in lines), "an address or an option"
    assert "://" not in LOCK


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}"))
        for name in ("libtpu", "jax_cuda13_plugin")
    ],
)
@pytest.mark.skipif(machine.has_tpu() or machine.has_gpu(), reason="this machine has a TPU or a GPU")
def test_nothing_is_printed_about_chips_that_are_not_there(compiler):
    code = "import jax; from omnicodec_jax.cli import command; command.exit_with(lambda: print(jax.devices()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == ""


def test_machines_with_other_instructions_share_no_programs(monkeypatch, tmp_path):
    described, folders = tmp_path / "cpuinfo", []
    monkeypatch.setattr(machine, "Path", lambda _: described)
    for flags, speed in (("avx2", 2000), ("avx2", 3000), ("avx2 avx512f", 3000)):
        described.write_text(f"model name : A CPU\nflags : {flags}\ncpu MHz : {speed}\n")
        folders.append(compilation_cache.folder("gs://bucket/cache/"))
    assert folders[0] == folders[1] != folders[2]
    assert all(folder.startswith("gs://bucket/cache/") for folder in folders)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or machine.cores() == 1, reason="needs two cores, and Linux")
def test_program_that_was_compiled_for_one_core_is_not_run_on_two(tmp_path):
    code = """if True:
        import os, sys
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
        import jax
        from omnicodec_jax import compilation_cache
        compilation_cache.use()
        jax.jit(lambda x: x + 1)(1.0)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMNICODEC_CACHE": str(tmp_path)}
    for cores, compiled in (("1", 1), ("2", 2)):
        subprocess.run([sys.executable, "-c", code, cores], check=True, env=environment, cwd=ROOT)
        assert len(list(tmp_path.rglob("jit__lambda*-cache"))) == compiled


def test_ffts_that_are_ready_at_once_do_not_wait_for_each_other():
    """JAX 0.11.1 and 0.11.2 are not allowed, since they do."""
    code = """if True:
        import jax
        import jax.numpy as jnp
        def spectra(x):
            windows = [jnp.sin(x * n)[:, : 512 * n].reshape(-1, 512 * n) for n in range(1, 8)]
            return [jnp.abs(jnp.fft.rfft(window)).sum() for window in windows]
        step = jax.jit(spectra)
        for _ in range(50):
            jax.block_until_ready(step(jnp.ones((512, 4096))))
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT, timeout=120)


def test_tracing_is_not_interrupted_thousands_of_times_to_look_for_garbage():
    code = """if True:
        import gc
        from omnicodec_jax import machine
        machine.collect_garbage_less_often()
        collections = []
        gc.callbacks.append(lambda phase, _: collections.append(phase))
        kept = [[] for _ in range(100_000)]
        print(collections.count("start"))
    """
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)) <= 10


@pytest.mark.skipif(machine.has_tpu() or machine.has_gpu(), reason="this machine has a TPU or a GPU")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_process_that_computes_on_the_cpu_touches_no_new_memory_in_its_second_step():
    code = """if True:
        import resource, threading
        import numpy as np
        from omnicodec_jax import machine

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(2**27, np.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        machine.keep_freed_memory()
        thread = threading.Thread(target=lambda: print(faults(), faults()))
        thread.start()
        thread.join()
    """
    first, second = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert int(second) < int(first) / 100


def test_tests_of_both_folders_can_be_collected_together():
    """`make check` and `make test-slow` collect them together: of two modules of one name, one would be imported."""
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests/parity").glob("*.py")]
    names = [file.stem for file in files if file.stem != "conftest"]
    assert len(names) == len(set(names))
    for file in files:
        assert not re.search(r"^\s*(from|import) conftest\b", file.read_text(), re.MULTILINE), file
