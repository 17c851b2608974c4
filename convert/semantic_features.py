"""Semantic features of prepared audio by the PyTorch Qwen3-Omni audio encoder, to be stored beside it.

python -m convert.semantic_features --prepared data/prepared --encoder models/Qwen3-Omni --out data/features

Run again, or with --task i/n on many machines, it does the shards that are not done.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from convert import qwen3_aut
from convert.tensors import from_entries, import_torch
from omnicodec_jax import command, model_directory
from omnicodec_jax.data import audio, features, records
from omnicodec_jax.data.features import FeatureFormat
from omnicodec_jax.data.records import SAMPLE_RATE, Shard
from omnicodec_jax.data.units import Task, remove_leftovers
from omnicodec_jax.errors import DataError
from omnicodec_jax.signal import MEL_BINS, MEL_SAMPLE_RATE


class Encoder:
    """transformers' Qwen3OmniMoeAudioEncoder with the log-mel front end that it was trained with."""

    def __init__(self, checkpoint: str, dtype: Literal["bfloat16", "float32"]):
        torch = import_torch()
        from transformers import WhisperFeatureExtractor
        from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
        from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

        mapping, state_dict = qwen3_aut.load_audio_tower(checkpoint)
        config = qwen3_aut.config_from_transformers(mapping)
        variables = from_entries(state_dict, qwen3_aut.key_table(config), config)
        self.hash = model_directory.model_hash(config, variables)
        """The same as of what `convert.qwen3_aut` writes."""
        self.feature_dim = config.output_dim
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = Qwen3OmniMoeAudioEncoder(Qwen3OmniMoeAudioEncoderConfig(**mapping))
        tensors = {key: torch.from_numpy(value.astype(np.float32)) for key, value in state_dict.items()}
        self._model.load_state_dict(tensors)
        self._model.to(device=self._device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        self._log_mel = WhisperFeatureExtractor(feature_size=MEL_BINS)

    def __call__(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """float32 features [S, F] of each clip of 24 kHz samples, filled up with zeros to whole seconds."""
        torch = import_torch()
        mels = [self._mel(clip) for clip in clips]
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=self._device)
        joined = torch.from_numpy(np.concatenate(mels, axis=1)).to(self._device, self._model.dtype)
        output = self._model(joined, lengths).last_hidden_state.float().cpu().numpy()
        sizes = [mel.shape[1] // 100 * features.PER_SECOND for mel in mels]
        return np.split(output, np.cumsum(sizes)[:-1])

    def _mel(self, clip: np.ndarray) -> np.ndarray:
        """Log-mel [bins, frames]."""
        whole = audio.fit_length(clip, -(-clip.size // SAMPLE_RATE) * SAMPLE_RATE)
        samples = audio.resample(whole, SAMPLE_RATE, MEL_SAMPLE_RATE)
        options: Any = {"padding": False, "truncation": False, "return_tensors": "np"}
        return self._log_mel(samples, sampling_rate=MEL_SAMPLE_RATE, **options)["input_features"][0]


class Error:
    """How far what is stored is from what was computed: root of the summed squares, relative."""

    def __init__(self):
        self.squared, self.total = 0.0, 0.0

    def add(self, stored: np.ndarray, computed: np.ndarray) -> None:
        """Of one segment."""
        self.squared += float(np.square(stored.astype(np.float32) - computed).sum())
        self.total += float(np.square(computed).sum())

    def __str__(self) -> str:
        return f"{(self.squared / max(self.total, 1e-30)) ** 0.5:.2e}"


def read_segments(prepared: Path, shard: Shard) -> Iterator[np.ndarray]:
    """Segments of a shard in their order, float32 [T]."""
    seconds = records.read_settings(prepared)["segment_seconds"]
    path = records.shard_path(prepared, shard.name)
    for number in range(sum(records.num_segments(clip, seconds) for clip in shard.clips)):
        yield records.read_samples(records.read_record(path, number)).astype(np.float32) / 32768


def batched(items: Iterable[np.ndarray], seconds: int) -> Iterator[list[np.ndarray]]:
    """Neighbours together, until they last `seconds`."""
    batch: list[np.ndarray] = []
    for item in items:
        batch.append(item)
        if sum(clip.size for clip in batch) >= seconds * SAMPLE_RATE:
            yield batch
            batch = []
    if batch:
        yield batch


def main(
    prepared: Path,
    encoder: str,
    out: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    number: Literal["bfloat16", "int8"] = "bfloat16",
    batch_seconds: int = 240,
    task: str = "0/1",
) -> int:
    """Compute and store the semantic features of prepared audio.

    Args:
        prepared: What `omnicodec prepare` has written.
        encoder: Directory or hub id of Qwen3-Omni, of its thinker, or of the audio encoder alone.
        out: Directory of the features.
        dtype: What the encoder computes in.
        number: What is stored: 51 kB per second of audio as bfloat16, half of that as int8.
        batch_seconds: Audio that is encoded at once.
        task: i/n: this process's share of the shards, counted from 0.
    """
    mine = Task.parse(task)
    shards = records.read_index(prepared)[mine.index :: mine.count]
    model = Encoder(encoder, dtype)
    format = FeatureFormat(encoder=model.hash, compute=dtype, feature_dim=model.feature_dim, number=number)
    features.save_format(out, format, silence=model([np.zeros(SAMPLE_RATE, np.float32)])[0])

    todo = [shard for shard in shards if not features.shard_path(out, shard).is_file()]
    error, failed = Error(), 0
    total = sum(sum(shard.clips) for shard in todo) // SAMPLE_RATE
    with tqdm(total=total, desc="features", unit=" s of audio") as bar:

        def encoded(shard: Shard) -> Iterator[bytes]:
            for batch in batched(read_segments(prepared, shard), batch_seconds):
                for computed in model(batch):
                    record = format.encode(computed)
                    error.add(format.decode(record, 0, len(computed)), computed)
                    yield record
                bar.update(sum(clip.size for clip in batch) // SAMPLE_RATE)

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
        f"relative error of {number} against {dtype}: {error}"
    )
    return int(failed > 0)


if __name__ == "__main__":
    command.run(main, prog="python -m convert.semantic_features")
