"""Perplexity of tokens: how well a language model predicts them (the paper's semantic evaluation, §3.1.4, Table 4).

    omnicodec perplexity --tokens data/tokens --config language_model --out ppl.json

A decoder of the Qwen2 kind is trained on token shards and evaluated on the clips that were held out. The perplexity of
a codebook is exp(mean cross-entropy of its codes, in nats), where each code is predicted among the codes of its
codebook. PPL0 is the perplexity of the first codebook, PPL mean the mean over the codebooks. The layout decides what
the model knows when it predicts code k of a frame, and numbers of different layouts cannot be compared:

    flat       Earlier frames, and the codes of this frame before k. A step has one code; codebook follows codebook.
    delayed    Of each codebook j, the frames up to the (k - j - 1)-th after this one. A step has K codes; codebook k
               comes k steps later.
    parallel   Earlier frames. A step has K codes, and each is predicted without the others.

"flat" is the default. It leaves out nothing that comes before, so that its cross-entropies add up to that of the whole
stream, and its model is Qwen2 without changes. The paper does not say which layout it has used. Perplexity also depends
on the model, on its training and on the frame rate: to compare codecs, use the same config on tokens of the same audio.
A model that has learnt few clips by heart predicts all others badly, and its perplexity can exceed the codebook's size.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.config.language_model import LayoutName
from omnicodec_jax.distributed import sharding
from omnicodec_jax.language_model.learning import Learnt, learn
from omnicodec_jax.language_model.windows import batches

NOTE = "numbers of different layouts do not compare"


class Perplexity(NamedTuple):
    """The perplexity of held-out tokens, over all clips and for each domain."""

    layout: LayoutName
    """The layout of the model's ids. Perplexities of different layouts cannot be compared."""
    ppl: tuple[float, ...]
    """The perplexity of each codebook."""
    tokens: int
    """The number of codes that were predicted, over all codebooks."""
    domains: dict[str, "Perplexity"]
    """The perplexity of each domain; empty where the shards name no domains."""

    @property
    def ppl0(self) -> float:
        """The perplexity of the first codebook."""
        return self.ppl[0]

    @property
    def ppl_mean(self) -> float:
        """The mean of the codebooks' perplexities."""
        return float(np.mean(self.ppl))

    @classmethod
    def from_sums(
        cls, layout: LayoutName, nats: np.ndarray, counts: np.ndarray, domains: np.ndarray | None = None
    ) -> "Perplexity":
        """Computes perplexities from the sums of windows.

        Args:
            layout: The layout of the windows.
            nats: The cross-entropy of each window and codebook, summed over its codes: [W, K].
            counts: The number of codes of each window and codebook: [W, K].
            domains: The domain of each window: str [W].
        """
        names = () if domains is None else np.unique(domains[domains != ""]).tolist()
        each = {name: cls.from_sums(layout, nats[domains == name], counts[domains == name]) for name in names}
        ppl = np.exp(nats.sum(0, dtype=np.float64) / counts.sum(0))
        return cls(layout, tuple(ppl.tolist()), int(counts.sum()), each)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as a dict that JSON can hold."""
        derived = {"ppl0": self.ppl0, "ppl_mean": self.ppl_mean}
        return {**self._asdict(), **derived, "domains": {name: each.to_dict() for name, each in self.domains.items()}}

    def __str__(self) -> str:
        rows = [*self.domains.items(), ("all", self)]
        lines = [f"{name:12} {each.ppl0:10.2f} {each.ppl_mean:10.2f} {each.tokens:12}" for name, each in rows]
        heading = f"{'':12} {'PPL0':>10} {'PPL mean':>10} {'tokens':>12}"
        return "\n".join([f"layout {self.layout}, {len(self.ppl)} codebooks; {NOTE}", heading, *lines])


def evaluate(learnt: Learnt) -> Perplexity:
    """Returns the perplexity of all held-out windows. All processes take part, and all get the result."""
    trainer, params, corpus, mesh = learnt
    score = jax.jit(trainer.evaluate, out_shardings=sharding.replicated(mesh))
    total, size = len(corpus.held_out), trainer.config.batch_size
    count = -(-total // size)
    windows = grain.MapDataset.range(count * size).map(corpus.held_out.or_blank)
    with contextlib.closing(batches(windows, trainer.config, mesh)) as rows:
        results = [jax.device_get(score(params, next(rows))) for _ in range(count)]
    nats, counts = (np.concatenate(parts)[:total] for parts in zip(*results, strict=True))
    return Perplexity.from_sums(trainer.layout.name, nats, counts, corpus.domains)


def measure(tokens: Path, config: PerplexityConfig, workdir: Path | None = None) -> Perplexity:
    """Trains a language model on some clips with `learn`, and evaluates it on the others with `evaluate`."""
    return evaluate(learn(tokens, config, workdir))
