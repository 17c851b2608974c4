"""Computes the semantic features of prepared audio with a frozen audio encoder, and stores them.

omnicodec convert semantic-features --prepared data/prepared --encoder models/whisper --out data/features

A converted encoder is computed by JAX, a checkpoint of Qwen3-Omni by PyTorch.

Each of the crops that training will use (`omnicodec_jax/data/crops.py`) is encoded by itself, as the reference encodes
what it trains on; with Whisper, all of a segment is, as when a file is tokenized. The same command does the shards that
are not done yet; with --task i/n, many machines share them.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from omnicodec_jax import model_directory, shipped
from omnicodec_jax.buckets import as_path, on_disk
from omnicodec_jax.codec_directory import encoder_directory
from omnicodec_jax.converters import qwen3_aut
from omnicodec_jax.converters.tensors import from_entries, import_torch
from omnicodec_jax.converters.transformers_directory import naming
from omnicodec_jax.data import audio, crops, features, records
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.features import EncoderKind, FeatureFormat
from omnicodec_jax.data.prepare_unit import read_settings
from omnicodec_jax.data.records import SAMPLE_RATE, Shard
from omnicodec_jax.data.units import Share
from omnicodec_jax.dsp import MEL_BINS, MEL_SAMPLE_RATE
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import remove_leftovers
from omnicodec_jax.pretrained.whisper import WhisperConfig
from omnicodec_jax.semantic import FeatureExtractor, in_precision, read_encoder

SHORTEST = SAMPLE_RATE // 10
"""The smallest length of a crop, and the smallest distance between two, in samples."""


class TorchEncoder:
    """The Qwen3OmniMoeAudioEncoder of transformers, with the log-mel front end that it was trained with."""

    def __init__(self, checkpoint: str, dtype: Literal["bfloat16", "float32"], known: str | None = None):
        """Loads the encoder.

        Args:
            checkpoint: Directory or hub id of all of Qwen3-Omni, of its thinker, or of the encoder alone.
            dtype: The number format that it computes in.
            known: The hash that stored features carry; it is kept if version 0.1 gave it to this encoder.
        """
        torch = import_torch()
        from transformers import WhisperFeatureExtractor
        from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
        from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

        mapping, state_dict = qwen3_aut.load_audio_tower(checkpoint)
        with naming(checkpoint):
            config = qwen3_aut.config_from_transformers(mapping)
        variables = from_entries(state_dict, qwen3_aut.key_table(config), config)
        self.hash = model_directory.model_hash(config, variables, known)
        """The hash of its weights: that of the model directory that `omnicodec convert qwen3-aut` writes."""
        self.feature_dim = config.output_dim
        self.source: EncoderKind = "qwen3_aut"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = Qwen3OmniMoeAudioEncoder(Qwen3OmniMoeAudioEncoderConfig(**mapping))
        tensors = {key: torch.from_numpy(value.astype(np.float32)) for key, value in state_dict.items()}
        self._model.load_state_dict(tensors)
        self._model.to(device=self._device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        self._log_mel = WhisperFeatureExtractor(feature_size=MEL_BINS)

    def __call__(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the features of clips, each encoded by itself.

        Args:
            clips: Samples at 24 kHz; all clips have the same length.

        Returns:
            float32 [S, F] for each clip.
        """
        torch = import_torch()
        mels = [self._mel(clip) for clip in clips]
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=self._device)
        joined = torch.from_numpy(np.concatenate(mels, axis=1)).to(self._device, self._model.dtype)
        output = self._model(joined, lengths).last_hidden_state.float().cpu().numpy()
        return np.split(output, len(clips))

    def _mel(self, clip: np.ndarray) -> np.ndarray:
        """Returns the log-mel spectrogram of a clip: [bins, frames]."""
        samples = audio.resample(clip, SAMPLE_RATE, MEL_SAMPLE_RATE)
        options: Any = {"padding": False, "truncation": False, "return_tensors": "np"}
        return self._log_mel(samples, sampling_rate=MEL_SAMPLE_RATE, **options)["input_features"][0]


