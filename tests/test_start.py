"""How a run begins: what it says, what it starts from, and how it stops while there is nothing to save yet."""

import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import model_directory
from omnicodec_jax.config import AcousticConfig, CodecConfig, Config, MeshConfig, SEANetConfig, STFTDiscriminatorConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import records
from omnicodec_jax.data.records import SAMPLE_RATE, Header, Shard
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.models.quantize import Codebook, fit_residual_codebooks
from omnicodec_jax.training import loop, lost_time, validation
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.log import CodecLog
from omnicodec_jax.training.start import _frames_per_batch, state_template
from omnicodec_jax.training.state import init_state, update_ema
from omnicodec_jax.training.validation import ValidationResult, Validator

ROOT = Path(__file__).parents[1]
SMALL = replaced(
    TINY,
    codec={"semantic": None},
    discriminators={"waveform": None},
    loss={"semantic": 0.0},
)
"""The tiny experiment without what a start treats no differently from the rest."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The tiny experiment on a second of noise in each domain, none of it held out."""
    prepared, lines = tmp_path_factory.mktemp("prepared"), []
    for number, domain in enumerate(("sound", "speech")):
        noise = np.random.default_rng(number).integers(-9000, 9000, SAMPLE_RATE, np.int16)
        header = Header(f"{domain}:0", domain, 0, SAMPLE_RATE, 1.0, SAMPLE_RATE, SAMPLE_RATE)
        name = f"{domain}-train-000000"
        size = records.write_shard(records.shard_path(prepared, name), [records.encode(header, noise)])
        shard = Shard(name=name, domain=domain, split="train", digest="0", clips=(SAMPLE_RATE,), bytes=size)
        lines.append(json.dumps(dataclasses.asdict(shard)))
    (prepared / records.INDEX).write_text("\n".join(lines))
    (prepared / records.SETTINGS).write_text('{"segment_seconds": 30}')
    return replaced(SMALL, data={"prepared": str(prepared)})


@pytest.fixture
def one_device(monkeypatch):
    device = jax.local_devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.fixture
def states_are_free(config, monkeypatch):
    """All weights are ones at first."""

    def leaf(shape: Any) -> jax.Array:
        value = np.full(shape.shape, jnp.issubdtype(shape.dtype, jnp.floating), shape.dtype)
        return jax.device_put(value, shape.sharding)

    ones = jax.tree.map(leaf, state_template(config, sharding.make_mesh(MeshConfig())))
    monkeypatch.setattr(loop, "first_state", lambda *_: ones)


@pytest.fixture
def steps_are_free(monkeypatch):
    """A step does nothing but count, and move the average of the weights away from them."""

    moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))

    def jit_step(gan: Gan, *_: Any):
        def step(state, batch, frozen):
            metrics = {"total": jnp.ones(()), "skipped": jnp.zeros(())}
            return state.replace(step=state.step + 1, ema_params=moved(state.ema_params)), metrics

        return step

    monkeypatch.setattr(loop, "jit_step", jit_step)


def test_each_part_of_a_start_says_what_it_does_and_how_long_it_took(config, tmp_path, steps_are_free, caplog):
    caplog.set_level(logging.INFO)
    assert loop.run(config, tmp_path) == 0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("start: ")]
    parts = [line.removesuffix(" …") for line in lines if line.endswith(" …")]
    assert [part.split(" of ")[0] for part in parts] == [
        "start: finding the data",
        "start: reading the frozen networks",
        "start: finding checkpoints",
        "start: weights at random",
        "start: k-means",
        "start: first checkpoint",
        "start: reading the last checkpoint",
        "start: first batch",
        "start: compiling the training step, and the first step",
    ]
    assert "start: k-means of 3 codebooks of up to 8 entries on 96 vectors" in parts
    assert "start: sound: 1 clips, 0.00 h" in lines
    for part in parts:
        assert any(re.fullmatch(rf"{re.escape(part)}: \d+\.\d s", line) for line in lines)


def test_run_without_validation_does_not_look_at_held_out_clips(
    one_device, config, tmp_path, states_are_free, steps_are_free, monkeypatch
):
    monkeypatch.setattr(Validator, "open", None)
    assert loop.run(replaced(config, run={"validate_every": None}), tmp_path) == 0
    with pytest.raises(ConfigError, match="validate_every"):
        replaced(config, run={"validate_every": 0})


