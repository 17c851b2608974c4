"""How well the codec does on held-out clips: always the same crops, all codebooks."""

import contextlib
import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omnicodec_jax import losses
from omnicodec_jax.config import Config
from omnicodec_jax.data import records
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.distributed import sharding
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.training.accumulation import Batch
from omnicodec_jax.training.step import Frozen, Gan, Tree

LOG = logging.getLogger(__name__)

SHOWN = 4
"""Clips whose audio is kept."""


class Validation(NamedTuple):
    """What a model makes of the held-out clips."""

    mel_distance: float
    """`losses.multi_scale_mel`, mean."""
    usage: dict[str, np.ndarray]
    """Of each codebook of a branch, the share of its entries that these clips need."""
    originals: np.ndarray
    reconstructions: np.ndarray
    """[SHOWN, 1, T]"""


class Validator:
    """Evaluates one state after another on the same clips."""

    def __init__(self, gan: Gan, mesh: Mesh, samples: Samples):
        self._gan, self._mesh, self._samples = gan, mesh, samples
        self._evaluate = jax.jit(partial(_evaluate, gan=gan, mesh=mesh), out_shardings=sharding.replicated(mesh))

    @classmethod
    def open(cls, gan: Gan, mesh: Mesh) -> "Validator | None":
        """Of the domains that have held-out clips; None: no domain of the config has any."""
        data, seed = gan.config.data, gan.config.seed
        shards = records.read_index(Path(data.prepared))
        held_out = {shard.domain for shard in shards if shard.split == "validation" and shard.clips}
        domains = tuple(domain for domain in data.domains if domain.name in held_out)
        if missing := [domain.name for domain in data.domains if domain not in domains]:
            LOG.warning(
                "%s: no clip of %s is held out, so there is no validation%s; prepare it again, into another directory, "
                "with a larger --validation",
                data.prepared,
                " or ".join(missing),
                " of it" if domains else " at all",
            )
        if not domains:
            return None
        here = dataclasses.replace(data, domains=domains, num_workers=0)
        return cls(gan, mesh, Samples.open(here, seed, "validation", needs_features(gan.config)))

    def __call__(self, params: Tree, codebooks: Tree, frozen: Frozen) -> Validation:
        """All processes take part, and all get the result."""
        config = self._gan.config
        data = dataclasses.replace(config.data, num_workers=0)
        results = []
        with contextlib.closing(Batches(self._samples, data, sharding.batch_sharding(self._mesh))) as batches:
            for _ in range(config.run.validation_batches):
                batch = next(batches)
                results.append(jax.device_get(self._evaluate({"params": params, CODEBOOKS: codebooks}, batch, frozen)))
        usage = {}
        for branch in results[0].codes:
            codes = np.concatenate([result.codes[branch] for result in results], axis=2)
            size = config.codec.codebook_sizes[0 if branch == "semantic" else -1]
            usage[branch] = np.array([np.unique(codes[:, k]).size / size for k in range(codes.shape[1])])
        distance = float(np.mean([result.mel_distance for result in results]))
        return Validation(distance, usage, results[0].original, results[0].reconstruction)


def needs_features(config: Config) -> bool:
    """Whether features are read with the audio."""
    return config.codec.semantic is not None and config.codec.semantic.source == "stored"


class _Evaluated(NamedTuple):
    mel_distance: jax.Array
    codes: dict[str, jax.Array]
    original: jax.Array
    reconstruction: jax.Array


def _evaluate(variables: Tree, batch: Batch, frozen: Frozen, gan: Gan, mesh: Mesh) -> _Evaluated:
    variables, frozen = sharding.gather(mesh, (variables, frozen))
    # float32 whatever training computes in: what a tokenizer will make of these weights.
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    audio, features, _ = gan.inputs(batch, frozen)
    output: Any = gan.codec.clone(dtype=jnp.float32).apply(variables, audio, features)
    distance = losses.multi_scale_mel(output.audio, audio, gan.config.codec.sample_rate)
    branches = {"semantic": output.semantic, "acoustic": output.acoustic}
    codes = {name: branch.codes for name, branch in branches.items() if branch is not None}
    return _Evaluated(distance, codes, audio[:SHOWN], output.audio[:SHOWN])
