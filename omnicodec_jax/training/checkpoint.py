"""Checkpoints of a training run. Orbax writes them while training goes on, and each is whole or not there."""

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from omnicodec_jax.buckets import BucketPath, on_disk
from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.errors import CheckpointError, OmniCodecError, told
from omnicodec_jax.files import disk_error
from omnicodec_jax.training import storage

LOG = logging.getLogger(__name__)


@runtime_checkable
class State(Protocol):
    """The state that a run carries from step to step: a pytree that knows how many steps are done."""

    @property
    def step(self) -> Any:
        """The number of steps that are done: int32."""
        ...


S = TypeVar("S", bound=State)

DIRECTORY = "checkpoints"
FREE = (
    "config.run.",
    "config.data.prepared",
    "config.data.features",
    "config.data.num_workers",
    # Options of a language model:
    "config.mesh.",
    "config.num_workers",
    "config.log_every",
    "config.save_every",
)
"""Prefixes of the names of options whose values may differ from those in the checkpoint."""
TOTAL_STEPS = "config.optimizer.total_steps"
"""The option that may differ until the end of the warm-up, since the warm-up is the same for a run of any length."""
DAMAGED = "damaged"
"""The folder of a run for checkpoints that cannot be read."""
TEXTS = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata", "metrics"}
"""The files of a checkpoint that are JSON."""
FOLDERS_OF_TEXTS = {"array_metadatas"}
"""The folders of a checkpoint whose files are JSON."""
DISTANCE = "mel_distance"
"""The metric by which the best checkpoint is chosen: the one with the lowest value."""
STATE, ABOUT = "state", "about"
KEPT_OF_LANGUAGE_MODELS = 2
"""The number of checkpoints that are kept of a language model. If the last cannot be read, the one before is used."""
FAILURES = (Exception, BaseExceptionGroup, asyncio.CancelledError)
"""The errors of writing a checkpoint: those that the storage raises, and those of tasks that Orbax has cancelled."""
THREADS = 10
"""An upper bound on the number of threads in which Orbax writes one checkpoint."""


