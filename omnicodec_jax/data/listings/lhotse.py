"""Lhotse's manifests of cuts and of recordings, and SHAR, which keeps the audio of its cuts in tars.

The lines are read here, since Lhotse itself imports PyTorch.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from omnicodec_jax.data.entries import WRONG, Entry, Listed, contained, number, readable, text
from omnicodec_jax.data.listings import tars
from omnicodec_jax.data.listings.tars import TarMember

CUTS = re.compile(r"cuts(?P<shard>\.\d+)?\.jsonl(\.gz)?")
"""Names of the lists of cuts in a directory of SHAR."""
SAME = 1e-3
"""Seconds by which a cut of a whole recording may differ from it, as Lhotse rounds."""


def is_line(fields: Any) -> bool:
    """Returns whether a line of JSON is a cut or a recording of Lhotse."""
    return (
        isinstance(fields, dict)
        and "audio_filepath" not in fields
        and (
            isinstance(fields.get("sources"), list) or "recording" in fields or str(fields.get("type")).endswith("Cut")
        )
    )


def entry(fields: dict[str, Any]) -> Listed:
    """Returns the entry of a cut or of a recording. Raises ValueError for one that cannot be read from files."""
    kind = fields.get("type")
    if "sources" in fields:
        return Entry(_id(fields), _source(fields), seconds=number(fields, "duration")), None
    recording = fields.get("recording")
    if kind not in (None, "MonoCut", "MultiCut") or not isinstance(recording, dict):
        raise ValueError(f"{kind or 'a cut'}: only cuts of one recording are read (MonoCut, MultiCut)")
    start, duration, whole = number(fields, "start"), number(fields, "duration"), number(recording, "duration")
    _refuse_channels(fields, recording)
    is_whole = not start and duration is not None and whole is not None and abs(duration - whole) <= SAME
    return (
        Entry(
            _id(fields),
            _source(recording),
            float(start or 0),
            None if is_whole else duration,
            duration,
            text(fields.get("custom") or {}, "domain"),
        ),
        _transcript(fields),
    )


def _id(fields: dict[str, Any]) -> str:
    if not isinstance(id := fields.get("id"), str) or not id:
        raise ValueError("no string `id`")
    return id


def _source(recording: dict[str, Any]) -> str:
    """Returns the file of a recording. Raises ValueError for one that is not a single file as it lies on disk."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise ValueError("the recording must have one source, a file")
    if recording.get("transforms"):
        raise ValueError("the recording has transforms; save it as Lhotse makes it (cut.save_audio), or leave them out")
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind == "command":
        raise ValueError("a command; only files are read: run it, and name the file that it writes")
    if kind not in ("file", "url") or not isinstance(source, str) or not source:
        raise ValueError(f"a source of type {kind!r}; only files are read")
    return readable(source)


def _refuse_channels(cut: dict[str, Any], recording: dict[str, Any]) -> None:
    channel, there = cut.get("channel"), recording.get("channel_ids")
    wanted = channel if isinstance(channel, list) else [channel]
    if isinstance(there, list) and channel is not None and set(there) != set(wanted):
        raise ValueError(f"channel {channel} of {there}; only the mix of all channels is read: split them into files")


def _transcript(cut: dict[str, Any]) -> str | None:
    said = [text(each, "text") for each in cut.get("supervisions") or () if isinstance(each, dict)]
    return " ".join(part for part in said if part) or None


# -- SHAR


def is_shar(folder: Path) -> bool:
    """Returns whether a directory holds SHAR: lists of cuts, and tars of their recordings."""
    return folder.is_dir() and any(True for _ in folder.glob("recording*.tar")) and bool(_lists(folder))


def _lists(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("cuts*.jsonl*") if CUTS.fullmatch(path.name))


def shar(folder: Path, lines: Callable[[Path], Iterable[bytes]]) -> Iterator[Listed]:
    """Yields the cuts of a directory of SHAR, with their recordings in the tars. `lines` reads a list of cuts."""
    for cuts in _lists(folder):
        found = CUTS.fullmatch(cuts.name)
        tar = folder / f"recording{(found and found['shard']) or ''}.tar"
        if not tar.is_file():
            yield Entry(cuts.name, cuts.name, problem=f"{tar.name}: no such file"), None
            continue
        audio = {str(PurePosixPath(name).with_suffix("")): member for name, member in _audio(tar)}
        for place, line in enumerate(lines(cuts), 1):
            try:
                if line.strip():
                    yield _shar_entry(json.loads(line), tar, contained(tar, folder), audio)
            except WRONG as error:
                yield Entry(f"{cuts.name}:{place}", cuts.name, problem=f"no clip: {error}"), None


def _audio(tar: Path) -> Iterator[tuple[str, TarMember]]:
    for name, member in tars.by_name(tar).items():
        if not name.endswith((".json", ".nometa", ".nodata")):
            yield name, member


def _shar_entry(cut: dict[str, Any], tar: Path, container: str, audio: dict[str, TarMember]) -> Listed:
    id = _id(cut)
    if (member := audio.get(id)) is None:
        raise ValueError(f"{id}: {tar.name} has no audio of it")
    # The tar holds the audio of the cut alone, from 0 on.
    entry = Entry(
        id,
        member.name,
        seconds=number(cut, "duration"),
        domain=text(cut.get("custom") or {}, "domain"),
        problem=member.problem,
        container=container,
        place=member.place,
    )
    return entry, _transcript(cut)
