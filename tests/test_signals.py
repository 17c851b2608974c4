"""Ctrl-C and SIGTERM end a command in one line at any moment, and in good order where that is possible."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = """
import sys, time
from omnicodec_jax import signals
from omnicodec_jax.cli import command

signals.end_at_once()
{work}
command.exit_with(work)
"""
LINES = {signal.SIGINT: "error: interrupted", signal.SIGTERM: "error: interrupted by SIGTERM"}

IMPORTS = """
import sys, time
from omnicodec_jax.__main__ import main

class Slow:
    def find_spec(self, name, *_):
        if name == "omnicodec_jax.cli":
            print("busy", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
main()
"""
WORKS = """
def work():
    try:
        print("busy", flush=True)
        time.sleep(60)
    finally:
        print("cleared", flush=True)
"""
COMPILES = """
import hashlib

signals.PATIENCE = 0.1

def work():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
TRACES = """
def work():
    print("kept")
    # An exception in a callback from C++ would be a segmentation fault here.
    code = "try:\\n    print('busy', file=sys.stderr, flush=True)\\n    time.sleep(60)\\nfinally:\\n    print('raised')"
    exec(code, {"__name__": "jax._src.compiler", "time": time, "sys": sys})
"""
DROPS = """
class Thing:
    def __del__(self):
        print("busy", flush=True)
        time.sleep(60)

def work():
    thing = Thing()
    del thing
    print("went on")
"""
ENDS = """
import atexit

def last():
    print("busy", flush=True)
    time.sleep(60)

def work():
    atexit.register(last)
"""
CLEARS = """
def work():
    try:
        print("busy", flush=True)
        time.sleep(60)
    finally:
        print("clearing", flush=True)
        time.sleep(60)
"""


def start(code: str) -> subprocess.Popen[str]:
    """Starts code that gets Ctrl-C, also where the tests run in the background and do not."""
    hears = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", hears + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def stopped(code: str, number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """The exit code, the rest of the output and the errors of code that is stopped when it has printed "busy"."""
    process = start(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=50)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("code", "left"),
    [
        pytest.param(IMPORTS, "", id="imports"),
        pytest.param(COMMAND.format(work=WORKS), "cleared\n", id="works"),
        pytest.param(COMMAND.format(work=COMPILES), "", id="compiles"),
        pytest.param(COMMAND.format(work=DROPS), "", id="drops what is raised"),
        pytest.param(COMMAND.format(work=ENDS), "", id="ends"),
    ],
)
def test_a_command_that_is_asked_to_stop_says_so_in_one_line_whatever_it_is_doing(number, code, left):
    assert stopped(code, number) == (128 + number, left, f"{LINES[number]}\n")


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_nothing_is_raised_within_jax_and_what_was_printed_is_kept(number):
    process = start(COMMAND.format(work=TRACES))
    assert process.stderr is not None
    assert process.stderr.readline() == "busy\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=50)
    assert (process.returncode, errors, output) == (128 + number, f"{LINES[number]}\n", "kept\n")


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_a_second_signal_does_not_wait_for_what_the_first_has_begun(number):
    process = start(COMMAND.format(work=CLEARS))
    assert process.stdout is not None
    for line in ("busy\n", "clearing\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    output, errors = process.communicate(timeout=50)
    assert (process.returncode, errors, output) == (128 + number, f"{LINES[number]}\n", "")


BAR = """
from tqdm import tqdm

def work():
    with tqdm(total=2, desc="work"):
        exec("print('busy', flush=True)\\ntime.sleep(60)", {"__name__": "jax", "time": time})
"""


def test_the_line_does_not_stand_behind_a_progress_bar():
    _, _, errors = stopped(COMMAND.format(work=BAR))
    assert errors.splitlines()[-1] == LINES[signal.SIGTERM]


def test_a_job_in_the_background_goes_on_after_ctrl_c():
    ignored = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code = ignored + COMMAND.format(work=WORKS.replace("60", "1"))
    assert stopped(code, signal.SIGINT) == (0, "cleared\n", "")


def test_the_program_and_the_files_of_a_checkout_can_be_stopped_while_they_import():
    """They import nothing before `signals` but `__main__`."""
    assert 'omnicodec = "omnicodec_jax.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    ways = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("convert/*.py")) if path.name != "__init__.py"]
    assert len(ways) == 9
    for path in ways:
        imports = [line for line in path.read_text().splitlines() if "import" in line]
        assert imports == ["from omnicodec_jax.__main__ import main"], path


SHARES = """
from multiprocessing.shared_memory import SharedMemory

def work():
    memory = SharedMemory(create=True, size=10)
    exec("print('busy', flush=True)\\ntime.sleep(60)", {"__name__": "jax", "time": time})
"""


def test_nothing_is_said_of_the_shared_memory_that_is_cleared():
    _, _, errors = stopped(COMMAND.format(work=SHARES))  # the process that clears it has ended, too
    assert errors == f"{LINES[signal.SIGTERM]}\n"
