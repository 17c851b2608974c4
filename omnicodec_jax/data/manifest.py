"""Lists of audio: JSONL manifests, Kaldi's scp files and plain directories, read line by line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax.data import audio
from omnicodec_jax.errors import DataError


class Entry(NamedTuple):
    """One clip of a corpus."""

    id: str
    path: str
    """As the list has it: absolute, or relative to `folder` of the list."""
    offset: float = 0.0
    duration: float | None = None
    """Seconds from `offset` on; None: to the end of the file."""
    seconds: float | None = None
    """How long the manifest says it is."""
    domain: str | None = None
    """Where the manifest says it; those of another domain than the one that is prepared are passed over."""
    problem: str | None = None
    """Why the line is no clip."""


def parse_sources(text: str, unnamed: bool = False) -> dict[str, Path]:
    """The command line's `speech=DIR,music=FILE` → domain → path. Raises DataError.

    unnamed: a path alone will do, with the domain "".
    """
    sources = {}
    for part in text.split(","):
        domain, equals, path = part.partition("=") if "=" in part or not unnamed else ("", "=", part)
        if not equals or not (domain.isidentifier() or (unnamed and not domain)):
            raise DataError(f"--manifest {part!r}: must be DOMAIN=PATH, such as speech=speech.jsonl")
        if domain in sources:
            raise DataError(f"--manifest: {domain} is given twice; join the two lists")
        if not Path(path).exists():
            raise DataError(f"--manifest {domain}: {path}: no such file or directory")
        if next(read(Path(path)), None) is None:
            raise DataError(f"--manifest {domain}: {path}: lists no audio")
        sources[domain] = Path(path)
    return sources


def folder(path: Path) -> Path:
    """Where the relative paths of a list begin."""
    return path if path.is_dir() else path.parent


def read(path: Path) -> Iterator[Entry]:
    """Clips of a manifest, in its order; a line that cannot be read becomes an entry that says why.

    .jsonl and .jsonl.gz: an object a line with `audio_filepath`, and if there, `id`, `offset`, `duration` (seconds),
    `domain`.
    .scp: `utterance path` or `path` a line. A directory: all audio in it.
    """
    if path.is_dir():
        for file in audio.find(path):
            name = file.relative_to(path).as_posix()
            yield Entry(name, name)
        return
    kinds = {".jsonl": _from_json, ".scp": _from_scp}
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in kinds:
        raise DataError(f"{path}: must be a directory, or end in .jsonl, .scp, .jsonl.gz or .scp.gz")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                try:
                    if text := line.decode().strip():
                        yield kinds[suffix](text)
                except (ValueError, OverflowError, RecursionError) as error:  # JSON's and Unicode's are ValueErrors
                    yield Entry(f"{path.name}:{number}", path.name, problem=f"no clip: {error}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged: {error}") from None


def _from_json(text: str) -> Entry:
    fields: dict[str, Any] = json.loads(text)
    if not isinstance(fields, dict) or not isinstance(file := fields.get("audio_filepath"), str):
        raise ValueError("no object with a string `audio_filepath`")
    offset, seconds = fields.get("offset"), fields.get("duration")
    for name, value in (("offset", offset), ("duration", seconds)):
        if value is not None and not (type(value) in (int, float) and 0 <= float(value) < float("inf")):
            raise ValueError(f"{name} = {value!r}: must be seconds")
    # Without an offset, a duration tells how long the whole file is.
    duration = None if offset is None else seconds
    domain = fields.get("domain")
    return Entry(str(fields.get("id", file)), file, float(offset or 0), duration, seconds, domain)


def _from_scp(text: str) -> Entry:
    if text.endswith("|"):
        raise ValueError("a command; only files are read")
    words = text.split()
    if len(words) > 2:
        raise ValueError(f"{len(words)} words; must be `utterance path` or `path` (in .jsonl, paths may hold blanks)")
    return Entry(words[0], words[-1])
