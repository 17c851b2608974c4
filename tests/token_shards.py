"""Token shards without a model."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from omnicodec_jax.corpus import shards


def write(folder: Path, clips: dict[str, int], frames: int = 5) -> Path:
    """A directory of one shard with so many clips of each domain, of one codebook of four entries at 12.5 Hz."""
    contract = {"codebook_sizes": [4], "frame_rate": 12.5, "model": "0123456789abcdef", "encoder": None}
    about = {"frames": frames, "duration": frames / 12.5, "codes": [[0]] * frames, "gain": 1.0, "source": ""}
    about |= {"sample_rate": 24_000, "num_samples": frames * 1920}
    rows = [{"id": f"{domain}{n}", "domain": domain, **about} for domain in clips for n in range(clips[domain])]
    path = shards.shard_path(folder, "all-000000")
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=shards.schema(1, contract)), path)
    path.with_suffix(".json").write_text('{"shard": {}, "rejects": []}\n')
    return folder
