"""How well a language model predicts tokens: the paper's semantic evaluation (§3.1.4, Table 4).

    omnicodec perplexity --tokens data/tokens --config language_model --out ppl.json

A decoder of the Qwen2 kind is trained on token shards, and asked for the clips that were held out. The perplexity of a
codebook is exp(mean cross-entropy of its codes, in nats), each predicted among that codebook's; PPL0 is that of the
first codebook, PPL mean the mean of the codebooks' perplexities. What the model knows when it predicts code k of a
frame depends on the layout, and numbers of different layouts do not compare:

    flat       earlier frames, and the frame's codes before k. One code a step, codebook after codebook
    delayed    of each codebook j, the frames up to the (k - j - 1)-th after this one. K codes a step, codebook k comes
               k steps later
    parallel   earlier frames. K codes a step, each predicted without the others

"flat" is the default: it leaves out nothing that comes before, so that its cross-entropies add up to that of the whole
stream, and its model is Qwen2 as it is. The paper does not say which layout it has used. Perplexity depends on the
model, its training and the frame rate as well: compare codecs by the same config on tokens of the same audio. A model
that learns few clips by heart is surprised by all others, by more than the size of the codebook.
"""

import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omnicodec_jax.config import DataConfig, PerplexityConfig
from omnicodec_jax.config.language_model import LayoutName
from omnicodec_jax.corpus import TokenSource, shards
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import ConfigError, DataError, TrainingError
from omnicodec_jax.language_model.model import LanguageModel, Layout
from omnicodec_jax.models.initialize import COMPILE_QUICKLY
from omnicodec_jax.training.state import Tree, optimizer

LOG = logging.getLogger(__name__)

TOKENS = "tokens"
"""Name of the only array of a batch: int32 [B, T + 1, C]."""
STEPS_AHEAD = 2
"""Steps under way on the devices before the loss of the first of them is looked at."""
PAPER_SIZES = (2048,) * 8
"""Entries of the eight codebooks that the paper evaluates."""


# -- Tokens


class Clips(NamedTuple):
    """What is known of all clips of a directory of token shards, in the order of `TokenSource`."""

    frames: np.ndarray
    """int64 [N]"""
    domains: np.ndarray
    """str [N]"""
    shares: np.ndarray
    """float64 [N]: a number in [0, 1) that depends on the clip's id alone."""

    @classmethod
    def read(cls, tokens: Path) -> "Clips":
        """Without the codes. Raises DataError where there are no shards."""
        table = pa.concat_tables(
            [pq.read_table(path, columns=["id", "domain", "frames"]) for path in shards.shards(tokens)]
        )
        shares = np.fromiter((_share(id.as_py()) for id in table["id"]), np.float64, len(table))
        return cls(table["frames"].to_numpy().astype(np.int64), np.array(table["domain"].to_pylist(), str), shares)


def _share(id: str) -> float:
    """As `omnicodec prepare` chooses files by their paths."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest()) / 2**64


def _share_of_one(shares: np.ndarray) -> str:
    """What to do about clips that all lie on one side."""
    if len(shares) < 2:
        return "two clips or more are needed, one to train on and one to hold out"
    return f"--held-out {np.sort(shares)[:2].mean():.4g} would hold out one of them"


class Windows:
    """Some clips of a directory of token shards, cut into windows: each frame is in one of them."""

    def __init__(self, source: TokenSource, numbers: np.ndarray, frames: np.ndarray, length: int, layout: Layout):
        """numbers: of the clips, in the source; frames: of each of those clips; length: of a window, in frames."""
        counts = -(-frames // length)
        self._source, self._length, self._layout = source, length, layout
        self.clips = np.repeat(numbers, counts)
        """int64 [W]: number of each window's clip."""
        self._starts = length * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """One row of a batch."""
        number, start = self.clips[index], self._starts[index]
        codes = self._source[number].codes[start : start + self._length, : len(self._layout.codebook_sizes)]
        return {TOKENS: self._layout.steps(codes, self._length)}

    def or_blank(self, index: int) -> dict[str, np.ndarray]:
        """The same; beyond the end one without codes, to fill up a batch."""
        return self[index] if index < len(self) else {TOKENS: self._layout.blanks(self._length)}


