"""`make demo`: tokenizes the bundled clips with the codec that comes along, fine-tunes it, continues tokens, compares.

The decoder of the shipped codec learns for a minute from some of the clips; the page has the others, from an untrained
codec of the same architecture, the shipped one, the fine-tuned one and Opus. Training from nothing is
`omnicodec train --config demo`, or `--config small` for the shipped codec.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from omnicodec_jax import cli, compilation_cache, model_directory, shipped
from omnicodec_jax.cli import command, corpora
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import TokenSource
from omnicodec_jax.data import audio, records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.evaluation import run as evaluations
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.language_model import continuation, learning, perplexity
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import loop

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
CONFIG, LANGUAGE_MODEL = "small_fine_tune", "language_model_demo"
SHIPPED = shipped.MODELS[shipped.DEFAULT]
ENCODER = SHIPPED / model_directory.ENCODER
HELD_OUT = 0.27
"""Share of the clips: three of eleven, two of music and one of speech."""
CONTINUED_SECONDS = 2
OPUS = "opus=6000+12000"
ALL = 99
"""More codebooks than any codec here has: all are decoded from."""
METRICS = ("mel_distance", "stoi", "si_sdr")
PLAN = """This took six minutes on one busy core, and two are quicker:
  1. prepare the bundled clips, eight to learn from and three held out, and tokenize them with the shipped codec
  2. fine-tune the decoder of the shipped codec on the eight, for about a minute
  3. train a small language model on the tokens, and continue two seconds of a clip that it has not heard
  4. reconstruct the held-out clips: an untrained codec, the shipped one, the fine-tuned one and Opus; write the page
"""


def main() -> int:
    """Exit code 0 when the figures of the held-out clips are in the order that ears would give."""
    print(PLAN, flush=True)
    command.log_progress()
    compilation_cache.use()
    manifest = ",".join(f"{domain}={BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))
    cli.prepare(manifest=manifest, out=RUNS / "prepared", settings=PrepareConfig(validation=HELD_OUT))
    corpora.tokenize(manifest=manifest, out=RUNS / "tokens", model=str(SHIPPED))
    if status := fine_tune():
        return status
    predicted = continue_tokens()
    cli.init(CONFIG, RUNS / "untrained", encoder=ENCODER)
    evaluation = evaluations.Evaluation(
        data=held_out(),
        out=RUNS / "report",
        models={
            "untrained": str(RUNS / "untrained"),
            "shipped": str(SHIPPED),
            "fine-tuned": str(RUNS / "fine-tuned"),
        },
        peers=(PeerRequest.parse(OPUS),),
        codebooks=(ALL,),
        metrics=METRICS,
        num_workers=os.cpu_count() or 1,
    )
    evaluations.run(evaluation)
    print(f"\nHeld-out clips, {(RUNS / 'report' / 'tables.md').read_text()}")
    print(f"Perplexity of the tokens to a small language model, {predicted}\n")
    print(f"Listen and compare: {RUNS / 'report' / 'index.html'}   Curves: tensorboard --logdir {RUNS}")
    print(f"Two seconds of a clip, and the two that the language model says next: {RUNS / 'continuation.wav'}")
    print(f"Tokens of all clips: pyarrow.parquet.read_table('{RUNS / 'tokens' / 'shards'}')")
    return int(not as_ears_would_order_them(mel_distances()))


def fine_tune() -> int:
    """Lets the decoder of the shipped codec learn from the clips that are not held out. Returns the exit code."""
    config = config_files.load(CONFIG)
    data = dataclasses.replace(config.data, prepared=str(RUNS / "prepared"))
    run = dataclasses.replace(config.run, start_from=str(SHIPPED), encoder=str(ENCODER))
    if status := loop.run(dataclasses.replace(config, data=data, run=run), RUNS / "fine_tuning"):
        return status
    return cli.export_model(workdir=RUNS / "fine_tuning", out=RUNS / "fine-tuned", encoder=ENCODER)


def continue_tokens() -> perplexity.Perplexity:
    """Writes two seconds of a clip that the language model has not learnt, and its continuation.

    The fine-tuned codec decodes them: its tokens are those of the shipped one, as only its decoder has learnt.
    """
    settings = config_files.load_as((PerplexityConfig,), LANGUAGE_MODEL)
    learnt = learning.learn(RUNS / "tokens", settings)
    tokenizer = OmniCodecTokenizer.from_pretrained(RUNS / "fine-tuned")
    frames = round(CONTINUED_SECONDS * tokenizer.frame_rate)
    clip = TokenSource(RUNS / "tokens")[learnt.corpus.held_out.clips[0]]
    heard = clip.codes[:frames, : len(learnt.corpus.layout.codebook_sizes)]
    drawn = continuation.draw(learnt, heard, frames, sampling=continuation.Sampling(temperature=0.9, top_k=50))
    sound = tokenizer.decode(np.concatenate([heard, drawn]).T[None])[0, 0]
    audio.save(RUNS / "continuation.wav", sound, tokenizer.sample_rate)
    return perplexity.evaluate(learnt)


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


def mel_distances() -> list[dict[str, float]]:
    """Returns for each held-out clip the mel distance of each system's reconstruction."""
    distances: dict[tuple[str, str], dict[str, float]] = {}
    for row in map(json.loads, (RUNS / "report" / "scores.jsonl").open()):
        system = row["system"].rpartition("-")[0]
        distances.setdefault((row["domain"], row["clip"]), {})[system] = row["values"]["mel_distance"]
    return list(distances.values())


def as_ears_would_order_them(distances: list[dict[str, float]]) -> bool:
    """Says whether shipped beats untrained on every clip, and fine-tuned beats shipped on average.

    An untrained codec gives noise, whatever the clip. A minute on eight clips says something about audio of the same
    kind, though not about each of three others: so the fine-tuned codec is judged by its mean over the clips.
    """
    learnt = all(of["shipped"] < of["untrained"] for of in distances)
    gained = sum(of["shipped"] - of["fine-tuned"] for of in distances) > 0
    return learnt and gained


if __name__ == "__main__":
    command.exit_with(main)
