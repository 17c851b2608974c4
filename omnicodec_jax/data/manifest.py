"""Lists of audio: JSONL manifests, Kaldi's scp files and plain directories."""

import codecs
import contextlib
import gzip
import itertools
import json
import pickle
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omnicodec_jax import names
from omnicodec_jax.buckets import as_path
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import DataError

PACKED_ENTRIES = 4096
"""Number of entries that a `Manifest` compresses together."""


class Entry(NamedTuple):
    """One clip of a corpus, or a line of a manifest that is no clip."""

    id: str
    path: str
    """Path of the file, absolute or relative to the `folder` of the list; or its URL in a bucket."""
    offset: float = 0.0
    """Where the clip begins in its file, in seconds."""
    duration: float | None = None
    """How long the clip is, in seconds from `offset` on; None: it reaches to the end of the file."""
    seconds: float | None = None
    """How long the clip is by the manifest, in seconds; None if the manifest does not say it."""
    domain: str | None = None
    """Domain of the clip by the manifest; None if the manifest does not say it."""
    problem: str | None = None
    """Why the line is no clip; None if it is one."""


def parse_sources(text: str, unnamed: bool = False) -> dict[str, Path]:
    """Reads the command line's `speech=DIR,music=FILE`. Raises DataError, also for what is not there.

    unnamed: a path alone is taken, too, with the domain "".
    """
    sources: dict[str, Path] = {}
    whole = unnamed and as_path(text).exists()  # whatever signs it holds
    for part in [text] if whole else names.assignments(text):
        alone = whole or (unnamed and "=" not in part)
        domain, equals, path = ("", "=", part) if alone else part.partition("=")
        if not equals or not (alone or domain.isidentifier()):
            raise DataError(f"--manifest {part!r}: must be DOMAIN=PATH, such as speech=speech.jsonl")
        if same := [known for known in sources if names.key(known) == names.key(domain)]:
            advice = "join the two lists" if same == [domain] else f"to some disks {same[0]} is the same name"
            raise DataError(f"--manifest: {domain} is given twice; {advice}")
        option = f"--manifest {domain}".rstrip()
        if not as_path(path).exists():
            hint = "; several lists must be DOMAIN=PATH,DOMAIN=PATH" if "," in path else ""
            raise DataError(f"{option}: {path}: no such file or directory{hint}")
        sources[domain] = as_path(path)
    return sources


class Manifest:
    """A list of audio as it was when it was read.

    The list is read once, when this object is made. Whoever iterates over it afterwards gets the same entries, whatever
    has become of the list and of its directories since. Entries are held compressed, in about 20 bytes each.
    """

    def __init__(self, path: Path, domain: str = ""):
        """Reads a list.

        Args:
            path: A manifest file, or a directory. The user is told what is passed over in a directory.
            domain: Only entries of this domain are kept, and lines that are no clips; "": all entries.

        Raises:
            DataError: If the list has no clip of the domain. The message says what it has instead.
        """
        self.folder = folder(path)
        """Directory that the relative paths of the entries begin in."""
        if path.is_dir():
            found = discovery.take(path)
            if not found.files:
                raise DataError(f"{path}: lists no audio; it holds {found}")
            entries = (_entry_of(file, path) for file in found.files)
        else:
            entries = (entry for entry, _ in transcribed(path, domain))
        self._packed = [zlib.compress(pickle.dumps(part), 1) for part in _batched(entries, PACKED_ENTRIES)]

    def __iter__(self) -> Iterator[Entry]:
        for packed in self._packed:
            for fields in pickle.loads(zlib.decompress(packed)):
                yield Entry(*fields)


def read_all(sources: dict[str, Path]) -> dict[str, Manifest]:
    """Reads the list of each domain. Raises DataError for a list without a clip of its domain."""
    manifests = {}
    for domain, path in sources.items():
        try:
            manifests[domain] = Manifest(path, domain)
        except DataError as error:
            option = f"--manifest {domain}".rstrip()
            raise DataError(f"{option}: {error}") from None
    return manifests


def _batched(entries: Iterable[Entry], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Yields entries as plain tuples, in lists of `size`."""
    remaining = iter(entries)
    while batch := [tuple(entry) for entry in itertools.islice(remaining, size)]:
        yield batch


def _entry_of(file: Path, directory: Path) -> Entry:
    """Returns the entry of a file that was found in a directory."""
    name = file.relative_to(directory).as_posix()
    return Entry(name, name)


def folder(path: Path) -> Path:
    """Returns the directory that the relative paths of a list begin in."""
    return path if path.is_dir() else path.parent


def read(path: Path) -> Iterator[Entry]:
    """Reads the entries of a list, line by line and in its order.

    A list is of one of these kinds; files may be compressed, and then end in .gz:

        .jsonl, .json   an object a line, as NeMo has them, with `audio_filepath`; `id`, `offset`, `duration` (seconds)
                        and `domain` may be given
        .scp            `utterance path` or `path` a line
        a directory     all audio files in it

    Yields:
        An entry for each clip. For a line that is no clip, an entry that says why.

    Raises:
        DataError: For a file of another kind, and for one that is damaged.
    """
    return (entry for entry, _ in _read(path))


def transcribed(path: Path, domain: str = "") -> Iterator[tuple[Entry, str | None]]:
    """Reads the entries of one domain ("": any) with their transcripts, the `text` of lines that have one.

    Yields:
        The same entries as `read`, without those of other domains.

    Raises:
        DataError: At the end of a list without a clip of the domain. The message says what it has instead.
    """
    others: Counter[str] = Counter()
    problem, has_clips = "", False
    for entry, text in _read(path):
        if domain and entry.domain not in (None, domain):
            others[str(entry.domain)] += 1
            continue
        if entry.problem is None:
            has_clips = True
        elif not problem:
            problem = f"; {entry.id}: {entry.problem}"
        yield entry, text
    if has_clips:
        return
    if others:
        there = ", ".join(f"{names.text(name)} ({count})" for name, count in others.most_common())
        raise DataError(f"{path}: lists no audio of the domain {domain}; its clips are of {there}")
    raise DataError(f"{path}: lists no audio{problem}")


def labelled(path: Path, label: str) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Reads the clips of a .jsonl or .json list that have a label, with all fields of their lines.

    Args:
        path: The list.
        label: The field that says what the label of a clip is. Lines without it, with null, and lines that are
            no clips are passed over.

    Raises:
        DataError: For a list of another kind, and for one without such a field.
    """
    if path.is_dir() or not {".jsonl", ".json"} & set(path.suffixes):
        raise DataError(f"{path}: must end in .jsonl, .json, or in one of them and .gz, as its lines must have labels")
    has_labels = False
    for line in _lines(path):
        try:
            text = line.removeprefix(codecs.BOM_UTF8).decode().strip()
            (entry, _), fields = _from_json(text), json.loads(text)
        except (ValueError, OverflowError, RecursionError):
            continue
        if fields.get(label) is not None:
            has_labels = True
            yield entry, fields
    if not has_labels:
        raise DataError(f"{path}: no line of a clip has the field {label}")


def _read(path: Path) -> Iterator[tuple[Entry, str | None]]:
    """Yields the entries of a list, each with its transcript."""
    if path.is_dir():
        for file in discovery.find(path):
            yield _entry_of(file, path), None
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
    with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else contextlib.nullcontext(file) as lines:
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
