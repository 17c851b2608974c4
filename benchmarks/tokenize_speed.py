"""Tokenizing a corpus of mixed lengths, against transformers' Mimi: python -m benchmarks.tokenize_speed

The corpus has FLAC files of 1 s to 5 min, cut from the bundled clips. Ours is what `omnicodec tokenize` does, from
files to shards, at full size (released_12hz, 33 codebooks), with stacked log-mel frames in place of the frozen
encoder's features. Three others take turns with it: a loop that loads each file with librosa and gives it to
`MimiModel.encode` (32 codebooks), the same in batches padded to their longest file, and our model on clips that are in
memory already. Weights are random, which does not change the arithmetic.
"""

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from omnicodec_jax import compilation_cache
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.data import audio, discovery

RATE = 24_000
CONFIG = "released_12hz"
BATCH = 4
"""How many files the padded Mimi encodes at once."""


def write_files(folder: Path, count: int, longest: float) -> Path:
    """Writes files in random order, whose lengths are spread evenly on a logarithmic scale. Returns their manifest."""
    sound = np.concatenate([audio.load(clip, RATE, 0.95).samples for clip in discovery.find(BUNDLED_CLIPS)])
    rng = np.random.default_rng(0)
    rows = []
    for number, seconds in enumerate(rng.permutation(np.geomspace(1, longest, count))):
        start = rng.integers(sound.size)
        samples = np.resize(np.roll(sound, -start), round(seconds * RATE))
        soundfile.write(folder / f"{number}.flac", samples, RATE)
        rows.append({"audio_filepath": f"{number}.flac", "duration": seconds})
    manifest = folder / "files.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def write_model(folder: Path) -> None:
    """Writes the model directory of the full-size codec with random weights."""
    import jax

    from omnicodec_jax import model_directory
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.models.initialize import init_variables

    codec = config_files.load(CONFIG).codec
    assert codec.semantic is not None
    codec = dataclasses.replace(codec, semantic=dataclasses.replace(codec.semantic, source="log_mel", feature_dim=1024))
    model, rng = model_directory.build(codec), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
    model_directory.save(folder, codec, variables)


def ours(manifest: Path, model: Path, folder: Path, readers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns two functions: the corpus job, and the model alone on as many seconds of 10 s clips in memory."""
    from omnicodec_jax.corpus.tokenize import Job, Worker, plan
    from omnicodec_jax.data.manifest import read_all

    job = Job(sources={"sound": manifest}, out=folder / "tokens", model=str(model), num_readers=readers)
    worker = Worker(job)
    tokenizer, total = worker.tokenizer, sum(entry["duration"] for entry in map(json.loads, manifest.open()))
    clip = np.random.default_rng(0).normal(0, 0.1, 10 * RATE).astype(np.float32)
    prepared = tokenizer.prepare(clip)

    def corpus() -> object:
        shutil.rmtree(job.out, ignore_errors=True)  # or what is finished would not be done again
        tokenizer.warm_up()
        for _ in worker.run(plan(read_all(job.sources), job.shard_hours)):
            pass
        return worker.use

    def resident() -> object:
        return sum(1 for _ in tokenizer.encode_each((n, prepared) for n in range(round(total / 10))))

    return corpus, resident


def mimi(manifest: Path, batch: int) -> Callable[[], object]:
    """Returns a function that encodes the same files by transformers' Mimi, `batch` at a time."""
    import librosa
    import torch
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    names = [manifest.parent / json.loads(line)["audio_filepath"] for line in manifest.open()]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(names), batch):
            clips = [torch.from_numpy(librosa.load(name, sr=RATE)[0]) for name in names[first : first + batch]]
            longest = max(len(clip) for clip in clips)
            padded = torch.stack([torch.nn.functional.pad(clip, (0, longest - len(clip))) for clip in clips])
            mask = torch.stack([torch.arange(longest) < len(clip) for clip in clips])
            yield padded[:, None], mask[:, None]

    @torch.inference_mode()
    def run() -> object:
        return [model.encode(padded, mask).audio_codes for padded, mask in batches()]

    return run


def main(files: int = 24, longest: float = 300.0, repeats: int = 3, readers: int = 1) -> None:
    """Measure all systems in turns.

    Args:
        files: How many files the corpus has.
        longest: Length of the longest file in seconds; the shortest has one second.
        repeats: Turns of each system.
        readers: Processes that decode files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = write_files(folder, files, longest)
        write_model(folder / "model")
        total = sum(json.loads(line)["duration"] for line in manifest.open())
        corpus, resident = ours(manifest, folder / "model", folder, readers)
        systems = {
            "omnicodec tokenize": corpus,
            "our model, clips in memory": resident,
            "Mimi, file by file": mimi(manifest, 1),
            f"Mimi, {BATCH} files padded": mimi(manifest, BATCH),
        }
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        use: object = None
        for turn in range(repeats):
            for name in systems if turn % 2 == 0 else reversed(systems):
                start = time.perf_counter()
                result = systems[name]()
                seconds[name].append(time.perf_counter() - start)
                use = result if name == "omnicodec tokenize" else use
        print(f"{files} files, {total / 60:.1f} min\n\n| | x real time | ours / this |\n| --- | --- | --- |")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            print(f"| {name} | {total / median:.1f} | {median / medians['omnicodec tokenize']:.2f} |")
        print(f"\n{use}")


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    compilation_cache.use()
    command.run(main, prog="python -m benchmarks.tokenize_speed")
