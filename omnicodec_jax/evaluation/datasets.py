"""Reads the sets to evaluate on: LibriSpeech, GTZAN and AudioSet as they unpack, manifests, and folders of audio."""

import csv
import logging
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from omnicodec_jax import names
from omnicodec_jax.data import audio, decoders, discovery, manifest
from omnicodec_jax.data.members import Member
from omnicodec_jax.errors import DataError

LOG = logging.getLogger(__name__)

GTZAN_TRACK = re.compile(r"([a-z]+)\.\d{5}")
GTZAN_DAMAGED = "jazz.00054"
"""The track of GTZAN whose file cannot be decoded."""
AUDIOSET_SEGMENTS = "eval_segments.csv"
AUDIOSET_FILE = re.compile(r"Y?(?P<id>[A-Za-z0-9_-]{11})(?P<span>_\d+(\.\d+)?_\d+(\.\d+)?)?")
AUDIOSET_SLACK = 0.5
"""The seconds by which the file of a segment may be longer than the segment, because encoders add some."""
WRITTEN = ".flac"
"""The suffix of the files that are written for each clip (see reconstruct.py)."""


class EvalClip(NamedTuple):
    """One clip of an evaluation."""

    id: str
    """A relative path without extension, which is unique in its set and can be the name of a file."""
    domain: str
    path: Path | Member
    transcript: str | None = None
    offset: float = 0.0
    """The second at which the clip begins in its file."""
    duration: float | None = None
    """The length of the clip in seconds; None: it reaches to the end of the file."""
    problem: str | None = None
    """The reason why a line of a manifest cannot be used; None: it can."""


def clips(folder: Path, domain: str, limit: int | None) -> list[EvalClip]:
    """Returns the clips of a set, in the order of the set.

    Args:
        folder: The folder that LibriSpeech's test-clean, GTZAN or AudioSet's eval set unpacks to, a manifest (see
            `manifest.read`; `text` in .jsonl is the transcript), or any folder with audio in it.
        domain: The domain of the clips.
        limit: The largest number of clips. They are spread evenly over the set, and always the same.

    Returns:
        The clips. Lines of a manifest that cannot be used come last, and do not count towards `limit`.

    Raises:
        DataError: If there is no audio of the domain, or a list does not fit the files.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} clips of {folder}: must be at least 1")
    if absent := manifest.missing(folder):
        raise DataError(f"{absent}: no such file or directory")
    found = [clip._replace(id=names.text(clip.id)) for clip in _read(folder, domain)]
    good = [clip for clip in found if clip.problem is None]
    if not good:
        raise DataError(
            f"{folder}: lists no audio of the domain {domain}; it must be a manifest, LibriSpeech's test-clean, GTZAN, "
            f"AudioSet's eval set with its {AUDIOSET_SEGMENTS}, or a folder of audio; "
            f"it holds {discovery.look(folder)}"
        )
    ids = names.distinct(folder, [clip.id for clip in good], WRITTEN, audio.EXTENSIONS)
    named = [clip._replace(id=id.removesuffix(WRITTEN)) for clip, id in zip(good, ids, strict=True)]
    problems = [clip for clip in found if clip.problem is not None]
    return (named if limit is None else _spread(named, limit)) + problems


def _spread(found: list[EvalClip], limit: int) -> list[EvalClip]:
    """Returns the middle clip of each of `limit` equal stretches."""
    if limit >= len(found):
        return found
    return [found[(2 * number + 1) * len(found) // (2 * limit)] for number in range(limit)]


# -- Layouts


def _read(path: Path, domain: str) -> list[EvalClip]:
    """Returns the clips of a manifest or a folder of any layout. Their ids keep the extensions of the files."""
    if not path.is_dir():
        return _manifest(path, domain)
    for layout in (_audioset, _librispeech, _gtzan):
        if clips := layout(path, domain):
            return clips
    try:
        return _manifest(path, domain)
    except DataError:  # the error below says more
        return []


def _manifest(path: Path, domain: str) -> list[EvalClip]:
    """Returns the clips of a domain that a manifest lists."""
    root = manifest.folder(path)
    return [
        EvalClip(entry.id, domain, entry.file(root), text, entry.offset, entry.duration, entry.problem)
        for entry, text in manifest.transcribed(path, domain)
    ]


def _librispeech(folder: Path, domain: str) -> list[EvalClip]:
    """Returns the clips of LibriSpeech; none, if the folder is not LibriSpeech.

    The clips are SPEAKER/CHAPTER/*.flac with transcripts, in the folder itself or in its subfolder test-clean.
    """
    root = folder / "test-clean" if (folder / "test-clean").is_dir() else folder
    found = []
    for listing in sorted(root.glob("*/*/*.trans.txt")):
        for line in filter(str.strip, listing.read_text(errors="replace").splitlines()):
            name, _, transcript = line.partition(" ")
            path = listing.with_name(f"{name}.flac")
            if not path.is_file():
                raise DataError(f"{listing}: {path.name} is not beside it; unpack the archive again")
            found.append(EvalClip(path.relative_to(root).as_posix(), domain, path, transcript))
    return found


def _gtzan(folder: Path, domain: str) -> list[EvalClip]:
    """Returns the tracks of GTZAN; none, if the folder is not GTZAN.

    The tracks are GENRE/GENRE.NUMBER.wav or .au, in the folder itself or in its subfolder of genres. If there is a list
    of tracks, only the listed tracks are returned.
    """
    for root in (folder, folder / "genres", folder / "genres_original"):
        files = sorted(path for kind in ("au", "wav") for path in root.glob(f"*/*.{kind}"))
        tracks = {path.stem: path for path in files if GTZAN_TRACK.fullmatch(path.stem)}
        if tracks:
            break
    else:
        return []
    if listing := _gtzan_list(root):
        lines = filter(str.strip, listing.read_text(errors="replace").splitlines())
        listed = [PurePosixPath(line.strip()).stem for line in lines]
        if absent := [name for name in listed if name not in tracks]:
            raise DataError(
                f"{listing}: {len(absent)} of its tracks are not in {root}, {absent[0]} for one; "
                "unpack the set again, or mend the list"
            )
        tracks = {name: tracks[name] for name in sorted(listed)}
    if tracks.pop(GTZAN_DAMAGED, None):
        LOG.warning("%s: left out %s, which is damaged in the set as distributed", folder, GTZAN_DAMAGED)
    return [EvalClip(path.relative_to(root).as_posix(), domain, path) for path in tracks.values()]


