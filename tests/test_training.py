"""Whole runs in miniature: what they show, and what becomes of them when they are stopped."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from fake_hub import put_on_hub
from quick_compilation import QUICKLY
from tensorboardX.proto.event_pb2 import Event
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import cli, losses, model_directory
from omnicodec_jax.buckets import directory_on_disk
from omnicodec_jax.cli import contents
from omnicodec_jax.config import Config, DiscriminatorConfig, MeshConfig, WavLMDiscriminatorConfig
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.records import SAMPLE_RATE
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.errors import CheckpointError, ConfigError, ModelError, TrainingError
from omnicodec_jax.model_directory import build
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.pretrained.whisper import WhisperConfig
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import frozen, loop, lost_time, metrics_queue, storage
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.export import export_model
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import first_state
from omnicodec_jax.training.state import init_state
from omnicodec_jax.training.validation import Validator

pytestmark = pytest.mark.minutes(8)

ROOT = Path(__file__).parents[1]
LOSSES = ("loss/", "gradient_norm/", "replaced/", "perplexity/")
MIDDLE = 4
"""Step of a checkpoint in the middle of a run."""


def events(workdir: Path) -> list[Any]:
    """What TensorBoard reads: records of length, checksum, message, checksum."""
    found = []
    for file in sorted((workdir / "events").iterdir()):
        data, at = file.read_bytes(), 0
        while at + 12 < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            if at + size + 16 > len(data):  # a full disk has cut it
                break
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def scalars(workdir: Path, prefixes: tuple[str, ...] = ("",), after: int = 0) -> dict[tuple[int, str], float]:
    """By step and tag; of a step that ran twice, the last."""
    return {
        (event.step, value.tag): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value" and value.tag.startswith(prefixes) and event.step > after
    }


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the checkpoints that there are."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The tiny experiment on a few seconds of tones in noise."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for domain in ("sound", "speech"):
        (folder / domain).mkdir()
        for number in range(5):
            time = np.arange(SAMPLE_RATE * 3 // 2) / SAMPLE_RATE
            tone = np.sin(2 * np.pi * (150 + 130 * number) * time) * np.sin(np.pi * time)
            soundfile.write(folder / domain / f"{number}.wav", 0.5 * tone + rng.normal(0, 0.05, time.size), SAMPLE_RATE)
    manifest = ",".join(f"{domain}={folder / domain}" for domain in ("sound", "speech"))
    assert cli.prepare(manifest=manifest, out=folder / "prepared", settings=PrepareConfig(validation=0.4)) == 0
    return replaced(TINY, data={"prepared": str(folder / "prepared")}, run={"keep_last": 10})


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs are on one device where a test does not say otherwise: eight of them on few cores take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield


@pytest.fixture
def eight_devices(one_device, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)


@pytest.fixture(scope="module", autouse=True)
def traced_once(one_device):
    """Runs of one step on one mesh share its trace, and that of validation: each takes as long as some ten steps."""
    real_step, real_validator, programs = loop.jit_step, Validator.__init__, {}

    def shared(program: str, gan: Gan, mesh: jax.sharding.Mesh, trace: Callable[[], Any]) -> Any:
        key = program, dataclasses.replace(gan.config, run=TINY.run), mesh
        if key not in programs:
            jax.clear_caches()  # what has been traced before would change the program's text, by which it is cached
            programs[key] = trace()
        return programs[key]

    def jit_step(gan: Gan, mesh: jax.sharding.Mesh, state: Any, networks: Any, with_discriminators: bool):
        any_start = Gan(replaced(gan.config, train={"discriminator_from": 0}), gan.wavlm, gan.encoder)
        name = f"step {with_discriminators}"
        return shared(name, any_start, mesh, lambda: real_step(gan, mesh, state, networks, with_discriminators))

    def validator(self: Validator, gan: Gan, mesh: jax.sharding.Mesh, samples: Samples):
        real_validator(self, gan, mesh, samples)
        self._evaluate = shared("validation", gan, mesh, lambda: self._evaluate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_step", jit_step)
        patch.setattr(Validator, "__init__", validator)
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """A run that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("run")
    assert loop.run(config, workdir) == 0
    return workdir


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """The same, as it stood in its middle."""
    shutil.copytree(whole / "checkpoints" / str(MIDDLE), tmp_path / "half" / "checkpoints" / str(MIDDLE))
    return tmp_path / "half"


