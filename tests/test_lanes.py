"""Sequences through lanes: what the devices hold, and what is said of their time."""

import threading
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from omnicodec_jax.blocks import AudioBlocks, encode_block
from omnicodec_jax.lanes import Clock, ContinuousBatcher, Use
from omnicodec_jax.tokenizer import OmniCodecTokenizer

CODEC = tiny.MIMI


def test_weights_lie_once_on_every_device():
    tokenizer = OmniCodecTokenizer(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC), devices=jax.local_devices()[:3])
    batchers = tokenizer._semantic_batcher, tokenizer._encoder_batcher, tokenizer._decoder_batcher
    copies = Counter()
    for batcher in batchers:
        for leaf in jax.tree.leaves(batcher._variables):
            copies.update({(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards})
    leaves = len(jax.tree.leaves(tokenizer.variables))
    assert Counter(device for device, _ in copies) == dict.fromkeys((0, 1, 2), leaves)


def test_padding_is_never_negative_while_a_long_clip_is_under_way(monkeypatch):
    tokenizer = OmniCodecTokenizer(CODEC, tiny.variables(CODEC))
    seen = []
    real = tokenizer._encoder_batcher.step

    def step(*arguments):
        seen.append(tokenizer.use)
        return real(*arguments)

    monkeypatch.setattr(tokenizer._encoder_batcher, "step", step)
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
    step: Any = time.perf_counter(), output, clock._times
    clock._steps.put(step)


def settle(clock: Clock) -> None:
    """Waits until a clock has seen every step before."""
    last, seen = Output(), threading.Event()
    last.block_until_ready = seen.set
    start(clock, last)
    seen.wait()


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
    settle(clock)
    assert clock._steps.empty()
    assert clock.times[1] > 0


def test_lanes_tell_what_was_padding_to_the_fraction():
    batcher = ContinuousBatcher(
        tiny.build(CODEC), encode_block, tiny.variables(CODEC), axis=1, devices=jax.local_devices()[:1]
    )
    samples = np.zeros(round(6.5 * tiny.HOP), np.float32)
    ((key, codes),) = batcher.run([("a clip", AudioBlocks(samples, None, tiny.HOP))])
    assert (key, codes.shape) == ("a clip", (4, 7))
    assert (batcher.frames, batcher.valid) == (12, 6.5)
