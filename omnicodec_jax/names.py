"""Names for what is written of each clip: inside its folder, no longer than file systems allow, no two the same."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path, PurePosixPath

from omnicodec_jax.errors import DataError

NAME_BYTES = 255
"""Longest name that the common file systems take,"""
PATH_BYTES = 1024
"""and the longest relative path that is made of an id; whole paths may have some 4096."""


def text(name: str) -> str:
    """The name in characters that UTF-8 has: bytes of it that are none are written out, as in `caf\\udce9.wav`."""
    return name.encode(errors="backslashreplace").decode()


def utf8(path: Path) -> Path:
    """The path, for writers that take no other than UTF-8. Raises DataError for another."""
    if (known := text(str(path))) != str(path):
        raise DataError(f"{known}: the path is not UTF-8, as that of shards must be; choose another")
    return path


def fit(name: str, suffix: str = "") -> str:
    """The name with a suffix; what is too long for a file is cut, and a hash tells it from what is cut likewise."""
    whole = os.fsencode(name)
    if len(whole + os.fsencode(suffix)) <= NAME_BYTES:
        return name + suffix
    end = f"{_hash(name)}{suffix}"
    return whole[: NAME_BYTES - len(os.fsencode(end))].decode(errors="ignore") + end


def _hash(name: str) -> str:
    """What tells a name from others that would come out the same."""
    return f"~{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"


def inside(name: str) -> str:
    """The relative path that a name stands for, wherever it points: without "..", a leading "/" and the like.

    Empty, if nothing is left. What cannot be in a file's name is written out.
    """
    return "/".join(_writable(part) for part in name.split("/") if part not in ("", ".", ".."))


def _writable(part: str) -> str:
    try:
        os.fsencode(part)  # bytes that are not UTF-8 can be in a file's name, halves of characters cannot
    except UnicodeEncodeError:
        part = text(part)
    return part.replace("\0", r"\x00")


def distinct(where: Path, names: Sequence[str], suffix: str, replaced: Set[str]) -> list[str]:
    """For each clip a relative path of its own, made of its name, that ends in `suffix`.

    It stands in place of the name's own suffix, if that is one of `replaced`. Clips that would come out the same keep
    theirs: a.wav and a.flac become a.wav.SUFFIX and a.flac.SUFFIX. What some disks take for one name gets a hash: Ab
    and ab become Ab~HASH.SUFFIX and ab~HASH.SUFFIX. Raises DataError for clips that cannot be told apart; `where` is
    named in its message.
    """
    whole = [inside(name) or "clip" for name in names]
    for name, times in Counter(whole).most_common(1):
        if times > 1:
            raise DataError(f"{where}: {times} clips are called {text(name)}; give each its own `id`")
    short = [_without(name, replaced) for name in whole]
    cuts = (name for name, cut in zip(whole, short, strict=True) if name != cut)
    taken = Counter(map(key, short)) + Counter(map(key, cuts))
    chosen = [cut if taken[key(cut)] == 1 else name for name, cut in zip(whole, short, strict=True)]
    twins = Counter(map(key, chosen))
    paths = [_fit_path(name, suffix if twins[key(name)] == 1 else _hash(name) + suffix) for name in chosen]
    folders = {key(folder.as_posix()) for path in paths for folder in PurePosixPath(path).parents}
    if both := [path for path in paths if key(path) in folders]:
        raise DataError(f"{where}: {text(both[0])} would be a file and a directory; give each clip its own `id`")
    return paths


def key(name: str) -> str:
    """The same for names that some disk takes for one: in other cases, or with accents composed or not."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _without(name: str, replaced: Set[str]) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in replaced else name


def _fit_path(name: str, suffix: str) -> str:
    *folders, last = name.split("/") if len(os.fsencode(name)) <= PATH_BYTES else [name.replace("/", "_")]
    return "/".join([*map(fit, folders), fit(last, suffix)])


def assignments(text: str) -> list[str]:
    """The parts of a command line's `NAME=PATH,NAME=PATH`; paths may hold commas."""
    return re.split(r",(?=\w[\w.+-]*=)", text)
