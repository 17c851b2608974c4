"""Token shards as training data: clips by number for Grain, and the layouts that language models take."""

import bisect
import operator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax.buckets import as_path
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data.attempts import Seen

OPEN_GROUPS = 16
"""Number of row groups that a process keeps in memory."""


def flat(codes: np.ndarray, codebook_sizes: list[int]) -> np.ndarray:
    """Lays codes out in one sequence, frame by frame, each codebook with numbers of its own.

    Args:
        codes: Integers [N, K].
        codebook_sizes: Entries of the codebooks, at least K of them. Codebook k has the numbers from the sum of the
            sizes before it.

    Returns:
        int32 [N · K].

    Examples:
        >>> flat(np.array([[1, 2], [3, 0]]), [4, 8]).tolist()
        [1, 6, 3, 4]
    """
    first = np.cumsum([0, *codebook_sizes[:-1]])[: codes.shape[1]]
    return (codes.astype(np.int32) + first).reshape(-1).astype(np.int32)


def delayed(codes: np.ndarray, fill: int) -> np.ndarray:
    """Lays codes out so that codebook k comes k steps later (MusicGen's delay pattern, arXiv 2306.05284).

    Args:
        codes: Integers [N, K].
        fill: The value in the places that have no code.

    Returns:
        int32 [N + K - 1, K].

    Examples:
        >>> delayed(np.array([[1, 2], [3, 4]]), fill=9).tolist()
        [[1, 9], [3, 2], [9, 4]]
    """
    frames, width = codes.shape
    result = np.full((frames + width - 1, width), fill, np.int32)
    for k in range(width):
        result[k : k + frames, k] = codes[:, k]
    return result


class TokenSource:
    """Gives clips of a directory of token shards by number: a random-access source for Grain.

    `len(source)` is the number of clips, and `source[7]` is a `Clip`.

    Examples:
        >>> import grain
        >>> source = TokenSource("data/tokens")
        >>> sizes = source.contract["codebook_sizes"]
        >>> dataset = grain.MapDataset.source(source).shuffle(seed=0).map(lambda clip: flat(clip.codes, sizes))
        >>> len(dataset) == len(source), dataset[0].ndim
        (True, 1)
    """

    def __init__(self, out: Path | str):
        """Opens the shards; their codes are read when they are asked for.

        Args:
            out: Directory that `omnicodec tokenize` has written.

        Raises:
            DataError: If it holds no finished shards.
        """
        self.contract = shards.contract(as_path(out))
        """The contract of the tokens: sizes of the codebooks, frame rate, model, and so on."""
        self._groups: list[tuple[Path, int, Seen]] = []
        self._ends: list[int] = []
        total = 0
        for path in shards.shards(as_path(out)):
            seen = Seen.of(path)  # since a later run may replace a shard, and groups are kept for all sources
            with shards.opened(path) as file:
                metadata = file.metadata
            for group in range(metadata.num_row_groups):
                total += metadata.row_group(group).num_rows
                self._groups.append((path, group, seen))
                self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Clip:
        index = range(len(self))[operator.index(number)]
        group = bisect.bisect_right(self._ends, index)
        clips = _read_group(*self._groups[group])
        return clips[index - self._ends[group]]  # counted from the end of the group


@lru_cache(OPEN_GROUPS)
def _read_group(path: Path, group: int, _seen: Seen) -> list[Clip]:
    with shards.opened(path) as file:
        return shards.read_group(file, group)
