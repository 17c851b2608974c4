"""Sequences through lanes: what the devices hold, and what is said of their time."""

import inspect
import subprocess
import sys
import threading
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnicodec_jax import memory_budget
from omnicodec_jax.blocks import AudioBlocks, encode_block
from omnicodec_jax.corpus import readers
from omnicodec_jax.corpus.readers import Read, Readers, Request
from omnicodec_jax.data.attempts import Seen
from omnicodec_jax.data.audio import LoadedClip
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.lanes import Clock, ContinuousBatcher, Use, _wait
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip

CODEC = tiny.MIMI


def test_weights_lie_once_on_every_device():
    tokenizer = OmniCodecTokenizer(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC), devices=jax.local_devices()[:3])
    batchers = tokenizer._lanes.semantic_batcher, tokenizer._lanes.encoder_batcher, tokenizer._lanes.decoder_batcher
    copies = Counter()
    for batcher in batchers:
        for leaf in jax.tree.leaves(batcher._variables):
            copies.update({(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards})
    leaves = len(jax.tree.leaves(tokenizer.variables))
    assert Counter(device for device, _ in copies) == dict.fromkeys((0, 1, 2), leaves)


def test_padding_is_never_negative_while_a_long_clip_is_under_way(monkeypatch):
    tokenizer = OmniCodecTokenizer(CODEC, tiny.variables(CODEC))
    seen = []
    real = tokenizer._lanes.encoder_batcher.step

    def step(*arguments):
        seen.append(tokenizer.use)
        return real(*arguments)

    monkeypatch.setattr(tokenizer._lanes.encoder_batcher, "step", step)
    samples = np.ones(400 * tiny.HOP - 5, np.float32)
    for _ in tokenizer.encode_each([(None, tokenizer.prepare(samples))]):
        pass
    assert all(use.valid <= use.frames for use in seen)
    assert len(seen) > 3
    assert tokenizer.use.valid == pytest.approx(samples.size / tiny.HOP)


class Output:
    """The output of a step: ready when it is let go, or never."""

    def __init__(self, error: Exception | None = None):
        self.go, self.error = threading.Event(), error

    def block_until_ready(self):
        self.go.wait()
        if self.error is not None:
            raise self.error


def start(clock: Clock, output: Output) -> None:
    """As `started` does, which takes arrays only."""
    clock._thread.submit(inspect.unwrap(_wait), time.perf_counter(), output, clock._times)


def settle(clock: Clock) -> None:
    """Waits until a clock has seen every step before."""
    clock._thread.submit(lambda: None).result()


def test_devices_are_never_idle_for_more_than_all_of_the_time(monkeypatch):
    now = iter([0.0, 1.0, 41.0, 42.0, 42.0, 42.0])  # a step of a second, 40 s of nothing, a step of a second
    clock, first, second = Clock(), Output(), Output()
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    start(clock, first)
    first.go.set()
    while clock.times[1] == 0:
        pass
    start(clock, second)
    assert clock.times == (0.0, 1.0)  # it is under way
    second.go.set()
    settle(clock)
    assert clock.times == (40.0, 42.0)
    assert "device idle 95.2%" in str(Use(1, 1, *clock.times))


def test_what_ran_before_a_clock_began_anew_does_not_count(monkeypatch):
    clock, before, now = Clock(), Output(), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    start(clock, before)
    clock.forget()
    now[0] = 100.0
    before.go.set()
    settle(clock)
    assert clock.times == (0.0, 0.0)


def test_a_clock_survives_a_device_that_fails():
    clock, failed = Clock(), Output(RuntimeError("device lost"))
    failed.go.set()
    start(clock, failed)
    settle(clock)
    assert clock.times[1] > 0


def test_a_process_may_end_while_a_step_is_under_way():
    code = """
import sys, jax, jax.numpy as jnp
from omnicodec_jax.lanes import Clock

last = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, x: x @ x / 400, x))
x = jnp.ones((400, 400))
last(x).block_until_ready()
for later in range(12):  # one of them ends while the interpreter is taken down
    clock = Clock()
    for _ in range(1 + 2 * later):
        x = last(x)
    clock.started(x)
sys.exit(130)
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == ""
    assert ended.returncode == 130


def test_lanes_tell_what_was_padding_to_the_fraction():
    batcher = ContinuousBatcher(
        tiny.build(CODEC), encode_block, tiny.variables(CODEC), axis=1, devices=jax.local_devices()[:1]
    )
    samples = np.zeros(round(6.5 * tiny.HOP), np.float32)
    ((key, codes),) = batcher.run([("a clip", AudioBlocks(samples, None, tiny.HOP))])
    assert (key, codes.shape) == ("a clip", (4, 7))
    assert (batcher.frames, batcher.valid) == (12, 6.5)


# -- Memory of the host


@pytest.fixture
def lanes(monkeypatch) -> OmniCodecTokenizer:
    """A codec of eight lanes in each of its two models, which compiles nothing: what comes out is zeros."""

    def step(self, state, lanes, size):
        return jnp.zeros((self.rows, 4, size) if self._axis else (self.rows, size, 8)), {}

    monkeypatch.setattr(ContinuousBatcher, "_step", step)
    return OmniCodecTokenizer(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC), devices=jax.local_devices()[:8])


@pytest.mark.parametrize(("hours", "least", "most"), [(3.5, 4, 4), (100, 8, 40)])
def test_clips_of_an_hour_fill_no_more_of_the_memory_than_they_may(lanes, hours, least, most, monkeypatch):
    hour, held = 3600, []  # samples here: what counts is how many hours are held
    monkeypatch.setattr(
        memory_budget, "memory", lambda: round(hours * hour / memory_budget.SHARE) * memory_budget.BYTES_PER_SAMPLE
    )
    under_way = set()

    def clips():
        for number in range(40):
            under_way.add(number)
            held.append(len(under_way))
            vectors = np.zeros((-(-hour // tiny.HOP), lanes.semantic.feature_dim), np.float32)
            yield number, PreparedClip(np.ones(hour, np.float32), features=vectors)

    for number, codes in lanes.encode_each(clips()):
        under_way.remove(number)
        assert codes.shape == (4, lanes.num_frames(hour))
    assert len(held) == 40
    assert not under_way
    assert least <= max(held) <= most


def test_audio_that_is_decoded_fills_no_more_of_the_memory_than_it_may(lanes, monkeypatch):
    monkeypatch.setattr(
        ContinuousBatcher, "_step", lambda self, state, running, size: (jnp.zeros((self.rows, 1, size * tiny.HOP)), {})
    )
    frames, under_way, held = 45, set(), []
    limit = 3 * frames * tiny.HOP * memory_budget.BYTES_PER_SAMPLE
    monkeypatch.setattr(memory_budget, "memory", lambda: round(limit / memory_budget.SHARE))

    def tokens():
        for number in range(20):
            under_way.add(number)
            held.append(len(under_way))
            yield number, np.zeros((4, frames), np.int32)

    for number, decoded in lanes.decode_each(tokens()):
        under_way.remove(number)
        assert decoded.shape == (1, frames * tiny.HOP)
    assert len(held) == 20
    assert max(held) == 3


def test_files_read_ahead_fill_no_more_of_the_memory_than_they_may(monkeypatch):
    size, under_way, held, threads = 1000, set(), [], 4
    all_given = threading.Event()

    class Reader:
        def __call__(self, request: Request) -> Read:
            all_given.wait()
            under_way.add(request.path)
            held.append(len(under_way))
            return Read(LoadedClip(np.zeros(size, np.float32), 1.0, 24_000, size), "", Seen(0, 0))

        def close(self):
            pass

        def join(self):
            pass

    monkeypatch.setattr(readers, "Reader", Reader)
    monkeypatch.setattr(readers, "HELD_SAMPLES", 3 * size)

    def requests():
        for number in range(50):
            if number == 4 * threads:  # as many as are given to the readers ahead
                all_given.set()
            yield number, Request(number, Entry("", ""), 24_000, None)

    done = []
    with Readers(threads) as reading:
        for number, result, _ in reading.map(requests(), lambda result: None):
            assert result is not None
            under_way.remove(number)
            done.append(number)
    assert done == list(range(50))
    assert max(held) <= 3 + threads + 1  # the one whose turn it is does not wait


def test_a_container_has_the_memory_that_it_was_given(tmp_path, monkeypatch):
    whole = memory_budget.memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "limit").write_text("1048576\n")
    monkeypatch.setattr(memory_budget, "LIMITS", (tmp_path / "memory.max", tmp_path / "gone"))
    assert memory_budget.memory() >= whole
    monkeypatch.setattr(memory_budget, "LIMITS", (tmp_path / "memory.max", tmp_path / "limit"))
    assert memory_budget.memory() == 1 << 20