class Checkpoints:
    """The checkpoints in a run's directory: the last few, and the best by validation. Use it in a `with` statement.

    Each checkpoint holds the whole state, the config, and the fingerprint of the prepared data. The place in the data
    is the step of the state.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config | PerplexityConfig,
        fingerprint: str,
        learnt_from: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Opens the checkpoints of a run, and sets aside those that are damaged.

        Args:
            workdir: The directory of the run.
            config: The config of the run.
            fingerprint: The fingerprint of the prepared data or of the tokens.
            learnt_from: What else a run must have in common with its checkpoints: the hashes of the frozen networks,
                the format of the stored features.

        Raises:
            CheckpointError: If the directory holds a run of another config or on other data, or checkpoints none of
                which can be read.
        """
        self._workdir, self.directory = workdir, workdir.absolute() / DIRECTORY
        self._about = {"config": config_files.to_dict(config, config_files.RUN), "data": fingerprint, **learnt_from}
        self._kind, self._warmup_steps = type(config), config.optimizer.warmup_steps
        self._start_from = config.run.start_from if isinstance(config, Config) else None
        self._keep_last = config.run.keep_last if isinstance(config, Config) else KEPT_OF_LANGUAGE_MODELS
        self._set_damaged_aside()
        self._manager: ocp.CheckpointManager | None = self._open()
        if (step := self.latest) is not None:
            self._refuse_others(_read_about(self.directory, step), step)

    def _open(self) -> ocp.CheckpointManager:
        def distance(metrics: dict[str, float]) -> float:
            return metrics[DISTANCE]

        best = managers.BestN(get_metric_fn=distance, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            storage.directory(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(self._keep_last), best]),
                best_fn=distance,  # so that the metric is saved; the policy says which checkpoints are kept
                cleanup_tmp_directories=True,
                atomicity_options=storage.atomicity(self.directory),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the writers, and raises their errors, which must not replace an earlier error.
        failures = self._close()
        if failures and not failure:
            raise self._could_not_be_written(failures[0]) from failures[0]

    def _close(self) -> list[BaseException]:
        """Waits until all writers have finished, and returns their errors."""
        manager, self._manager = self._manager, None
        failures: list[BaseException] = []
        while manager is not None and len(failures) < THREADS:  # each writer that has failed raises its error once
            try:
                manager.close()
                break
            except FAILURES as failure:
                failures.append(failure)
        return failures

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint that is finished on disk; None if there is none."""
        return max(storage.steps(self.directory), default=None)

    def save(self, state: State, mel_distance: float | None = None) -> None:
        """Starts to write a state, unless there is a checkpoint of its step.

        Raises CheckpointError if this fails, or if the state before it could not be written.
        """
        self.wait()  # Orbax would wait, too; and the checkpoint that it is writing may be that of this step
        if (step := int(state.step)) == self.latest:
            return
        metrics = None if mel_distance is None else {DISTANCE: mel_distance}
        items = {STATE: ocp.args.StandardSave(state), ABOUT: ocp.args.JsonSave(self._about)}
        if self._manager is None:
            self._manager = self._open()
        with self._explaining():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def check(self) -> None:
        """Raises CheckpointError if writing has failed since the last call."""
        # If Orbax is asked for errors while it is writing, it forgets them, and deletes the checkpoint that the new one
        # replaces.
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written. Raises CheckpointError if writing failed."""
        if self._manager is not None:
            with self._explaining():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def restore(self, template: S) -> S:
        """Reads the last checkpoint into arrays with the shapes and shardings of a template."""
        if (step := self.latest) is None:
            raise CheckpointError(f"{self.directory}: no checkpoint here")
        return restore(self._workdir, step, template)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            # Orbax's list of checkpoints is wrong now: it has the one that could not be written, and not the one that
            # this would have replaced. The next checkpoint is saved by a new manager, which lists those on disk. This
            # manager is closed, since its other threads may fail, too.
            self._close()
            raise self._could_not_be_written(error) from error

    def _could_not_be_written(self, error: BaseException) -> CheckpointError:
        what = f"{self.directory}: a checkpoint could not be written ({_first_line(error)})"
        return CheckpointError(f"{what}; {_what_to_do(self._workdir)}")

    def _set_damaged_aside(self) -> None:
        """Moves damaged checkpoints to a folder of their own, since the run will write those steps again."""
        last, damaged = last_whole(self.directory)
        for step, reason in damaged.items():
            aside = self._workdir / DAMAGED / str(step)
            LOG.warning("checkpoint of step %d cannot be read (%s): set aside as %s", step, reason, aside)
            if jax.process_index() == 0:
                _move(self.directory / str(step), aside)
        if damaged:
            LOG.warning("going on from step %s, the last checkpoint that is whole", last)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")

    def _refuse_others(self, about: dict[str, Any], step: int) -> None:
        if unknown := [name for name in self._about if name not in about]:
            LOG.info(
                "%s: written by a version that did not keep %s, which is not compared",
                self.directory,
                ", ".join(unknown),
            )
        config = config_files.run_config(about["config"], str(self.directory / str(step)), self._kind)
        if self._start_from is not None and isinstance(config, Config) and self._start_from != config.run.start_from:
            began = "random weights" if config.run.start_from is None else config.run.start_from
            LOG.warning(
                "run.start_from = %r: passed over, since the run is at step %d already; it began with %s",
                self._start_from,
                step,
                began,
            )
        held = _leaves({**about, "config": config_files.to_dict(config, config_files.RUN)})
        wanted = _leaves({name: self._about[name] for name in self._about if name in about})
        free = (*FREE, TOTAL_STEPS) if step <= self._warmup_steps else FREE
        differing = [
            f"{name}: {held.get(name)} in the checkpoint, {wanted.get(name)} now"
            for name in sorted(held.keys() | wanted.keys())
            if held.get(name) != wanted.get(name) and not name.startswith(free)
        ]
        if self._kind is Config and any(line.startswith(TOTAL_STEPS) for line in differing):
            differing.append(
                f"The learning rate has been falling since step {self._warmup_steps}, so that the run cannot be made "
                f"longer. To train on: omnicodec export-model --workdir {self._workdir} --out DIR, then omnicodec "
                "train with --run.start-from DIR, a new --workdir and the steps to add"
            )
        if differing:
            raise CheckpointError(
                f"{self.directory}: holds a run of another config; choose another --workdir, or give the same:\n  "
                + "\n  ".join(differing)
            )


@contextlib.contextmanager
def naming_the_last(workdir: Path) -> Iterator[None]:
    """A context in which an error of a disk that cannot be written names the last good checkpoint of a run.

    It becomes a CheckpointError. So does an error of a library that does not mention the disk, if the disk cannot be
    written when the error is raised. Other errors stay as they are.
    """
    try:
        yield
    except OmniCodecError:
        raise
    except FAILURES as error:
        if (refused := disk_error(error, workdir)) is None:
            raise
        raise CheckpointError(f"{told(refused)}; {_what_to_do(workdir)}") from error


def _what_to_do(workdir: Path) -> str:
    last = max(storage.steps(workdir.absolute() / DIRECTORY), default=None)
    kept = "nothing is kept" if last is None else f"the last good checkpoint is step {last}"
    return f"{kept}. Mend that, and give the same command again"


