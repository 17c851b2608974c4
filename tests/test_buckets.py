"""Paths in buckets, without a server: what they are, and what refuses them."""

import errno
import os
import pickle
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_experiment import config as TINY

from omnicodec_jax import buckets, cli, targets
from omnicodec_jax.buckets import BucketError, BucketPath, as_path, joined
from omnicodec_jax.data import ranged, records
from omnicodec_jax.data.entries import contained
from omnicodec_jax.errors import CheckpointError, OmniCodecError, told
from omnicodec_jax.origin import relative
from omnicodec_jax.training import loop, storage

pytestmark = pytest.mark.quick


def test_a_url_becomes_a_path_that_joins_and_splits_as_others_do():
    path = as_path("gs://bucket/data") / "shards" / "a.b.json"
    assert isinstance(path, BucketPath)
    assert (str(path), path.name, path.suffix) == ("gs://bucket/data/shards/a.b.json", "a.b.json", ".json")
    assert str(path.with_suffix(".parquet")) == "gs://bucket/data/shards/a.b.parquet"
    assert path.relative_to(as_path("gs://bucket/data/")).as_posix() == "shards/a.b.json"
    assert str(path.parent.parent) == "gs://bucket/data"
    assert {path: 1}[pickle.loads(pickle.dumps(path))] == 1
    assert str(path.absolute()) == str(path.resolve()) == str(path)


def test_a_path_of_this_machine_stays_as_it_is():
    assert type(as_path("data/prepared")) is type(Path())
    assert as_path(Path("a")) == Path("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/a", "ftp:// is not read"),
        ("gs://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("gs:/bucket/a", "two slashes"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises(BucketError, match=message):
        as_path(text)


@pytest.mark.parametrize("name", ["a.wav", "/abs/a.wav", "gs://other/a.wav"])
def test_a_list_names_files_beside_it_elsewhere_and_in_buckets(name):
    here, there = joined(Path("/lists"), name), joined(as_path("s3://bucket/lists"), name)
    wanted = {"a.wav": ("/lists/a.wav", "s3://bucket/lists/a.wav")}.get(name, (name, name))
    assert (str(here), str(there)) == wanted


@pytest.mark.parametrize("use", [open, os.listdir, os.fspath, Path.touch, lambda path: path.rename("b")])
def test_what_knows_no_buckets_refuses_them_and_makes_no_folder_of_their_name(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BucketError, match="s3://bucket/a: in a bucket"):
        use(as_path("s3://bucket/a"))
    assert list(tmp_path.iterdir()) == []


def test_without_its_library_a_bucket_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(buckets.requests.importlib.util, "find_spec", lambda name: None)
    buckets.requests.system_of.cache_clear()
    with pytest.raises(
        BucketError, match=r"s3:// needs s3fs, which is not installed: in the checkout, pip install -e '\.\[s3\]', or"
    ):
        as_path("s3://bucket/a").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--manifest", "speech=ftp://host/a.jsonl", "--out", "gs://bucket/out"],
        ["export", "--what", "decoder", "--model", "ftp://host/model", "--out", "out.stablehlo"],
        ["train", "--config", "demo", "--workdir", "gs://bucket/run", "--profile", "1:2"],
    ],
)
def test_commands_refuse_what_they_cannot_reach_in_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omnicodec", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "://" in line
    assert list(tmp_path.iterdir()) == []


def test_origins_in_one_bucket_are_seen_from_each_other_and_others_by_their_urls():
    inside, other = as_path("gs://bucket/a/x.wav"), as_path("s3://bucket/b")
    assert relative(inside, as_path("gs://bucket/b")) == "../a/x.wav"
    assert relative(inside, other) == relative(inside, Path("b")) == "gs://bucket/a/x.wav"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "full"),
            "s3://bucket/a: No space left on device; copies .* set TMPDIR",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/copies/a"), "^/copies/a: Permission denied$"),
    ],
)
def test_errors_of_this_machine_are_not_taken_for_the_servers(error, message, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(
        buckets.requests, "system_of", lambda scheme: SimpleNamespace(info=lambda url: {"type": "file"}, get_file=fail)
    )
    monkeypatch.setattr(buckets.requests.time, "sleep", None)  # nothing is asked again
    with pytest.raises(OSError, match=".") as raised, as_path("s3://bucket/a").open():
        pass
    assert re.search(message, told(raised.value))


# -- Names


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("s3://bucket/lists/../raw/a.wav", "s3://bucket/raw/a.wav"),
        ("s3://bucket//raw/./a.wav", "s3://bucket/raw/a.wav"),
        ("s3://bucket/../a.wav", "s3://bucket/a.wav"),
        ("gs://bucket/a b#c?d%20e/", "gs://bucket/a b#c?d%20e"),
    ],
)
def test_dots_and_double_slashes_in_a_url_are_taken_as_a_disk_takes_them(text, path):
    assert str(as_path(text)) == path


