"""How long training waits for data in a bucket whose every answer takes 50 ms: python -m benchmarks.bucket_speed

The bucket is a directory of this machine behind a file system that sleeps before each request. Steps are sleeps, too,
so that the figure is the pipeline's alone: the share of the time that the loop waits for its next batch. The first
batches, before the pipeline has filled up, do not count.
"""

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from omnicodec_jax.buckets import requests
from omnicodec_jax.cli import command
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import DataConfig, DomainConfig
from omnicodec_jax.data import audio, features, pipeline, prepare, prepare_unit, records, units

SECONDS, BATCH, STEPS, UNCOUNTED = 10, 24, 60, 10
WIDTH = 1280
URL = "s3://benchmark"


class Slow:
    """A file system whose every request takes a while, and which has the files of a directory."""

    def __init__(self, directory: Path, latency: float):
        self._files, self._directory, self._latency = fsspec.filesystem("file"), str(directory), latency
        self.requests = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(url: str, *arguments: Any, **options: Any) -> Any:
            self.requests += 1
            time.sleep(self._latency)
            return getattr(self._files, name)(url.replace(URL, self._directory), *arguments, **options)

        return request


def prepare_audio(directory: Path) -> None:
    """Prepares a minute of each bundled clip."""
    clips = directory / "clips"
    clips.mkdir()
    for number, clip in enumerate(sorted(BUNDLED_CLIPS.glob("*.flac"))):
        samples = audio.load(clip, records.SAMPLE_RATE).samples
        audio.save(clips / f"{number}.wav", np.resize(samples, 60 * records.SAMPLE_RATE), records.SAMPLE_RATE)
    with contextlib.redirect_stderr(io.StringIO()):
        config = prepare.PrepareConfig(validation=0.0)
        prepare.run({"sound": clips}, directory / "prepared", config, 1, units.Share())


def store_features(directory: Path) -> None:
    """Stores features of each crop of the prepared audio, of the width of Qwen3-Omni's, all of them zero."""
    length, (prepared, out) = SECONDS * records.SAMPLE_RATE, (directory / "prepared", directory / "features")
    stored = features.FeatureFormat(
        encoder="benchmark",
        compute="float32",
        feature_dim=WIDTH,
        source="qwen3_aut",
        crop_samples=length,
        stride_samples=length,
    )
    (out / records.SHARDS).mkdir(parents=True)
    features.save_format(out, stored)
    seconds = prepare_unit.read_settings(prepared).segment_seconds
    for shard in records.read_index(prepared):
        lengths = (length for clip in shard.clips for _, length in records.segments(clip, seconds))
        made = (stored.encode(np.zeros((stored.num_vectors(length), WIDTH), np.float32)) for length in lengths)
        records.write_shard(features.shard_path(out, shard), made)


def wait_share(prepared: str, step: float, stored: str | None = None) -> float:
    """Returns the share of the time that steps of so many seconds wait for their batches."""
    config = DataConfig(prepared=prepared, features=stored, domains=(DomainConfig(name="sound"),), batch_size=BATCH)
    samples = pipeline.Samples.open(config, seed=0, stored_features=stored is not None)
    batches = iter(pipeline.host_batches(samples, BATCH, range(BATCH)))
    waited, start = 0.0, 0.0
    for number in range(UNCOUNTED + STEPS):
        if number == UNCOUNTED:
            waited, start = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        assert not batch["replaced"].any(), "a clip could not be read"
        time.sleep(step)
    return waited / (time.perf_counter() - start)


def main(*, step_seconds: float = 0.7, latency: float = 0.05) -> None:
    """Measure how long training waits for data in a bucket whose every request takes some time.

    Args:
        step_seconds: How long a step takes.
        latency: How long a request takes, in seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare_audio(directory)
        store_features(directory)
        print(f"batches of {BATCH} crops of {SECONDS} s, steps of {step_seconds:g} s\n")
        print("| where | batches read at a time | waiting for audio | for audio and features |\n|" + " --- |" * 4)

        def print_row(where: str, place: str, ahead: int) -> None:
            shares = [wait_share(f"{place}/prepared", step_seconds, stored) for stored in (None, f"{place}/features")]
            print(f"| {where} | {ahead} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)

        print_row("directory", str(directory), pipeline.BATCHES_AHEAD)
        system: Any = Slow(directory, latency)
        requests.system_of = lambda scheme: system  # pyright: ignore[reportAttributeAccessIssue]
        for ahead in (pipeline.BATCHES_AHEAD, pipeline.AHEAD_IN_BUCKET):
            pipeline.AHEAD_IN_BUCKET = ahead
            print_row(f"bucket, {1e3 * latency:g} ms a request", URL, ahead)
        logging.disable()  # what is still read ahead is about to be gone


if __name__ == "__main__":
    command.run(main, prog="python -m benchmarks.bucket_speed")
