"""Cuts token shards into windows of equal length: those of some clips to train on, those of the others held out."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.corpus import TokenSource, shards
from omnicodec_jax.data.pipeline import Batches, Dataset
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import DataError
from omnicodec_jax.language_model.layout import Layout

TOKENS = "tokens"
"""The name of the only array of a batch: int32 [B, T + 1, C]."""


class ClipTable(NamedTuple):
    """A table of all clips of a directory of token shards without their codes, in the order of `TokenSource`."""

    frames: np.ndarray
    """The number of frames of each clip: int64 [N]."""
    domains: np.ndarray
    """The domain of each clip: str [N]."""
    shares: np.ndarray
    """A number in [0, 1) for each clip, which depends on the clip's id alone: float64 [N]."""
    fingerprint: str
    """A hash of the ids and lengths of the clips and of the token contract."""
    sources: str
    """A hash of the sources of the clips, which tells it from one of other audio under the same ids."""

    @classmethod
    def read(cls, tokens: Path) -> "ClipTable":
        """Reads the table of a directory. Raises DataError where there are no shards."""
        table = pa.concat_tables(
            [shards.read_columns(path, ["id", "domain", "frames", "source"]) for path in shards.shards(tokens)]
        )
        ids, frames = table["id"].to_pylist(), table["frames"].to_numpy().astype(np.int64)
        contract = shards.contract(tokens)
        del contract["format"]  # version 0.1 did not write it, and its runs must keep their fingerprints
        digest = hashlib.blake2b(json.dumps(contract, sort_keys=True).encode(), digest_size=8)
        digest.update("\0".join(ids).encode())
        digest.update(frames.tobytes())
        shares = np.array([_share(id) for id in ids], np.float64)
        sources = hashlib.blake2b("\0".join(table["source"].to_pylist()).encode(), digest_size=8)
        domains = np.array(table["domain"].to_pylist(), str)
        return cls(frames, domains, shares, digest.hexdigest(), sources.hexdigest())


def _share(id: str) -> float:
    """Returns a number in [0, 1), computed from an id as `omnicodec prepare` computes it from a path."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest()) / 2**64


def _how_to_split(shares: np.ndarray) -> str:
    """Returns advice for a user when either no clip or every clip is held out."""
    if len(shares) < 2:
        return "two clips or more are needed, one to train on and one to hold out"
    return f"--held-out {np.sort(shares)[:2].mean():.4g} would hold out one of them"


class Windows:
    """Some clips of a directory of token shards, cut into windows. Every frame is in exactly one of them."""

    def __init__(self, source: TokenSource, numbers: np.ndarray, frames: np.ndarray, length: int, layout: Layout):
        """Cuts clips into windows.

        Args:
            source: The clips of the directory.
            numbers: The numbers of the chosen clips in the source.
            frames: The number of frames of each chosen clip.
            length: The number of frames of a window.
            layout: How the codes of a window become ids.
        """
        counts = -(-frames // length)
        self._source, self._length, self._layout = source, length, layout
        self.clips = np.repeat(numbers, counts)
        """The number of each window's clip: int64 [W]."""
        self._starts = length * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """Returns one row of a batch."""
        number, start = self.clips[index], self._starts[index]
        codes = self._source[number].codes[start : start + self._length, : len(self._layout.codebook_sizes)]
        return {TOKENS: self._layout.steps(codes, self._length)}

    def or_blank(self, index: int) -> dict[str, np.ndarray]:
        """Returns a row as `windows[index]` does, and beyond the end a row of blanks, to fill up the last batch."""
        return self[index] if index < len(self) else {TOKENS: self._layout.blanks(self._length)}


class TokenCorpus(NamedTuple):
    """A directory of token shards, split into windows to train on and windows that are held out."""

    train: Windows
    held_out: Windows
    domains: np.ndarray
    """The domain of each held-out window: str [W]."""
    layout: Layout
    fingerprint: str
    """A hash by which a resumed run knows whether the tokens are still the same."""
    sources: str
    """A hash by which it knows whether they are still of the same audio, which version 0.1 did not keep."""

    @classmethod
    def open(cls, tokens: Path, config: PerplexityConfig) -> "TokenCorpus":
        """Opens a directory of token shards. Raises DataError if it has no tokens, or if all or none of the clips are
        held out."""
        source, clips = TokenSource(tokens), ClipTable.read(tokens)
        layout = Layout(config.layout, tuple(source.contract["codebook_sizes"][: config.num_codebooks]))

        def windows(chosen: np.ndarray, use: str) -> Windows:
            (numbers,) = np.nonzero(chosen)
            if not clips.frames[numbers].any():
                raise DataError(
                    f"{tokens}: of its {len(source)} clips none is {use} with held_out = {config.held_out:g}; "
                    + _how_to_split(clips.shares[clips.frames > 0])
                )
            return Windows(source, numbers, clips.frames[numbers], config.window_frames, layout)

        is_held_out = clips.shares < config.held_out
        held_out = windows(is_held_out, "held out")
        train = windows(~is_held_out, "trained on")
        return cls(train, held_out, clips.domains[held_out.clips], layout, clips.fingerprint, clips.sources)

    def training_order(self, seed: int) -> grain.MapDataset:
        """Returns an endless dataset of the windows to train on, shuffled anew in every epoch."""
        return grain.MapDataset.source(self.train).seed(seed).shuffle().repeat()


def batches(windows: Dataset, config: PerplexityConfig, mesh: Mesh, step: int = 0) -> Batches:
    """Returns batches of windows in their order, sharded over a mesh; the first is that of step number `step`."""
    return Batches(windows, config.batch_size, config.num_workers, sharding.batch_sharding(mesh), step)
