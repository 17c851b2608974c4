"""A training run: `run` sets it up, makes or restores its state, and `train` takes it from step to step."""

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from omnicodec_jax.buckets import as_path
from omnicodec_jax.config import Config
from omnicodec_jax.data import features
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.data.records import SAMPLE_RATE
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.losses import CEPSTRUM_SLICES, WAVLM_FRAME_RATE
from omnicodec_jax.training import frozen as frozen_networks
from omnicodec_jax.training import storage
from omnicodec_jax.training.checkpoint import Checkpoints, frozen_hashes, naming_the_last
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.log import CodecLog
from omnicodec_jax.training.lost_time import RunClock
from omnicodec_jax.training.metrics_queue import FiniteCheck, MetricsQueue
from omnicodec_jax.training.start import first_state, stage, state_template
from omnicodec_jax.training.state import TrainState
from omnicodec_jax.training.step import jit_step
from omnicodec_jax.training.validation import Validator, reads_features

LOG = logging.getLogger(__name__)

MIN_SEMANTIC_WEIGHT = 10.0
"""The weight of the semantic loss below which it hardly affects features as small as those of Qwen3-Omni's encoder."""


class Profile(NamedTuple):
    """The steps that an xprof trace covers: from step `start` on, up to but without step `stop`."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Parses START:STOP. Raises ConfigError if the text is anything else."""
        start, _, stop = text.partition(":")
        if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ConfigError(f"--profile {text}: must be START:STOP, steps, the first below the second")
        return cls(int(start), int(stop))

    @staticmethod
    def trace(directory: Path) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which JAX traces what devices and XLA do, and writes the trace into a directory.

        Calls of Python functions are left out, since there are millions of them while a step is compiled. With them,
        the first step of a tiny run took 5 GB of memory and 200 MB of disk; without them, 1.8 GB and 11 MB.
        """
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        return jax.profiler.trace(directory, profiler_options=options)


class RunSetup(NamedTuple):
    """The networks, devices, data and checkpoints of a run, which `set_up` makes before the state."""

    config: Config
    """The config of the run, without the losses for which a frozen network is missing."""
    workdir: Path
    gan: Gan
    frozen: FrozenVariables
    mesh: Mesh
    samples: Samples
    validator: Validator | None
    checkpoints: Checkpoints


def run(config: Config, workdir: Path, profile: Profile | None = None, began: float | None = None) -> int:
    """Trains until `optimizer.total_steps`, from the last checkpoint in `workdir` or, if it has none, from the start.

    All processes of a run call it, after `multihost.initialize`. It returns the exit code: 0 when the run is complete,
    and 128 + the number of the signal when a signal has stopped it. It has then saved a checkpoint. Raises
    OmniCodecError for errors that the user can mend. `began` is when the process was started, in seconds since 1970;
    the time since then counts as the run's (None: from now on).
    """
    interruption, clock = multihost.Interruption(), RunClock(began)
    try:
        with interruption, naming_the_last(workdir):
            with interruption.raising():
                setup = set_up(config, workdir)
            clock.record_in(workdir if multihost.is_main() else None)
            with contextlib.closing(clock), setup.checkpoints:
                if setup.checkpoints.latest is None:
                    save_first_state(setup, interruption)
                if interruption.signal is None:
                    train(setup, profile, interruption, clock)
                step = setup.checkpoints.latest
    except multihost.Interrupted:
        LOG.info("interrupted before there was anything to save: the same command starts anew")
        return 128 + (signal.SIGTERM if interruption.signal is None else interruption.signal)
    if interruption.signal is None:
        return 0
    LOG.info("interrupted: step %d is saved, and the same command goes on from there", step)
    return 128 + interruption.signal


# -- Before the first step


def set_up(config: Config, workdir: Path) -> RunSetup:
    """Opens the data, loads the frozen networks, and opens the checkpoints of a run.

    Raises OmniCodecError for what is missing, or is not what the checkpoints were made with.
    """
    storage.directory(workdir)
    mesh = sharding.make_mesh(config.run.mesh)
    sharding.require_whole_rows(mesh, config.data.batch_size, "data.batch_size")
    check_audio(config)
    check_frames(config)
    with stage("finding the data"):
        samples = Samples.open(config.data, config.seed, "train", reads_features(config))
    for domain, clips in zip(config.data.domains, samples.clips, strict=True):
        hours = clips.samples.sum() / SAMPLE_RATE / 3600
        LOG.info("start: %s: %d clips, %.2f h", domain.name, clips.samples.size, hours)
    unused = tuple(frozen_networks.unused_paths(config))
    with stage("reading the frozen networks"):
        gan, variables = frozen_networks.load(config)
        identity: dict[str, Any] = {"frozen": frozen_networks.hashes(gan, variables, frozen_hashes(workdir))}
        frozen = sharding.to_global(variables, mesh)
    config = gan.config
    if config.data.features is not None and reads_features(config):
        identity["features"] = features.identity(as_path(config.data.features))
    warnings = (weak_semantic_loss(config), late_discriminators(config), *unused)
    for warning in filter(None, warnings):
        LOG.warning("start: %s", warning)
    validator = None if config.run.validate_every is None else Validator.open(gan, mesh)
    with stage("finding checkpoints"):  # last, since the checkpoints must be closed from here on
        checkpoints = Checkpoints(workdir, config, samples.fingerprint, identity)
    return RunSetup(config, workdir, gan, frozen, mesh, samples, validator, checkpoints)


def check_audio(config: Config) -> None:
    """Raises ConfigError if the codec's sample rate is not that of prepared audio, or if crops are too short."""
    if (rate := config.codec.sample_rate) != SAMPLE_RATE:
        raise ConfigError(f"codec.sample_rate = {rate}: must be {SAMPLE_RATE}, since prepared audio has that rate")
    stft = config.discriminators.stft
    shortest = max((config.codec.hop_length, *(() if stft is None else stft.windows)))
    if (samples := config.data.segment_samples) < shortest:
        raise ConfigError(
            f"data.segment_samples = {samples}: must be {shortest} or more, to hold a frame of the codec and the "
            "windows of discriminators.stft"
        )


