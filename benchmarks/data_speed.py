"""The way from files to batches on one core: python -m benchmarks.data_speed

Preparing is compared with a loop of `librosa.load`, which is how the reference reads its files, over the same files:
the bundled clips, and longer files made of them in the usual formats. Both take turns, and the figures are medians.
Reading is measured with 10 s crops in batches of 24 with stored features of width 2048. All times are CPU time.
"""

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from omnicodec_jax import model_directory
from omnicodec_jax.cli import command
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import DataConfig, DomainConfig
from omnicodec_jax.data import audio, features, pipeline, prepare, records, units
from omnicodec_jax.data.features import FeatureFormat
from omnicodec_jax.data.manifest import Entry
from omnicodec_jax.planning.totals import totals
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.whisper import FEATURE_RATE, SIZES

SECONDS, BATCH, WIDTH, STEPS = 10, 24, 2048, 20
LONG_SECONDS = 180
FORMATS = {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}


def write_corpus(directory: Path) -> dict[str, list[Path]]:
    """Writes a long file of the bundled clips in each format, mono and stereo, at 44.1 kHz.

    Returns:
        The files by kind, the bundled clips among them.
    """
    clips = sorted(BUNDLED_CLIPS.glob("*.flac"))
    whole = np.concatenate([audio.load(clip, 44_100).samples for clip in clips])
    mono = np.resize(whole, LONG_SECONDS * 44_100)
    corpus = {"bundled clips, FLAC": clips}
    for channels, samples in ((1, mono[:, None]), (2, np.stack([mono, np.roll(mono, 1000)], axis=1))):
        for format, subtype in FORMATS.items():
            path = directory / f"{channels}.{format.lower()}"
            with soundfile.SoundFile(path, "w", 44_100, channels, subtype, format=format) as file:
                for start in range(0, len(samples), 44_100):  # libsndfile's Vorbis encoder crashes on long blocks
                    file.write(samples[start : start + 44_100])
            corpus[f"3 min, {format}, {'mono' if channels == 1 else 'stereo'}"] = [path]
    return corpus


def librosa_loop(paths: list[Path]) -> None:
    """Reads files as the reference does."""
    import librosa

    for path in paths:
        samples, _ = librosa.load(path, sr=records.SAMPLE_RATE)
        librosa.util.normalize(samples) * 0.95  # type: ignore[reportUnusedExpression]


def prepare_files(paths: list[Path], out: Path) -> None:
    """Prepares files as one unit of work, in this process."""
    shutil.rmtree(out, ignore_errors=True)  # or what is finished would not be done again
    entries = tuple(Entry(path.name, str(path)) for path in paths)
    unit = prepare.SplitUnit("sound-train-000000", "sound", Path(), entries, "train")
    prepare.prepare_unit(unit, out, prepare.PrepareConfig(), False, {}, lambda *_: None)


def alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Runs two functions in turns, and returns the median CPU seconds of each, after a turn to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for run, own in zip((first, second), times, strict=True):
            start = time.process_time()
            run()
            own.append(time.process_time() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def measure_prepare(directory: Path, repeats: int) -> None:
    """Measures preparing, and prints a line for each kind of file."""
    print("| files | librosa.load, × real time | prepare, × real time | prepare / librosa |\n| --- | --- | --- | --- |")
    for name, paths in write_corpus(directory).items():
        seconds = sum(soundfile.info(path).duration for path in paths)
        theirs, ours = alternate(
            partial(librosa_loop, paths), partial(prepare_files, paths, directory / "out"), repeats
        )
        print(f"| {name} | {seconds / theirs:.0f} | {seconds / ours:.0f} | **{theirs / ours:.2f}** |", flush=True)


def measure_pipeline(directory: Path) -> None:
    """Measures how fast batches are read, and prints it with the size of the data on disk."""
    clips, prepared, stored = directory / "clips", directory / "prepared", directory / "features"
    clips.mkdir()
    for number, clip in enumerate(sorted(BUNDLED_CLIPS.glob("*.flac"))):
        samples = audio.load(clip, records.SAMPLE_RATE).samples
        audio.save(clips / f"{number}.wav", np.resize(samples, 60 * records.SAMPLE_RATE), records.SAMPLE_RATE)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare.run({"sound": clips}, prepared, prepare.PrepareConfig(validation=0.0), 1, units.Share())
    (shard,) = records.read_index(prepared)
    crop = SECONDS * records.SAMPLE_RATE
    format = FeatureFormat(encoder="none", compute="float32", feature_dim=WIDTH, crop_samples=crop, stride_samples=crop)
    rng, count = np.random.default_rng(0), features.num_vectors(crop)
    sizes = [size for clip in shard.clips for _, size in records.segments(clip, 30)]
    vectors = (
        format.encode(rng.standard_normal((count * len(format.starts(size)), WIDTH), np.float32)) for size in sizes
    )
    feature_bytes = records.write_shard(features.shard_path(stored, shard), vectors)
    features.save_format(stored, format)

    config = DataConfig(
        prepared=str(prepared), features=str(stored), domains=(DomainConfig(name="sound"),), batch_size=BATCH
    )
    samples = pipeline.Samples.open(config, 0, stored_features=True)
    batches = iter(pipeline.host_batches(samples, BATCH, range(BATCH)))
    for _ in range(2):
        next(batches)
    start = time.process_time()
    for _ in range(STEPS):
        next(batches)
    speed = STEPS * BATCH * SECONDS / (time.process_time() - start)
    hours = sum(sizes) / records.SAMPLE_RATE / 3600
    print(f"\nbatches of {BATCH} x {SECONDS} s with stored features: {speed:.0f} x real time per core")
    print(f"one core feeds a step of {BATCH} clips every {BATCH * SECONDS / speed:.2f} s")
    print(
        f"on disk, per hour: audio {shard.bytes / hours / 1e6:.0f} MB (int16: {2 * 3.6e-3 * records.SAMPLE_RATE:.0f}), "
        f"features {feature_bytes / hours / 1e6:.0f} MB as bfloat16"
    )


def print_encoders() -> None:
    """Prints what each frozen encoder takes to compute features of a window, as compiled. Nothing is run."""
    print(f"\n{'encoder':<12} {'parameters':>11} {'GFLOP/s of audio':>17} {'kB/s stored, bfloat16':>22}")
    encoders: dict[str, Any] = {f"Whisper {name}": config for name, config in SIZES.items()}
    for name, config in {**encoders, "Qwen3-AuT": Qwen3AuTConfig()}.items():
        qwen = isinstance(config, Qwen3AuTConfig)
        seconds, rate = (config.window_chunks, features.PER_SECOND) if qwen else (config.window_seconds, FEATURE_RATE)
        module = model_directory.build(config)
        mel = jax.ShapeDtypeStruct((1, 100 * seconds, config.num_mel_bins), jnp.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), mel)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(variables))
        compiled = jax.jit(module.apply).lower(variables, mel).compile()
        flops = totals(compiled.as_text() or "").flops / seconds
        stored = rate * 2 * config.output_dim
        print(f"{name:<16} {parameters / 1e6:>7.1f} M {flops / 1e9:>17.2f} {stored / 1e3:>22.1f}")


def main(repeats: int = 5) -> None:
    """Measure preparing, reading, and the cost of computing features instead of reading them.

    Args:
        repeats: Turns of each, after one to warm up.
    """
    with tempfile.TemporaryDirectory() as directory:
        measure_prepare(Path(directory), repeats)
        measure_pipeline(Path(directory))
    print_encoders()


if __name__ == "__main__":
    command.run(main, prog="python -m benchmarks.data_speed")
