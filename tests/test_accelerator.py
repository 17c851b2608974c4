"""The table of what an accelerator makes of this package runs through on any machine, and rows fail by themselves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import sameness, speed
from benchmarks.accelerator.sameness import Row
from benchmarks.accelerator.settings import SMALL, Settings, write_model
from omnicodec_jax.planning.chips import Topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra `plan`")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # trains, and tokenizes in six processes
def test_every_row_is_measured_in_miniature_on_a_cpu():
    names = [name for name in accelerator.rows(SMALL) if name != "golden"]  # which compiles for minutes
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    device, _, heading, _, *table = done.stdout.splitlines()
    assert "x cpu (cpu), jax " in device
    assert heading == "| | here | beside |"
    assert len(table) == len(names)
    assert "failed" not in done.stdout
    assert "codes the same, compiled programs the same" in done.stdout


def test_codes_of_a_cpu_are_those_of_a_cpu_and_no_codebook_gives_always_the_same(tmp_path):
    write_model(SMALL, tmp_path)
    row = sameness.codes_of_a_cpu(SMALL, tmp_path)
    assert row.here.startswith("0 of ")
    codes = sameness.codes_of(SMALL, tmp_path, jax.devices()[0])
    assert min(len(np.unique(book)) for book in codes) > 1


def test_mismatches_are_counted_by_codebook():
    ours, theirs = np.zeros((2, 4, 100), np.int32)
    theirs[1, :1], theirs[3, :50] = 1, 1
    assert sameness.mismatches(ours, theirs) == ("51 of 400 differ (semantic 0.00%, first acoustic 1.00%, last 50.00%)")


def test_upsampler_is_that_of_numpy():
    assert float(sameness.upsampler(SMALL, Path()).here.split()[2]) < 1e-6


@pytest.fixture
def golden(monkeypatch, tmp_path) -> SimpleNamespace:
    """One golden step with one loss, which is off by a thousandth here."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    data = SimpleNamespace(DIRECTORY=tmp_path, load=lambda: SimpleNamespace(steps=[{"msspec": 30.0}]))
    ours = SimpleNamespace(metrics=[{"mel": 2.002}])
    steps = SimpleNamespace(TERMS={"mel": "msspec"}, WEIGHTED={"mel": 15}, run=lambda: ours)
    monkeypatch.setitem(sys.modules, "golden", data)
    monkeypatch.setitem(sys.modules, "test_golden_steps", steps)
    return data


def test_golden_steps_are_compared_loss_by_loss(golden):
    assert sameness.golden_steps(SMALL, Path()).here == "losses off by up to 1.0e-03 (mel, step 0)"


def test_golden_steps_need_their_data(golden):
    golden.DIRECTORY /= "absent"
    with pytest.raises(FileNotFoundError, match="no golden data in .*absent"):
        sameness.golden_steps(SMALL, Path())


def failing(monkeypatch, **reasons: str) -> None:
    """Rows that are measured, but for those with a reason."""

    def run(command, **options):
        name = command[command.index("--row") + 1]
        if name in reasons:
            return SimpleNamespace(returncode=1, stdout="", stderr=f"Traceback …\n{reasons[name]}\n")
        return SimpleNamespace(returncode=0, stdout=f"a log\n{json.dumps(Row(name, '1', '2'))}\n", stderr="a warning")

    monkeypatch.setattr(accelerator.subprocess, "run", run)


def test_a_row_that_fails_says_why_and_the_others_stand(monkeypatch, capsys):
    failing(monkeypatch, step_24="RESOURCE_EXHAUSTED: 90 | 80 GiB", golden="FileNotFoundError: no golden data in x")
    assert accelerator.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"| step_24 | failed: RESOURCE_EXHAUSTED: 90 \| 80 GiB |  |" in lines
    assert "| golden | failed: FileNotFoundError: no golden data in x |  |" in lines
    assert "| step_6 | 1 | 2 |" in lines
    assert len(lines) == 4 + len(accelerator.rows(Settings()))


def test_nothing_measured_is_no_success(monkeypatch):
    failing(monkeypatch, codes="no device")
    assert accelerator.main(only=("codes",)) == 1


def test_a_row_that_hangs_is_given_up(monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    assert accelerator.measured("codes", True, True, Path(), 3.0) == Row("codes", "failed: not done after 3 s", "")


def test_there_is_no_plan_for_a_cpu():
    assert speed.said_by(speed.start_plan(SMALL, 2)) == "no plan"


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("NVIDIA H100 80GB HBM3", "h100:1"),
        ("NVIDIA H200", "h200:1"),
        ("NVIDIA A100-SXM4-80GB", "a100:1"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb:1"),
        ("TPU v4", "v4:1x1x1"),
        ("TPU v5 lite", "v5e:1x1"),
        ("TPU v5", "v5p:1x1x1"),
        ("TPU v5p", "v5p:1x1x1"),
        ("TPU v6 lite", "v6e:1x1"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("TPU v4 lite", None),
        ("TPU7x", None),
    ],
)
def test_plan_is_for_the_kind_of_device_that_is_here(monkeypatch, kind, topology):
    monkeypatch.setattr(speed.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(speed.subprocess, "Popen", lambda command, **_: command)
    plan = speed.start_plan(Settings(), 6)
    assert (plan and plan.topology) == topology
    if plan is not None:
        assert plan.process[plan.process.index("--topology") + 1] == topology


@needs_libtpu
@pytest.mark.parametrize("topology", sorted({name for name in speed.TOPOLOGIES.values() if name.startswith("v")}))
def test_kinds_of_tpus_are_those_that_libtpu_gives_the_chips_of_a_plan(topology):
    assert speed.TOPOLOGIES[Topology.parse(topology).devices[0].device_kind] == topology


def test_plan_is_read_from_what_the_command_says(monkeypatch):
    said = "per chip\n  total              13.40 GiB of 15.75\nroofline               713 ms a step, bound by memory; …"
    monkeypatch.setattr(speed.jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")])
    process = SimpleNamespace(communicate=lambda: (said, ""))
    monkeypatch.setattr(speed.subprocess, "Popen", lambda *_, **__: process)
    assert speed.said_by(speed.start_plan(Settings(), 6)) == "plan for v5e:1x1: 713 ms at best, 13.40 GiB"
    process.communicate = lambda: ("", "a warning\nerror: no libtpu\n")
    assert speed.said_by(speed.start_plan(Settings(), 6)) == "no plan: error: no libtpu"


def test_slow_operations_are_added_up_over_a_trace_with_the_kernels_of_a_gpu():
    def event(name: str, duration: float, **stats: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, duration_ns=duration, stats=list(stats.items()))

    kernel = event("conv2d_grouped_direct_kernel", 5, hlo_op="custom-call.1")
    events = [event("dot.1", 3, hlo_op="dot.1"), event("fusion", 4, hlo_op="fusion"), event("a thread", 100)]
    lines = [SimpleNamespace(events=events), SimpleNamespace(events=[event("dot.1", 2, hlo_op="dot.1"), kernel])]
    found = speed.operations(SimpleNamespace(planes=[SimpleNamespace(lines=lines)]))
    assert found == {"dot.1": 5, "fusion": 4, "custom-call.1 (conv2d_grouped_direct_kernel)": 5}