def test_end_of_a_run_says_which_share_of_its_time_was_learning(
    one_device, config, tmp_path, states_are_free, steps_are_free, caplog
):
    caplog.set_level(logging.INFO)
    assert loop.run(config, tmp_path) == 0
    assert re.fullmatch(r"time: \d+\.\d % of \d+\.\d s was learning; lost: start .*", caplog.messages[-1])
    spent = lost_time.of_run(tmp_path)
    assert caplog.messages[-1] == f"time: {spent}"
    (start,) = spent.starts
    assert start.steps == (0, config.optimizer.total_steps)
    took = {cause for cause, seconds in spent.seconds.items() if seconds}
    assert took == {"learning", "start", "compilation", "first batch", "waiting for data", "saving"}
    assert spent.total == pytest.approx(start.last.at - start.first.began, abs=0.5)


def ask_to_stop(number: int):
    """Stands for work during which the signal comes."""

    def work(*_: Any, **__: Any):
        signal.raise_signal(number)
        raise AssertionError("went on")

    return work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("part", ["first_state", "Samples.open", "frozen_networks.load"])
def test_run_that_is_asked_to_stop_before_its_first_checkpoint_leaves_none(
    config, tmp_path, monkeypatch, caplog, number, part
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(f"omnicodec_jax.training.loop.{part}", ask_to_stop(number))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert loop.run(config, tmp_path) == 128 + number
    assert caplog.messages[-1] == "interrupted before there was anything to save: the same command starts anew"
    assert not [path for path in tmp_path.glob("checkpoints/*") if path.name != "metadata"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_kmeans_can_be_interrupted_between_two_codebooks():
    fitted: list[int] = []

    def one_more() -> None:
        fitted.append(len(fitted))
        if len(fitted) == 2:
            signal.raise_signal(signal.SIGTERM)

    books = Codebook(jnp.zeros((4, 8, 6)), jnp.zeros((4, 8)), jnp.zeros(4), jnp.zeros(4))
    fit = partial(fit_residual_codebooks, jax.random.key(0), normal(80, 6), books, TINY.codec.codebook)
    with multihost.Interruption() as interruption, pytest.raises(multihost.Interrupted), interruption.raising():
        fit(one_more)
    assert fitted == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_run_that_is_asked_to_stop_while_it_writes_its_first_checkpoint_leaves_it_whole(
    config, tmp_path, states_are_free, monkeypatch, caplog, number
):
    caplog.set_level(logging.INFO)
    save = Checkpoints.save

    def asked(self: Checkpoints, *arguments: Any):
        signal.raise_signal(number)
        save(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", asked)
    monkeypatch.setattr(loop, "train", None)
    assert loop.run(config, tmp_path) == 143
    assert "step 0 is saved" in caplog.messages[-1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_process_ends_at_once_while_the_compiler_lets_no_handler_run():
    code = (
        "import hashlib, sys\n"
        "from omnicodec_jax.distributed import multihost\n"
        "with multihost.Interruption() as interruption, interruption.ending_the_process():\n"
        "    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


# -- Several processes


def test_processes_without_jax_own_service_agree_on_where_to_stop(monkeypatch):
    asked: list[int] = []

    def gather(own: np.ndarray) -> np.ndarray:
        asked.append(int(own))
        return np.array([own, signal.SIGTERM], np.int32)  # the other process had one

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", gather)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with multihost.Interruption() as interruption:
            assert [interruption.stops_before(step) for step in range(11, 21)] == [False] * 9 + [True]
    finally:
        jax.config.update("jax_enable_preemption_service", True)
    assert asked == [0]
    assert interruption.signal == signal.SIGTERM


def test_processes_that_joined_while_jax_own_service_was_off_agree_all_the_same(monkeypatch):
    joined = SimpleNamespace(client=object(), preemption_sync_manager=None)
    monkeypatch.setattr(multihost.multihost_utils.distributed, "global_state", joined)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", lambda own: np.array([own, 0], np.int32))
    with multihost.Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.stops_before(multihost.STEPS_BETWEEN_AGREEMENTS)
    assert interruption.signal == signal.SIGTERM


TWO = """
import dataclasses
import sys
import jax
from omnicodec_jax.config import files as config_files
from omnicodec_jax.config import MeshConfig, RunConfig
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.training.start import first_state
from omnicodec_jax.training.gan import FrozenVariables, Gan

multihost.initialize()
sharding.MIN_SHARDED_SIZE = 1  # so that even these kernels are shared out
config = config_files.load(sys.argv[2])
for axes in ({"data": 2}, {"data": 1, "fsdp": 2}):
    mesh = sharding.make_mesh(MeshConfig(**axes))
    started = dataclasses.replace(config, run=RunConfig(start_from=sys.argv[1]))
    state = first_state(Gan(started), FrozenVariables(), mesh, None)
    assert jax.tree.leaves(state.discriminators)
    kernel = state.params["downsample"]["kernel"]
    print("started", axes, kernel.is_fully_replicated, float(kernel.addressable_data(0)[0, 0, 0]))
"""


def test_two_processes_start_from_a_model_without_discriminators(tmp_path):
    (tmp_path / "config.py").write_text(f"from omnicodec_jax.config import *\n\nconfig = {SMALL!r}\n")
    shapes = jax.eval_shape(lambda: init_state(SMALL, jax.random.key(0)))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), (shapes.params, shapes.codebooks))
    model_directory.save(tmp_path / "model", SMALL.codec, {"params": ones[0], "codebooks": ones[1]})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    environment |= {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path / "model"), str(tmp_path / "config.py")],
            env={**environment, "JAX_PROCESS_ID": str(number)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    output = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    for printed, _ in output:
        started = [line.split()[-2:] for line in printed.splitlines() if line.startswith("started")]
        assert started == [["True", "1.0"], ["False", "1.0"]]


# -- What is started from, and what is heard of it


@pytest.mark.parametrize(("name", "heard"), [("paper_12hz", True), ("released_12hz", False), ("demo", False)])
def test_nearly_silent_semantic_loss_is_told_of_at_the_start(name, heard):
    assert (loop.weak_semantic_loss(config_files.load(ROOT / f"configs/{name}.py")) is not None) == heard


# -- Validation


def test_domain_whose_held_out_files_were_all_refused_is_left_out_of_validation(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prepared = tmp_path / "prepared"
    (prepared / "shards").mkdir(parents=True)
    source = Path(config.data.prepared)
    lines = [json.loads(line) for line in (source / records.INDEX).read_text().splitlines()]
    held_out = [line | {"name": line["name"].replace("train", "validation"), "split": "validation"} for line in lines]
    refused = [line | {"clips": []} if line["domain"] == "speech" else line for line in held_out]
    (prepared / records.SETTINGS).write_text((source / records.SETTINGS).read_text())
    mesh = sharding.make_mesh(MeshConfig())

    def opened(index: list[dict]) -> Validator | None:
        (prepared / records.INDEX).write_text("".join(json.dumps(line) + "\n" for line in index))
        return Validator.open(Gan(replaced(config, data={"prepared": str(prepared)})), mesh)

    assert opened(lines + refused) is not None
    assert "no clip of speech is held out, so there is no validation of it" in caplog.text
    assert opened(lines + [line | {"clips": []} for line in held_out]) is None
    assert "so there is no validation" in caplog.text


def test_validation_computes_in_float32_whatever_training_does():
    gan = Gan(replaced(TINY, train={"compute_dtype": "bfloat16"}))
    state = jax.eval_shape(lambda: init_state(TINY, jax.random.key(0)))
    batch = {"audio": jax.ShapeDtypeStruct((8, 1, 5760), jnp.float32)}
    mesh = sharding.make_mesh(MeshConfig())
    variables = {"params": state.params, "codebooks": state.codebooks}
    evaluate = partial(validation._evaluate, gan=gan, mesh=mesh)
    text = str(jax.make_jaxpr(evaluate)(variables, batch, FrozenVariables()))
    assert "f32" in text
    assert "bf16" not in text


def test_weights_and_their_average_are_both_validated_and_the_average_decides(
    config, tmp_path, states_are_free, steps_are_free, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)

    def validator(params: Any, *_: Any) -> ValidationResult:
        """Its mel distance is a weight and 10, to which the steps above add in the average."""
        distance, nothing = 10 + float(params["downsample"]["kernel"][0, 0, 0]), np.zeros((0, 1, 1))
        return ValidationResult({1: 20.0, 4: distance}, {}, nothing, nothing)

    monkeypatch.setattr(Validator, "open", lambda *_: validator)
    short = replaced(config, optimizer={"total_steps": 3}, run={"validate_every": 3})
    assert loop.run(short, tmp_path) == 0
    assert "held-out clips: mel distance 14.0000 by the weight average, 11.0000 by the weights" in caplog.text
    metrics = json.loads((tmp_path / "checkpoints" / "3" / "metrics" / "metrics").read_text())
    assert metrics == {"mel_distance": 14.0}


@pytest.mark.parametrize(
    ("step", "distances", "told"),
    [
        (2, {1: 3.0, 2: 2.99, 4: 2.95}, True),
        (2, {1: 3.0, 2: 2.99, 4: 3.2}, True),
        (2, {1: 3.0, 2: 2.96, 4: 2.9}, False),
        (1, {1: 3.0, 2: 2.99, 4: 2.95}, False),  # in warm-up
    ],
)
def test_log_says_in_plain_words_that_the_decoder_ignores_the_acoustic_branch(step, distances, told, caplog):
    caplog.set_level(logging.INFO)
    nothing = np.zeros((0, 1, 1))
    CodecLog(TINY, None, 0).write_validation(step, ValidationResult(distances, {}, nothing, nothing), 0.0)
    assert f"by codebooks 1: 3.0000, 2: {distances[2]:.4f}, 4: {distances[4]:.4f};" in caplog.text
    assert ("the decoder ignores the acoustic branch: with all 4 codebooks" in caplog.text) == told


def test_line_of_the_log_over_steps_with_and_without_discriminators_shows_the_losses_of_those_that_have_them(caplog):
    caplog.set_level(logging.INFO)
    log, books = CodecLog(TINY, None, 0), {"semantic_quantizer": {"cluster_usage": np.ones((1, 8))}}
    for metrics in ({"total": 4.0}, {"total": 2.0, "mel": 1.0}):
        log.add({name: np.asarray(value) for name, value in metrics.items()}, 0.0)
    log.write(2, books)
    assert "step 2/8  total 3  mel 1 " in caplog.text


def test_parts_of_random_weights_are_not_frozen(config, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.freeze = \('encoder',\): .*--run\.start-from"):
        loop.run(replaced(config, train={"freeze": ("encoder",)}), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"batch_size": 12}}, "data.batch_size = 12: must be a multiple of data x fsdp = 8"),
        ({"codec": {"sample_rate": 16_000}}, "codec.sample_rate = 16000: must be 24000, since prepared audio"),
        ({"data": {"segment_samples": 1919}}, "data.segment_samples = 1919: must be 1920 or more"),
        (
            {"optimizer": {"weight_decay_modules": ("encoder", "decodr")}},
            "no module decodr; there are acoustic_quant",
        ),
        (
            {
                "codec": {
                    "seanet": SEANetConfig(n_filters=2, ratios=(20, 16)),
                    "semantic": TINY.codec.semantic,
                    "wavlm_dim": 6,
                },
                "loss": {"wavlm_distillation": 50.0},
                "run": {"wavlm": "models/wavlm"},
            },
            "loss.wavlm_distillation = 50: must be 0 with 37.5 frames a second",
        ),
        (
            {"codec": {"seanet": SEANetConfig(n_filters=2, ratios=(31, 25))}, "loss": {"latent_cepstrum": 1.0}},
            "loss.latent_cepstrum = 1: must be 0 with frames of 1550 samples",
        ),
    ],
)
def test_config_that_would_train_something_else_or_nothing_is_refused(config, tmp_path, values, message):
    with pytest.raises(ConfigError) as caught:
        loop.run(replaced(config, **values), tmp_path)
    assert message in str(caught.value)


def test_crops_are_no_shorter_than_the_windows_of_the_discriminators(config, tmp_path):
    wide = STFTDiscriminatorConfig(filters=4, windows=(206, 2296))
    with pytest.raises(ConfigError, match=r"segment_samples = 2295: must be 2296 or more.*discriminators\.stft"):
        loop.run(replaced(config, discriminators={"stft": wide}, data={"segment_samples": 2295}), tmp_path)


def test_vectors_of_k_means_are_those_of_the_frames_that_the_encoder_makes(config):
    cut_off = replaced(config, data={"segment_samples": 5761})
    assert _frames_per_batch(config) == 8 * 3
    assert _frames_per_batch(cut_off) == 8 * 4


def test_numbers_of_codebooks_that_validation_decodes():
    def counts(acoustic: int, **options: Any) -> list[int]:
        quantizer = AcousticConfig(num_quantizers=acoustic, min_quantizers=1)
        return validation.codebook_counts(CodecConfig(acoustic=quantizer, **options))

    assert counts(32) == [1, 2, 4, 8, 16, 32, 33]
    assert counts(31) == [1, 2, 4, 8, 16, 32]
    assert counts(1) == [1, 2]
    assert counts(3, semantic=None, wavlm_dim=None) == [1, 2, 3]


def test_average_of_the_weights_forgets_the_random_ones_within_a_hundred_steps():
    optimizer = dataclasses.replace(TINY.optimizer, ema_decay=0.999)
    average: Any = {"codec": {"small": jnp.zeros(1)}}
    for step in range(100):
        average = update_ema(optimizer, average, {"codec": {"small": jnp.ones(1)}}, step)
    assert float(average["codec"]["small"][0]) > 0.999
    late: Any = update_ema(optimizer, {"codec": {"small": jnp.zeros(1)}}, {"codec": {"small": jnp.ones(1)}}, 10**6)
    assert float(late["codec"]["small"][0]) == pytest.approx(0.001, rel=1e-3)