def test_a_list_in_a_bucket_names_files_in_the_folder_beside_its_own():
    assert str(joined(as_path("gs://bucket/lists"), "../raw/a.wav")) == "gs://bucket/raw/a.wav"


def test_nothing_lies_above_a_bucket():
    root = as_path("s3://bucket/")
    assert (str(root), root.name, str(root.parent), str((root / "a").parent)) == (
        "s3://bucket",
        "bucket",
        "s3://bucket",
        "s3://bucket",
    )
    with pytest.raises(OmniCodecError, match="s3://bucket: name the directory to write to"):
        targets.outside(root, "_tokens")
    assert str(targets.outside(root / "a", "_tokens")) == "s3://bucket/a_tokens"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("gs://bucket/lists", "a.tar"), ("https://host/lists", "https://host/lists/a.tar"), ("/lists", "a.tar")],
)
def test_a_list_beside_its_tars_can_be_moved_with_them(folder, name):
    assert contained(as_path(folder) / "a.tar", as_path(folder)) == name
    assert contained(as_path("gs://bucket/b/a.tar"), as_path("gs://bucket/lists")) == "gs://bucket/b/a.tar"


# -- Checkpoints in S3


def test_orbax_has_the_private_functions_by_which_checkpoints_are_written_to_s3():
    """Fails for an Orbax that has moved one of storage.REPLACED, or does not go by it any more."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    storage.directory(as_path("s3://bucket/run"))
    for use_ocdbt in (True, False):
        spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/run/1/state", use_ocdbt=use_ocdbt)
        held = spec.get("base", spec)
        assert (held["driver"], held["bucket"]) == ("s3", "bucket")
        assert held["path"].startswith("run/1/state")


@pytest.mark.parametrize("url", ["s3://bucket/run#1", "gs://bucket/what?/run", "gs://bucket/100%/run"])
def test_run_whose_name_orbax_would_read_as_part_of_a_url_is_refused(url):
    with pytest.raises(CheckpointError, match=rf"{re.escape(url)}: a run in a bucket must have a name without [#?%],"):
        loop.set_up(TINY, as_path(url))


def test_orbax_without_one_of_them_is_told_with_its_name_and_what_to_do(monkeypatch):
    monkeypatch.setitem(storage.REPLACED, "_normalize_path", "orbax.checkpoint._src.gone")
    storage._register_s3.cache_clear()
    with pytest.raises(CheckpointError, match=r"orbax.checkpoint._src.gone._normalize_path.* or train into gs://"):
        storage.directory(as_path("s3://bucket/run"))
    storage.directory(as_path("gs://bucket/run"))


class Ranges(BucketPath):
    """A path in a bucket whose bytes are those of a file of this machine."""

    file = Path()

    def stat(self, **_) -> os.stat_result:
        return self.file.stat()

    def read_range(self, start: int, end: int) -> bytes:
        return self.file.read_bytes()[start:end]


@pytest.mark.parametrize(("count", "longest"), [(1, 10), (40, 200_000), (3000, 30), (0, 1)])
def test_single_records_of_a_shard_are_found_in_its_bytes(count, longest, tmp_path, monkeypatch):
    rng = np.random.default_rng(count)
    written = [rng.bytes(int(size)) for size in rng.integers(0, longest, count)]
    monkeypatch.setattr(Ranges, "file", tmp_path / "a.array_record")
    records.write_shard(Ranges.file, written)
    ranged._footer.cache_clear()
    monkeypatch.setattr(ranged, "TAIL", 2 * ranged.BLOCK)  # so that a footer is longer
    ranges = Ranges("gs://bucket/a.array_record")
    assert ranged.num_records(ranges) == count
    assert [ranged.read(ranges, number) for number in range(count)] == written
    with pytest.raises(IndexError):
        ranged.read(ranges, count)


def test_a_folder_for_copies_that_a_process_beside_has_removed_is_made_anew(tmp_path, monkeypatch):
    copies, made = sys.modules["omnicodec_jax.buckets.copies"], list[Path]()

    def make(prefix):
        made.append(tmp_path / f"{prefix}{len(made)}")
        made[-1].mkdir()
        if len(made) == 1:  # before it is locked, it looks like what a killed process has left
            copies.remove_dead_copies()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", make)
    assert copies.copies.__wrapped__() == made[1]
    assert [folder.is_dir() for folder in made] == [False, True]
    copies.remove_dead_copies()
    assert made[1].is_dir()