def command(config: Config, workdir: Path, limit: int | None = None, alone: bool = True, **environment: str):
    """The real thing, in a process of its own. `alone`: on one of eight devices, as here, with the programs of here."""
    code = "import runpy, sys\nsys.path.insert(0, '.')\n"
    if alone:
        code += "import jax\njax.devices = lambda: jax.local_devices()[:1]\n"
    if limit is not None:
        code += f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "runpy.run_path('train.py', run_name='__main__')"
    options = ["--config", "tests/tiny_experiment.py", "--workdir", str(workdir)]
    options += ["--data.prepared", config.data.prepared, "--run.keep-last", "10"]
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}  # as here: the same program
    return subprocess.Popen(
        [sys.executable, "-c", code, *options],
        env={**os.environ, **strict, "OMNICODEC_CACHE": str(ROOT / ".jax_cache"), **environment},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_shows_what_happens_in_it(whole, config):
    total = config.optimizer.total_steps
    tags = {tag for step, tag in scalars(whole) if step == total}
    expected = {
        *("loss/total", "loss/mel", "loss/semantic", "loss/self_guidance", "loss/commitment_acoustic"),
        *("loss/adversarial_stft", "loss/feature_matching_waveform", "loss/discriminator_waveform"),
        *("gradient_norm/codec", "gradient_norm/stft", "gradient_norm/waveform", "learning_rate/adamw"),
        *("codebook_usage/acoustic_02", "perplexity/semantic_00", "replaced/acoustic_01"),
        *("speed/steps_per_second", "speed/audio_seconds_per_second", "speed/data_wait_share", "speed/memory_gib"),
        *("speed/host_memory_gib", "time/learning", "time/waiting_for_data", "time/steps_done_again"),
        *("validation/mel_distance", "validation_usage/acoustic_00", "data/unreadable_clips"),
        *(f"validation_mel_distance/codebooks_{count:02d}" for count in (1, 2, 4)),
        *("decoder_input/share_of_semantic", "decoder_input/share_of_acoustic", "latent/variation_over_time"),
    }
    assert expected <= tags
    shown = [value for event in events(whole) for value in event.summary.value if event.step == total]
    kinds = {value.tag: value.WhichOneof("value") for value in shown if value.tag.startswith("validation_0")}
    assert [value.WhichOneof("value") for value in shown if value.tag == "validation_0/original"] == ["audio", "image"]
    assert kinds.keys() == {"validation_0/original", "validation_0/reconstruction"}


def test_resumed_run_is_the_undisturbed_one_to_the_last_bit(whole, half, config):
    assert loop.run(config, half) == 0
    resumed = scalars(half, LOSSES)
    assert resumed == scalars(whole, LOSSES, after=MIDDLE)
    assert len(resumed) > 50


def test_resumed_run_on_eight_devices_is_the_undisturbed_one(whole, half, config, eight_devices):
    assert loop.run(replaced(config, run={"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}), half) == 0
    expected = scalars(whole, LOSSES, after=MIDDLE)
    resumed = scalars(half, LOSSES)
    assert resumed.keys() == expected.keys()
    for key, value in expected.items():
        assert resumed[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_run_that_is_asked_to_stop_saves_and_goes_on(whole, config, tmp_path, monkeypatch, caplog, number):
    log = loop.CodecLog.write
    caplog.set_level(logging.INFO)

    def ask(report: Any, step: int, *books: Any):
        log(report, step, *books)
        if step == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.CodecLog, "write", ask)
        assert loop.run(config, tmp_path) == 128 + number
    assert "step 3 is saved" in caplog.messages[-1]
    assert steps(tmp_path) == [0, 2, 3]
    assert loop.run(config, tmp_path) == 0
    assert scalars(tmp_path, LOSSES) == scalars(whole, LOSSES)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_stopped_run_goes_on_with_the_same_command(whole, config, tmp_path, number):
    workdir = tmp_path / "run"
    process = command(config, workdir)
    log = []
    for line in process.stderr:
        log.append(line)
        if " step 3/" in line:
            process.send_signal(number)
            break
    log += process.stderr.readlines()
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number), "".join(log)
    stopped_at = steps(workdir)[-1]
    assert stopped_at < config.optimizer.total_steps
    assert number == signal.SIGKILL or f"step {stopped_at} is saved" in log[-1]
    again = command(config, workdir)
    assert again.wait() == 0, again.stderr.read()
    assert scalars(workdir, LOSSES) == scalars(whole, LOSSES)


def test_run_in_a_bucket_is_killed_and_goes_on_as_on_a_disk(whole, config, bucket, tmp_path):
    for file in Path(config.data.prepared).rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            (bucket / "prepared" / file.relative_to(config.data.prepared)).put(file)
    there = replaced(config, data={"prepared": str(bucket / "prepared")})
    process = command(there, bucket / "run")
    log = []
    for line in process.stderr:
        log.append(line)
        if " step 3/" in line:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL, "".join(log)
    assert storage.steps(bucket / "run" / "checkpoints")[-1] < config.optimizer.total_steps
    (bucket / "run" / "checkpoints" / "7" / "state" / "manifest.ocdbt").write_bytes(b"half-written")
    assert loop.run(there, bucket / "run") == 0
    assert storage.steps(bucket / "run" / "checkpoints") == steps(whole)
    assert len(lost_time.of_run(bucket / "run").starts) == 2
    with directory_on_disk(bucket / "run") as here:
        assert scalars(here, LOSSES) == scalars(whole, LOSSES)
    for workdir, model in ((bucket / "run", bucket / "model"), (whole, tmp_path / "model")):
        export_model(workdir, model)
    for name in ("model.safetensors", "config.json", "discriminators/model.safetensors"):
        assert (bucket / "model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert "training run at step 8 of 8" in "".join(contents.describe(bucket / "run"))
    with pytest.raises(CheckpointError, match="another config"):
        loop.run(replaced(there, optimizer={"learning_rate": 1.0}), bucket / "run")


def test_full_disk_stops_the_run_and_loses_nothing(whole, half, config):
    process = command(config, half, limit=100_000)
    errors = process.communicate()[1]
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (process.returncode, len(messages)) == (1, 1), errors
    assert "could not be written" in messages[0], errors
    assert f"the last good checkpoint is step {MIDDLE}" in messages[0], errors
    assert "Traceback" not in errors, errors
    assert steps(half) == [MIDDLE]
    assert loop.run(config, half) == 0
    assert scalars(half, LOSSES, after=MIDDLE) == scalars(whole, LOSSES, after=MIDDLE)


def two_processes(config: Config, workdir: Path) -> list[subprocess.Popen[str]]:
    """One run, of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
        }
    return [
        command(config, workdir, alone=False, XLA_FLAGS=QUICKLY, JAX_PROCESS_ID=str(number), **cluster)
        for number in range(2)
    ]


def assert_near(found: Path, expected: Path) -> None:
    """Losses of two runs."""
    ours, theirs = scalars(found, LOSSES), scalars(expected, LOSSES)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_two_processes_are_one(whole, config, tmp_path):
    processes = two_processes(config, tmp_path)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert_near(tmp_path, whole)
    assert " step 8/" in errors[0]
    assert " step " not in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])], ids=["preemption of one", "Ctrl-C"]
)
def test_processes_that_are_asked_to_stop_save_and_go_on(whole, config, tmp_path, number, asked):
    """To what one process gives."""
    processes = two_processes(config, tmp_path / "two")
    for line in processes[0].stderr:
        if " step 3/" in line:
            for process in asked:
                processes[process].send_signal(number)
            break
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, "\n".join(errors)
    stopped_at = steps(tmp_path / "two")[-1]
    assert 3 <= stopped_at < config.optimizer.total_steps
    assert f"step {stopped_at} is saved" in errors[0]
    processes = two_processes(config, tmp_path / "two")
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert_near(tmp_path / "two", whole)


def test_discriminators_begin_at_a_step_and_a_run_that_is_stopped_before_it_is_the_undisturbed_one(config, tmp_path):
    begun = MIDDLE + 1
    late = replaced(config, train={"discriminator_from": begun}, run={"save_every": begun - 1})
    assert loop.run(late, tmp_path / "whole") == 0
    assert steps(tmp_path / "whole") == [0, MIDDLE, begun, late.optimizer.total_steps]
    seen = scalars(tmp_path / "whole", LOSSES)
    adversarial = ("loss/adversarial_stft", "loss/discriminator_waveform", "gradient_norm/stft")
    assert {step for step, tag in seen if tag in adversarial} == set(range(begun + 1, late.optimizer.total_steps + 1))
    assert {step for step, tag in seen if tag == "loss/mel"} == set(range(1, late.optimizer.total_steps + 1))
    for step in (MIDDLE, begun):
        half = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole" / "checkpoints" / str(step), half / "checkpoints" / str(step))
        assert loop.run(late, half) == 0
        assert scalars(half, LOSSES) == scalars(tmp_path / "whole", LOSSES, after=step)


@pytest.mark.parametrize(("start", "stop"), [(5, 7), (6, 20)])
def test_trace_covers_steps_of_this_start(half, config, caplog, start, stop):
    assert loop.run(config, half, loop.Profile(start, stop)) == 0
    (file,) = (half / "profile").rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines]
    names = {event.name for line in lines for event in line.events}
    assert any("dot" in name for name in names)
    assert not any(name.startswith("$") for name in names), "calls of Python"
    assert not any("no trace" in message for message in caplog.messages)


def test_options_that_come_too_late_in_a_run_are_named(whole, config, tmp_path, caplog):
    end = config.optimizer.total_steps
    shutil.copytree(whole / "checkpoints" / str(end), tmp_path / "checkpoints" / str(end))
    assert loop.run(replaced(config, run={"start_from": "models/other"}), tmp_path, loop.Profile(end, end + 2)) == 0
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"run.start_from = 'models/other': passed over, since the run is at step {end} already; it began with random "
        "weights",
        f"--profile {end}:{end + 2}: no trace, since the run ends at step {end}",
    ]
    assert not (tmp_path / "profile").exists()
    late = replaced(config, train={"discriminator_from": end})
    assert loop.late_discriminators(late) == (
        f"train.discriminator_from = {end}: the run ends at step {end}, so that the discriminators never begin"
    )
    assert loop.late_discriminators(replaced(config, train={"discriminator_from": end - 1})) is None
    none = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
    assert loop.late_discriminators(dataclasses.replace(late, discriminators=none)) is None


def test_run_goes_on_without_its_curves_and_without_a_trace_of_steps_before_it(config, half, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
    assert loop.run(config, half, loop.Profile(3, 4)) == 0
    assert not list((half / "profile").rglob("*.xplane.pb"))
    assert any("no trace" in message for message in caplog.messages)
    assert [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()] == [
        f"TensorBoard's events: {half / 'events'}: No space left on device; going on without"
    ]
    assert steps(half)[-1] == config.optimizer.total_steps


def test_last_checkpoints_and_the_best_are_kept(whole, config, tmp_path):
    distances = {step: value for (step, tag), value in scalars(whole).items() if tag == "validation/mel_distance"}
    kept = replaced(config, run={"keep_last": 1})
    shutil.copytree(whole / "checkpoints" / str(MIDDLE), tmp_path / "checkpoints" / str(MIDDLE))
    metrics = tmp_path / "checkpoints" / str(MIDDLE) / "metrics" / "metrics"
    assert json.loads(metrics.read_text())["mel_distance"] == pytest.approx(distances[MIDDLE])
    metrics.write_text(json.dumps({"mel_distance": 0.0}))
    assert loop.run(kept, tmp_path) == 0
    assert steps(tmp_path) == [MIDDLE, config.optimizer.total_steps]


def test_checkpoint_of_another_run_is_refused_with_what_differs(whole, config):
    other = replaced(config, optimizer={"learning_rate": 0.5}, data={"batch_size": 16}, run={"log_every": 7})
    with pytest.raises(
        CheckpointError, match=r"(?s)config\.data\.batch_size: 8 .* 16 now.*learning_rate: 0\.0001"
    ) as error:
        loop.run(other, whole)
    assert "log_every" not in str(error.value)


def test_checkpoint_of_other_data_is_refused(whole, config, monkeypatch):
    real = Samples.open
    monkeypatch.setattr(Samples, "open", lambda *args: dataclasses.replace(real(*args), fingerprint="other"))
    with pytest.raises(CheckpointError, match='data: .* in the checkpoint, "other" now'):
        loop.run(config, whole)


def test_steps_that_are_not_finite_are_named_and_too_many_stop_the_run(half, config, monkeypatch, caplog):
    class Broken(Batches):
        def __next__(self) -> Any:
            batch = super().__next__()
            return {**batch, "audio": batch["audio"] * np.float32(np.nan)}

    assert metrics_queue.MAX_NOT_FINITE == 10
    monkeypatch.setattr(metrics_queue, "MAX_NOT_FINITE", 3)
    monkeypatch.setattr(loop, "Batches", Broken)
    with caplog.at_level(logging.INFO), pytest.raises(TrainingError, match="3 steps in a row were not finite"):
        loop.run(replaced(config, run={"save_every": 100, "validate_every": 100}), half)
    named = [record.getMessage() for record in caplog.records if "is not finite" in record.getMessage()]
    assert len(named) == 3
    assert all(message.count("sound:") + message.count("speech:") == config.data.batch_size for message in named)
    assert steps(half) == [MIDDLE]


def test_validation_decodes_the_first_codebooks_alone(whole, config, tmp_path):
    assert cli.export_model(workdir=whole, out=tmp_path / "ema", ema=True) == 0
    variables = jax.tree.map(jnp.asarray, model_directory.load(tmp_path / "ema")[1])
    gan, mesh = Gan(config), sharding.make_mesh(MeshConfig())
    validator = Validator.open(gan, mesh)
    assert validator is not None
    found = validator(variables["params"], variables["codebooks"], FrozenVariables()).mel_distances
    seen, last = scalars(whole), config.optimizer.total_steps
    assert found == {n: pytest.approx(seen[last, f"validation_mel_distance/codebooks_{n:02d}"]) for n in (1, 2, 4)}
    assert found[4] == pytest.approx(seen[last, "validation/mel_distance"])

    @jax.jit
    def decode_two(audio: jax.Array) -> jax.Array:
        features = gan.inputs({"audio": audio}, FrozenVariables()).features
        codes = gan.codec.apply(variables, audio, features, method="encode")
        decoded = gan.codec.apply(variables, codes[:, :2], method="decode")
        return losses.multi_scale_mel(decoded[:, :, : audio.shape[2]], audio, SAMPLE_RATE)

    held_out = Samples.open(config.data, config.seed, "validation")
    with contextlib.closing(Batches(held_out, config.data.batch_size, 0, sharding.batch_sharding(mesh))) as batches:
        assert found[2] == pytest.approx(float(decode_two(next(batches)["audio"])), rel=1e-4)


# -- Models out of runs, and runs out of models


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert cli.export_model(workdir=whole, out=out) == 0
    return out


def test_exported_model_encodes(exported, config):
    tokenizer = OmniCodecTokenizer.from_pretrained(exported)
    assert tokenizer.config == config.codec
    audio = np.random.default_rng(0).normal(0, 0.1, (1, 1, 9600)).astype(np.float32)
    assert tokenizer.encode(audio, SAMPLE_RATE)[0].shape == (4, 5)


def test_average_and_earlier_steps_can_be_exported(whole, exported, tmp_path):
    for name, options in {"ema": {"ema": True}, "early": {"step": MIDDLE}}.items():
        assert cli.export_model(workdir=whole, out=tmp_path / name, **options) == 0
        _, variables = model_directory.load(tmp_path / name)
        _, last = model_directory.load(exported)
        differs = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (variables, last)), strict=True)]
        assert sum(differs) > len(differs) / 2
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; kept are 0, 2, 4, 6, 8"):
        cli.export_model(workdir=whole, out=tmp_path / "none", step=5)
    with pytest.raises(CheckpointError, match="no run"):
        cli.export_model(workdir=tmp_path, out=tmp_path / "none")


def test_model_that_takes_the_place_of_another_has_no_part_of_that(config, tmp_path, capsys):
    none = DiscriminatorConfig(stft=None, waveform=None, wavlm=None)
    plain = dataclasses.replace(config, discriminators=none)
    state = init_state(plain, jax.random.key(0))
    with Checkpoints(tmp_path / "run", plain, "data") as checkpoints:
        checkpoints.save(state)
    out = tmp_path / "model"
    stft = DiscriminatorConfig(stft=config.discriminators.stft, waveform=None, wavlm=None)
    weights = init_variables(build(stft), jax.random.key(0))
    model_directory.save(out / model_directory.DISCRIMINATORS, stft, weights)
    whisper = WhisperConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=8)
    encoder = init_variables(build(whisper), jax.random.key(0))
    model_directory.save(out / model_directory.ENCODER, whisper, encoder)
    with pytest.raises(ModelError, match=r"encoder: a whisper encoder, .* the codec takes no encoder's features"):
        cli.export_model(workdir=tmp_path / "run", out=out)
    assert not (out / "config.json").exists()

    semantic = dataclasses.replace(config.codec.semantic, source="whisper", feature_dim=8)
    takes = dataclasses.replace(plain, codec=dataclasses.replace(config.codec, semantic=semantic))
    with Checkpoints(tmp_path / "takes", takes, "data") as checkpoints:
        checkpoints.save(init_state(takes, jax.random.key(0)))
    assert cli.export_model(workdir=tmp_path / "takes", out=out) == 0
    assert f"{out / 'encoder'}: the encoder that was there stays" in capsys.readouterr().out
    assert OmniCodecTokenizer.from_pretrained(out).computes_features
    assert not (out / model_directory.DISCRIMINATORS / "config.json").exists()


def test_exported_model_and_its_discriminators_go_to_pytorch_and_back(exported, config, tmp_path):
    parts = {exported: [], exported / model_directory.DISCRIMINATORS: ["--discriminators"]}
    file = tmp_path / "config.py"
    file.write_text(f"from omnicodec_jax.config import *\n\nconfig = {config!r}\n")
    for part, options in parts.items():
        tensors, back, again = tmp_path / "tensors.safetensors", tmp_path / "back", tmp_path / "again.safetensors"
        command_line("convert.to_torch", "--model", part, "--out", tensors)
        command_line("convert.from_torch", "--checkpoint", tensors, "--config", file, "--out", back, *options)
        command_line("convert.to_torch", "--model", back, "--out", again)
        assert model_directory.load(back)[0] == model_directory.load(part)[0]
        assert len({model_directory.model_hash(*model_directory.load(each)) for each in (back, part)}) == 1
        assert again.read_bytes() == tensors.read_bytes()
        shutil.rmtree(back)


def command_line(module: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, cwd=ROOT)


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_run_can_start_from_an_exported_model(exported, config, caplog, tmp_path, monkeypatch, on_the_hub):
    caplog.set_level(logging.INFO)
    name = "you/codec" if on_the_hub else str(exported)
    if on_the_hub:
        put_on_hub(monkeypatch, name, exported, tmp_path / "downloaded")
    mesh = sharding.make_mesh(MeshConfig())
    samples = Samples.open(config.data, 0)

    def start(**options: Any):
        return first_state(Gan(replaced(config, run={"start_from": name}, **options)), FrozenVariables(), mesh, samples)

    state, (_, variables) = start(), model_directory.load(exported)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state.codebooks, variables["codebooks"])
    _, discriminators = model_directory.load(exported / "discriminators")
    jax.tree.map(np.testing.assert_array_equal, state.discriminators, discriminators["params"])
    assert "at random" not in caplog.text  # nothing was missing, and to draw takes a program of its own
    assert start(discriminators={"stft": None, "waveform": None}).discriminators == {}
    with pytest.raises(ConfigError, match="another codec"):
        start(codec={"dimension": 32})


def test_without_wavlm_its_losses_are_left_out_and_the_log_says_so(config, caplog):
    wavlm = dataclasses.replace(
        config, discriminators=dataclasses.replace(config.discriminators, wavlm=WavLMDiscriminatorConfig())
    )
    with caplog.at_level(logging.INFO):
        gan, networks = frozen.load(wavlm)
    assert gan.config.discriminators.wavlm is None
    assert networks.wavlm is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["without WavLM"]


@pytest.fixture
def with_frozen_networks(config, tmp_path) -> Config:
    """The tiny experiment with an encoder and a WavLM of random weights in model directories."""
    rng = np.random.default_rng(0)
    wavlm = WavLMConfig(
        **{"dimension": 16, "num_layers": 2, "num_heads": 2, "dim_feedforward": 32, "position_kernel": 8},
        **{"conv_channels": (8,) * 7, "position_groups": 2, "num_buckets": 8, "max_bucket_distance": 16},
    )
    encoder = Qwen3AuTConfig(
        conv_channels=4, d_model=8, num_heads=2, num_layers=1, dim_feedforward=16, window_chunks=1, output_dim=10
    )
    for name, network in {"wavlm": wavlm, "encoder": encoder}.items():
        shapes = model_directory.expected_tensors(model_directory.build(network))
        tensors = {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
        model_directory.save(tmp_path / name, network, model_directory.unflatten(tensors))
    discriminators = dataclasses.replace(
        config.discriminators, wavlm=WavLMDiscriminatorConfig(channels=4, hidden_size=16, hidden_states=3)
    )
    semantic = dataclasses.replace(config.codec.semantic, source="qwen3_aut", feature_dim=10)
    return replaced(
        dataclasses.replace(config, discriminators=discriminators),
        codec={"semantic": semantic, "wavlm_dim": 16},
        loss={"wavlm_distillation": 1.0},
        optimizer={"total_steps": 3, "warmup_steps": 1},
        run={"wavlm": str(tmp_path / "wavlm"), "encoder": str(tmp_path / "encoder"), "validate_every": 100},
    )


@pytest.mark.slow
def test_frozen_networks_are_read_and_take_part(with_frozen_networks, tmp_path):
    assert loop.run(with_frozen_networks, tmp_path / "run") == 0
    seen = scalars(tmp_path / "run", after=2)
    for tag in ("loss/adversarial_wavlm", "loss/feature_matching_wavlm", "loss/wavlm_distillation", "loss/semantic"):
        assert seen[3, tag] > 0
    assert seen[3, "gradient_norm/wavlm"] > 0
    assert cli.export_model(workdir=tmp_path / "run", out=tmp_path / "model") == 0
    discriminators, weights = model_directory.load(tmp_path / "model" / "discriminators")
    assert discriminators == with_frozen_networks.discriminators
    assert set(weights["params"]) == {"stft", "waveform", "wavlm"}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "run",
            {"encoder": None},
            "must be a directory that omnicodec convert qwen3-aut has written",
        ),
        ("codec", {"wavlm_dim": 8}, "is 16 wide; codec.wavlm_dim = 8"),
        ("discriminators", {"wavlm": WavLMDiscriminatorConfig()}, "has 3 hidden states of width 16"),
    ],
)
def test_frozen_networks_that_do_not_fit_are_refused(with_frozen_networks, section, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        frozen.load(replaced(with_frozen_networks, **{section: values}))


def test_learns_for_a_minute(config, tmp_path):
    longer = replaced(
        config,
        optimizer={"learning_rate": 1e-3, "total_steps": 60, "warmup_steps": 5},
        run={"log_every": 10, "validate_every": 60, "save_every": 60},
    )
    assert loop.run(longer, tmp_path) == 0
    seen = scalars(tmp_path)
    totals = [seen[step, "loss/total"] for step in range(10, 61, 10)]
    assert np.mean(totals[-3:]) < 0.7 * totals[0]
    usage = [value for (step, tag), value in seen.items() if tag.startswith("codebook_usage/") and step == 60]
    assert len(usage) == 4
    assert min(usage) > 0.6


# -- Wrong options


@pytest.mark.parametrize("text", ["10", "5:5", "b:c", "-1:4"])
def test_steps_to_profile_are_a_range(text):
    assert loop.Profile.parse("10:20") == (10, 20)
    with pytest.raises(ConfigError, match="must be START:STOP"):
        loop.Profile.parse(text)


def test_mesh_that_does_not_fit_the_devices_is_refused(eight_devices):
    with pytest.raises(ConfigError, match=r"data x fsdp x tensor = 2 x 3 x 1 = 6, but there are 8 devices"):
        sharding.make_mesh(MeshConfig(fsdp=3))


def test_half_of_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES"):
        multihost.initialize()


def test_options_of_a_command_line_replace_those_of_the_config(tmp_path):
    options = ["--config", "configs/demo.py", "--workdir", str(tmp_path), "--data.prepared", str(tmp_path)]
    command = [sys.executable, "train.py", *options, "--data.batch-size", "8"]  # one for each device
    missing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith(f"error: {tmp_path}")
    unknown = subprocess.run([*command, "--optimizer.steps", "3"], capture_output=True, text=True, cwd=ROOT)
    assert unknown.returncode == 2
    assert "--optimizer.steps" in unknown.stderr
