"""Lists of audio: JSONL manifests, Kaldi's scp files and plain directories, read line by line."""

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax import names
from omnicodec_jax.data import discovery
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
    """As the manifest says it; entries of another domain than the one that is prepared are passed over."""
    problem: str | None = None
    """Why the line is no clip."""


def parse_sources(text: str, unnamed: bool = False) -> dict[str, Path]:
    """The command line's `speech=DIR,music=FILE` → domain → path. Raises DataError.

    unnamed: a path alone will do, with the domain "".
    """
    sources: dict[str, Path] = {}
    whole = unnamed and Path(text).exists()  # whatever signs it holds
    for part in [text] if whole else names.assignments(text):
        alone = whole or (unnamed and "=" not in part)
        domain, equals, path = ("", "=", part) if alone else part.partition("=")
        if not equals or not (alone or domain.isidentifier()):
            raise DataError(f"--manifest {part!r}: must be DOMAIN=PATH, such as speech=speech.jsonl")
        if same := [known for known in sources if names.key(known) == names.key(domain)]:
            advice = "join the two lists" if same == [domain] else f"to some disks {same[0]} is the same name"
            raise DataError(f"--manifest: {domain} is given twice; {advice}")
        option = f"--manifest {domain}".rstrip()
        if not Path(path).exists():
            hint = "; several lists must be DOMAIN=PATH,DOMAIN=PATH" if "," in path else ""
            raise DataError(f"{option}: {path}: no such file or directory{hint}")
        try:
            check(Path(path), domain)
        except DataError as error:
            raise DataError(f"{option}: {error}") from None
        sources[domain] = Path(path)
    return sources


def check(path: Path, domain: str) -> None:
    """Raises DataError for a list without a clip of the domain (any, if that is ""), and says what it has instead.

    Of a directory, the user is told what is passed over.
    """
    if path.is_dir():
        found = discovery.take(path)
        if not found.files:
            raise DataError(f"{path}: lists no audio; it holds {found}")
        return
    domains: Counter[str] = Counter()
    problem = None
    for entry in read(path):
        if entry.problem is not None:
            problem = problem or f"{entry.id}: {entry.problem}"
        elif is_of(entry, domain):
            return
        else:
            domains[str(entry.domain)] += 1
    if domains:
        there = ", ".join(f"{names.text(name)} ({count})" for name, count in domains.most_common())
        raise DataError(f"{path}: lists no audio of the domain {domain}; its clips are of {there}")
    raise DataError(f"{path}: lists no audio" + (f"; {problem}" if problem else ""))


def is_of(entry: Entry, domain: str) -> bool:
    """Whether a list that is read for a domain ("": any) gives the entry; a line that is no clip is given always."""
    return not domain or entry.domain in (None, domain)


def folder(path: Path) -> Path:
    """Where the relative paths of a list begin."""
    return path if path.is_dir() else path.parent


def read(path: Path) -> Iterator[Entry]:
    """Clips of a manifest, in its order; a line that cannot be read becomes an entry that says why.

    .jsonl or .json, as NeMo has them: an object a line with `audio_filepath`, and if there, `id`, `offset`, `duration`
    (seconds), `domain`. .scp: `utterance path` or `path` a line. Each of them as .gz, too. A directory: all audio in
    it.
    """
    return (entry for entry, _ in transcribed(path))


def transcribed(path: Path) -> Iterator[tuple[Entry, str | None]]:
    """The same with transcripts: the `text` of lines that have one."""
    if path.is_dir():
        for file in discovery.find(path):
            name = file.relative_to(path).as_posix()
            yield Entry(name, name), None
        return
    kinds = {".jsonl": _from_json, ".json": _from_json, ".scp": _from_scp}
    suffix = (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()
    if suffix not in kinds:
        raise DataError(f"{path}: must be a directory, or end in .jsonl, .json, .scp, or in one of them and .gz")
    errors = "surrogateescape" if suffix == ".scp" else "strict"  # paths, which may hold any bytes; JSON is UTF-8
    for number, line in enumerate(_lines(path), 1):
        try:
            if text := line.removeprefix(codecs.BOM_UTF8).decode(errors=errors).strip():
                yield kinds[suffix](text)
        except (ValueError, OverflowError, RecursionError) as error:  # JSON's and Unicode's are ValueErrors
            yield Entry(f"{path.name}:{number}", path.name, problem=f"no clip: {error}"), None


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines):
                if number == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path}: written as UTF-16; save it as UTF-8")
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged: {error}") from None


def _from_json(line: str) -> tuple[Entry, str | None]:
    fields: dict[str, Any] = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(file := fields.get("audio_filepath"), str) or not file:
        raise ValueError("no object with a string `audio_filepath`")
    offset, seconds = fields.get("offset"), fields.get("duration")
    for name, value in (("offset", offset), ("duration", seconds)):
        if value is not None and not (type(value) in (int, float) and 0 <= float(value) < float("inf")):
            raise ValueError(f"{name} = {value!r}: must be seconds")
    id, domain, text = fields.get("id"), fields.get("domain"), fields.get("text")
    if type(id) not in (str, int, float, type(None)):
        raise ValueError(f"id = {id!r}: must be a text or a number")
    if not isinstance(domain, str | None):
        raise ValueError(f"domain = {domain!r}: must be a text")
    # Without an offset, a duration tells how long the whole file is.
    duration = None if offset is None else seconds
    name = file if id in (None, "") else str(id)
    entry = Entry(name, file, float(offset or 0), duration, seconds, domain or None)
    return entry, text if isinstance(text, str) else None


def _from_scp(line: str) -> tuple[Entry, str | None]:
    if line.endswith("|"):
        raise ValueError("a command; only files are read")
    words = line.split()
    if len(words) > 2:
        raise ValueError(f"{len(words)} words; must be `utterance path` or `path` (in .jsonl, paths may hold blanks)")
    return Entry(words[0], words[-1]), None
