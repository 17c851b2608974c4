"""Servers of buckets on this machine, each in a process of its own: moto for S3, gcp-storage-emulator for GCS."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "test"
GCS_SERVER = """
from gcp_storage_emulator.handlers import objects

download = objects.download

def with_generation(request, response, storage, *arguments, **options):
    try:
        held = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = held["generation"]
    except objects.NotFound:
        pass
    return download(request, response, storage, *arguments, **options)

objects.download = with_generation  # the emulator leaves out this header, which TensorStore reads

from gcp_storage_emulator.__main__ import main

main()
"""
S3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
S3 |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
# gcsfs asks another service of Google of what kind a bucket is, and TensorStore the machine for its account.
GCS = {"FSSPEC_GCS_TOKEN": "anon", "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
GCS |= {"GCE_METADATA_ROOT": "127.0.0.1:9"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def s3(port: int | None = None) -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """A server of S3 with one bucket; gives its process, and the variables that lead programs to it."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], url) as process:
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"))
        yield process, S3 | {"AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def gcs(port: int | None = None) -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """A server of Google Cloud Storage with one bucket; gives what `s3` does."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET]
    with _running([sys.executable, "-c", GCS_SERVER, "start", *options], url) as process:
        yield process, GCS | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


SERVERS = {"s3": s3, "gs": gcs}


@contextlib.contextmanager
def _running(command: list[str], url: str) -> Iterator[subprocess.Popen]:
    environment = {name: value for name, value in os.environ.items() if name != "STORAGE_EMULATOR_HOST"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,
        start_new_session=True,
    )
    try:
        _wait_for(process, url)
        yield process
    finally:
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, however that comes about."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait_for(process: subprocess.Popen, url: str) -> None:
    for _ in range(600):
        assert process.poll() is None, f"the server for {url} did not start"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"{url}: no answer")