def _gtzan_list(root: Path) -> Path | None:
    """Returns the list of tracks, in the folder of the genres or in the one above; None, if there is no list.

    The list test_filtered.txt is preferred. Raises DataError if there are several other lists and not this one.
    """
    lists = [path for place in (root, root.parent) for path in sorted(place.glob("*.txt")) if _lists_tracks(path)]
    if tested := [path for path in lists if path.name == "test_filtered.txt"]:
        return tested[0]
    if len(lists) > 1:
        raise DataError(f"{root}: {', '.join(path.name for path in lists)}: several lists of tracks; keep only one")
    return lists[0] if lists else None


def _lists_tracks(path: Path) -> bool:
    """Returns whether a text file begins with the name of a track."""
    lines = path.read_text(errors="replace").split()
    return bool(lines) and GTZAN_TRACK.fullmatch(PurePosixPath(lines[0]).stem) is not None


def _audioset(folder: Path, domain: str) -> list[EvalClip]:
    """Returns the segments of AudioSet's eval set for which there is audio; none, if the folder is not AudioSet.

    The files are called YTID, YYTID or YTID_START_END and may be in any subfolder. Some segments usually have no audio,
    because videos vanish from the web.
    """
    listing = folder / AUDIOSET_SEGMENTS
    if not listing.is_file():
        return []
    files = {match["id"]: path for path in discovery.find(folder) if (match := AUDIOSET_FILE.fullmatch(path.stem))}
    segments = _audioset_segments(listing)
    found = []
    for name, (start, end) in segments.items():
        if path := files.get(name):
            part = _audioset_part(path, start, end)
            found.append(EvalClip(path.relative_to(folder).as_posix(), domain, path, None, *part))
    if not found:
        raise DataError(
            f"{listing}: audio of none of its segments; files must be called YTID.wav or YTID_START_END.wav"
        )
    LOG.info("%s: audio of %d of %d segments", listing, len(found), len(segments))
    return sorted(found)


def _audioset_segments(listing: Path) -> dict[str, tuple[float, float]]:
    """Returns the start and end of each segment in seconds, by YTID."""
    with listing.open(newline="", errors="replace") as file:
        rows = csv.reader((line for line in file if line.strip() and not line.startswith("#")), skipinitialspace=True)
        try:
            return {name: (float(start), float(end)) for name, start, end, *_ in rows}
        except ValueError as error:
            raise DataError(
                f"{listing}: row {rows.line_num}: {error}; rows must be `YTID, start, end, labels`"
            ) from None


def _audioset_part(path: Path, start: float, end: float) -> tuple[float, float | None]:
    """Returns offset and duration of a segment in its file, which may hold the segment alone or the whole recording."""
    seconds = decoders.seconds(path)
    if seconds <= end - start + AUDIOSET_SLACK:
        return 0.0, None
    if seconds <= start:
        raise DataError(
            f"{path}: {seconds:.1f} s are more than its segment, and end before that begins, at {start:g} s; "
            "cut it again, or remove it"
        )
    return start, min(end, seconds) - start
