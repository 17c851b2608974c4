"""Another number of steps for a run that has begun: allowed while the schedule is the same, else told how."""

import dataclasses

import pytest
import tiny_experiment
from tiny_experiment import replaced

from omnicodec_jax.config import Config
from omnicodec_jax.errors import CheckpointError
from omnicodec_jax.training import checkpoint
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.state import learning_rate

BEGUN, LONGER = tiny_experiment.config, replaced(tiny_experiment.config, optimizer={"total_steps": 80})
WARMUP = BEGUN.optimizer.warmup_steps


@pytest.fixture
def at_step(monkeypatch):
    """Makes it look as if every directory held a checkpoint of a config and step."""

    def hold(config: Config, step: int) -> None:
        about = {"config": dataclasses.asdict(config), "data": "f"}
        monkeypatch.setattr(Checkpoints, "latest", step)
        monkeypatch.setattr(checkpoint, "_read_about", lambda *_: about)

    return hold


@pytest.mark.parametrize("step", [0, WARMUP])
def test_until_the_warm_up_ends_a_run_can_be_made_longer(step, at_step, tmp_path):
    at_step(BEGUN, step)
    with Checkpoints(tmp_path, LONGER, "f"):
        pass
    with pytest.raises(CheckpointError, match=r"config.seed: 0 in the checkpoint, 1 now"):
        Checkpoints(tmp_path, dataclasses.replace(LONGER, seed=1), "f")


def test_after_the_warm_up_it_says_how_to_train_longer(at_step, tmp_path):
    at_step(BEGUN, WARMUP + 1)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, LONGER, "f")
    message = str(caught.value)
    assert "config.optimizer.total_steps: 8 in the checkpoint, 80 now" in message
    assert f"has been falling since step {WARMUP}" in message
    assert (
        f"omnicodec export-model --workdir {tmp_path} --out DIR, then omnicodec train with --run.start-from DIR"
        in message
    )


def test_the_schedule_of_a_longer_run_is_the_same_until_the_warm_up_ends():
    short, long = learning_rate(BEGUN.optimizer), learning_rate(LONGER.optimizer)
    same = [float(short(step)) == float(long(step)) for step in range(WARMUP + 2)]
    assert same == [True] * (WARMUP + 1) + [False]
