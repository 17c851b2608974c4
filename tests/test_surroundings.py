"""What lies around a process: a cache that cannot be written, streams that are closed or full."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import lru_cache

from omnicodec_jax import cli, compilation_cache
from omnicodec_jax.buckets import BucketError
from omnicodec_jax.errors import OmniCodecError

ROOT = Path(__file__).parents[1]


def test_where_no_program_can_be_kept_one_line_says_so(monkeypatch, tmp_path, caplog):
    """A file in the place of the directory or above it, and no home directory."""
    kept: list[object] = []
    monkeypatch.setattr(jax.config, "update", lambda *named: kept.append(named))
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        monkeypatch.setenv("OMNICODEC_CACHE", str(tmp_path / name))
        compilation_cache.use()

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("OMNICODEC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compilation_cache.use()
    assert not kept
    start = "programs are compiled anew by every run: "
    first, second, third = caplog.messages
    assert first.startswith(f"{start}{tmp_path / 'file'}: ")
    assert second.startswith(f"{start}{tmp_path / 'file'}")
    assert third == f"{start}no home (OMNICODEC_CACHE)"


def test_a_program_that_may_not_be_kept_is_told_once(monkeypatch, tmp_path, caplog):
    compilation_cache.remove_what_is_cut()
    programs = lru_cache.LRUCache(str(tmp_path), max_size=-1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "x"))

    monkeypatch.setattr(type(programs.path), "write_bytes", refuse)
    for name in ("step", "other"):
        programs.put(name, bytes(10))
    assert caplog.messages == [
        f"programs are compiled anew by every run: {tmp_path}: Permission denied (OMNICODEC_CACHE)"
    ]


def test_programs_are_not_kept_where_this_package_only_reads(monkeypatch):
    monkeypatch.setenv("OMNICODEC_CACHE", "https://example.org/cache")
    with pytest.raises(BucketError, match="https:// is only read here"):
        compilation_cache.use()


def test_the_cache_in_a_home_that_no_shell_has_filled_in(monkeypatch, tmp_path):
    kept: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMNICODEC_CACHE", "~/cache")
    compilation_cache.use()
    assert kept["jax_compilation_cache_dir"] == compilation_cache.folder(str(tmp_path / "cache"))


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_a_service_has_closed_are_not_taken_by_files(tmp_path, closed):
    code = """if True:
        import os, sys
        from pathlib import Path
        from omnicodec_jax.cli import command

        def work():
            with open(sys.argv[1], "w") as file:
                file.write(f"{file.fileno() > 2} {os.get_inheritable(2)} {sys.stderr.isatty()}")
            print("not an error", file=sys.stderr)

        command.exit_with(work)
    """
    out = tmp_path / "out"
    line = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {shlex.quote(str(out))} {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert out.read_text() == "True True False"
    assert done.stdout == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_standard_output_is_named_when_it_cannot_be_written():
    for work in ("lambda: print('line')", "lambda: sys.stdout.buffer.write(bytes(10**6)) and None"):
        code = f"import sys\nfrom omnicodec_jax.cli import command\ncommand.exit_with({work})"
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1
        assert done.stderr == "error: standard output: No space left on device\n"


def test_samples_go_nowhere_only_if_they_are_sent_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OmniCodecError, match="standard output is closed; name a file to write to"):
        cli.stream_decode(tmp_path / "clip.safetensors", model="small")