def check_frames(config: Config) -> None:
    """Raises ConfigError for a loss whose targets do not come at the codec's frames but drift away from them."""
    codec, loss = config.codec, config.loss
    if loss.wavlm_distillation and config.run.wavlm and WAVLM_FRAME_RATE * codec.hop_length % codec.sample_rate:
        raise ConfigError(
            f"loss.wavlm_distillation = {loss.wavlm_distillation:g}: must be 0 with {codec.frame_rate:g} frames a "
            f"second, of which WavLM's {WAVLM_FRAME_RATE} states are no multiple"
        )
    if loss.latent_cepstrum and codec.hop_length % CEPSTRUM_SLICES:
        raise ConfigError(
            f"loss.latent_cepstrum = {loss.latent_cepstrum:g}: must be 0 with frames of {codec.hop_length} samples, "
            f"which cannot be cut into {CEPSTRUM_SLICES} equal slices"
        )


def weak_semantic_loss(config: Config) -> str | None:
    """Returns a warning if the weight of the semantic loss is so low that it hardly has an effect, else None."""
    semantic = config.codec.semantic
    if semantic is None or config.loss.semantic >= MIN_SEMANTIC_WEIGHT:
        return None
    stored = None if config.data.features is None else features.read_format(as_path(config.data.features))
    source = stored.source if semantic.source == "stored" and stored is not None else semantic.source
    if source in ("log_mel", "whisper"):
        return None
    return (
        f"loss.semantic = {config.loss.semantic:g}: features of Qwen3-Omni's encoder are of the order of 0.01, and so "
        f"is their loss, beside {config.loss.mel:g} times a mel loss of 3: the semantic branch hardly learns "
        "(docs/training.md)"
    )


def late_discriminators(config: Config) -> str | None:
    """Returns a warning if there are discriminators that would begin after the last step, else None."""
    begin, end = config.train.discriminator_from, config.optimizer.total_steps
    if begin < end or not any(dataclasses.asdict(config.discriminators).values()):
        return None
    return f"train.discriminator_from = {begin}: the run ends at step {end}, so that the discriminators never begin"


def save_first_state(setup: RunSetup, interruption: multihost.Interruption) -> None:
    """Makes the state before the first step and saves it as checkpoint 0, from which `train` restores it."""
    with interruption.raising():
        state = first_state(setup.gan, setup.frozen, setup.mesh, setup.samples)
    with stage("first checkpoint"):
        setup.checkpoints.save(state)
        setup.checkpoints.wait()


# -- The steps


