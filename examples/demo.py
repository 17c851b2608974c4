"""`make demo`: tokenizes the bundled clips with the bundled codec, fine-tunes it, continues tokens, compares.

The decoder of the shipped codec learns for a minute from some of the clips; the page has the others, from an untrained
codec of the same architecture, the shipped one, the fine-tuned one and Opus. Training from nothing is
`omnicodec train --config demo`, or `--config small` for the shipped codec.
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omnicodec_jax import cli, compilation_cache, machine, model_directory, shipped
from omnicodec_jax.cli import command, corpora
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import TokenSource
from omnicodec_jax.data import audio, records
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.evaluation import run as evaluations
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.language_model import continuation, learning
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import loop

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
CONFIG, LANGUAGE_MODEL = "small_fine_tune", "language_model_demo"
SHIPPED = shipped.MODELS[shipped.DEFAULT]
ENCODER = SHIPPED / model_directory.ENCODER
HELD_OUT = 0.27
"""Share of the clips: three of eleven, two of music and one of speech."""
LEARNT = "learnt"
"""Name in the report of the clips that training has seen."""
CONTINUED_SECONDS = 2
OPUS = "opus=6000"
ALL = 99
"""More codebooks than any codec here has: all are decoded from."""
METRICS = ("mel_distance", "stoi")
Scores = dict[str, dict[str, float]]
"""The scores of a clip, by system and metric."""
PLAN = """This takes three to four minutes on two cores:
  1. prepare the bundled clips, eight to learn from and three held out, and tokenize them with the shipped codec
  2. fine-tune the decoder of the shipped codec on the eight, for about a minute
  3. train a small language model on the tokens, and continue two seconds of a clip that it has not heard
  4. reconstruct all clips: an untrained codec, the shipped one, the fine-tuned one and Opus; write the page
"""


def main() -> int:
    """Exit code 0 when the figures of the clips are in the order that ears would give."""
    print(PLAN, flush=True)
    command.log_progress()
    compilation_cache.use()
    manifest = ",".join(f"{domain}={BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))
    cli.prepare(manifest=manifest, out=RUNS / "prepared", settings=PrepareConfig(validation=HELD_OUT))
    corpora.tokenize(manifest=manifest, out=RUNS / "tokens", model=str(SHIPPED))
    # Compiling a training step keeps one core busy. The untrained codec is compiled and made on another one.
    with ThreadPoolExecutor(max_workers=1) as beside:
        untrained = beside.submit(cli.init, CONFIG, RUNS / "untrained", encoder=ENCODER)
        if status := fine_tune():
            return status
    untrained.result()
    continue_tokens()
    evaluation = evaluations.Evaluation(
        data=clip_lists(),
        out=RUNS / "report",
        models={
            "untrained": str(RUNS / "untrained"),
            "shipped": str(SHIPPED),
            "fine-tuned": str(RUNS / "fine-tuned"),
        },
        peers=(PeerRequest.parse(OPUS),),
        codebooks=(ALL,),
        metrics=METRICS,
        num_workers=machine.cores(),
    )
    evaluations.run(evaluation)
    print(f"\nClips that were learnt, and clips held out: {(RUNS / 'report' / 'tables.md').read_text()}")
    print(f"Listen and compare: {RUNS / 'report' / 'index.html'}   Curves: tensorboard --logdir {RUNS}")
    print(f"Two seconds of a clip, and the two that the language model says next: {RUNS / 'continuation.wav'}")
    print(f"Tokens of all clips: pyarrow.parquet.read_table('{RUNS / 'tokens' / 'shards'}')")
    return int(not as_ears_would_order_them(scores(held_out=True), scores(held_out=False)))


def fine_tune() -> int:
    """Lets the decoder of the shipped codec learn from the clips that are not held out. Returns the exit code."""
    config = config_files.load(CONFIG)
    data = dataclasses.replace(config.data, prepared=str(RUNS / "prepared"))
    # The page compares the held-out clips, so that validation would do it twice.
    run = dataclasses.replace(config.run, start_from=str(SHIPPED), encoder=str(ENCODER), validate_every=None)
    if status := loop.run(dataclasses.replace(config, data=data, run=run), RUNS / "fine_tuning"):
        return status
    return cli.export_model(workdir=RUNS / "fine_tuning", out=RUNS / "fine-tuned", encoder=ENCODER)


def continue_tokens() -> None:
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


def clip_lists() -> dict[str, Path]:
    """Lists of the bundled clips that training has not seen, by domain, and of those that it has, under `LEARNT`.

    No clip that is held out is so long as to make several records.
    """
    lists: dict[str, set[Path]] = {}
    for shard in records.read_index(RUNS / "prepared"):
        for number in range(len(shard.clips) if shard.split == "validation" else 0):
            header = records.read_header(records.read_record(records.shard_path(RUNS / "prepared", shard.name), number))
            lists.setdefault(header.domain, set()).add(BUNDLED_CLIPS / f"{header.domain}_{header.id}.flac")
    lists[LEARNT] = set(BUNDLED_CLIPS.glob("*.flac")).difference(*lists.values())
    (RUNS / "lists").mkdir(exist_ok=True)
    paths = {name: RUNS / "lists" / f"{name}.jsonl" for name in sorted(lists)}
    for name, path in paths.items():
        rows = ({"id": clip.stem, "audio_filepath": str(clip)} for clip in sorted(lists[name]))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def scores(held_out: bool) -> list[Scores]:
    """Returns the scores of each clip that is held out, or of each other one."""
    clips: dict[str, Scores] = {}
    for row in map(json.loads, (RUNS / "report" / "scores.jsonl").open()):
        if (row["domain"] != LEARNT) == held_out:
            clips.setdefault(row["clip"], {})[row["system"].rpartition("-")[0]] = row["values"]
    return list(clips.values())


def as_ears_would_order_them(held_out: list[Scores], learnt: list[Scores]) -> bool:
    """Says whether the scores of the clips are in the order that ears would give.

    An untrained codec gives noise, whatever the clip: by both measures, every other system must beat it on every
    held-out clip. The clips that the fine-tuned codec has learnt it must bring nearer, on average, than the shipped one
    does. What a minute on eight clips does to others is shown, and not judged: it may be either. So is the place of
    Opus: it is easier to understand, and further from the spectrum.
    """
    beaten = all(
        others["mel_distance"] < of["untrained"]["mel_distance"] and others["stoi"] > of["untrained"]["stoi"]
        for of in held_out
        for system, others in of.items()
        if system != "untrained"
    )
    gained = sum(of["shipped"]["mel_distance"] - of["fine-tuned"]["mel_distance"] for of in learnt) > 0
    return bool(held_out) and beaten and gained


if __name__ == "__main__":
    command.exit_with(main)
