"""The paper's Table 2 at a small budget: python -m benchmarks.ablations --config demo

It trains the config and each of its ablations (recipes ablations/…) for the same number of steps, scores all of them on
the same clips, and measures the perplexity of their tokens with the same language model. By default it uses the data
that `make demo` has prepared and held out. Finished work is kept in --work, and the same command goes on from there.
"""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omnicodec_jax import compilation_cache, machine
from omnicodec_jax.cli import corpora
from omnicodec_jax.cli.models import export_model
from omnicodec_jax.cli.options import BUNDLED_CLIPS, named
from omnicodec_jax.codec_directory import encoder_directory
from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import contract, read_tokens
from omnicodec_jax.errors import ConfigError, TrainingError
from omnicodec_jax.evaluation import datasets, summary
from omnicodec_jax.evaluation import run as evaluations
from omnicodec_jax.evaluation.signal_metrics import SIGNAL_METRICS
from omnicodec_jax.language_model import perplexity
from omnicodec_jax.recipes import ablations
from omnicodec_jax.semantic import ENCODERS, read_encoder_of
from omnicodec_jax.training import loop

ROOT = Path(__file__).parents[1]
WHOLE, FINE_TUNED = "whole", "fine_tuned"
HELD_OUT = "runs/demo/held_out"
DOMAINS = ("speech", "music", "sound")


class Tokens(NamedTuple):
    """The figures of a model's tokens."""

    ppl0: float
    ppl_mean: float
    utilization: float
    """The share of the entries that the corpus uses, mean over the codebooks."""


def variants(base: Config, whole: Path) -> Iterator[tuple[str, Config]]:
    """Yields the config itself and its ablations by name. `whole` is the model that fine-tuning starts from."""
    yield WHOLE, base
    for _, name, _ in pkgutil.iter_modules(ablations.__path__):
        config: Config = importlib.import_module(f"{ablations.__name__}.{name}").ablate(base)
        if name == FINE_TUNED:
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, start_from=str(whole)))
        yield name, config


def shortened(config: Config, steps: int | None) -> Config:
    """Returns the config with fewer steps, of which at most a tenth are warm-up. None: the config as it is."""
    if steps is None or steps >= config.optimizer.total_steps:
        return config
    warmup = min(config.optimizer.warmup_steps, steps // 10)
    optimizer = dataclasses.replace(config.optimizer, total_steps=steps, warmup_steps=warmup)
    return dataclasses.replace(config, optimizer=optimizer)


def train(config: Config, folder: Path) -> Path:
    """Trains a config, or goes on with its training, and returns the model directory, which can tokenize by itself."""
    if loop.run(config, folder / "run"):
        raise TrainingError(f"{folder}: interrupted; the same command goes on")
    semantic, encoder = config.codec.semantic, config.run.encoder
    if semantic is None or semantic.source not in ENCODERS:
        encoder = None
    export_model(workdir=folder / "run", out=folder / "model", encoder=None if encoder is None else Path(encoder))
    return folder / "model"


def measure_tokens(model: Path, manifest: str, language_model: Path) -> Tokens:
    """Tokenizes a corpus, and returns the perplexity of its tokens and how many entries they use."""
    out = model.parent / "tokens"
    corpora.tokenize(manifest=manifest, out=out, model=str(model))
    result = perplexity.measure(out, config_files.load_as((PerplexityConfig,), language_model))
    use = summary.codebook_use([clip.codes.T for clip in read_tokens(out)], contract(out)["codebook_sizes"])
    return Tokens(result.ppl0, result.ppl_mean, float(np.mean(use.usage)))


def main(
    config: Path,
    work: Path = Path("runs/ablations"),
    steps: int | None = None,
    encoder: str | None = None,
    data: str = ",".join(f"{domain}={HELD_OUT}/{domain}.jsonl" for domain in ("speech", "music")),
    corpus: str = ",".join(f"{domain}={BUNDLED_CLIPS / domain}.jsonl" for domain in DOMAINS),
    language_model: Path = Path("language_model_demo"),
    codebooks: int = 16,
) -> None:
    """Train and score a config and its ablations.

    Args:
        config: Recipe or config file to ablate; its data must be prepared.
        work: Directory of runs, models and tokens.
        steps: Steps of each training, if it is to be shorter than the config says.
        encoder: Model directory of the frozen encoder of the semantic branch; by default, that of the config's run.
        data: Held-out clips to score, as `omnicodec evaluate` takes them.
        corpus: Audio whose tokens the language model learns, as `omnicodec tokenize` takes it.
        language_model: Recipe or config file of the language model.
        codebooks: Codebooks to decode from, the semantic one included.
    """
    base = config_files.load(config)
    if encoder is not None:
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, encoder=encoder))
    semantic = base.codec.semantic
    if semantic is not None and semantic.source in ENCODERS:  # told before hours of training
        if base.run.encoder is None:
            raise ConfigError(f"--encoder is missing: the models tokenize with that of source={semantic.source!r}")
        read_encoder_of(encoder_directory(base.run.encoder), semantic)
    held_out = {domain: Path(path) for domain, path in named(data, "--data").items()}
    for domain, path in held_out.items():  # so that a wrong path is reported now, and not after hours of training
        datasets.clips(path, domain, None)
    models, tokens = {}, {}
    for name, variant in variants(shortened(base, steps), work / WHOLE / "model"):
        models[name] = train(variant, work / name)
        tokens[name] = measure_tokens(models[name], corpus, language_model)
    evaluation = evaluations.Evaluation(
        data=held_out,
        out=work / "report",
        models={name: str(path) for name, path in models.items()},
        codebooks=(codebooks,),
        metrics=tuple(SIGNAL_METRICS),
        num_workers=machine.cores(),
    )
    evaluations.run(evaluation)
    report = json.loads((work / "report" / "report.json").read_text())
    titles = (*(metric.title for metric in SIGNAL_METRICS.values()), "PPL0", "PPL mean", "Codebook utilization")
    print(f"{' / '.join(report['domains'])}\n\n| | {' | '.join(titles)} |\n|{' --- |' * (len(titles) + 1)}")
    for system in report["systems"][1:]:
        name = system["name"].rpartition("-")[0]
        cells = report["summary"][system["name"]]
        values = [
            " / ".join(summary.format_number(cells[domain][metric]["mean"], 2) for domain in report["domains"])
            for metric in SIGNAL_METRICS
        ]
        values += [f"{tokens[name].ppl0:.2f}", f"{tokens[name].ppl_mean:.2f}", f"{tokens[name].utilization:.3f}"]
        print(f"| {name.replace('_', ' ')} | {' | '.join(values)} |")


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    command.log_progress()
    compilation_cache.use()
    command.run(main, prog="python -m benchmarks.ablations")
