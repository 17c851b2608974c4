"""Servers of buckets on this machine: moto for S3 and gcp-storage-emulator for GCS, each in a process of its own.

For the Hugging Face hub, of which there is no server to install, a thread answers what huggingface_hub asks to read,
and another one answers as a web server does.
"""

import contextlib
import ctypes
import email.utils
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


# -- The hub


class Hub(BaseHTTPRequestHandler):
    """Answers for the repositories in a folder, such as FOLDER/datasets/OWNER/NAME: is it there, what is in it, files.

    With a token, it answers only to those who send it.
    """

    folder: Path
    token: str | None = None
    sent: list[tuple[str, int]]
    """Paths that were asked for, with the number of bytes that were sent."""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        names = [urllib.parse.unquote(name) for name in parts.path.strip("/").split("/")]
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self._send(b"", 401, "RepoNotFound")
        elif names[0] == "api":
            self._about("/".join(names[1:4]), names[4:], "recursive=true" in parts.query.lower())
        else:
            kind = [] if names[0] == "datasets" else ["models"]
            at = names.index("resolve")
            self._file(self.folder.joinpath(*kind, *names[:at], *names[at + 2 :]))

    def _about(self, repository: str, asked: list[str], recursive: bool) -> None:
        root = self.folder / repository
        if not root.is_dir():
            self._send(b"", 404, "RepoNotFound")
        elif asked[:1] != ["tree"]:
            self._send(json.dumps({"id": repository.partition("/")[2]}).encode())
        elif not (place := root.joinpath(*asked[2:])).is_dir():
            self._send(b"", 404, "EntryNotFound")
        else:
            paths = sorted(place.rglob("*") if recursive else place.iterdir())
            self._send(json.dumps([self._row(path, root) for path in paths]).encode())

    def _row(self, path: Path, root: Path) -> dict:
        row = {"path": path.relative_to(root).as_posix(), "oid": "", "size": 0, "type": "directory"}
        if path.is_file():
            row |= {"oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "type": "file"}
        return row

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._send(b"", 404, "EntryNotFound")
        elif wanted := self.headers["Range"]:
            first, last = wanted.removeprefix("bytes=").split("-")
            self._send(path.read_bytes()[int(first) : int(last) + 1 if last else None], 206)
        else:
            self._send(path.read_bytes())

    def _send(self, data: bytes, status: int = 200, error: str | None = None) -> None:
        self.sent.append((self.path, len(data)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hub(folder: Path, token: str | None = None) -> Iterator[tuple[type[Hub], str]]:
    """Serves the repositories in a folder; gives the class that answers, and the URL."""
    with _answering(type("Answers", (Hub,), {"folder": folder, "token": token, "sent": []})) as served:
        yield served


# -- The web


class Web(Hub):
    """Answers for the files of a folder, as web servers do: with ranges or without, and not always at once."""

    has_ranges = True
    failures: list[int]
    """Answers that the next requests get in place of a file."""

    def do_HEAD(self) -> None:
        self.do_GET()

    @property
    def asked(self) -> Path:
        return self.folder / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")

    def end_headers(self) -> None:
        if self.asked.is_file():
            self.send_header("Last-Modified", email.utils.formatdate(self.asked.stat().st_mtime, usegmt=True))
        super().end_headers()

    def do_GET(self) -> None:
        if self.failures:
            self._send(b"", self.failures.pop(0))
        else:
            if not self.has_ranges:
                del self.headers["Range"]
            self._file(self.asked)


@contextlib.contextmanager
def web(folder: Path) -> Iterator[tuple[type[Web], str]]:
    """Serves the files of a folder; gives the class that answers, and the URL."""
    with _answering(type("Answers", (Web,), {"folder": folder, "failures": [], "sent": []})) as served:
        yield served


@contextlib.contextmanager
def _answering(answers: type) -> Iterator[tuple[type, str]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield answers, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
