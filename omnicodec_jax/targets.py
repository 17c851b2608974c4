"""Chooses the files that a command writes, and refuses to replace files that were made of something else."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from omnicodec_jax import names
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.origin import Origin
from omnicodec_jax.token_file import SUFFIX


def choose(
    input: Path, output: Path | None, extensions: frozenset[str], suffix: str, folder_suffix: str
) -> list[tuple[Path, Path]]:
    """Returns the path that is written for each input file. Raises OmniCodecError."""
    if isinstance(place := output or input, BucketPath):
        place.check_writable()
    if not input.exists():
        raise OmniCodecError(f"{input}: no such file or directory")
    if not input.is_dir():
        # Without an output, a decoded file gets another name than its original, which must not be replaced.
        name = names.fit(input.stem, (folder_suffix if output is None and suffix != SUFFIX else "") + suffix)
        file = input.with_name(name) if output is None else output / name if output.is_dir() else output
        if suffix == SUFFIX and file.suffix != SUFFIX:
            raise OmniCodecError(f"{file}: token files end in {SUFFIX}; a directory must be there already")
        _check_folder(file.parent)
        check_apart(input, file)
        return [(input, file)]
    found = discovery.take(input, extensions)
    if not found.files:
        raise OmniCodecError(f"{input}: holds no file named {' '.join(sorted(extensions))}; it holds {found}")
    folder = output or outside(input, folder_suffix)
    _check_folder(folder)
    inside = mirrored_names(input, found.files, extensions, suffix)
    return [(source, folder / inside[source]) for source in found.files]


def check_apart(input: Path, output: Path) -> None:
    """Raises OmniCodecError, before any work, for an output that is the input itself, by whatever name."""
    on_disk = not (isinstance(input, BucketPath) or isinstance(output, BucketPath))
    if input == output or (on_disk and output.exists() and output.samefile(input)):
        raise OmniCodecError(f"{output}: is the input itself, which would be lost; choose another output")


def _check_folder(folder: Path) -> None:
    """Raises OmniCodecError, before any work, if a folder or one of its parents exists and is no directory."""
    if isinstance(folder, BucketPath):
        return
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise OmniCodecError(f"{folder}: {there} is no directory; choose another output")


def outside(folder: Path, suffix: str) -> Path:
    """Returns the path of a directory beside `folder`, whose name is that of `folder` with a suffix.

    Raises OmniCodecError for the root of a disk, and for a whole bucket, since buckets beside it may belong to others.
    """
    named = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    if not named.name or (isinstance(folder, BucketPath) and folder.parent == folder):
        raise OmniCodecError(f"{folder}: name the directory to write to")
    return named.with_name(names.fit(named.name, suffix))


def mirrored_names(root: Path, files: list[Path], extensions: frozenset[str], suffix: str) -> dict[Path, str]:
    """Returns the names that the files of a tree get in a mirror of the tree."""
    inside = [file.relative_to(root).as_posix() for file in files]
    return dict(zip(files, names.distinct(root, inside, suffix, extensions), strict=True))


def superseded(
    targets: Sequence[tuple[Path, Path]], suffix: str, origin_of: Callable[[Path], Origin | None]
) -> str | None:
    """Returns a line about files that an earlier run has made of the same sources under other names; None: no such.

    A source that is joined by another of the same stem keeps its suffix in the name of what is made of it, and loses it
    again when it is alone.

    Args:
        targets: Pairs of a source and the file that is made of it.
        suffix: What the names of these files end in.
        origin_of: Returns the origin that a file names; None if it names none.
    """
    made, old = {target for _, target in targets}, []
    for source, target in targets:
        for name in (source.stem, source.name):
            other = target.with_name(names.fit(name, suffix))
            if other not in made and other.is_file():
                origin = origin_of(other)
                if origin is not None and origin.is_at(source, other):
                    old.append(f"{other}: of an earlier run; what is made of {source} is {target.name} now; remove it")
    return old[0] + (f" (and {len(old) - 1} others likewise)" if old[1:] else "") if old else None


def check_replaced(targets: Sequence[tuple[Path, Path]], origin_of: Callable[[Path], Origin | None]) -> None:
    """Raises OmniCodecError, before any work, if files would be replaced that were not made of the same sources.

    Args:
        targets: Pairs of a source and the file that is made of it.
        origin_of: Returns the origin that a file names; None if it names none.
    """
    lost = [why for source, target in targets if target.is_file() and (why := _why(source, target, origin_of(target)))]
    if lost:
        others = f" (and {len(lost) - 1} others likewise)" if lost[1:] else ""
        raise OmniCodecError(f"{lost[0]}{others}; choose another output, or replace with --overwrite")


def _why(source: Path, target: Path, origin: Origin | None) -> str | None:
    """Returns why a file must not be replaced; None if it was made of the same source."""
    if origin is None:
        return f"{target}: is there already, and does not say that it was made of {source}"
    if not origin.is_of(source, target):
        return f"{target}: was made of {origin.path}, not of {source}"
    return None
