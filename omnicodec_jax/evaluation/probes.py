"""Probes: small classifiers that predict labels of clips from the frozen codes of a codec, on clips held out for it.

The label of a clip is a field of its line in a manifest, such as `speaker`, `language` or `class`. The label `text` is
the transcript, which a probe spells. A quarter of the clips is held out. Clips of one file stay together, and so do
clips of one `speaker` unless that is the label. So a probe cannot know the label by the voice alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.data import manifest
from omnicodec_jax.data.members import Member
from omnicodec_jax.errors import ConfigError, DataError

TRANSCRIPT = "text"
"""The label that a probe spells, while it chooses other labels from a few."""
SPEAKER = "speaker"
HELD_OUT = 4
"""The number of groups of clips of which one is held out."""
SHUFFLES = 3
"""The number of random orders of the labels over which the score by chance is averaged."""
CHANCE, CLIPS = "chance", "clips"
SHOWN = 5
"""The largest number of left-out labels that are named."""

GROUPS: dict[str, Callable[[int], range]] = {
    "first codebook": lambda count: range(1),
    "second": lambda count: range(1, min(2, count)),
    "first 8": lambda count: range(8 if count >= 8 else 0),
    "all but the first": lambda count: range(1, count),
    "all": lambda count: range(count),
}
"""Functions from the number of codebooks to those that a probe sees. If one is semantic, it is the first."""


class LabelledClip(NamedTuple):
    """A clip with the label that a probe has to predict."""

    path: Path | Member
    offset: float
    duration: float | None
    label: str
    group: str
    """The name of the clip's group. All clips of a group are held out, or none of them is."""


class HeldOut(NamedTuple):
    """The numbers of the clips that a probe learns from, and of those that it is tested on."""

    train: list[int]
    test: list[int]


def read(path: Path, label: str) -> list[LabelledClip]:
    """Returns the clips of a manifest that have a label. Raises DataError if there are fewer than eight."""
    found, folder = [], manifest.folder(path)
    for entry, fields in manifest.labelled(path, label):
        file = entry.file(folder)
        speaker = fields.get(SPEAKER) if label != SPEAKER else None
        known = speaker is not None and str(speaker).strip()
        # A file's group is its path from the manifest, so that a corpus is split in the same way wherever it lies.
        group = f"speaker {speaker}" if known else f"file {str(file).removeprefix(f'{folder}/')}"
        found.append(LabelledClip(file, entry.offset, entry.duration, str(fields[label]).strip(), group))
    if len(found) < 2 * HELD_OUT:
        raise DataError(f"{path}: {len(found)} clips with {label}; a probe needs at least {2 * HELD_OUT}")
    return found


def split(clips: Sequence[LabelledClip], label: str) -> HeldOut:
    """Divides clips into those to learn from and those to be tested on, in the same way wherever the corpus lies.

    Labels that are not in both parts are left out of both. Raises DataError if fewer than two are left.
    """
    by_label: dict[str, set[str]] = {}
    for clip in clips:
        by_label.setdefault("" if label == TRANSCRIPT else clip.label, set()).add(clip.group)
    held_out: dict[str, bool] = {}
    for groups in by_label.values():
        ordered = sorted(groups, key=lambda group: hashlib.sha256(group.encode(errors="surrogateescape")).digest())
        left = [group for group in ordered if group not in held_out]
        count = max(1, round(len(groups) / HELD_OUT)) - sum(held_out.get(group, False) for group in groups)
        held_out |= {group: number < count for number, group in enumerate(left)}
    both = {name for name, groups in by_label.items() if len({held_out[group] for group in groups}) == 2}
    if len(both) < (1 if label == TRANSCRIPT else 2):
        raise DataError(
            f"{label}: {len(both)} labels have clips to learn from and others to be tested on; "
            "two are needed, each in several files (and of several speakers, if lines have a speaker)"
        )
    used = [number for number, clip in enumerate(clips) if ("" if label == TRANSCRIPT else clip.label) in both]
    sides = {side: [number for number in used if held_out[clips[number].group] is side] for side in (False, True)}
    return HeldOut(sides[False], sides[True])


