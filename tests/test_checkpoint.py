"""Checkpoints that cannot be written, and those that something has damaged since."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import lru_cache
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import compilation_cache
from omnicodec_jax.errors import CheckpointError
from omnicodec_jax.training import checkpoint
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.events import EventWriter
from omnicodec_jax.training.state import TrainState

CONFIG = replaced(TINY, run={"keep_last": 1})
KEPT = replaced(TINY, run={"keep_last": 3})


def state(step: int) -> TrainState:
    """A state that is as quickly written as any."""
    nothing = {field.name: {} for field in dataclasses.fields(TrainState)}
    return TrainState(**{**nothing, "step": jnp.int32(step), "params": {"w": jnp.full((64, 64), step, jnp.float32)}})


def template() -> TrainState:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state(0))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_to_save(checkpoints: Checkpoints, step: int) -> CheckpointError:
    """The error that a run gets to see, whichever of its calls is the first to learn of it."""

    def save() -> None:
        checkpoints.save(state(step))
        while True:
            checkpoints.check()

    with full_disk(), pytest.raises(CheckpointError) as error:
        save()
    return error.value


def test_checkpoint_whose_writing_failed_is_not_called_the_last_good_one(tmp_path: Path):
    with Checkpoints(tmp_path, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
        checkpoints.wait()
        error = fail_to_save(checkpoints, 6)
        assert "the last good checkpoint is step 4" in str(error)
        assert checkpoints.latest == 4
        assert checkpoints.restore(template()).step == 4
    assert Checkpoints(tmp_path, CONFIG, "data").latest == 4


def test_checkpoint_that_is_still_being_written_is_not_called_the_last_one(tmp_path: Path):
    with Checkpoints(tmp_path, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
        while (latest := checkpoints.latest) is None:
            pass
        assert latest == 4
        np.testing.assert_array_equal(checkpoints.restore(template()).params["w"], state(4).params["w"])


def test_step_whose_writing_failed_is_saved_when_there_is_room_again(tmp_path: Path):
    with Checkpoints(tmp_path, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
        checkpoints.wait()
        fail_to_save(checkpoints, 6)
        checkpoints.save(state(6))
        checkpoints.wait()
        assert checkpoints.latest == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_state_that_is_being_written_is_not_written_again(tmp_path: Path):
    with Checkpoints(tmp_path, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
        checkpoints.save(state(4))
        checkpoints.wait()
        assert checkpoints.latest == 4


def test_run_goes_on_whatever_the_signs_in_the_name_of_its_folder(tmp_path: Path):
    """Those that have a meaning in a URL, too."""
    workdir = tmp_path / "run #1, 50 %? a%20b"
    with Checkpoints(workdir, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
    with Checkpoints(workdir, CONFIG, "data") as checkpoints:
        assert checkpoints.restore(template()).step == 4
    assert checkpoint.read(workdir, None)[1] == 4


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's directory with a checkpoint of step 4."""
    with Checkpoints(tmp_path, CONFIG, "data") as checkpoints:
        checkpoints.save(state(4))
        checkpoints.wait()
    return tmp_path


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "/data/events"), RuntimeError("a library says nothing of disks")],
    ids=lambda error: type(error).__name__,
)
def test_full_disk_at_any_moment_of_a_run_names_the_last_good_checkpoint(saved: Path, error: Exception):
    with full_disk(), pytest.raises(CheckpointError) as caught, checkpoint.naming_the_last(saved):
        raise error
    assert "the last good checkpoint is step 4" in str(caught.value)
    assert "choose" in str(caught.value)
    assert not [path.name for path in saved.iterdir() if path.name != "checkpoints"]


def test_error_that_is_none_of_the_disk_stays_as_it_is(saved: Path):
    for error in (RuntimeError("no matter of disks"), FileNotFoundError(errno.ENOENT, "No such file", "data")):
        with pytest.raises(type(error)) as caught, checkpoint.naming_the_last(saved):
            raise error
        assert caught.value is error


