"""A run from its first step to its last, whatever happens in between."""

import contextlib
import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from omnicodec_jax.config import Config
from omnicodec_jax.data import features
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.data.records import SAMPLE_RATE
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.errors import ConfigError, TrainingError
from omnicodec_jax.training import frozen as frozen_networks
from omnicodec_jax.training.accumulation import Batch
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.report import Report
from omnicodec_jax.training.start import first_state, place, stage, state_template
from omnicodec_jax.training.state import TrainState
from omnicodec_jax.training.step import Frozen, Gan, Metrics, jit_step
from omnicodec_jax.training.validation import Validator, needs_features

LOG = logging.getLogger(__name__)

PATIENCE = 10
"""Steps in a row that may be not finite."""
AUDIBLE = 10.0
"""Weight of the semantic loss from which it counts beside the others, on features as small as Qwen3-Omni's."""
STEPS_AHEAD = 2
"""Steps under way on the devices before the metrics of the first of them are looked at."""


class Profile(NamedTuple):
    """Which steps an xprof trace covers: from the first on, and not the last."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Of START:STOP. Raises ConfigError."""
        start, _, stop = text.partition(":")
        if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ConfigError(f"--profile {text}: must be START:STOP, steps, the first below the second")
        return cls(int(start), int(stop))


def run(config: Config, workdir: Path, profile: Profile | None = None) -> int:
    """Trains until `optimizer.total_steps`, from the last checkpoint in `workdir`, or from the start.

    All processes of a run call it, after `multihost.initialize`. Returns the exit code: 0 when the run is complete,
    128 + the signal's number when it was asked to stop, which it does with a checkpoint. Raises OmniCodecError for
    what a user can mend.
    """
    interruption = multihost.Interruption()
    try:
        with interruption, contextlib.ExitStack() as closing:
            with interruption.raising():
                parts = assemble(config, workdir, closing)
                fresh = parts.checkpoints.latest is None
                first = first_state(parts.gan, parts.frozen, parts.mesh, parts.samples) if fresh else None
            if first is not None:
                with stage("first checkpoint"):
                    parts.checkpoints.save(first)
                    parts.checkpoints.wait()
            del first  # or devices would hold two states from here on
            if interruption.signal is None:
                train(parts, workdir, profile, interruption)
            step = parts.checkpoints.latest
    except multihost.Interrupted:
        LOG.info("interrupted before there was anything to save: the same command starts anew")
        return 128 + (interruption.signal or signal.SIGTERM)
    if interruption.signal is None:
        return 0
    LOG.info("interrupted: step %d is saved, and the same command goes on from there", step)
    return 128 + interruption.signal


class Parts(NamedTuple):
    """What a run is made of, before its state."""

    gan: Gan
    frozen: Frozen
    mesh: Mesh
    samples: Samples
    validator: Validator | None
    checkpoints: Checkpoints


def assemble(config: Config, workdir: Path, closing: contextlib.ExitStack) -> Parts:
    """Finds data, frozen networks and checkpoints. closing: what closes the checkpoints.

    Raises OmniCodecError for what is missing, or is not what the checkpoints were made with.
    """
    mesh = sharding.make_mesh(config.run.mesh)
    with stage("finding the data"):
        samples = Samples.open(config.data, config.seed, "train", needs_features(config))
    for domain, clips in zip(config.data.domains, samples.clips, strict=True):
        LOG.info(
            "start: %s: %d clips, %.2f h", domain.name, clips.samples.size, clips.samples.sum() / SAMPLE_RATE / 3600
        )
    with stage("reading the frozen networks"):
        gan, variables = frozen_networks.load(config)
        learnt_from: dict[str, Any] = {"frozen": frozen_networks.hashes(gan, variables)}
        frozen = place(variables, mesh)
    if needs_features(config):
        learnt_from["features"] = features.identity(Path(gan.config.data.features or ""))
    with stage("finding checkpoints"):
        checkpoints = closing.enter_context(Checkpoints(workdir, gan.config, samples.fingerprint, learnt_from))
    if hint := hardly_heard(gan.config):
        LOG.warning("start: %s", hint)
    return Parts(gan, frozen, mesh, samples, Validator.open(gan, mesh), checkpoints)


def hardly_heard(config: Config) -> str | None:
    """What to know of a semantic loss that the codec will take little notice of; None: nothing."""
    semantic = config.codec.semantic
    if semantic is None or semantic.source == "log_mel" or config.loss.semantic >= AUDIBLE:
        return None
    return (
        f"loss.semantic = {config.loss.semantic:g}: features of Qwen3-Omni's encoder are of the order of 0.01, and so "
        f"is their loss, beside {config.loss.mel:g} times a mel loss of 3: the semantic branch hardly learns "
        "(docs/training.md)"
    )


