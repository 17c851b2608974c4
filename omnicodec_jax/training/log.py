"""The log of a codec's training run: lines of progress, and TensorBoard."""

import logging
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnicodec_jax import dsp
from omnicodec_jax.config import Config
from omnicodec_jax.distributed import multihost
from omnicodec_jax.training import host_memory
from omnicodec_jax.training.events import EventWriter
from omnicodec_jax.training.lost_time import Spent
from omnicodec_jax.training.packing import Tree
from omnicodec_jax.training.step_window import StepWindow
from omnicodec_jax.training.validation import LEAST_GAIN, ValidationResult

LOG = logging.getLogger(__name__)

TAGS = {
    "grad_norm_": "gradient_norm/",
    "replaced_": "replaced/",
    "learning_rate": "learning_rate/adamw",
    "unreadable_clips": "data/unreadable_clips",
    "num_quantizers": "step/num_quantizers",
    "decoder_input_": "decoder_input/share_of_",
    "latent_variation": "latent/variation_over_time",
    "skipped": "step/skipped",
}
"""TensorBoard's tags by the beginning of a metric's name. All other metrics are losses."""
PROGRESS = ("total", "mel", "semantic", "self_guidance")
"""The metrics that a line of progress shows, if the run has them."""
SPECTROGRAM = (1024, 256)
"""Window and hop of the spectrograms in TensorBoard."""


class CodecLog:
    """Writes means of metrics over the steps since the last line, as a line of progress and to TensorBoard."""

    def __init__(self, config: Config, directory: Path | None, step: int):
        """Opens the file of TensorBoard's events.

        Args:
            config: The config of the run.
            directory: Where TensorBoard's events go; None: no events are written.
            step: The step that this start of the run begins at.
        """
        self._config = config
        self._events = None if directory is None else EventWriter(directory, step)
        self._window, self._waited = StepWindow(), 0.0

    def add(self, metrics: Mapping[str, np.ndarray], waited: float) -> None:
        """Adds the metrics of one step, and the seconds that the step waited for its batch."""
        self._window.add(metrics)
        self._waited += waited

    def write(self, step: int, codebooks: Tree) -> None:
        """Writes the means over the steps that were added since the last call, and the health of the codebooks."""
        means, steps, elapsed = self._window.means()
        waited, self._waited = self._waited, 0.0
        batch = self._config.data.batch_size * self._config.data.segment_samples / self._config.codec.sample_rate
        speed = {
            "steps_per_second": steps / elapsed,
            "audio_seconds_per_second": steps * batch / elapsed,
            "data_wait_share": waited / elapsed,
            "memory_gib": memory_gib(),
        }
        host = host_memory.of_process()
        scalars = {f"speed/{name}": value for name, value in speed.items()}
        scalars |= numbered("speed/host_memory_gib", multihost.of_all_processes(host))
        scalars |= numbered("speed/worker_memory_gib", host_memory.of_workers())
        for name, value in means.items():
            scalars |= numbered(tag(name), value)
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
            "step %d/%d  %s  %.3g steps/s  %.4g s of audio/s  data %.0f %%  host %.2f GiB  %s left",
            step,
            total,
            losses,
            speed["steps_per_second"],
            speed["audio_seconds_per_second"],
            100 * speed["data_wait_share"],
            host,
            f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min",
        )

    def write_validation(
        self, step: int, result: ValidationResult, seconds: float, weights: ValidationResult | None = None
    ) -> None:
        """Writes the result on held-out clips, with the audio and spectrograms of originals and reconstructions.

        Args:
            step: The number of steps that are done.
            result: The result, which is that of the weights' moving average if the run keeps one.
            seconds: How long the validation took. It does not count as time of the steps.
            weights: The result of the weights themselves; None: `result` is that.
        """
        self._window.leave_out(seconds)
        shares = ", ".join(f"{name} {100 * np.mean(values):.0f} %" for name, values in result.usage.items())
        distance = f"mel distance {result.mel_distance:.4f}"
        if weights is not None:
            distance += f" by the weight average, {weights.mel_distance:.4f} by the weights"
        curve = ", ".join(f"{count}: {value:.4f}" for count, value in result.mel_distances.items())
        LOG.info("step %d  held-out clips: %s; by codebooks %s; codebook usage %s", step, distance, curve, shares)
        if multihost.is_main() and step >= max(1, self._config.optimizer.warmup_steps):
            self._warn_of_ignored_codebooks(step, result)
        if self._events is None:
            return
        scalars = {"validation/mel_distance": result.mel_distance}
        for count, value in result.mel_distances.items():
            scalars[f"validation_mel_distance/codebooks_{count:02d}"] = value
        if weights is not None:
            scalars["validation/mel_distance_of_weights"] = weights.mel_distance
        for name, values in result.usage.items():
            scalars |= numbered(f"validation_usage/{name}", values)
        for row, pair in enumerate(zip(result.originals, result.reconstructions, strict=True)):
            for name, audio in zip(("original", "reconstruction"), pair, strict=True):
                samples, rate = np.clip(audio[0], -1, 1), self._config.codec.sample_rate
                self._events.clip(step, f"validation_{row}/{name}", samples, rate, spectrogram(samples))
        self._events.scalars(step, scalars)

    def write_time(self, step: int, spent: Spent) -> None:
        """Writes to TensorBoard the share of the run's wall time that each cause has had so far."""
        if self._events is not None:
            shares = {f"time/{cause.replace(' ', '_')}": share for cause, share in spent.shares.items()}
            self._events.scalars(step, shares)

    def _warn_of_ignored_codebooks(self, step: int, result: ValidationResult) -> None:
        codec = self._config.codec
        if not result.ignores_acoustic_codebooks(codec):
            return
        LOG.warning(
            "step %d  the decoder ignores the acoustic branch: with all %d codebooks the mel distance is less than "
            "%.0f %% below that with the semantic one alone (docs/training.md says what helps)",
            step,
            codec.num_quantizers,
            100 * LEAST_GAIN,
        )


