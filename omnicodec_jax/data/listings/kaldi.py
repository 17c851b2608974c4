"""Kaldi's data directories: wav.scp names recordings, and segments, if there, the parts of them that are clips."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from omnicodec_jax.data.entries import Entry, Listed, readable

RECORDINGS, SEGMENTS = "wav.scp", "segments"
CHANNELS = "no clip: its recording has segments of single channels; only the mix of all is read: split them into files"
"""The reason why a segment of a recording of several channels is no clip."""


def segments_of(path: Path) -> Path | None:
    """Returns the list of segments that lies beside a wav.scp; None if there is none."""
    beside = path.parent / SEGMENTS
    return beside if path.name in (RECORDINGS, f"{RECORDINGS}.gz") and beside.is_file() else None


def recording(line: str) -> Entry:
    """Returns the entry of a line of an .scp. Raises ValueError for a line that names no file."""
    if line.endswith("|"):
        raise ValueError("a command; only files are read: run it, and name the file that it writes")
    words = line.split()
    if len(words) > 2:
        raise ValueError(f"{len(words)} words; must be `utterance path` or `path` (in .jsonl, paths may hold blanks)")
    return Entry(words[0], readable(words[-1]))


def segments(recordings: Iterable[str], lines: Iterable[str]) -> Iterator[Listed]:
    """Yields the segments of recordings, in the order of their list.

    Args:
        recordings: The lines of wav.scp.
        lines: The lines of segments: `utterance recording start end`, in seconds; an end of 0 or less is that of the
            recording. A channel may follow. Where it is another than 0, the recording has several.
    """
    known = {line.split()[0]: _recording(line) for line in recordings if line}
    parts = [line.split() for line in lines]
    for words in parts:
        if len(words) == 5 and words[4] not in ("0", "-1") and (found := known.get(words[1])):
            known[words[1]] = found._replace(problem=found.problem or CHANNELS)
    for number, words in enumerate(parts, 1):
        if words:
            yield _segment(words, number, known), None


def _recording(line: str) -> Entry:
    try:
        return recording(line)
    except ValueError as error:  # it costs the segments of this recording
        return Entry(line.split()[0], RECORDINGS, problem=f"no clip: {error}")


def _segment(words: list[str], number: int, known: dict[str, Entry]) -> Entry:
    try:
        utterance, name, start, end = words[0], words[1], float(words[2]), float(words[3])
        if len(words) > 5 or not 0 <= start < float("inf") or not end < float("inf"):
            raise ValueError
    except (IndexError, ValueError):
        return Entry(f"{SEGMENTS}:{number}", SEGMENTS, problem="no clip: must be `utterance recording start end`")
    found = known.get(name)
    if found is None or found.problem:
        why = f"{RECORDINGS} has no recording {name}" if found is None else found.problem
        return Entry(utterance, SEGMENTS, problem=why)
    if 0 < end <= start:
        return Entry(utterance, found.path, problem=f"no clip: ends at {end:g} s, before it begins at {start:g} s")
    duration = end - start if end > 0 else None
    return found._replace(id=utterance, offset=start, duration=duration, seconds=duration)