class Corpus(NamedTuple):
    """Tokens ready to be learnt."""

    tokens: Path
    train: Windows
    held_out: Windows
    domains: np.ndarray
    """str [W]: of each held-out window."""
    layout: Layout

    @classmethod
    def open(cls, tokens: Path, config: PerplexityConfig) -> "Corpus":
        """Raises DataError where there are no shards, or no clips on either side."""
        source, clips = TokenSource(tokens), Clips.read(tokens)
        layout = Layout(config.layout, tuple(source.contract["codebook_sizes"][: config.num_codebooks]))

        def windows(chosen: np.ndarray, fate: str) -> Windows:
            (numbers,) = np.nonzero(chosen)
            if not clips.frames[numbers].any():
                raise DataError(
                    f"{tokens}: of its {len(source)} clips none is {fate} with held_out = {config.held_out:g}; "
                    + _share_of_one(clips.shares[clips.frames > 0])
                )
            return Windows(source, numbers, clips.frames[numbers], config.window_frames, layout)

        chosen = clips.shares < config.held_out
        held_out = windows(chosen, "held out")
        return cls(tokens, windows(~chosen, "trained on"), held_out, clips.domains[held_out.clips], layout)

    def training_order(self, seed: int) -> grain.MapDataset:
        """All windows to train on, endlessly, shuffled anew in every epoch."""
        return grain.MapDataset.source(self.train).seed(seed).shuffle().repeat()

    def batches(self, windows: grain.MapDataset, config: PerplexityConfig, mesh: Mesh) -> Batches:
        """Of windows in their order, over the mesh."""
        samples = Samples(choices=windows, crops=windows, clips=(), directory=self.tokens, fingerprint="")
        reading = DataConfig(batch_size=config.batch_size, num_workers=config.num_workers)
        return Batches(samples, reading, sharding.batch_sharding(mesh))


# -- Training


