"""Lists of audio in all formats: which reader reads what (`data/listings`), and what a list was when it was read."""

import codecs
import gzip
import itertools
import json
import logging
import pickle
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from omnicodec_jax import names
from omnicodec_jax.buckets import BucketPath, as_path, joined
from omnicodec_jax.data import braces, discovery
from omnicodec_jax.data.entries import WRONG, Entry, Listed, number, readable, text
from omnicodec_jax.data.listings import kaldi, lhotse, nemo, parquet, tars
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import LFS, LFS_POINTER, NO_FILE

LOG = logging.getLogger(__name__)

PACKED_ENTRIES = 4096
"""Number of entries that a `Manifest` compresses together."""
ARCHIVES = {".tar": tars.entries, ".parquet": parquet.entries}
"""Readers of files that hold the audio themselves, by their suffix."""
GZIP = b"\x1f\x8b"
"""Bytes that a file compressed with gzip begins with."""


def parse_sources(text: str, unnamed: bool = False) -> dict[str, Path]:
    """Reads the command line's `speech=DIR,music=FILE`. Raises DataError, also for what is not there.

    unnamed: a path alone is taken, too, with the domain "".
    """
    if not text.strip():
        raise DataError("--manifest is empty: is a variable of the shell not set?")
    sources: dict[str, Path] = {}
    whole = unnamed and not missing(as_path(text))  # whatever signs it holds
    for part in [text] if whole else names.assignments(text):
        alone = whole or (unnamed and "=" not in part)
        domain, equals, path = ("", "=", part) if alone else part.partition("=")
        if not equals or not (alone or domain.isidentifier()):
            raise DataError(f"--manifest {part!r}: must be DOMAIN=PATH, such as speech=speech.jsonl")
        if same := [known for known in sources if names.key(known) == names.key(domain)]:
            advice = "join the two lists" if same == [domain] else f"to some disks {same[0]} is the same name"
            raise DataError(f"--manifest: {domain} is given twice; {advice}")
        option = f"--manifest {domain}".rstrip()
        if not path:
            raise DataError(f"{option}: must be followed by a path, as in speech=speech.jsonl")
        if path.startswith("pipe:"):
            raise DataError(
                f"{option}: {path}: a command; only files are read: run it, and name the file that it writes"
            )
        if absent := missing(as_path(path)):
            hint = "; several lists must be DOMAIN=PATH,DOMAIN=PATH" if "," in path else ""
            raise DataError(f"{option}: {absent}: no such file or directory{hint}")
        if pipe := next(filter(_is_pipe, files(as_path(path))), None):
            raise DataError(f"{option}: {pipe}: {NO_FILE}")
        sources[domain] = as_path(path)
    return sources


def files(path: Path) -> list[Path]:
    """Returns the files that a path with braces names, in their order; a path without them alone.

    Examples:
        >>> [file.name for file in files(Path("shards/{08..10}.tar"))]
        ['08.tar', '09.tar', '10.tar']
    """
    return [path] if path.exists() else [as_path(name) for name in braces.expand(str(path))]


def missing(path: Path) -> Path | None:
    """Returns the first file or directory of a path, which may have braces, that is not there; None: all are."""
    return next((file for file in files(path) if not file.exists()), None)


def _is_pipe(path: Path) -> bool:
    """Returns whether a path of this machine is neither a file nor a directory."""
    return not (isinstance(path, BucketPath) or path.is_file() or path.is_dir())


class Manifest:
    """A list of audio as it was when it was read.

    The list is read once, when this object is made. Whoever iterates over it afterwards gets the same entries, whatever
    has become of the list and of its directories since. Entries are held compressed, in about 20 bytes each.
    """

    def __init__(self, path: Path, domain: str = ""):
        """Reads a list.

        Args:
            path: A list of any kind that `read` reads. The user is told what is passed over in a directory.
            domain: Only entries of this domain are kept, and lines that are no clips; "": all entries.

        Raises:
            DataError: If the list has no clip of the domain. The message says what it has instead.
        """
        self.folder = folder(path)
        """Directory that the relative paths of the entries begin in."""
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
    """Returns the directory that the relative paths of a list begin in; of lists in several directories, one above."""
    if path.is_dir():
        return path
    parents = {file.parent for file in files(path)}
    return parents.pop() if len(parents) == 1 else next(up for up in path.parents if not braces.stand_in(str(up)))