def train(parts: Parts, workdir: Path, profile: Profile | None, interruption: multihost.Interruption) -> None:
    """From the last checkpoint to the last step, or to where it is asked to stop; the state there is saved."""
    gan, frozen, mesh, samples, validator, checkpoints = parts
    config = gan.config
    with stage("reading the last checkpoint"):
        state = checkpoints.restore(state_template(config, mesh))
    start = int(state.step)
    LOG.info("%s: from step %d of %d, %s", workdir, start, config.optimizer.total_steps, describe(mesh, state))
    if profile is not None and profile.start < start:  # no error: the same command goes on with the run
        LOG.warning("--profile %d:%d: no trace, since the run is at step %d already", *profile, start)
    report = Report(config, workdir / "events" if multihost.is_main() else None, start)
    watch = Watch(report, samples, config.data.batch_size)

    def validate() -> float | None:
        """Mel distance of held-out clips, if there are any: by the average of the weights where one is kept."""
        if validator is None:
            return None
        began, weights = time.perf_counter(), None
        result = validator(state.params, state.codebooks, frozen)
        if state.ema_params is not None:
            weights, result = result, validator(state.ema_params, state.codebooks, frozen)
        report.validate(int(state.step), result, time.perf_counter() - began, weights)
        return result.mel_distance

    if start == 0 and validator is not None:
        with stage("held-out clips before the first step"), interruption.ending_the_process():
            validate()
    step = jit_step(gan, mesh, state, frozen)

    def compile_and_run(batch: Batch) -> tuple[TrainState, Metrics]:
        with stage("compiling the training step, and the first step"), interruption.ending_the_process():
            return jax.block_until_ready(step(state, batch, frozen))

    with (
        contextlib.closing(Batches(samples, config.data, sharding.batch_sharding(mesh), start)) as batches,
        contextlib.ExitStack() as trace,
    ):
        for number in range(start, config.optimizer.total_steps):
            if interruption.noticed(number):
                break
            if profile is not None and number == profile.start:
                trace.enter_context(jax.profiler.trace(workdir / "profile"))
            asked = time.perf_counter()
            with stage("first batch") if number == start else contextlib.nullcontext():
                batch = next(batches)
            waited = time.perf_counter() - asked
            state, metrics = compile_and_run(batch) if number == start else step(state, batch, frozen)
            watch.add(number, metrics, waited)
            checkpoints.check()

            done = number + 1
            last = done == config.optimizer.total_steps
            if profile is not None and done == profile.stop:
                jax.block_until_ready(state)
                trace.close()
            if done % config.run.log_every == 0 or last:
                watch.catch_up()
                report.log(done, jax.device_get(state.codebooks))
            if done % config.run.validate_every == 0 or last:
                watch.catch_up()
                checkpoints.save(state, validate())
            elif done % config.run.save_every == 0:
                watch.catch_up()
                checkpoints.save(state)
    watch.catch_up()
    checkpoints.save(state)
    checkpoints.wait()


class Watch:
    """Looks at the metrics of every step, some steps late so that the devices need not wait."""

    def __init__(self, report: Report, samples: Samples, batch_size: int):
        self._report, self._samples, self._batch_size = report, samples, batch_size
        self._pending: deque[tuple[int, Any, float]] = deque()

    def add(self, number: int, metrics: Any, waited: float) -> None:
        """A step that has been started, and the seconds it waited for its batch."""
        self._pending.append((number, metrics, waited))
        self.catch_up(STEPS_AHEAD)

    def catch_up(self, ahead: int = 0) -> None:
        """Looks at all steps but the last `ahead`. Raises TrainingError if too many in a row were not finite."""
        while len(self._pending) > ahead:
            number, metrics, waited = self._pending.popleft()
            metrics = jax.device_get(metrics)
            self._report.add(metrics, waited)
            if metrics["skipped"]:
                self._not_finite(number, int(metrics["skipped"]))

    def _not_finite(self, number: int, in_a_row: int) -> None:
        first = number * self._batch_size
        if multihost.is_main():
            ids = ", ".join(self._samples.id(index) for index in range(first, first + self._batch_size))
            LOG.warning("step %d is not finite and changes nothing (%d in a row); samples: %s", number, in_a_row, ids)
        if in_a_row >= PATIENCE:
            raise TrainingError(
                f"step {number}: {PATIENCE} steps in a row were not finite; the log names their samples. The last "
                "checkpoint is from before; a lower optimizer.learning_rate in a new --workdir with run.start_from, or "
                "train.compute_dtype=float32, may help"
            )


def describe(mesh: Mesh, state: TrainState) -> str:
    """Devices and what of the state each holds."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    held = max(sharding.bytes_per_device(state).values()) / 2**30
    return f"{mesh.size} x {device.device_kind} ({shape}), {held:.3f} GiB of state on each"