class State(NamedTuple):
    """What training carries from step to step: arrays, or what stands for them."""

    params: Tree
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, what it predicts and how it learns."""

    config: PerplexityConfig
    layout: Layout

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optimizer(self.config.optimizer, self.config.optimizer.weight_decay_modules)

    def init(self, key: PRNGKeyArray) -> State:
        """The state before the first step. Jit it."""
        params = self._model.init(key, jnp.zeros((1, 1, self.batch_shape[2]), jnp.int32))["params"]
        return State(params, self._optimizer.init(params))

    @property
    def _model(self) -> LanguageModel:
        dtype = jnp.dtype(self.config.compute_dtype)
        return LanguageModel(self.config.model, self.layout.vocabulary, dtype, self.config.remat)

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """[B, T + 1, C]"""
        return self.config.batch_size, *self.layout.blanks(self.config.window_frames).shape

    def evaluate(
        self, params: Tree, batch: dict[str, Int[Array, "B S C"]]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
        """`Layout.cross_entropy` of every step but the first, each predicted from those before it."""
        tokens = batch[TOKENS]
        logits: Any = self._model.apply({"params": params}, tokens[:, :-1])
        return self.layout.cross_entropy(logits, tokens[:, 1:])

    def train_step(self, state: State, batch: dict[str, Int[Array, "B S C"]]) -> tuple[State, Float[Array, ""]]:
        """Updates the parameters on one batch; the mean cross-entropy of its codes before that, in nats."""

        def loss(params: Tree) -> Float[Array, ""]:
            nats, counts = self.evaluate(params, batch)
            return nats.sum() / counts.sum()

        value, gradient = jax.value_and_grad(loss)(state.params)
        update, moments = self._optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, update), moments), value

    def template(self, mesh: Mesh) -> State:
        """Shapes and shardings of the state."""
        return sharding.template(mesh, lambda: self.init(jax.random.key(0)))


def jit_step(task: Task, mesh: Mesh) -> Callable[..., tuple[State, Array]]:
    """`Task.train_step` over a mesh. The state that goes in is given away. Raises ConfigError for an uneven batch."""
    if (size := task.config.batch_size) % (rows := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(f"PerplexityConfig.batch_size = {size}: must be a multiple of data x fsdp = {rows}")
    held = sharding.shardings(mesh, task.template(mesh))
    return jax.jit(
        task.train_step,
        in_shardings=(held, sharding.batch_sharding(mesh)),
        out_shardings=(held, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def lower_step(
    config: PerplexityConfig, mesh: Mesh, codebook_sizes: tuple[int, ...] = PAPER_SIZES
) -> jax.stages.Lowered:
    """The very step that training runs, from shapes alone; `.compile()` it. The mesh's devices need not exist."""
    task = Task(config, Layout(config.layout, codebook_sizes[: config.num_codebooks]))
    batch = jax.ShapeDtypeStruct(task.batch_shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    step: Any = jit_step(task, mesh)
    return step.lower(task.template(mesh), {TOKENS: batch})


def train(task: Task, corpus: Corpus, mesh: Mesh) -> Tree:
    """Parameters after `optimizer.total_steps`. Raises TrainingError if the loss is not finite."""
    config, total = task.config, task.config.optimizer.total_steps
    held = sharding.shardings(mesh, task.template(mesh))
    state = jax.jit(task.init, out_shardings=held, compiler_options=COMPILE_QUICKLY)(jax.random.key(config.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    LOG.info("%.1f M parameters, %d windows, %d held out", size / 1e6, len(corpus.train), len(corpus.held_out))
    step = jit_step(task, mesh)
    since, waiting, seen = time.perf_counter(), deque(), []
    with closing(corpus.batches(corpus.training_order(config.seed), config, mesh)) as batches:
        for done in range(1, total + 1):
            state, loss = step(state, next(batches))
            waiting.append(loss)
            logged = done % config.log_every == 0 or done == total
            while len(waiting) > (0 if logged else STEPS_AHEAD):
                seen.append(float(waiting.popleft()))
            if not np.isfinite(seen).all():
                raise TrainingError(f"step {done}: the loss is not finite; a lower optimizer.learning_rate may help")
            if logged:
                speed, mean = len(seen) / (time.perf_counter() - since), np.mean(seen)
                LOG.info("step %d/%d  cross-entropy %.4f nats  %.3g steps/s", done, total, mean, speed)
                since, seen = time.perf_counter(), []
    return state.params


# -- Evaluation


class Perplexity(NamedTuple):
    """Of held-out tokens."""

    layout: LayoutName
    """Of another one, numbers do not compare."""
    ppl: tuple[float, ...]
    """Of each codebook."""
    tokens: int
    """Codes that count, of all these codebooks."""
    domains: dict[str, "Perplexity"]
    """The same of each domain; empty if the shards name none."""

    @property
    def ppl0(self) -> float:
        """Of the first codebook."""
        return self.ppl[0]

    @property
    def ppl_mean(self) -> float:
        """Mean of the codebooks' perplexities."""
        return float(np.mean(self.ppl))

    @classmethod
    def of(
        cls, layout: LayoutName, nats: np.ndarray, counts: np.ndarray, domains: np.ndarray | None = None
    ) -> "Perplexity":
        """From each window's sums of nats and counts of codes [W, K], and the windows' domains [W]."""
        names = () if domains is None else np.unique(domains[domains != ""]).tolist()
        each = {name: cls.of(layout, nats[domains == name], counts[domains == name]) for name in names}
        ppl = np.exp(nats.sum(0, dtype=np.float64) / counts.sum(0))
        return cls(layout, tuple(ppl.tolist()), int(counts.sum()), each)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        derived = {"ppl0": self.ppl0, "ppl_mean": self.ppl_mean}
        return {**self._asdict(), **derived, "domains": {name: each.to_dict() for name, each in self.domains.items()}}

    def __str__(self) -> str:
        rows = [*self.domains.items(), ("all", self)]
        lines = [f"{name:12} {each.ppl0:10.2f} {each.ppl_mean:10.2f} {each.tokens:12}" for name, each in rows]
        heading = f"{'':12} {'PPL0':>10} {'PPL mean':>10} {'tokens':>12}"
        return "\n".join([f"layout {self.layout}, {len(self.ppl)} codebooks; {NOTE}", heading, *lines])


def evaluate(task: Task, params: Tree, corpus: Corpus, mesh: Mesh) -> Perplexity:
    """Of all held-out windows. All processes take part, and all get the result."""
    score = jax.jit(task.evaluate, out_shardings=sharding.replicated(mesh))
    total, size = len(corpus.held_out), task.config.batch_size
    count = -(-total // size)
    windows = grain.MapDataset.range(count * size).map(corpus.held_out.or_blank)
    with closing(corpus.batches(windows, task.config, mesh)) as batches:
        results = [jax.device_get(score(params, next(batches))) for _ in range(count)]
    nats, counts = (np.concatenate(parts)[:total] for parts in zip(*results, strict=True))
    return Perplexity.of(task.layout.name, nats, counts, corpus.domains)


def measure(tokens: Path, config: PerplexityConfig) -> Perplexity:
    """Trains a language model on some clips of a directory of token shards, and evaluates it on the others.

    Raises DataError for tokens that cannot be used, ConfigError for a mesh that does not fit the devices, TrainingError
    for a training that diverges.
    """
    corpus, mesh = Corpus.open(tokens, config), sharding.make_mesh(config.mesh)
    task = Task(config, corpus.layout)
    return evaluate(task, train(task, corpus, mesh), corpus, mesh)