def read(path: Path) -> Iterator[Entry]:
    """Reads the entries of a list, line by line and in its order.

    A list is of one of these kinds; the first two may be compressed, and then end in .gz:

        .jsonl, .json   an object a line: as NeMo has them, with `audio_filepath`; `id`, `offset`, `duration` (seconds),
                        `domain` and, for a file in audio_N.tar, `shard_id` may be given; or Lhotse's cuts, recordings
        .scp            `utterance path` or `path` a line; if `segments` lies beside Kaldi's wav.scp, they are the clips
        .tar            the audio in it, as WebDataset has it
        .parquet        its column of audio, as Hugging Face's datasets have it
        a directory     all audio files in it; or what Lhotse's SHAR, tars or Parquet in it hold

    Several files are written with braces: shards/{000..012}.tar.

    Yields:
        An entry for each clip. For a line that is no clip, an entry that says why.

    Raises:
        DataError: For a file of another kind, and for one that is damaged.
    """
    return (entry for entry, _ in _read(path))


def transcribed(path: Path, domain: str = "") -> Iterator[Listed]:
    """Reads the entries of one domain ("": any) with their transcripts, the `text` of lines that have one.

    Yields:
        The same entries as `read`, without those of other domains.

    Raises:
        DataError: At the end of a list without a clip of the domain. The message says what it has instead.
    """
    others: Counter[str] = Counter()
    problem, has_clips = "", False
    for entry, transcript in _read(path):
        if domain and entry.domain not in (None, domain):
            others[str(entry.domain)] += 1
            continue
        if entry.problem is None:
            has_clips = True
        elif not problem:
            problem = f"; {entry.id}: {entry.problem}"
        yield entry, transcript
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
        label: The field that says what the label of a clip is. Lines without it, with null or an empty text, and lines
            that are no clips are passed over, and the log says how many these are.

    Raises:
        DataError: For a list that is not there or of another kind, and for one without such a field.
    """
    if absent := missing(path):
        raise DataError(f"{absent}: no such file")
    if path.is_dir() or not {".jsonl", ".json"} & set(path.suffixes):
        raise DataError(f"{path}: must end in .jsonl, .json, or in one of them and .gz, as its lines must have labels")
    has_labels, passed_over = False, 0
    above = folder(path)
    for file, line in ((each, line) for each in files(path) for line in _lines(each)):
        content = line.removeprefix(codecs.BOM_UTF8).strip()
        try:
            (entry, _), fields = _from_json(content.decode(), file), json.loads(content)
            entry = _seen_from(above, file.parent, entry)
            has_label = fields.get(label) is not None and str(fields[label]).strip()
        except WRONG:
            has_label = False
        if has_label:
            has_labels = True
            yield entry, fields
        elif content:
            passed_over += 1
    if not has_labels:
        raise DataError(f"{path}: no line of a clip has the field {label}")
    if passed_over:
        LOG.warning("%s: passed over %d lines that are no clips, or have no %s", path, passed_over, label)


def _read(path: Path) -> Iterator[Listed]:
    """Yields the entries of a list, each with its transcript."""
    if path.is_dir():
        yield from lhotse.shar(path, _lines) if lhotse.is_shar(path) else _in_directory(path)
    elif (suffix := path.suffix.lower()) in ARCHIVES:
        yield from ARCHIVES[suffix](files(path), folder(path))
    else:
        above = folder(path)
        for file in files(path):
            segments = kaldi.segments_of(file)
            listed = kaldi.segments(_texts(file), _texts(segments)) if segments else _from_lines(file)
            yield from ((_seen_from(above, file.parent, entry), transcript) for entry, transcript in listed)


def _seen_from(above: Path, folder: Path, entry: Entry) -> Entry:
    """Returns an entry of a list in a folder with its file as it is called from a directory above."""
    name = entry.path if entry.container is None else entry.container
    if folder == above or entry.problem or "://" in name:
        return entry
    if isinstance(folder, BucketPath):
        name = str(joined(folder, name))
    else:
        name = str(PurePosixPath(folder.relative_to(above), name))
    return entry._replace(path=name) if entry.container is None else entry._replace(container=name)


def _in_directory(path: Path) -> Iterator[Listed]:
    """Yields the audio of a directory, which is listed once; if it has no audio by itself, that of its archives."""
    found = discovery.take(path)
    for file in found.files:
        yield _entry_of(file, path), None
    if found.files:
        return
    suffix = next((suffix for suffix in ARCHIVES if found.others[suffix]), None)
    if suffix is None:
        raise DataError(f"{path}: lists no audio; it holds {found}")
    yield from ARCHIVES[suffix](discovery.find(path, {suffix}), path)


def _from_lines(path: Path) -> Iterator[Listed]:
    """Yields the entries of a list with one a line, each with its transcript."""
    kinds = {".jsonl": _from_json, ".json": _from_json, ".scp": _from_scp}
    *_, before, last = "", "", *path.suffixes
    suffix = (before if _is_gz(path) else last).lower()
    if ".tar" in path.suffixes or last.lower() in (".tgz", ".tbz2", ".txz"):
        raise DataError(f"{path}: a compressed tar: members can be read in plain tars alone; uncompress it first")
    if suffix not in kinds:
        raise DataError(
            f"{path}: must be a directory, or end in .jsonl, .json, .scp, or in one of them and .gz, or in .tar or "
            ".parquet"
        )
    errors = "surrogateescape" if suffix == ".scp" else "strict"  # paths, which may hold any bytes; JSON is UTF-8
    for place, line in enumerate(_lines(path), 1):
        try:
            if content := line.removeprefix(codecs.BOM_UTF8).decode(errors=errors).strip():
                yield kinds[suffix](content, path)
        except WRONG as error:
            yield Entry(f"{path.name}:{place}", path.name, problem=f"no clip: {error}"), None


def _texts(path: Path) -> Iterator[str]:
    """Yields the lines of one of Kaldi's files, whose names may hold any bytes."""
    return (line.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape").strip() for line in _lines(path))


def _is_gz(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        is_packed = _is_gz(path) and file.read(len(GZIP)) == GZIP  # what web servers have packed arrives unpacked
        file.seek(0)
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=file) if is_packed else file):
                if number == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path}: written as UTF-16; save it as UTF-8")
                if number == 0 and line.startswith(LFS):
                    raise DataError(f"{path}: {LFS_POINTER}")
                if number == 0 and line.startswith(GZIP):
                    raise DataError(f"{path}: compressed with gzip; its name must end in .gz")
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged: {error}") from None


def _from_json(line: str, path: Path) -> Listed:
    if line.startswith("["):
        raise ValueError("a JSON array; each of its objects must stand on a line of its own")
    fields: dict[str, Any] = json.loads(line)
    if lhotse.is_line(fields):
        return lhotse.entry(fields)
    if not isinstance(fields, dict) or not isinstance(file := fields.get("audio_filepath"), str) or not file:
        raise ValueError("no object with a string `audio_filepath`")
    offset, seconds = number(fields, "offset"), number(fields, "duration")
    id, domain = fields.get("id"), fields.get("domain")
    if type(id) not in (str, int, float, type(None)):
        raise ValueError(f"id = {id!r}: must be a text or a number")
    if not isinstance(domain, str | None):
        raise ValueError(f"domain = {domain!r}: must be a text")
    # Without an offset, a duration tells how long the whole file is.
    duration = None if offset is None else seconds
    name = file if id in (None, "") else str(id)
    entry = Entry(name, readable(file), float(offset or 0), duration, seconds, domain or None)
    return nemo.in_tar(entry, fields.get("shard_id"), path), text(fields, "text")


def _from_scp(line: str, path: Path) -> Listed:
    return kaldi.recording(line), None