def test_writer_that_was_given_up_is_an_error_in_one_line(saved: Path, monkeypatch):
    def given_up(*_: Any, **__: Any) -> None:
        raise asyncio.CancelledError

    with Checkpoints(saved, CONFIG, "data") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", given_up)
        with pytest.raises(CheckpointError, match="the last good checkpoint is step 4"):
            checkpoints.save(state(6))


def test_full_disk_at_the_start_costs_the_curves_and_not_the_run(tmp_path: Path, caplog):
    with full_disk():
        writer = EventWriter(tmp_path / "events", 0)
        writer.scalars(1, {"loss/mel": 1.0})
    assert [message for message in caplog.messages if "going on without" in message]


def test_program_that_a_full_disk_has_cut_is_not_left_in_the_cache_and_the_disk_is_named_once(tmp_path: Path, caplog):
    compilation_cache.remove_what_is_cut()
    programs = lru_cache.LRUCache(str(tmp_path), max_size=-1)
    with full_disk():
        programs.put("step", bytes(1000))
        programs.put("other", bytes(1000))
    (message,) = caplog.messages
    assert message.startswith(f"programs are compiled anew by every run: {tmp_path}: File too large; raise the limit")
    assert programs.get("step") is programs.get("other") is None
    programs.put("step", bytes(1000))
    assert programs.get("step") == bytes(1000)


WRITER_THAT_WAS_GIVEN_UP = """
import asyncio, threading, tensorstore
from omnicodec_jax.cli import command

async def wait(writer):
    await writer

def write():
    promise, writer = tensorstore.Promise.new()
    loop = asyncio.new_event_loop()
    task = loop.create_task(wait(writer))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    promise.set_result(None)

command.log_progress()
write()
thread = threading.Thread(target=write)
thread.start()
thread.join()
"""


