"""Corpora at the size where things break: an hour in one file, two thousand files, faults in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_corpus import workers

from omnicodec_jax.corpus import read_tokens, shards

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": ""}
"""As users run it: eight fake devices, compiled plainly, would hold eight times as much and take as much longer."""
HOUR = """
import sys
from pathlib import Path
from omnicodec_jax import compilation_cache
from omnicodec_jax.cli import command
from omnicodec_jax.cli import corpora as commands
from omnicodec_jax.distributed import multihost

def resident(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20

compilation_cache.use()
short, hour, model, out = sys.argv[1:]
multihost.initialize = lambda: None
options = {"model": model, "num_readers": 1}
commands.tokenize(manifest=f"sound={short}", out=Path(out, "a"), **options)  # weights and programs are there
commands.detokenize(Path(out, "a"), Path(out, "b"), model)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
commands.tokenize(manifest=f"sound={hour}", out=Path(out, "c"), **options)
commands.detokenize(Path(out, "c"), Path(out, "d"), model)
print("GiB above", resident("VmHWM") - before)
"""


def test_an_hour_in_one_file_takes_less_than_two_gib(clips, demo_model, tmp_path):
    for name, seconds in {"short": 2, "hour": 3600}.items():
        (tmp_path / name).mkdir()
        with soundfile.SoundFile(tmp_path / name / f"{name}.flac", "w", 44_100, 2) as file:
            samples = np.resize(soundfile.read(clips[0])[0].reshape(-1), (seconds * 44_100, 1)).astype(np.float32)
            for start in range(0, len(samples), 1 << 20):
                file.write(np.repeat(samples[start : start + (1 << 20)], 2, axis=1))
    arguments = [tmp_path / "short", tmp_path / "hour", demo_model, tmp_path / "out"]
    command = [sys.executable, "-c", HOUR, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=ONE_DEVICE).stdout
    assert float(said.split("GiB above")[1]) < 2, said
    info = soundfile.info(tmp_path / "out" / "d" / "sound" / "hour.flac")
    assert (info.frames, info.samplerate) == (3600 * 44_100, 44_100)


def test_two_thousand_files_through_every_runner_with_faults(clips, demo_model, tmp_path):
    folder, rng = tmp_path / "files", np.random.default_rng(0)
    folder.mkdir()
    sound = [soundfile.read(clip, dtype="int16") for clip in clips]
    for number in range(2000):
        samples, rate = sound[number % len(sound)]
        start, size = rng.integers(0, len(samples) // 2), int(rate * rng.uniform(0.1, 1.0))
        path = folder / f"{number:04d}.flac"
        if number % 200 == 7:
            path.write_bytes(b"no sound")
        else:
            soundfile.write(path, samples[start : start + size], rate)

    def files(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()}

    for runner in ("here", "processes", "ray"):
        options = ["--manifest", f"sound={folder}", "--out", str(tmp_path / runner), "--model", str(demo_model)]
        options += ["--runner", runner, "--num-workers", "2", "--num-readers", "1", "--shard-hours", "0.2"]
        command = [sys.executable, "-c", "from omnicodec_jax import cli; cli.main()", "tokenize", *options]
        process = subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE)
        if runner == "processes":  # first a worker dies, then all
            while not list((tmp_path / runner).glob(f"{shards.UNITS}/*.json")):
                time.sleep(0.1)
                assert process.poll() is None
            os.kill(workers(process, runner)[0], signal.SIGKILL)
            time.sleep(5)
            process.kill()
            process.wait()
            process = subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE)
        assert process.wait() == 0
        assert files(runner) == files("here")
    assert len({clip.id for clip in read_tokens(tmp_path / "here")}) == 1990
    rejects = (tmp_path / "here" / shards.REJECTS).read_text().splitlines()
    assert [json.loads(line)["path"] for line in rejects] == [f"{number:04d}.flac" for number in range(7, 2000, 200)]
