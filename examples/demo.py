"""`make demo`: trains a tiny codec on some of the bundled clips and shows what it makes of the others.

Beside it stands the codec that comes with the package, which has learnt from hours of other audio.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from omnicodec_jax import cli, compilation_cache, shipped
from omnicodec_jax.cli import command, corpora
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.evaluation import run as evaluations
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS
from omnicodec_jax.language_model import perplexity
from omnicodec_jax.training import loop

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
CONFIG, LANGUAGE_MODEL = "demo", "language_model_demo"
HELD_OUT = 0.27
"""Share of the clips: three of eleven, two of music and one of speech."""
OPUS = "opus=6000+12000"
ALL = 99
"""More codebooks than any codec here has: all are decoded from."""


def main() -> int:
    """Exit code 0 when every held-out clip is nearer to what it was after training, and nearest from the codec that
    comes with the package."""
    command.log_progress()
    compilation_cache.use()
    manifest = ",".join(f"{domain}={BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))
    cli.prepare(manifest=manifest, out=RUNS / "prepared", settings=PrepareConfig(validation=HELD_OUT))
    cli.init(CONFIG, RUNS / "untrained")
    config = config_files.load(CONFIG)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(RUNS / "prepared")))
    if status := loop.run(config, RUNS / "run"):
        return status
    cli.export_model(workdir=RUNS / "run", out=RUNS / "trained")
    corpora.tokenize(manifest=manifest, out=RUNS / "corpus", model=str(RUNS / "trained"))
    settings = config_files.load_as((PerplexityConfig,), LANGUAGE_MODEL)
    predicted = perplexity.measure(RUNS / "corpus", settings)

    evaluation = evaluations.Evaluation(
        data=held_out(),
        out=RUNS / "report",
        models={name: str(RUNS / name) for name in ("untrained", "trained")} | {"small": shipped.DEFAULT},
        peers=(PeerRequest.parse(OPUS),),
        codebooks=(ALL,),
        metrics=tuple(SIGNAL_METRICS),
        num_workers=os.cpu_count() or 1,
    )
    evaluations.run(evaluation)
    print(f"\nHeld-out clips, {(RUNS / 'report' / 'tables.md').read_text()}")
    print(f"Perplexity of the tokens to a small language model, {predicted}\n")
    print(f"Listen and compare: {RUNS / 'report' / 'index.html'}   Curves: tensorboard --logdir {RUNS}")
    print(f"Tokens of all clips: pyarrow.parquet.read_table('{RUNS / 'corpus' / 'shards'}')")
    return int(not all(as_ears_would_order_them()))


def held_out() -> dict[str, Path]:
    """Lists of the bundled clips that training has not seen, by domain; none is so long as to make several records."""
    lists: dict[str, list[str]] = {}
    for shard in records.read_index(RUNS / "prepared"):
        for number in range(len(shard.clips) if shard.split == "validation" else 0):
            header = records.read_header(records.read_record(records.shard_path(RUNS / "prepared", shard.name), number))
            row = {"id": header.id, "audio_filepath": str(BUNDLED_CLIPS / f"{header.domain}_{header.id}.flac")}
            lists.setdefault(header.domain, []).append(json.dumps(row) + "\n")
    (RUNS / "held_out").mkdir(exist_ok=True)
    paths = {domain: RUNS / "held_out" / f"{domain}.jsonl" for domain in sorted(lists)}
    for domain, path in paths.items():
        path.write_text("".join(sorted(lists[domain])))
    return paths


def as_ears_would_order_them() -> list[bool]:
    """Says of each held-out clip whether its mel distance falls from untrained to trained to the shipped one."""
    distances: dict[tuple[str, str], dict[str, float]] = {}
    for row in map(json.loads, (RUNS / "report" / "scores.jsonl").open()):
        system = row["system"].rpartition("-")[0]
        distances.setdefault((row["domain"], row["clip"]), {})[system] = row["values"]["mel_distance"]
    return [of["untrained"] > of["trained"] > of[shipped.DEFAULT] for of in distances.values()]


if __name__ == "__main__":
    sys.exit(main())