def train(setup: RunSetup, profile: Profile | None, interruption: multihost.Interruption, clock: RunClock) -> None:
    """Trains from the last checkpoint to the last step, or to the step at which a signal stops it, and saves there."""
    config, mesh, checkpoints = setup.config, setup.mesh, setup.checkpoints
    total_steps = config.optimizer.total_steps
    with stage("reading the last checkpoint"):
        state = checkpoints.restore(state_template(config, mesh))
    start = int(state.step)
    LOG.info("%s: from step %d of %d, %s", setup.workdir, start, total_steps, describe_devices(mesh, state))
    if profile is not None and not start <= profile.start < total_steps:
        # This is a warning and no error, since the same command also resumes a run that is past these steps.
        reason = f"is at step {start} already" if profile.start < start else f"ends at step {total_steps}"
        LOG.warning("--profile %d:%d: no trace, since the run %s", *profile, reason)
    log = CodecLog(config, setup.workdir / "events" if multihost.is_main() else None, start)
    check = FiniteCheck(setup.samples, config.data.batch_size)

    def receive(number: int, read: tuple[dict[str, np.ndarray], float]) -> None:
        log.add(*read)
        check(number, read[0])

    queue = MetricsQueue(receive)
    if start == 0 and setup.validator is not None:
        with stage("held-out clips before the first step"), interruption.ending_the_process(clock.close):
            validate(setup, state, log, clock)
    discriminator_from = config.train.discriminator_from
    validates_every = None if setup.validator is None else config.run.validate_every
    codec_step, gan_step = (jit_step(setup.gan, mesh, state, setup.frozen, both) for both in (False, True))

    with (
        contextlib.closing(
            Batches(
                setup.samples,
                config.data.batch_size,
                config.data.num_workers,
                sharding.batch_sharding(mesh),
                start,
            )
        ) as batches,
        contextlib.ExitStack() as trace,
    ):
        clock.step = start
        clock.record()
        clock.turn_to("learning")
        for number in range(start, total_steps):
            if interruption.stops_before(number):
                break
            if profile is not None and number == profile.start:
                trace.enter_context(profile.trace(setup.workdir / "profile"))

            began, first = time.perf_counter(), number == start
            with (
                stage("first batch") if first else contextlib.nullcontext(),
                clock.spending("first batch" if first else "waiting for data"),
            ):
                batch = next(batches)
            waited = time.perf_counter() - began
            step = gan_step if number >= discriminator_from else codec_step
            compiles = first or number == discriminator_from
            if compiles:
                with clock.spending("saving"):
                    checkpoints.wait()  # a signal may end the process while it compiles
            with compiling(interruption, number, first, clock) if compiles else contextlib.nullcontext():
                state, metrics = step(state, batch, setup.frozen)
                if compiles:
                    jax.block_until_ready((state, metrics))
            queue.add(number, (metrics, waited))
            checkpoints.check()

            clock.step = done = number + 1
            last = done == total_steps
            logs = last or done % config.run.log_every == 0
            validates = validates_every is not None and (last or done % validates_every == 0)
            saves = last or validates or done == discriminator_from or done % config.run.save_every == 0
            if profile is not None and done == profile.stop:
                jax.block_until_ready(state)
                trace.close()
            if logs or saves:
                queue.flush()
            if logs:
                log.write(done, jax.device_get(state.codebooks))
            if saves:
                distance = validate(setup, state, log, clock) if validates else None
                with clock.spending("saving"):
                    checkpoints.save(state, distance)
            if logs or saves:
                clock.record()
                log.write_time(done, clock.spent())
    queue.flush()
    with clock.spending("saving"):
        checkpoints.save(state)
        checkpoints.wait()


@contextlib.contextmanager
def compiling(interruption: multihost.Interruption, number: int, first: bool, clock: RunClock) -> Iterator[None]:
    """A context for the first step of a program, which compiles for minutes; a signal ends the process at once."""
    what = "the training step, and the first step" if first else f"the discriminators, which begin at step {number}"
    with stage(f"compiling {what}"), interruption.ending_the_process(clock.close), clock.spending("compilation"):
        yield


def validate(setup: RunSetup, state: TrainState, log: CodecLog, clock: RunClock) -> float | None:
    """Evaluates the held-out clips, logs the result and returns the mel distance; None: there are no held-out clips.

    The mel distance is that of the moving average of the weights if the run keeps one.
    """
    if setup.validator is None:
        return None
    began, weights = time.perf_counter(), None
    with clock.spending("validation"):
        result = setup.validator(state.params, state.codebooks, setup.frozen)
        if state.ema_params is not None:
            weights, result = result, setup.validator(state.ema_params, state.codebooks, setup.frozen)
        log.write_validation(int(state.step), result, time.perf_counter() - began, weights)
    return result.mel_distance


def describe_devices(mesh: Mesh, state: TrainState) -> str:
    """Describes the devices, and how much of the state each of them holds."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    held = max(sharding.bytes_per_device(state).values()) / 2**30
    return f"{mesh.size} x {device.device_kind} ({shape}), {held:.3f} GiB of state on each"