def _move(folder: Path, to: Path) -> None:
    """Moves a folder, and replaces the folder that is at its new place. In a bucket, objects are copied and deleted."""
    if isinstance(folder, BucketPath) and isinstance(to, BucketPath):
        for file in folder.find():
            with on_disk(file) as copy:
                (to / file.relative_to(folder)).put(copy)
        folder.remove_all()
        return
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(exist_ok=True)
    folder.rename(to)


def last_whole(directory: Path) -> tuple[int | None, dict[int, str]]:
    """Finds the last checkpoint that can be read.

    Returns its step, and a dict from the steps of damaged checkpoints to what is wrong with them. The arrays of earlier
    checkpoints are not read, since that takes long. Raises CheckpointError if there are checkpoints but none of them is
    whole, since the user must decide whether to start anew.
    """
    last: int | None = None
    damaged: dict[int, str] = {}
    for step in reversed(storage.steps(directory)):
        if reason := damage(directory / str(step), arrays=last is None):
            damaged[step] = reason
        elif last is None:
            last = step
    if damaged and last is None:
        found = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"{directory}: no checkpoint here can be read ({found}); delete it all to start anew")
    return last, damaged


def damage(folder: Path, arrays: bool = True) -> str | None:
    """Returns why a checkpoint cannot be read, or None if it can be. `arrays` says whether to read its arrays, too."""
    try:
        for part in (f"{STATE}/_METADATA", f"{ABOUT}/metadata"):
            if not (folder / part).is_file():
                return f"{part} is missing"
        in_bucket = isinstance(folder, BucketPath)
        for path in sorted(folder.find() if in_bucket else (path for path in folder.rglob("*") if path.is_file())):
            if path.name in TEXTS or path.parent.name in FOLDERS_OF_TEXTS:
                try:
                    json.loads(path.read_text())
                except ValueError:
                    return f"{path.relative_to(folder)} is cut off"
        if arrays:
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": storage.base(folder / STATE)}).result()
            keys = store.list().result()
            for key in keys:
                store.read(key).result()
            return None if keys else f"{STATE} holds no arrays"
    except Exception as error:  # the storage raises errors of any type
        return _first_line(error)
    return None


def read(workdir: Path, step: int | None) -> tuple[Config, int]:
    """Reads the config and the step of a kept checkpoint. With step None, it is the last checkpoint that is whole.

    Raises CheckpointError if the checkpoint is not there, or damaged.
    """
    directory = workdir.absolute() / DIRECTORY
    kept = storage.steps(directory)
    if not kept:
        raise CheckpointError(f"{workdir}: no run with checkpoints")
    if step is None:
        step, damaged = last_whole(directory)
        for number, reason in damaged.items():
            LOG.warning("%s: checkpoint of step %d cannot be read (%s): passed over", workdir, number, reason)
    elif step not in kept:
        raise CheckpointError(f"{workdir}: no checkpoint of step {step}; kept are {', '.join(map(str, kept))}")
    elif reason := damage(directory / str(step)):
        others = ", ".join(str(number) for number in kept if number != step) or "no others"
        raise CheckpointError(f"{workdir}: checkpoint of step {step} cannot be read ({reason}); there are {others}")
    assert step is not None
    return config_files.run_config(_read_about(directory, step)["config"], str(directory / str(step))), step


def frozen_hashes(workdir: Path) -> dict[str, str]:
    """Reads the hashes of a run's frozen networks, by name, from its checkpoints.

    Returns no hashes for a new run, and for a run of an early version, whose checkpoints do not have them.
    """
    directory = workdir.absolute() / DIRECTORY
    for step in reversed(storage.steps(directory)):
        try:
            return json.loads((directory / str(step) / ABOUT / "metadata").read_text()).get("frozen", {})
        except (OSError, ValueError):  # the checkpoint is damaged: `Checkpoints` sets it aside with a warning
            continue
    return {}


def restore(workdir: Path, step: int, template: S) -> S:
    """Reads a kept checkpoint into arrays with the shapes and shardings of a template."""
    folder = workdir.absolute() / DIRECTORY / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(storage.directory(folder / STATE), template)
        except Exception as error:  # the storage raises errors of any type
            raise CheckpointError(f"{folder}: cannot be read: {_first_line(error)}") from error


def _read_about(directory: Path, step: int) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(storage.directory(directory / str(step) / ABOUT))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _leaves(tree: Any, name: str = "") -> dict[str, str]:
    """Returns the values of a tree by dotted names, as JSON."""
    if isinstance(tree, dict):
        return {path: leaf for key, value in tree.items() for path, leaf in _leaves(value, f"{name}.{key}").items()}
    return {name[1:]: json.dumps(tree)}