class JaxEncoder:
    """An encoder that is converted already, as it computes in the tokenizer."""

    def __init__(self, directory: Path, dtype: Literal["bfloat16", "float32"], known: str | None = None):
        """Loads the encoder from a model directory; see `TorchEncoder` for dtype and known."""
        config, variables = read_encoder(directory)
        self.hash = model_directory.model_hash(config, variables, known)
        """The hash of its weights."""
        self.feature_dim = config.output_dim
        self.source: EncoderKind = "whisper" if isinstance(config, WhisperConfig) else "qwen3_aut"
        self._extract = FeatureExtractor(in_precision((config, variables), dtype), jax.local_devices())

    def __call__(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the features of clips of any lengths, float32 [S, F] for each."""
        mels = ((number, self._extract.log_mel(clip, SAMPLE_RATE)) for number, clip in enumerate(clips))
        features = dict(self._extract.features(mels))
        return [features[number] for number in range(len(clips))]


def open_encoder(
    checkpoint: str, dtype: Literal["bfloat16", "float32"], known: str | None = None
) -> TorchEncoder | JaxEncoder:
    """Loads an encoder from a model directory, or from a checkpoint of Qwen3-Omni; see `TorchEncoder`."""
    directory = as_path(checkpoint)
    is_bundled = checkpoint in shipped.MODELS
    if not is_bundled and (not directory.is_dir() or model_directory.unconverted(directory) == "qwen3_aut"):
        return TorchEncoder(checkpoint, dtype, known)
    return JaxEncoder(encoder_directory(checkpoint), dtype, known)


class RoundingError:
    """The relative error of stored features against computed ones: the root of the summed squares."""

    def __init__(self):
        self.squared, self.total = 0.0, 0.0

    def add(self, stored: np.ndarray, computed: np.ndarray) -> None:
        """Adds the errors of one segment."""
        self.squared += float(np.square(stored.astype(np.float32) - computed).sum())
        self.total += float(np.square(computed).sum())

    def __str__(self) -> str:
        return f"{(self.squared / max(self.total, 1e-30)) ** 0.5:.2e}"


class Segment(NamedTuple):
    """A segment of a clip, which is a record of a shard of audio."""

    record: int
    """The number of the record."""
    samples: int
    """The length of the segment."""
    parts: list[tuple[int, int]]
    """The beginnings and lengths of the parts that are encoded."""


def segments(prepared: Path, shard: Shard, format: FeatureFormat) -> list[Segment]:
    """Returns the segments of a shard, in their order."""
    seconds = read_settings(prepared).segment_seconds
    lengths = [length for clip in shard.clips for _, length in records.segments(clip, seconds)]
    return [Segment(record, length, format.parts(length)) for record, length in enumerate(lengths)]


def read_parts(path: Path, segments: list[Segment]) -> Iterator[np.ndarray]:
    """Yields the parts of a shard's segments that are encoded, float32 [T]. Raises DataError."""
    for segment in segments:
        record = records.read_record(path, segment.record)
        for start, size in segment.parts:
            yield crops.read(record, segment.samples, start, size)


def batched(items: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yields lists of `size` neighbours; the last list may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def main(
    prepared: Path,
    encoder: str,
    out: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    number: Literal["bfloat16", "int8"] = "bfloat16",
    crop_seconds: float = 10.0,
    stride_seconds: float | None = None,
    batch_seconds: int = 240,
    task: str = "0/1",
) -> int:
    """Compute and store the semantic features of prepared audio.

    Args:
        prepared: Directory that `omnicodec prepare` has written.
        encoder: Directory that `omnicodec convert whisper` or `omnicodec convert qwen3-aut` has written; a codec that
            has an encoder, such as small; or directory or hub id of Qwen3-Omni, of its thinker, or of its audio encoder
            alone, which PyTorch runs.
        out: Directory of the features.
        dtype: Number format that the encoder computes in.
        number: Number format that is stored: bfloat16 takes 53 kB for each second of a crop (Whisper tiny: 10 kB), int8
            half of that.
        crop_seconds: Length of the crops that are trained on: data.segment_samples / 24000.
        stride_seconds: Seconds between the beginnings of two crops of a clip. The smaller it is, the more crops there
            are to store. Default: the length of a crop, so that crops lie side by side. With Whisper, crops of longer
            clips may begin at every vector, and are stored once.
        batch_seconds: Seconds of audio that are encoded at once.
        task: Share of the shards that this process does, i/n: number i, counted from 0, of n.
    """
    mine = Share.parse(task)
    shards = records.read_index(prepared)[mine.index :: mine.count]
    stride_seconds = crop_seconds if stride_seconds is None else stride_seconds
    if not all(SHORTEST <= seconds * SAMPLE_RATE < float("inf") for seconds in (crop_seconds, stride_seconds)):
        raise DataError(f"--crop-seconds {crop_seconds:g}, --stride-seconds {stride_seconds:g}: must be 0.1 or more")
    crop, stride = (round(seconds * SAMPLE_RATE) for seconds in (crop_seconds, stride_seconds))
    kept = features.read_format(out)
    model = open_encoder(encoder, dtype, None if kept is None else kept.encoder)
    format = FeatureFormat(
        encoder=model.hash,
        compute=dtype,
        feature_dim=model.feature_dim,
        source=model.source,
        number=number,
        crop_samples=crop,
        stride_samples=stride,
    )
    with claim(out, mine, "semantic features"):
        features.save_format(out, format)
        return _store(model, format, crop, prepared, shards, out, batch_seconds)


def _store(
    model: TorchEncoder | JaxEncoder,
    format: FeatureFormat,
    crop: int,
    prepared: Path,
    shards: list[Shard],
    out: Path,
    batch_seconds: int,
) -> int:
    """Computes and stores the features of the shards that have none yet. Returns the exit code."""
    held = {path.name for path in (out / records.SHARDS).glob(f"[!.]*{records.SUFFIX}")}
    seconds = read_settings(prepared).segment_seconds

    def is_done(shard: Shard) -> bool:
        path, count = features.shard_path(out, shard), sum(records.num_segments(clip, seconds) for clip in shard.clips)
        return path.name in held and records.is_whole(path, count)

    todo = [shard for shard in shards if not is_done(shard)]
    error, failed = RoundingError(), 0
    total = sum(sum(shard.clips) for shard in todo) // SAMPLE_RATE
    with tqdm(total=total, desc="features", unit=" s of audio") as bar:

        def encoded(shard: Shard) -> Iterator[bytes]:
            parts = segments(prepared, shard, format)
            size = max(1, batch_seconds * SAMPLE_RATE // crop)
            with on_disk(records.shard_path(prepared, shard.name)) as path:
                vectors = itertools.chain.from_iterable(map(model, batched(read_parts(path, parts), size)))
                for part in parts:
                    computed = np.concatenate(list(itertools.islice(vectors, len(part.parts))))
                    record = format.encode(computed)
                    error.add(format.decode(record, 0, len(computed)), computed)
                    yield record
                    bar.update(part.samples // SAMPLE_RATE)

        for shard in todo:
            path = features.shard_path(out, shard)
            remove_leftovers(path)
            try:
                records.write_shard(path, encoded(shard))
            except DataError as problem:
                bar.write(f"error: {shard.name}: {problem}", file=sys.stderr)
                failed += 1
    print(
        f"features: {len(todo) - failed} of {len(todo)} shards, {total / 3600:.2f} h, "
        f"relative error of {format.number} against {format.compute}: {error}"
    )
    return int(failed > 0)
