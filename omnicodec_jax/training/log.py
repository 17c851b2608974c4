"""What a run shows of itself: one line of progress now and then, and TensorBoard."""

import logging
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnicodec_jax import dsp
from omnicodec_jax.config import Config
from omnicodec_jax.training.events import Events
from omnicodec_jax.training.step import Tree
from omnicodec_jax.training.validation import Validation

LOG = logging.getLogger(__name__)

GROUPS = {
    "grad_norm_": "gradient_norm/",
    "replaced_": "replaced/",
    "learning_rate": "learning_rate/adamw",
    "unreadable_clips": "data/unreadable_clips",
    "num_quantizers": "step/num_quantizers",
    "skipped": "step/skipped",
}
"""Where metrics go in TensorBoard by the beginning of their names; the others are losses."""
PROGRESS = ("total", "mel", "semantic", "self_guidance")
"""Metrics of the progress line, where the run has them."""
SPECTROGRAM = (1024, 256)
"""Window and hop."""


class Report:
    """Means over the steps since the last line. Writes nothing unless `directory` is given."""

    def __init__(self, config: Config, directory: Path | None, step: int):
        self._config = config
        self._events = None if directory is None else Events(directory, step)
        self._start_window()

    def _start_window(self) -> None:
        self._metrics: list[Mapping[str, np.ndarray]] = []
        self._waited, self._since = 0.0, time.perf_counter()

    def add(self, metrics: Mapping[str, np.ndarray], waited: float) -> None:
        """One step's metrics, and the seconds that it waited for its batch."""
        self._metrics.append(metrics)
        self._waited += waited

    def log(self, step: int, codebooks: Tree) -> None:
        """Writes what has come in, and begins anew."""
        elapsed, steps = time.perf_counter() - self._since, len(self._metrics)
        means = {name: np.mean([metrics[name] for metrics in self._metrics], axis=0) for name in self._metrics[0]}
        batch = self._config.data.batch_size * self._config.data.segment_samples / self._config.codec.sample_rate
        speed = {
            "steps_per_second": steps / elapsed,
            "audio_seconds_per_second": steps * batch / elapsed,
            "data_wait_share": self._waited / elapsed,
            "memory_gib": memory_gib(),
        }
        scalars = {f"speed/{name}": value for name, value in speed.items()}
        for name, value in means.items():
            prefix = next((prefix for prefix in GROUPS if name.startswith(prefix)), "")
            label = GROUPS.get(prefix, "loss/") + name.removeprefix(prefix)
            scalars |= numbered(label, value)
        for name, collection in codebooks.items():
            branch = name.removesuffix("_quantizer")
            alive, perplexity = codebook_health(collection["cluster_usage"], self._config)
            scalars |= numbered(f"codebook_usage/{branch}", alive) | numbered(f"perplexity/{branch}", perplexity)
        if self._events is not None:
            self._events.scalars(step, scalars)
        losses = "  ".join(f"{name} {means[name]:.4g}" for name in PROGRESS if name in means)
        total = self._config.optimizer.total_steps
        left = (total - step) / speed["steps_per_second"]
        LOG.info(
            "step %d/%d  %s  %.3g steps/s  %.4g s of audio/s  data %.0f %%  %s left",
            *(step, total, losses, speed["steps_per_second"], speed["audio_seconds_per_second"]),
            *(100 * speed["data_wait_share"], f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min"),
        )
        self._start_window()

    def validate(self, step: int, result: Validation, seconds: float, weights: Validation | None = None) -> None:
        """Writes what held-out clips have given, with originals and reconstructions to look at and to hear.

        seconds: what that took, which is no part of the steps' time. weights: where `result` is that of their moving
        average, what they give themselves.
        """
        self._since += seconds
        shares = ", ".join(f"{name} {100 * np.mean(values):.0f} %" for name, values in result.usage.items())
        distance = f"mel distance {result.mel_distance:.4f}"
        if weights is not None:
            distance += f" by the weight average, {weights.mel_distance:.4f} by the weights"
        LOG.info("step %d  held-out clips: %s, codebook usage %s", step, distance, shares)
        if self._events is None:
            return
        scalars = {"validation/mel_distance": result.mel_distance}
        if weights is not None:
            scalars["validation/mel_distance_of_weights"] = weights.mel_distance
        for name, values in result.usage.items():
            scalars |= numbered(f"validation_usage/{name}", values)
        self._events.scalars(step, scalars)
        for row, pair in enumerate(zip(result.originals, result.reconstructions, strict=True)):
            for name, audio in zip(("original", "reconstruction"), pair, strict=True):
                tag, samples = f"validation_{row}/{name}", np.clip(audio[0], -1, 1)
                self._events.clip(step, tag, samples, self._config.codec.sample_rate, spectrogram(samples))


def numbered(name: str, value: Any) -> dict[str, float]:
    """A scalar under its name, a vector as one scalar per codebook."""
    value = np.asarray(value)
    return {name: float(value)} if value.ndim == 0 else {f"{name}_{i:02d}": float(v) for i, v in enumerate(value)}


def codebook_health(cluster_usage: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Of each codebook, from its moving averages [Q, K]: share of the entries that are not dead, and perplexity."""
    usage = np.asarray(cluster_usage)
    share = usage / usage.sum(-1, keepdims=True)
    alive = np.mean(usage > config.codec.codebook.dead_threshold * usage.mean(-1, keepdims=True), axis=-1)
    return alive, np.exp(-np.sum(share * np.log(np.maximum(share, 1e-20)), axis=-1))


def memory_gib() -> float:
    """Peak memory of this process's first device; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    used = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return used / 2**30


def spectrogram(audio: np.ndarray) -> np.ndarray:
    """Samples [T] → grey image [1, F, N] uint8, low frequencies at the bottom, 80 dB from black to white."""
    magnitude = np.abs(dsp.stft(jnp.asarray(audio), *SPECTROGRAM, center=True)).T[::-1]
    decibels = 20 * np.log10(np.maximum(magnitude, 1e-5) / SPECTROGRAM[0] ** 0.5)
    return (255 * np.clip((decibels + 60) / 80, 0, 1)).astype(np.uint8)[None]