def tag(metric: str) -> str:
    """Returns TensorBoard's tag of a metric, by `TAGS`."""
    for prefix, replacement in TAGS.items():
        if metric.startswith(prefix):
            return replacement + metric.removeprefix(prefix)
    return f"loss/{metric}"


def numbered(name: str, value: Any) -> dict[str, float]:
    """Names the values of a metric: a scalar by its name, and each value of a vector by name and codebook."""
    value = np.asarray(value)
    return {name: float(value)} if value.ndim == 0 else {f"{name}_{i:02d}": float(v) for i, v in enumerate(value)}


def codebook_health(cluster_usage: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns for Q codebooks with usages [Q, K] the shares of entries that are not dead, and the perplexities."""
    usage = np.asarray(cluster_usage)
    share = usage / usage.sum(-1, keepdims=True)
    alive = np.mean(usage > config.codec.codebook.dead_threshold * usage.mean(-1, keepdims=True), axis=-1)
    return alive, np.exp(-np.sum(share * np.log(np.maximum(share, 1e-20)), axis=-1))


def memory_gib() -> float:
    """Returns the peak memory of this process's first device in GiB; on a CPU, that of the process."""
    stats = jax.local_devices()[0].memory_stats()
    used = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return used / 2**30


def spectrogram(audio: np.ndarray) -> np.ndarray:
    """Draws samples [T] as a grey image [1, F, N] uint8: low frequencies at the bottom, 80 dB from black to white."""
    magnitude = np.abs(dsp.stft(jnp.asarray(audio), *SPECTROGRAM, center=True)).T[::-1]
    decibels = 20 * np.log10(np.maximum(magnitude, 1e-5) / SPECTROGRAM[0] ** 0.5)
    return (255 * np.clip((decibels + 60) / 80, 0, 1)).astype(np.uint8)[None]
