"""Where the time of a run goes: the record, and what is said of it."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnicodec_jax import cli
from omnicodec_jax.errors import TrainingError
from omnicodec_jax.training import lost_time
from omnicodec_jax.training.lost_time import FILE, RESTARTS, Line, RunClock, Spent

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]


def line(began: float, at: float, step: int | None, learning: float, start: float = 10.0) -> Line:
    return Line(float(began), float(at), step, {"start": start, "learning": float(learning)}, 1.0)


KILLED = [line(0, 10, None, 0), line(0, 10, 0, 0), line(0, 30, 100, 20), line(0, 50, 200, 40)]
"""A start that was killed somewhere after step 200."""
RESUMED = [line(80, 90, 150, 0), line(80, 120, 300, 30)]
"""The next, from the checkpoint of step 150."""


def written(folder: Path, lines: list[Line]) -> Path:
    (folder / FILE).write_text("".join(json.dumps(each._asdict()) + "\n" for each in lines))
    return folder


def test_time_of_a_killed_run_is_learning_restart_and_steps_done_again():
    spent = Spent.of([*KILLED, *RESUMED])
    assert spent.total == pytest.approx(120)
    kept = {cause: seconds for cause, seconds in spent.seconds.items() if seconds}
    assert kept == pytest.approx({"learning": 60, "start": 20, RESTARTS: 30, lost_time.DONE_AGAIN: 10})
    assert str(spent) == "50.0 % of 2.0 min was learning; lost: start 16.7 %, restarts 25.0 %, steps done again 8.3 %"


def test_run_that_goes_on_from_where_it_stopped_has_done_nothing_again():
    spent = Spent.of([*KILLED, line(50, 60, 200, 0), line(50, 70, 300, 10)])
    assert spent.seconds[lost_time.DONE_AGAIN] == 0
    assert spent.seconds["learning"] == 50
    assert [start.steps for start in spent.starts] == [(0, 200), (200, 300)]


def test_start_that_comes_to_no_step_is_lost_whole():
    spent = Spent.of([*KILLED, line(60, 75, None, 0, start=15), *RESUMED])
    assert [start.steps for start in spent.starts] == [(0, 200), None, (150, 300)]
    assert spent.seconds["start"] == 35
    assert spent.seconds[RESTARTS] == 10 + 5
    assert spent.seconds[lost_time.DONE_AGAIN] == 10


def test_steps_that_two_starts_did_again_count_by_the_earlier_of_them():
    spent = Spent.of([*KILLED, *RESUMED, line(130, 140, 50, 0), line(130, 150, 60, 10)])
    assert spent.seconds["learning"] == 10 + 10
    assert spent.seconds[lost_time.DONE_AGAIN] == 30 + 30


def test_line_that_a_killed_process_has_cut_costs_itself(tmp_path):
    written(tmp_path, KILLED)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"began": 0, "at": 55, "st')
    clock = RunClock()
    clock.record_in(tmp_path)
    clock.step = 150
    clock.record()
    assert [each.step for each in lost_time.read(tmp_path)] == [None, 0, 100, 200, None, 150]
    assert clock.spent().seconds == lost_time.of_run(tmp_path).seconds


def test_at_any_moment_time_is_spent_on_one_cause(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lost_time.time, "perf_counter", lambda: now[0])
    clock = RunClock()

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    pass_by(3)
    with clock.spending("validation"):
        pass_by(5)
    clock.turn_to("learning")
    pass_by(20)
    with clock.spending("saving"):
        pass_by(2)
        with clock.spending("waiting for data"):
            pass_by(1)
    pass_by(10)
    clock.record()
    expected = {"start": 3, "validation": 5, "learning": 30, "saving": 2, "waiting for data": 1}
    assert {cause: seconds for cause, seconds in clock.spent().seconds.items() if seconds} == pytest.approx(
        expected, abs=0.1
    )


def test_full_disk_costs_the_record_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lost_time, "_append", full)
    caplog.set_level(logging.INFO)
    clock = RunClock()
    clock.record_in(tmp_path)
    clock.close()
    full_disk, time_spent = caplog.messages
    assert full_disk.endswith(f"{FILE}: No space left on device; going on without")
    assert time_spent.startswith("time: 0.0 % of ")


def test_goodput_says_what_the_time_of_all_restarts_was_lost_to(tmp_path, capsys):
    cli.goodput(workdir=written(tmp_path, [*KILLED, *RESUMED]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: {Spent.of([*KILLED, *RESUMED])}"
    assert "  restarts              30.0 s    25.0 %" in lines
    assert ": steps 150 to 300 in 40.0 s, 1.00 GiB of host memory at first, 1.00 at last" in lines[-1]


def test_directory_without_a_record_is_called_so(tmp_path):
    with pytest.raises(TrainingError, match=r"no record of a run's time"):
        cli.goodput(workdir=tmp_path)


def test_process_that_is_stopped_while_it_compiles_says_where_its_time_went(tmp_path):
    code = (
        "import hashlib, logging, pathlib, sys\n"
        "from omnicodec_jax.distributed import multihost\n"
        "from omnicodec_jax.training.lost_time import RunClock\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "clock = RunClock()\n"
        "clock.record_in(pathlib.Path(sys.argv[1]))\n"
        "with multihost.Interruption() as interruption, interruption.ending_the_process(clock.close):\n"
        "    print('busy', flush=True)\n"
        "    with clock.spending('compilation'):\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    assert "time: 0.0 % of" in process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert len(lost_time.read(tmp_path)) == 2


def test_time_of_a_process_begins_with_its_start():
    code = (
        "import time; time.sleep(0.05); from omnicodec_jax.training import lost_time; print(lost_time.process_start())"
    )
    before = time.time()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert before - 0.1 < float(result.stdout) < before + 0.1 + (time.time() - before) / 2
