"""`make demo`: trains a small codec on some of the bundled clips and shows what it makes of the others."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp

from omnicodec_jax import cli, command, config_files
from omnicodec_jax.corpus import commands
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.losses import multi_scale_mel
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import loop

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
CONFIG = ROOT / "configs" / "demo.py"
HELD_OUT = 0.27
"""Share of the clips: three of eleven, two of music and one of speech."""


def main() -> int:
    """Exit code 0 when every held-out clip comes back nearer to what it was than from an untrained codec."""
    command.log_progress()
    command.use_compilation_cache()
    manifest = ",".join(f"{domain}={cli.BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))
    cli.prepare(manifest=manifest, out=RUNS / "prepared", settings=PrepareConfig(validation=HELD_OUT))
    cli.init(CONFIG, RUNS / "untrained")
    config = config_files.load(CONFIG)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(RUNS / "prepared")))
    if status := loop.run(config, RUNS / "run"):
        return status
    cli.export_model(workdir=RUNS / "run", out=RUNS / "trained")

    clips, distances = held_out(), {}
    for name in ("untrained", "trained"):
        for clip in clips:
            tokens, decoded = (RUNS / kind / name / clip.stem for kind in ("tokens", "audio"))
            tokens, decoded = tokens.with_suffix(".safetensors"), decoded.with_suffix(".wav")
            if cli.encode(clip, tokens, RUNS / name) or cli.decode(tokens, decoded, RUNS / name):
                return 1
            distances[name, clip] = distance(clip, decoded)
    commands.tokenize(manifest=manifest, out=RUNS / "corpus", model=str(RUNS / "trained"))
    codec = OmniCodecTokenizer.from_pretrained(RUNS / "trained")
    print(
        f"\nMel distance of held-out clips, {codec.num_quantizers} codebooks, {codec.bitrate:g} bit/s (0 is perfect):"
    )
    print(f"  {'':32} untrained  trained")
    for clip in clips:
        print(f"  {clip.stem:32} {distances['untrained', clip]:9.2f} {distances['trained', clip]:8.2f}")
    print(f"Audio: {RUNS / 'audio'}   Tokens: {RUNS / 'tokens'}   Curves: tensorboard --logdir {RUNS}")
    print(f"Tokens of all clips: pyarrow.parquet.read_table('{RUNS / 'corpus' / 'shards'}')")
    return int(any(distances["trained", clip] >= distances["untrained", clip] for clip in clips))


def held_out() -> list[Path]:
    """The bundled clips that training has not seen; none is so long that it became more than one record."""
    shards = [shard for shard in records.read_index(RUNS / "prepared") if shard.split == "validation"]
    found = [
        records.read_header(records.read_record(records.shard_path(RUNS / "prepared", shard.name), number))
        for shard in shards
        for number in range(len(shard.clips))
    ]
    return sorted(cli.BUNDLED_CLIPS / f"{header.domain}_{header.id}.flac" for header in found)


def distance(original: Path, decoded: Path) -> float:
    """Multi-scale mel distance at 24 kHz."""
    pair = [audio_files.load(path, records.SAMPLE_RATE).samples for path in (original, decoded)]
    size = min(samples.size for samples in pair)
    one, other = (jnp.asarray(samples[None, None, :size]) for samples in pair)
    return float(multi_scale_mel(other, one, records.SAMPLE_RATE))


if __name__ == "__main__":
    sys.exit(main())
