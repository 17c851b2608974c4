"""Files that are whole or not there, who may read them, and what is said where they cannot be written."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from tiny import OMNICODEC, variables

from omnicodec_jax import cli, model_directory, token_file
from omnicodec_jax.converters import to_torch
from omnicodec_jax.corpus import shards, webdataset
from omnicodec_jax.data import audio, records
from omnicodec_jax.data.claim import claim
from omnicodec_jax.errors import ModelError, told
from omnicodec_jax.evaluation import page
from omnicodec_jax.files import replacing, rewriting
from omnicodec_jax.token_file import TokenFile

pytestmark = pytest.mark.quick

TOKENS = TokenFile(
    codes=np.zeros((2, 3), np.uint16), model="m", frame_rate=12.5, sample_rate=24_000, num_samples=5760, gain=1.0
)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_models_and_tokens_can_be_read_by_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        model_directory.save(tmp_path, OMNICODEC, variables(OMNICODEC))
        TOKENS.save(tmp_path / "tokens.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", "tokens.safetensors"), oct(mode))


@pytest.mark.parametrize(
    ("kind", "converter"),
    [
        ("wavlm", "wavlm"),
        ("mimi", "mimi"),
        ("qwen3_omni_moe", "qwen3-aut"),
        ("qwen3_omni_moe_audio_encoder", "qwen3-aut"),
    ],
)
def test_checkpoint_of_transformers_names_its_converter(tmp_path, kind, converter):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"], "hidden_size": 8}))
    with pytest.raises(ModelError, match=rf"not converted yet; run: omnicodec convert {converter} --checkpoint "):
        model_directory.load(tmp_path)


def test_other_models_of_transformers_are_refused_by_their_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "5"}))
    with pytest.raises(ModelError, match="a llama model of transformers, which nothing here converts"):
        model_directory.load(tmp_path)


def test_checkpoint_of_pytorch_names_its_converter(tmp_path):
    (tmp_path / "omnicodec.pth").write_bytes(b"")
    with pytest.raises(ModelError, match=r"omnicodec convert from-torch .* --checkpoint .*omnicodec\.pth"):
        model_directory.load(tmp_path)
    with pytest.raises(ModelError, match=r"omnicodec\.pth: a file, .* omnicodec convert from-torch"):
        model_directory.resolve(tmp_path / "omnicodec.pth")


def test_model_that_git_lfs_did_not_fetch_is_named_so(tmp_path):
    model_directory.save(tmp_path, OMNICODEC, variables(OMNICODEC))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        model_directory.load(tmp_path)


# -- Disks that take no more


@contextlib.contextmanager
def disk_of(size: int):
    """A limit on the size of files stands for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_codes_and_weights_are_saved_as_they_are_in_whatever_order_they_lie_in_memory(tmp_path):
    codes = np.arange(12, dtype=np.uint16).reshape(4, 3).T  # as of a clip of shards, which are [N, K]
    dataclasses.replace(TOKENS, codes=codes).save(tmp_path / "tokens.safetensors")
    np.testing.assert_array_equal(TokenFile.load(tmp_path / "tokens.safetensors").codes, codes)
    weights = variables(OMNICODEC)
    for number in ("float32", "int8"):
        model_directory.save(tmp_path / "c", OMNICODEC, weights, number)
        model_directory.save(tmp_path / "f", OMNICODEC, jax.tree.map(np.asfortranarray, weights), number)
        assert (tmp_path / "f/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 100_000).astype(np.float32)
CODES = np.random.default_rng(0).integers(0, 2000, (50_000, 2)).astype(np.uint16)
CONTRACT = {"codebook_sizes": [2048] * 2}


def save_tokens(path):
    dataclasses.replace(TOKENS, codes=CODES.T).save(path)


def save_model(path):
    model_directory.save(path.parent, OMNICODEC, variables(OMNICODEC))


def save_to_torch(path):
    model_directory.save(path.parent / "model", OMNICODEC, variables(OMNICODEC))
    with disk_of(5000):
        to_torch.main(path.parent / "model", path)


def save_token_shard(path):
    clips = [shards.Clip("a", "speech", CODES, 1.0, 24_000, 96_000_000, "")]
    shards.write(path, clips, CONTRACT)


def save_tar(path):
    save_token_shard(path.parent / "tokens" / "shards" / "a.parquet")
    with disk_of(50_000):
        webdataset._convert(path.parent / "tokens" / "shards" / "a.parquet", path.parent)


def save_array(path):
    with replacing(path) as temporary:
        np.save(temporary, CODES)


def save_in_words_of_its_own(path):
    with replacing(path) as temporary:
        try:
            temporary.write_bytes(CODES.tobytes())
        except OSError:
            raise RuntimeError("inline_container.cc: unexpected pos 64 vs 0") from None


WRITERS = {
    "a.safetensors": save_tokens,
    "model.safetensors": save_model,
    "omnicodec.safetensors": save_to_torch,
    "omnicodec.pth": save_to_torch,
    "a.parquet": save_token_shard,
    "a.tar": save_tar,
    "a.array_record": lambda path: records.write_shard(path, [NOISE.tobytes()]),
    "a.wav": lambda path: audio.save(path, NOISE, 24_000),
    "a.flac": lambda path: audio.save(path, NOISE, 24_000),
    "a.png": lambda path: page.spectrogram(NOISE, 24_000, path),
    "a.npy": save_array,
    "a.any": save_in_words_of_its_own,
}
"""By the name of the file."""
THEIR_OWN = (save_to_torch, save_tar)
"""Writers that first make what they read, and then limit the size themselves."""


def test_a_disk_that_is_full_before_safetensors_begins_is_called_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(token_file, "save_tensors", refuse)
    with pytest.raises(OSError) as caught:
        TOKENS.save(tmp_path / "a.safetensors")
    assert told(caught.value).startswith(f"{tmp_path / 'a.safetensors'}: No space left on device; make room there")


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_called_so_with_the_file_and_what_to_do(tmp_path, name):
    if name.endswith(".pth"):
        pytest.importorskip("torch", reason="PyTorch writes .pth files")
    path = tmp_path / "out" / name
    limited = contextlib.nullcontext() if WRITERS[name] in THEIR_OWN else disk_of(2000)
    with limited, pytest.raises(OSError) as caught:
        WRITERS[name](path)
    line = told(caught.value)
    assert line.startswith(f"{path}: File too large; raise the limit (ulimit -f)")
    assert "\n" not in line
    assert not path.exists()
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOSPC, "No space left on device; make room there, or choose another place"),
        (errno.EDQUOT, "Disk quota exceeded; make room within your quota, or choose another place"),
        (errno.EROFS, "Read-only file system; choose another place"),
        (errno.EACCES, "Permission denied; get the right to write there, or choose another place"),
    ],
)
def test_whatever_keeps_a_file_from_being_written_says_what_to_do(tmp_path, monkeypatch, code, line):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(OSError) as caught:
            TOKENS.save(tmp_path / "a.safetensors")
        with pytest.raises(OSError) as refused, claim(tmp_path):
            pass
    assert told(caught.value) == f"{tmp_path / 'a.safetensors'}: {line}"
    assert told(refused.value) == f"{tmp_path}: {line}"


