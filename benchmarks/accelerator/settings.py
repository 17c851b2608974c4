"""What the rows of the table measure, at full size or small, and a codec with random weights that uses all codes."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import CodecConfig, SemanticConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import audio, discovery
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.quantize import CODEBOOKS, nearest

TINY = Path(__file__).parents[2] / "tests" / "tiny_experiment.py"


class Settings(NamedTuple):
    """Sizes of everything that is measured."""

    config: str = "released_12hz"
    """Recipe or config file."""
    seconds: float = 10.0
    """Length of a training clip, and of a clip that is tokenized."""
    batches: tuple[int, ...] = (6, 12, 24)
    """Clips in a training step; a row for each."""
    clips: int = 256
    """Clips that are tokenized for the speed."""
    torch_batch: int = 16
    """Clips that PyTorch encodes at once."""
    compute_dtype: str = "bfloat16"
    """Number format that the training step computes in; in bfloat16 the step is rematerialised."""
    heard: int | None = None
    """How many of the bundled clips are tokenized to compare codes; None: all."""
    repeats: int = 5
    """Turns of what is timed, after two to warm up."""
    plan: bool = True
    """Whether a training step has its plan beside it."""


SMALL = Settings(str(TINY), 0.24, (2,), 2, 1, "float32", 2, 1)
"""To see on any machine that every row runs."""


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a function, after two turns to warm up."""
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def codec_config(settings: Settings) -> CodecConfig:
    """Returns the codec of the settings, with stacked log-mel frames in place of an encoder's features."""
    codec = config_files.load(settings.config).codec
    assert isinstance(codec, CodecConfig)
    semantic = codec.semantic or SemanticConfig()
    return dataclasses.replace(codec, semantic=dataclasses.replace(semantic, source="log_mel", feature_dim=1024))


def bundled_audio(settings: Settings, sample_rate: int) -> list[np.ndarray]:
    """Reads the bundled clips, float32 [T] each."""
    files = discovery.find(BUNDLED_CLIPS)[: settings.heard]
    return [audio.load(file, sample_rate, 0.95).samples for file in files]


def write_model(settings: Settings, directory: Path) -> None:
    """Writes a codec with random weights, whose codebooks lie where the vectors are that they quantize.

    A codec whose entries lie elsewhere would give the same few codes, whatever a device computes.
    """
    config, rng = codec_config(settings), np.random.default_rng(0)
    model = OmniCodec(config)
    shapes = flatten_dict(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    variables = unflatten_dict({path: random_values(path, leaf, rng) for path, leaf in shapes.items()})
    size = 2 * config.sample_rate
    pieces = [np.resize(clip, size) for clip in bundled_audio(settings, config.sample_rate)]
    low = [audio.resample(piece, config.sample_rate, dsp.MEL_SAMPLE_RATE) for piece in pieces]
    features = dsp.stack_frames(dsp.log_mel(jnp.asarray(np.stack(low))))

    @jax.jit
    def vectors(variables: Any, audio: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent: Any = model.apply(variables, audio, method="acoustic_latent")
        hidden: Any = model.apply(variables, features, latent.shape[1], method="semantic_frames")
        semantic: Any = model.apply(variables, hidden, method="semantic_vectors")
        acoustic: Any = model.apply(variables, latent, None, method="acoustic_vectors")
        return semantic, acoustic

    semantic, acoustic = vectors(variables, np.stack(pieces)[:, None], features)
    for name, rows in (("semantic_quantizer", semantic), ("acoustic_quantizer", acoustic)):
        variables[CODEBOOKS][name] = fitting_entries(variables[CODEBOOKS][name], rows, rng)
    model_directory.save(directory, config, variables)


def random_values(path: tuple[str, ...], leaf: Any, rng: np.random.Generator) -> np.ndarray:
    """Draws values under which signals neither fade out nor grow from layer to layer."""
    normal = rng.standard_normal(leaf.shape, np.float32)
    if path[-1] == "kernel":
        return normal / np.float32(math.prod(leaf.shape[:-1]) ** 0.5)
    if path[-1] == "scale":
        return np.full(leaf.shape, 0.3 if "layer_scale" in path[-2] else 1.0, np.float32)
    if path[-1] in ("cluster_usage", "initialized"):
        return np.ones(leaf.shape, np.float32)
    return np.float32(0.02) * normal


def fitting_entries(book: dict[str, Any], rows: jax.Array, rng: np.random.Generator) -> dict[str, Any]:
    """Draws the entries of residual codebooks, each as far apart as what the ones before it leave."""
    entries, left = [], np.asarray(rows)
    for shape in [book["embedding_sum"].shape[1:]] * len(book["embedding_sum"]):
        drawn = left.mean(0) + left.std(0) * rng.standard_normal(shape, np.float32)
        entries.append(drawn)
        left = left - drawn[np.asarray(nearest(jnp.asarray(left), jnp.asarray(drawn)))]
    return {**book, "embedding_sum": np.stack(entries).astype(np.float32)}
