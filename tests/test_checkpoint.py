"""Checkpoints that cannot be written, and those that something has damaged since."""

import contextlib
import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax.errors import CheckpointError
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.state import TrainState

CONFIG = replaced(TINY, run={"keep_last": 1})


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
    with full_disk(), pytest.raises(CheckpointError) as error:
        checkpoints.save(state(step))
        while True:
            checkpoints.check()
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
