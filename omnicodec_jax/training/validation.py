"""Validation: the mel distance of the codec on the same crops of held-out clips, by the number of codebooks."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omnicodec_jax import losses
from omnicodec_jax.buckets import as_path
from omnicodec_jax.config import CodecConfig, Config, MimiConfig
from omnicodec_jax.data import records
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.distributed import sharding
from omnicodec_jax.exact import full_float32
from omnicodec_jax.models.backbone import Latent
from omnicodec_jax.models.quantize import CODEBOOKS
from omnicodec_jax.semantic import ENCODERS
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.packing import Tree

LOG = logging.getLogger(__name__)

CLIPS_SHOWN = 4
"""The number of clips that TensorBoard shows, with their reconstructions."""
LEAST_GAIN = 0.02
"""The least share by which the acoustic codebooks lower the mel distance if the decoder does not ignore them."""


class ValidationResult(NamedTuple):
    """The result of one set of weights on the held-out clips."""

    mel_distances: dict[int, float]
    """The mean of `losses.multi_scale_mel` by the number of first codebooks that are decoded."""
    usage: dict[str, np.ndarray]
    """The share of entries of each branch's codebooks that occur in the codes of these clips."""
    originals: np.ndarray
    """The audio of the first clips: [CLIPS_SHOWN, 1, T]."""
    reconstructions: np.ndarray
    """The reconstructions of the first clips from all codebooks: [CLIPS_SHOWN, 1, T]."""

    @property
    def mel_distance(self) -> float:
        """The mel distance with all codebooks."""
        return self.mel_distances[max(self.mel_distances)]

    def ignores_acoustic_codebooks(self, codec: CodecConfig | MimiConfig) -> bool:
        """Returns whether decoding the acoustic codebooks, too, is hardly better than the semantic codebook alone.

        It is False for a codec without a semantic codebook.
        """
        semantic = self.mel_distances.get(codec.num_semantic_quantizers)
        return semantic is not None and self.mel_distance > (1 - LEAST_GAIN) * semantic


def codebook_counts(codec: CodecConfig | MimiConfig) -> list[int]:
    """Returns the numbers of codebooks that validation decodes: the semantic ones, powers of two, and all."""
    count = codec.num_quantizers
    powers = {2**i for i in range(count.bit_length()) if 2**i < count}
    return sorted({*powers, codec.num_semantic_quantizers, count} - {0})


class Validator:
    """Evaluates weights on held-out clips, every time on the same crops of them."""

    def __init__(self, gan: Gan, mesh: Mesh, samples: Samples):
        self._gan, self._mesh, self._samples = gan, mesh, samples
        evaluate = full_float32(partial(_evaluate, gan=gan, mesh=mesh))
        self._evaluate = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))

    @classmethod
    def open(cls, gan: Gan, mesh: Mesh) -> "Validator | None":
        """Opens the held-out clips of the domains that have some; returns None if no domain of the config has any."""
        data, seed = gan.config.data, gan.config.seed
        shards = records.read_index(as_path(data.prepared))
        held_out = {shard.domain for shard in shards if shard.split == "validation" and shard.clips}
        domains = tuple(domain for domain in data.domains if domain.name in held_out)
        if missing := [domain.name for domain in data.domains if domain not in domains]:
            LOG.warning(
                "%s: no clip of %s is held out, so there is no validation%s; prepare it again, into another directory, "
                "with a larger --validation: %s",
                data.prepared,
                " or ".join(missing),
                " of it" if domains else " at all",
                _enough(shards, missing),
            )
        if not domains:
            return None
        here = dataclasses.replace(data, domains=domains, num_workers=0)
        return cls(gan, mesh, Samples.open(here, seed, "validation", reads_features(gan.config)))

    def __call__(self, params: Tree, codebooks: Tree, frozen: FrozenVariables) -> ValidationResult:
        """Evaluates a codec's parameters and codebooks. All processes must call it, and all get the same result."""
        config = self._gan.config
        results, held = [], sharding.batch_sharding(self._mesh)
        with contextlib.closing(Batches(self._samples, config.data.batch_size, 0, held)) as batches:
            for _ in range(config.run.validation_batches):
                batch = next(batches)
                results.append(jax.device_get(self._evaluate({"params": params, CODEBOOKS: codebooks}, batch, frozen)))
        codes = np.concatenate([result.codes for result in results], axis=2)
        sizes, semantic = config.codec.codebook_sizes, config.codec.num_semantic_quantizers
        shares = np.array([np.unique(codes[:, k]).size / size for k, size in enumerate(sizes)])
        branches = {"semantic": shares[:semantic], "acoustic": shares[semantic:]}
        means = np.mean([result.mel_distances for result in results], axis=0)
        return ValidationResult(
            mel_distances=dict(zip(codebook_counts(config.codec), means.tolist(), strict=True)),
            usage={name: values for name, values in branches.items() if values.size},
            originals=results[0].originals,
            reconstructions=results[0].reconstructions,
        )


def _enough(shards: Sequence[records.Shard], domains: Sequence[str]) -> str:
    """Says which --validation holds out a clip of each of these domains, very likely.

    The paths of the files decide, which prepared audio does not keep: only `omnicodec prepare` can say the least one.
    """
    clips = min(sum(len(shard.clips) for shard in shards if shard.domain == domain) for domain in domains)
    return f"{min(0.5, 5 / max(1, clips)):.2g} is enough for {clips} clips, and omnicodec prepare says the least"


def reads_features(config: Config) -> bool:
    """Returns whether stored semantic features are read with the audio.

    Their source is `stored`, or an encoder if `data.features` is set. Without that, the step runs the encoder.
    """
    semantic = config.codec.semantic
    return semantic is not None and (
        semantic.source == "stored" or (semantic.source in ENCODERS and config.data.features is not None)
    )


def runs_encoder(config: Config) -> bool:
    """Returns whether the step runs the frozen encoder: on real audio without stored features, or on decoded audio."""
    semantic = config.codec.semantic
    return (semantic is not None and semantic.source in ENCODERS) and (
        not reads_features(config) or config.loss.semantic_perceptual > 0
    )


class _BatchResult(NamedTuple):
    mel_distances: jax.Array
    """The mel distance for each of `codebook_counts`."""
    codes: jax.Array
    originals: jax.Array
    reconstructions: jax.Array


def _evaluate(variables: Tree, batch: TrainBatch, frozen: FrozenVariables, gan: Gan, mesh: Mesh) -> _BatchResult:
    variables, frozen = sharding.gather(mesh, (variables, frozen))
    # Validation computes in float32, since a tokenizer will do so with these weights.
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    config = gan.config.codec
    call: Any = partial(gan.codec.clone(dtype=jnp.float32).apply, variables)

    def decode(latent: Latent) -> tuple[jax.Array, jax.Array]:
        decoded = call(latent, method="decode_latent")[:, :, : audio.shape[2]]
        return losses.multi_scale_mel(decoded, audio, config.sample_rate), decoded[:CLIPS_SHOWN]

    with sharding.in_force(mesh):
        inputs = gan.inputs(batch, frozen)
        audio = inputs.audio
        codes = call(audio, inputs.features, method="encode")
        latents = [call(codes[:, :count], method="dequantize") for count in codebook_counts(config)]
        distances, reconstructions = jax.lax.map(decode, jnp.stack(latents))  # one after the other, to save memory
    return _BatchResult(distances, codes, audio[:CLIPS_SHOWN], reconstructions[-1])
