"""Finds the audio files below a directory, and counts what else is there."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path, PurePath
from typing import NamedTuple

from omnicodec_jax import names
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.data.audio import EXTENSIONS

LOG = logging.getLogger(__name__)

COMPANIONS = frozenset((".jsonl", ".scp", ".md"))
"""Kinds of files that are meant to lie beside audio: lists of it, and notes. Alone, they are not worth a warning."""
KINDS_NAMED = 8
"""Number of kinds that are named of what is passed over; the others are added up."""


class Found(NamedTuple):
    """Files that were found in a directory."""

    files: list[Path]
    """Files with one of the suffixes, sorted."""
    others: Counter[str]
    """Numbers of the files that are passed over, by their kind."""

    def __str__(self) -> str:
        """Describes what is passed over, kind by kind."""
        named = sorted(self.others.items(), key=lambda kind: (-kind[1], kind[0]))[:KINDS_NAMED]
        rest = self.others.total() - sum(count for _, count in named)
        if not self.others:
            return "nothing else" if self.files else "nothing"
        return ", ".join([*(f"{count} {kind}" for kind, count in named), *([f"{rest} of other kinds"] if rest else [])])


def find(path: Path, suffixes: Set[str] = EXTENSIONS) -> list[Path]:
    """Returns the file itself, or all files below a directory with one of the suffixes, sorted; see `look`."""
    return look(path, suffixes).files


def take(path: Path, suffixes: Set[str] = EXTENSIONS) -> Found:
    """Finds files as `look` does, and tells the user what is passed over, unless it is lists and notes alone."""
    found = look(path, suffixes)
    if found.files and not found.others.keys() <= COMPANIONS:
        LOG.warning("%s: passed over %s; files taken: %d", path, found, len(found.files))
    return found


def look(path: Path, suffixes: Set[str] = EXTENSIONS) -> Found:
    """Returns the file itself, or the files below a directory, by suffix.

    Links to files and to directories are followed. A directory that several links lead to is taken once, as it is
    called without links if it can be; hidden files and directories are passed over.
    """
    if not path.is_dir():
        return Found([path], Counter())
    if isinstance(path, BucketPath):
        return _look_in_bucket(path, suffixes)
    files: list[Path] = []
    others: Counter[str] = Counter()
    folders, links, seen = [(path, os.path.realpath(path))], [], set()
    while folders or links:
        if folders:
            folder, real = folders.pop()
        else:
            links.sort(reverse=True)
            folder = links.pop()
            real = os.path.realpath(folder)
        if real in seen:
            others["links to directories that are taken already"] += 1
            continue
        seen.add(real)
        try:
            for entry in _entries(folder):
                kind = PurePath(entry.name).suffix.lower()
                if entry.name.startswith("."):
                    others["hidden"] += 1
                elif _is_folder(entry):
                    if entry.is_symlink():
                        links.append(folder / entry.name)
                    else:
                        folders.append((folder / entry.name, os.path.join(real, entry.name)))
                elif kind in suffixes:
                    files.append(folder / entry.name)
                else:
                    others[names.text(kind) or "without a suffix"] += 1
        except OSError:
            others["directories that cannot be read"] += 1
    return Found(sorted(files), others)


def _look_in_bucket(folder: BucketPath, suffixes: Set[str]) -> Found:
    """Returns what `look` does of a folder in a bucket, which is listed once."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    for path in folder.find():
        kind = PurePath(path.name).suffix.lower()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            others["hidden"] += 1
        elif kind in suffixes:
            files.append(path)
        else:
            others[names.text(kind) or "without a suffix"] += 1
    return Found(sorted(files), others)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
