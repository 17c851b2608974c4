"""Names of the files that are written for clips: inside their folder, not too long for file systems, all different."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path, PurePosixPath

from omnicodec_jax.errors import DataError

NAME_BYTES = 255
"""Largest number of bytes in a name that the common file systems take."""
PATH_BYTES = 1024
"""Largest number of bytes in a relative path that is made of an id; whole paths may have some 4096."""


def text(name: str) -> str:
    """Returns a name as valid UTF-8 text; its bytes that are not UTF-8 are written out, as in `caf\\udce9.wav`."""
    return name.encode(errors="backslashreplace").decode()


def an(word: str) -> str:
    """Returns a word behind its article: a codec, an encoder."""
    return f"{'an' if word.startswith(tuple('aeiou')) else 'a'} {word}"


def utf8(path: Path) -> Path:
    """Returns a path for writers that take only UTF-8. Raises DataError for a path that is not UTF-8."""
    if (known := text(str(path))) != str(path):
        raise DataError(f"{known}: the path is not UTF-8, as that of shards must be; choose another")
    return path


def fit(name: str, suffix: str = "") -> str:
    """Returns a name with a suffix. A name that is too long is cut, and gets a hash that tells it from others."""
    whole = os.fsencode(name)
    if len(whole + os.fsencode(suffix)) <= NAME_BYTES:
        return name + suffix
    end = f"{_hash(name)}{suffix}"
    return whole[: NAME_BYTES - len(os.fsencode(end))].decode(errors="ignore") + end


def _hash(name: str) -> str:
    """Returns a short hash that tells a name from others that would come out the same."""
    return f"~{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"


def inside(name: str) -> str:
    """Returns a relative path for a name, which stays inside its folder: without "..", a leading "/" and the like.

    The path is empty if nothing is left. Characters that cannot be in a file's name are written out.
    """
    return "/".join(_writable(part) for part in name.split("/") if part not in ("", ".", ".."))


def _writable(part: str) -> str:
    try:
        os.fsencode(part)  # a file's name can hold bytes that are not UTF-8, but no halves of characters
    except UnicodeEncodeError:
        part = text(part)
    return part.replace("\0", r"\x00")


def distinct(where: Path, names: Sequence[str], suffix: str, replaced: Set[str]) -> list[str]:
    """Returns a relative path for each clip, made of its name; no two are the same.

    Two names that would come out the same keep their own suffixes: a.wav and a.flac become a.wav.SUFFIX and
    a.flac.SUFFIX. Names that some disks take for one get a hash: Ab and ab become Ab~HASH.SUFFIX and ab~HASH.SUFFIX.

    Args:
        where: Named in the message of errors.
        names: Names of the clips.
        suffix: What every path ends in.
        replaced: Suffixes of names that `suffix` takes the place of.

    Raises:
        DataError: If clips cannot be told apart.
    """
    whole = [inside(name) or "clip" for name in names]
    for name, times in Counter(whole).items():
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
    """Returns a key that is the same for names that some disk takes for one: without case and composed accents."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _without(name: str, replaced: Set[str]) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in replaced else name


def _fit_path(name: str, suffix: str) -> str:
    if len(os.fsencode(name)) > PATH_BYTES:
        name = name.replace("/", "_")
    *folders, last = name.split("/")
    return "/".join([*map(fit, folders), fit(last, suffix)])


def assignments(text: str) -> list[str]:
    """Splits a command line's `NAME=PATH,NAME=PATH` at the commas between its parts; paths may hold commas, too."""
    return re.split(r",(?=\w[\w.+-]*=)", text)