def printed(code: str) -> str:
    """What a program prints on standard error."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_writer_that_ends_after_orbax_has_given_it_up_prints_no_traceback():
    assert printed(WRITER_THAT_WAS_GIVEN_UP) == ""


@pytest.mark.parametrize(
    "code",
    ["(lambda: 1 / 0)()", "class Bad:\n  def __del__(self): 1 / 0\nBad()"],
    ids=["it ends the process", "nothing can catch it"],
)
def test_any_other_traceback_is_printed(code: str):
    errors = printed(f"from omnicodec_jax.cli import command; command.log_progress()\n{code}")
    assert "Traceback" in errors
    assert "ZeroDivisionError" in errors


# -- Damaged since


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's directory with checkpoints of steps 4, 6 and 8, of which the first is the best."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, KEPT, "data") as checkpoints:
        for step, distance in {4: 1.0, 6: None, 8: 2.0}.items():
            checkpoints.save(state(step), distance)
        checkpoints.wait()
    return workdir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def opened(workdir: Path, **options: Any) -> tuple[int | None, int]:
    """Step that a run goes on from, and of the state that it gets."""
    with Checkpoints(workdir, KEPT, "data", **options) as checkpoints:
        return checkpoints.latest, int(checkpoints.restore(template()).params["w"][0, 0])


def test_run_goes_on_whichever_file_of_its_last_checkpoint_is_cut_off(run, tmp_path, caplog):
    files = [path.relative_to(run) for path in (run / "checkpoints" / "8").rglob("*") if path.is_file()]
    assert len(files) > 8
    passed_over = set()
    for number, file in enumerate(files):
        for keep in (0.0, 0.5):
            workdir = tmp_path / f"{number}-{keep}"
            shutil.copytree(run, workdir)
            cut(workdir / file, keep)
            caplog.clear()
            step, value = opened(workdir)
            assert step == value
            assert step in (6, 8), file
            if step == 6:
                passed_over.add(file.name)
                assert "checkpoint of step 8 cannot be read" in caplog.text
                assert "going on from step 6" in caplog.text
                assert (workdir / "damaged" / "8").is_dir()
    assert passed_over >= {"metadata", "metrics", "_METADATA", "manifest.ocdbt"}


def test_empty_folder_of_a_step_is_passed_over(copy, caplog):
    (copy / "checkpoints" / "10").mkdir()
    assert opened(copy) == (8, 8)
    assert "checkpoint of step 10 cannot be read (state/_METADATA is missing)" in caplog.text
    assert not (copy / "checkpoints" / "10").exists()


def test_damaged_best_checkpoint_does_not_keep_a_run_from_going_on(copy, caplog):
    cut(copy / "checkpoints" / "4" / "metrics" / "metrics")
    assert opened(copy) == (8, 8)
    assert "checkpoint of step 4 cannot be read (metrics/metrics is cut off)" in caplog.text


def test_step_whose_checkpoint_was_damaged_is_saved_again(copy):
    cut(copy / "checkpoints" / "8" / "about" / "metadata")
    with Checkpoints(copy, KEPT, "data") as checkpoints:
        checkpoints.save(state(8))
    assert opened(copy) == (8, 8)


def test_run_without_a_whole_checkpoint_does_not_start_anew(copy):
    for step in (4, 6, 8):
        shutil.rmtree(copy / "checkpoints" / str(step) / "state")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint here can be read \(step 8: state/_METADATA is missing; .*delete"
    ) as error:
        opened(copy)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["4", "6", "8"]


def test_export_takes_the_last_whole_checkpoint_and_says_so(copy, caplog):
    cut(copy / "checkpoints" / "8" / "about" / "metadata")
    assert checkpoint.read(copy, None)[1] == 6
    assert "checkpoint of step 8 cannot be read (about/metadata is cut off): passed over" in caplog.text
    assert (copy / "checkpoints" / "8").is_dir()
    with pytest.raises(CheckpointError, match=r"checkpoint of step 8 cannot be read .*; there are 4, 6"):
        checkpoint.read(copy, 8)


# -- Of another run

LEARNT_FROM = {"frozen": {"wavlm": "a1"}, "features": {"encoder": "b2", "number": "int8"}}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"frozen": {"wavlm": "c3"}}, r'frozen\.wavlm: "a1" in the checkpoint, "c3" now'),
        ({"frozen": {}}, r'frozen\.wavlm: "a1" in the checkpoint, None now'),
        ({"features": {"encoder": "d4", "number": "int8"}}, r'features\.encoder: "b2" in the checkpoint, "d4" now'),
        ({"features": {"encoder": "b2", "number": "bfloat16"}}, r'features\.number: "int8" in the checkpoint'),
    ],
)
def test_run_on_another_frozen_network_or_feature_set_of_the_same_shape_is_refused(tmp_path, other, message):
    with Checkpoints(tmp_path, CONFIG, "data", LEARNT_FROM) as checkpoints:
        checkpoints.save(state(4))
    with Checkpoints(tmp_path, CONFIG, "data", LEARNT_FROM) as checkpoints:
        assert checkpoints.latest == 4
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, CONFIG, "data", LEARNT_FROM | other)


def test_same_networks_from_another_place_are_the_same_run(tmp_path):
    with Checkpoints(tmp_path, CONFIG, "data", LEARNT_FROM) as checkpoints:
        checkpoints.save(state(4))
    moved = replaced(CONFIG, run={"wavlm": "elsewhere/wavlm"}, data={"features": "elsewhere/features"})
    with Checkpoints(tmp_path, moved, "data", LEARNT_FROM) as checkpoints:
        assert checkpoints.latest == 4


def test_run_from_before_its_networks_were_recorded_goes_on_and_says_so(copy, caplog):
    caplog.set_level(logging.INFO)
    assert opened(copy, learnt_from=LEARNT_FROM) == (8, 8)
    assert "did not keep frozen, features, which is not compared" in caplog.text
