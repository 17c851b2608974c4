"""Processes of a cluster that share work without talking: real ones, on loopback."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from omnicodec_jax.distributed import multihost
from omnicodec_jax.errors import ConfigError

SHARE = """
import sys
from omnicodec_jax.distributed import multihost
print(*multihost.share_of_work(), flush=True)
sys.stdin.read()  # until the other has ended
import jax
print(float(jax.jit(lambda x: x + 1)(1.0)), jax.process_count(), flush=True)
"""


def test_a_process_that_is_done_first_does_not_wait_for_the_others():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen([sys.executable, "-c", SHARE], env=os.environ | cluster | {"JAX_PROCESS_ID": rank}, **pipes)
        for rank in "01"
    )
    try:
        assert first.communicate("", timeout=120)[0].splitlines() == ["0 2", "2.0 2"]  # of the service, even
        assert second.poll() is None
        assert second.communicate("", timeout=120)[0].splitlines() == ["1 2", "2.0 2"]
        assert (first.returncode, second.returncode) == (0, 0)
    finally:
        for process in (first, second):
            process.kill()


STOPPED = """
import os, signal, time
from omnicodec_jax.distributed import multihost
print(*multihost.share_of_work(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_process_that_has_its_share_is_ended_by_sigterm_as_any_other():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    environment = os.environ | alone | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", STOPPED], env=environment, capture_output=True, text=True, timeout=50
    )
    assert process.stdout == "0 1\n"
    assert process.returncode == -signal.SIGTERM


def test_alone_there_is_nothing_to_share():
    result = subprocess.run([sys.executable, "-c", SHARE], input="", capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0] == "0 1"


RANKS = "JAX_NUM_PROCESSES and JAX_PROCESS_ID are '{}' and '{}': a number, and one from 0 to below it"
ADDRESS = "JAX_COORDINATOR_ADDRESS is '{}': must be host:port"


@pytest.mark.parametrize(
    ("address", "count", "rank", "message"),
    [
        *(("a:1", *words, RANKS.format(*words)) for words in (("two", "0"), ("2", "first"), ("2", "2"), ("2", "-1"))),
        *((address, "1", "0", ADDRESS.format(address)) for address in ("a", "", "a:", ":1")),
    ],
)
def test_a_cluster_that_cannot_be_is_told_in_one_line(monkeypatch, address, count, rank, message):
    for name, value in zip(multihost.CLUSTER_VARIABLES, (address, count, rank), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        multihost.share_of_work()
