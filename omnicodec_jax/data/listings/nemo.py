"""NeMo's tarred manifests: a line names a file in the tar of its shard."""

import functools
import re
from pathlib import Path, PurePosixPath
from typing import Any

from omnicodec_jax.data.entries import Entry, contained
from omnicodec_jax.data.listings import tars
from omnicodec_jax.data.listings.tars import TarMember

LONGEST = 64
"""Largest number of characters of the name of a shard."""

FURTHER = re.compile(r"-sub\d+$")
"""End of the stem by which a line calls a file that another line has named before."""


def in_tar(entry: Entry, shard: Any, path: Path) -> Entry:
    """Returns the entry of a line with a `shard_id`: its file is in a tar, if there is a tar of the shard.

    The tar is called audio_N.tar, and lies beside the manifest, or, of a manifest a shard, in the directory above.

    Args:
        entry: The entry of the line, as that of a file by itself.
        shard: The shard's number; None: the line has none.
        path: The manifest.

    Raises ValueError for a shard that no tar can be called after.
    """
    if shard is None:
        return entry
    if type(shard) not in (int, str) or len(str(shard)) > LONGEST:
        raise ValueError(f"shard_id = {str(shard)[:LONGEST]}: must be a number or a short text")
    tar = tar_of(path.parent, shard)
    if tar is None:
        return entry
    member = _member(tar, entry.path)
    if member is None:
        return entry._replace(problem=f"{tar.name} has no such member")
    container = contained(tar, path.parent)
    return entry._replace(path=member.name, container=container, place=member.place, problem=member.problem)


@functools.lru_cache(4096)
def tar_of(folder: Path, shard: Any) -> Path | None:
    """Returns the tar of a shard; None if there is none."""
    places = (folder / f"audio_{shard}.tar", folder.parent / f"audio_{shard}.tar")
    return next((tar for tar in places if tar.is_file()), None)


def _member(tar: Path, name: str) -> TarMember | None:
    """Returns the member that a line means; None if there is none.

    Lines after the first about one file are called as it is with -sub1, -sub2 …; where NeMo has changed the format
    (--force_codec), the line has the suffix of before.
    """
    members, stem = _members(tar), _stem(name)
    return next((members[key] for key in (name, stem, FURTHER.sub("", stem)) if key in members), None)


@functools.lru_cache(2)
def _members(tar: Path) -> dict[str, TarMember]:
    """Returns the files of a tar by their names, and by their names without suffix."""
    found = tars.by_name(tar)
    return {_stem(name): member for name, member in found.items()} | found


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