def labels_told(clips: Sequence[LabelledClip], label: str) -> str:
    """Returns a sentence that says how many labels probes tell apart, and which ones they have to leave out."""
    parts = split(clips, label)
    told = {clips[number].label for number in (*parts.train, *parts.test)}
    left_out = sorted({clip.label for clip in clips} - told)
    if not left_out:
        return f"There are {len(told)} labels."
    return (
        f"There are {len(told)} labels. Left out, as all clips of each are of one file or speaker: "
        f"{', '.join(left_out[:SHOWN])}{f' and {len(left_out) - SHOWN} more' if len(left_out) > SHOWN else ''}."
    )


def measure(
    clips: Sequence[LabelledClip], codes: Sequence[np.ndarray], sizes: Sequence[int], frame_rate: float, label: str
) -> dict[str, float]:
    """Returns the scores of probes of each group of codebooks: their accuracy, or the word error for transcripts.

    Args:
        clips: The clips.
        codes: The codes of each clip: [K, N].
        sizes: The number of entries of each codebook.
        frame_rate: The number of frames a second.
        label: The name of the label.

    Returns:
        The score of each group in `GROUPS`, by its name; under `CHANCE`, the score of a probe of all codebooks that has
        learnt from labels in a random order; and under `CLIPS`, the number of clips that were tested.

    Raises:
        DataError: If there are too few clips of each label.
    """
    parts = split(clips, label)
    chosen = {name: list(group(len(sizes))) for name, group in GROUPS.items()}
    labels = [clip.label for clip in clips]
    probe = _spelling if label == TRANSCRIPT else _accuracy
    figures = {}
    for name, books in chosen.items():
        if books:
            seen = [clip[books] for clip in codes]
            figures[name] = probe(seen, [sizes[book] for book in books], frame_rate, labels, parts)
    rng = np.random.default_rng(0)
    others = []
    for _ in range(1 if label == TRANSCRIPT else SHUFFLES):
        shuffled = list(labels)
        for number, other in zip(parts.train, rng.permutation(parts.train), strict=True):
            shuffled[number] = labels[other]
        others.append(probe(codes, sizes, frame_rate, shuffled, parts))
    return {**figures, CHANCE: float(np.mean(others)), CLIPS: float(len(parts.test))}


# -- Labels


def _accuracy(
    codes: Sequence[np.ndarray], sizes: Sequence[int], frame_rate: float, labels: Sequence[str], parts: HeldOut
) -> float:
    """Returns the share of held-out clips whose label a logistic regression predicts from the frequencies of codes."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    features = vstack([_frequencies(clip, sizes) for clip in codes]).tocsr()
    model = LogisticRegression(C=100.0, max_iter=1000)
    model.fit(features[parts.train], [labels[number] for number in parts.train])
    return float(model.score(features[parts.test], [labels[number] for number in parts.test]))


def _frequencies(codes: np.ndarray, sizes: Sequence[int]) -> Any:
    """Returns the square roots of the shares of all entries, which have norm 1, as a sparse row: [1, sum of sizes]."""
    from scipy.sparse import csr_matrix

    starts = np.concatenate([[0], np.cumsum(sizes)])
    entries, counts = np.unique(codes + starts[:-1, None], return_counts=True)
    shares = np.sqrt(counts / codes.size)
    return csr_matrix((shares, (np.zeros_like(entries), entries)), shape=(1, starts[-1]))


# -- Transcripts


def _spelling(
    codes: Sequence[np.ndarray], sizes: Sequence[int], frame_rate: float, labels: Sequence[str], parts: HeldOut
) -> float:
    """Returns the word error of the texts that a small CTC network spells from the codes of held-out clips."""
    from omnicodec_jax.evaluation import spelling

    try:
        import jiwer
    except ImportError:
        raise ConfigError("a probe of transcripts counts wrong words: pip install jiwer") from None
    said = [spelling.plain(label) for label in labels]
    learnt = [(codes[number], said[number]) for number in parts.train if said[number]]
    spoken = [(codes[number], said[number]) for number in parts.test if said[number]]
    if not (learnt and spoken):
        raise DataError("no words in the transcripts of clips to learn from, or of clips to be tested on")
    speller = spelling.learn(learnt, sizes, frame_rate)
    return float(jiwer.wer([text for _, text in spoken], [speller(clip) for clip, _ in spoken]))
