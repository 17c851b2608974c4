"""Measure what a GPU or TPU makes of this package, and print one table: python -m benchmarks.accelerator

Every row runs in a process of its own, with the whole device to itself, and fails by itself, with its reason in the
table. `--small` runs all rows in miniature, on any machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.accelerator import pytorch, sameness, speed
from benchmarks.accelerator.sameness import Row
from benchmarks.accelerator.settings import SMALL, Settings, write_model

Measure = Callable[[Settings, Path], Row]
MODEL = "model"
"""Name of what makes the model that the rows use."""


def rows(settings: Settings) -> dict[str, Measure]:
    """Returns the rows by name, in the order of the table."""
    found: dict[str, Measure] = {
        "codes": sameness.codes_of_a_cpu,
        "bfloat16": sameness.codes_in_bfloat16,
        "processes": sameness.two_processes,
        "upsampler": sameness.upsampler,
        "kernel": sameness.residual_stage,
        "golden": sameness.golden_steps,
    }
    found |= {f"step_{clips}": partial(speed.training_step, clips=clips) for clips in settings.batches}
    found["codebooks"] = speed.first_codebooks
    found |= {f"tokenize_{name}": partial(speed.tokenization, precision=name) for name in ("float32", "bfloat16")}
    found |= {"slowest_step": speed.slowest_of_a_step, "slowest_tokenizing": speed.slowest_of_tokenization}
    found |= {"pytorch": pytorch.codes_and_audio, "pytorch_speed": pytorch.codec_speed, "mimi": pytorch.mimi_speed}
    return found


def measured(name: str, small: bool, plan: bool, model: Path, timeout: float) -> Row:
    """Measures a row in a process of its own. What goes wrong there stands in the row."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--row", name, "--model", str(model)]
    command += ["--small"] * small + ["--no-plan"] * (not plan)
    # The rows of one table share what they compile, but no table takes a program of another day.
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(model.parent / "programs"),
        "JAX_TRACEBACK_FILTERING": "off",
    }
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Row(name, f"failed: not done after {timeout:.0f} s", "")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Row(*json.loads(lines[-1]))
    reasons = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return Row(name, f"failed: {reasons[-1]}", "")


def main(
    small: bool = False,
    only: tuple[str, ...] = (),
    timeout: float = 3600.0,
    plan: bool = True,
    row: str | None = None,
    model: Path | None = None,
    fingerprint: bool = False,
) -> int:
    """Measure what a GPU or TPU makes of this package, and print one table.

    Args:
        small: Run every row in miniature, to see that it runs.
        only: Rows to measure: codes, bfloat16, processes, upsampler, kernel, golden, step_6, …; all, if none is named.
        timeout: Seconds after which a row is given up.
        plan: Put what `omnicodec plan` says beside each training step, for which it compiles for minutes.
        row: Measure this row in this process, and print it as JSON; for the command itself.
        model: Directory of the model that this row uses.
        fingerprint: Print digests of the codes and of the compiled encoder instead; for the row `processes`.
    """
    settings = (SMALL if small else Settings())._replace(plan=plan)
    if row is not None and model is not None:
        return _measure_here(settings, row, model, fingerprint)
    named = only or tuple(rows(settings))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / MODEL
        print(
            f"{measured(MODEL, small, plan, model, timeout).here}\n\n| | here | beside |\n| --- | --- | --- |",
            flush=True,
        )
        for name in named:
            found = measured(name, small, plan, model, timeout)
            failed += found.here.startswith("failed")
            cells = (cell.replace("|", r"\|") for cell in found)
            print(f"| {' | '.join(cells)} |", flush=True)
    return int(failed == len(named))


def _measure_here(settings: Settings, row: str, model: Path, fingerprint: bool) -> int:
    """Measures one row in this process."""
    import jax

    if fingerprint:
        print(sameness.fingerprint(settings, model))
        return 0
    if row == MODEL:
        write_model(settings, model)
        device = jax.devices()[0]
        found = Row(
            MODEL, f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}", ""
        )
    else:
        found = rows(settings)[row](settings, model)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    command.run(main, prog="python -m benchmarks.accelerator")
