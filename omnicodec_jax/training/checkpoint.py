"""Checkpoints of a run (Orbax): written while training goes on, whole or not there, and never of another run."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from omnicodec_jax import config_files
from omnicodec_jax.config import Config
from omnicodec_jax.errors import CheckpointError
from omnicodec_jax.training.state import TrainState

DIRECTORY = "checkpoints"
FREE = ("config.run.", "config.data.prepared", "config.data.features", "config.data.num_workers")
"""Beginnings of the names of what may differ from what the checkpoint was made with."""
DISTANCE = "mel_distance"
"""What the best checkpoint has least of."""
STATE, ABOUT = "state", "about"
THREADS = 10
"""That Orbax may write one checkpoint in, and more."""


class Checkpoints:
    """The checkpoints in a run's directory: the last few, and the best by validation. A context that closes them.

    Each holds all of the state, the config, and the fingerprint of the prepared data. The place in the data is the
    state's step.
    """

    def __init__(self, workdir: Path, config: Config, fingerprint: str):
        """Raises CheckpointError if the directory holds a run of another config, or on other data."""
        self._workdir, self.directory = workdir, workdir.absolute() / DIRECTORY
        self._about = {"config": dataclasses.asdict(config), "data": fingerprint}

        def distance(metrics: dict[str, float]) -> float:
            return metrics[DISTANCE]

        best = managers.BestN(get_metric_fn=distance, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(config.run.keep_last), best]),
                best_fn=distance,  # so that it is saved: what is kept, the policy says
                cleanup_tmp_directories=True,
            ),
        )
        if (step := self.latest) is not None:
            self._refuse_others(_read_about(self.directory, step))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        # Closing waits for what is being written, and raises what that raises: not in place of an earlier failure.
        with contextlib.suppress(Exception) if failure else self._explaining():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the last checkpoint that is finished on disk; None: there is none."""
        return max(steps(self.directory), default=None)

    def save(self, state: TrainState, mel_distance: float | None = None) -> None:
        """Starts to write a state that is not there yet. Raises CheckpointError if that, or the last one, failed."""
        self.wait()  # as Orbax would; what it has begun to write may be this state
        if (step := int(state.step)) == self.latest:
            return
        metrics = None if mel_distance is None else {DISTANCE: mel_distance}
        items = {STATE: ocp.args.StandardSave(state), ABOUT: ocp.args.JsonSave(self._about)}
        with self._explaining():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def check(self) -> None:
        """Raises CheckpointError if writing has failed since the last call."""
        # Asked for errors while it is writing, Orbax would forget them, and delete what the new checkpoint replaces.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until everything is written. Raises CheckpointError if it could not be."""
        failures: list[Exception] = []
        for ask in (self._manager.wait_until_finished, self._manager.check_for_errors):
            # Each thread of Orbax that has failed is told of once: what is left would count against the next checkpoint.
            for _ in range(THREADS):
                try:
                    ask()
                    break
                except Exception as failure:  # of any type: whatever the storage raises
                    failures.append(failure)
        if failures:
            with self._explaining():
                self._manager.reload()  # it has counted this one, and no longer what this one was to replace
                raise failures[0]

    def restore(self, template: TrainState) -> TrainState:
        """The last checkpoint as arrays with the shapes and shardings of the template."""
        if (step := self.latest) is None:
            raise CheckpointError(f"{self.directory}: no checkpoint here")
        return restore(self._workdir, step, template)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on what its storage raises, of any type
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            kept = "nothing is kept" if self.latest is None else f"the last good checkpoint is step {self.latest}"
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({reason}); {kept}. Mend that, and give the same "
                "command again"
            ) from error

    def _refuse_others(self, about: dict[str, Any]) -> None:
        held, wanted = _leaves(about), _leaves(self._about)
        differing = [
            f"{name}: {held.get(name)} in the checkpoint, {wanted.get(name)} now"
            for name in sorted(held.keys() | wanted.keys())
            if held.get(name) != wanted.get(name) and not name.startswith(FREE)
        ]
        if differing:
            raise CheckpointError(
                f"{self.directory}: holds a run of another config; choose another --workdir, or give the same:\n  "
                + "\n  ".join(differing)
            )


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that are finished on disk, in order.

    Orbax gives a checkpoint the name of its step when all of it is written. What Orbax itself counts are those that it
    has begun to write, too.
    """
    folders = directory.glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal() and (path / STATE).is_dir())


def read(workdir: Path, step: int | None) -> tuple[Config, int]:
    """Config and step of a kept checkpoint, the last one by default. Raises CheckpointError if it is not there."""
    directory = workdir.absolute() / DIRECTORY
    kept = steps(directory)
    if not kept:
        raise CheckpointError(f"{workdir}: no run with checkpoints")
    step = kept[-1] if step is None else step
    if step not in kept:
        raise CheckpointError(f"{workdir}: no checkpoint of step {step}; kept are {', '.join(map(str, kept))}")
    text = json.dumps({"model_type": "run", **_read_about(directory, step)["config"]})
    return config_files.from_json(text, {"run": Config}, f"{directory / str(step)}"), step


def restore(workdir: Path, step: int, template: TrainState) -> TrainState:
    """A kept checkpoint as arrays with the shapes and shardings of the template."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir.absolute() / DIRECTORY / str(step) / STATE, template)


def _read_about(directory: Path, step: int) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / str(step) / ABOUT)


def _leaves(tree: Any, name: str = "") -> dict[str, str]:
    """Values under dotted names, as JSON."""
    if isinstance(tree, dict):
        return {path: leaf for key, value in tree.items() for path, leaf in _leaves(value, f"{name}.{key}").items()}
    return {name[1:]: json.dumps(tree)}