def test_a_file_where_a_directory_is_needed_says_so(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError) as saved:
        TOKENS.save(tmp_path / "out" / "deep" / "a.safetensors")
    with pytest.raises(OSError) as claimed, claim(tmp_path / "out"):
        pass
    for caught in (saved, claimed):
        assert "a file stands where a directory is needed; choose another place" in told(caught.value)


def test_what_cannot_be_read_is_not_blamed_on_what_is_written(tmp_path):
    with pytest.raises(PermissionError) as caught, replacing(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/b.wav")
    assert told(caught.value) == "/elsewhere/b.wav: Permission denied"


# -- What killed runs leave


def leave(path: Path) -> Path:
    """What a process leaves that is killed while it writes `path`."""
    script = (
        "import os, pathlib, sys; from omnicodec_jax.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    before = set(path.parent.iterdir())
    subprocess.run([sys.executable, "-c", script, path], check=False)
    (leftover,) = set(path.parent.iterdir()) - before
    return leftover


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path, other = tmp_path / "rejects[1].jsonl", tmp_path / "rejects.jsonl"
    leave(path)
    kept = leave(other)
    with replacing(path) as written_by_another:
        with rewriting(path) as temporary:
            temporary.write_text("whole")
        assert sorted(tmp_path.iterdir()) == sorted([kept, written_by_another, path])
    assert sorted(tmp_path.iterdir()) == sorted([kept, path])


def test_a_copy_that_a_full_disk_has_stopped_is_not_blamed_on_its_source(tmp_path):
    with disk_of(2000), pytest.raises(OSError) as caught:
        cli.clips(tmp_path / "out")
    assert told(caught.value).startswith(f"{tmp_path / 'out'}/")
    assert "File too large; raise the limit (ulimit -f)" in told(caught.value)
