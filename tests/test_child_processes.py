"""Child processes that die, are stopped, or lose their parent."""

import functools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omnicodec_jax.child_processes import Child, Children, Died, Finished, Reported
from omnicodec_jax.errors import DataError

pytestmark = pytest.mark.quick


def work(item, report, *, folder):
    """Kills its own process once for each item that is called "killed", and always for "crash"."""
    report(f"begun {item}")
    flag = folder / str(item)
    if item == "crash" or (str(item).startswith("killed") and not flag.exists()):
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "refused":
        raise DataError("refused: not this one")
    if item == "unpicklable":
        raise type("Local", (Exception,), {})("in words")
    return len(item)


@pytest.fixture
def child(tmp_path):
    def make() -> Child:
        return Child(functools.partial(work, folder=tmp_path), "forkserver", preload=[__name__])

    return make


def test_a_death_names_the_item_and_costs_no_other(child):
    items = ["a", "killed 1", "crash", "bb", "killed 2", "ccc"]
    results, died = {}, []
    with Children(child() for _ in range(2)) as children:
        for item, event in children.run(items):
            if isinstance(event, Died):
                died.append((item, event.exit_code))
                if item != "crash":
                    children.again(item)
            elif isinstance(event, Finished):
                results[item] = event.value
            else:
                assert event == Reported(f"begun {item}")
    assert results == {item: len(item) for item in items if item != "crash"}
    assert sorted(died) == [("crash", -9), ("killed 1", -9), ("killed 2", -9)]
    assert children.at_hand == []


def test_every_thread_learns_why_its_own_process_died(child):
    def deaths(_):
        own = child()
        codes = []
        for _ in range(20):
            own.begin("crash")
            event = None
            while not isinstance(event, Died):
                event = own.next_event()
            codes.append(event.exit_code)
        return codes

    with ThreadPoolExecutor(4) as threads:
        codes = [code for codes in threads.map(deaths, range(4)) for code in codes]
    assert codes == [-signal.SIGKILL] * 80


def test_what_a_child_raises_is_raised_with_where_it_happened(child):
    with Children([child()]) as children, pytest.raises(DataError, match="refused: not this one") as caught:
        list(children.run(["refused"]))
    assert "in work" in "".join(caught.value.__notes__)
    with Children([child()]) as children, pytest.raises(RuntimeError, match="Local: in words"):
        list(children.run(["unpicklable"]))


def test_an_idle_child_that_is_killed_is_started_again_and_its_next_item_is_not_blamed(child):
    with Children([child()]) as children:
        assert [event.value for _, event in children.run(["a"])] == ["begun a", 1]
        (idle,) = children._free
        idle._process.kill()
        idle._process.join()
        assert [event.value for _, event in children.run(["bb"])] == ["begun bb", 2]


def test_items_of_any_size_do_not_keep_other_children_from_starting(child):
    large = ["a" * 10_000_000] * 3
    with Children(child() for _ in range(3)) as children:
        assert [event.value for _, event in children.run(large) if isinstance(event, Finished)] == [10_000_000] * 3


def test_a_child_that_could_not_be_started_is_closed_all_the_same(child, monkeypatch):
    one = child()

    def full(_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(one._context.Process, "start", full)
    with pytest.raises(OSError, match="Resource temporarily unavailable"), Children([one]) as children:
        list(children.run(["a"]))


def test_a_closed_child_ends_whatever_it_is_doing(child):
    busy = child()
    busy.begin("a")
    busy.close()
    busy.join()
    assert not busy._process.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        busy.begin("b")


ORPHAN = """
import sys
from omnicodec_jax.child_processes import Child

def wait(item, report):
    report(1)
    sys.stdin.read()
    import signal
    signal.pause()

if __name__ == "__main__":
    child = Child(wait, sys.argv[1])
    child.begin(None)
    while child.next_event() is None:
        pass
    print(child._process.pid, flush=True)
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_end_with_a_parent_that_is_killed_whatever_they_are_doing(tmp_path, method):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    # The pipe of standard output is at its end when the last process has ended that could write to it.
    process = subprocess.Popen([sys.executable, tmp_path / "orphan.py", method], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{int(said)}/cmdline").exists() or not Path(f"/proc/{int(said)}/cmdline").read_bytes()


def blocked(item, report):
    """Whether Ctrl-C was kept from the process from its beginning on."""
    return item in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ctrl_c_in_a_terminal_does_not_reach_a_process_that_is_only_starting(method):
    with Children([Child(blocked, method)]) as children:
        events = [event for _, event in children.run([signal.SIGINT])]
    assert events == [Finished(True)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
