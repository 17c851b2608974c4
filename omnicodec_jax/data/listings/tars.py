"""Tars of audio, as WebDataset has them: members of one key are the audio of a clip and what is said of it."""

import contextlib
import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from omnicodec_jax import buckets
from omnicodec_jax.data.audio import EXTENSIONS
from omnicodec_jax.data.entries import WRONG, Entry, Listed, contained, number, text
from omnicodec_jax.data.members import Member, MemberPlace
from omnicodec_jax.files import LFS, LFS_POINTER

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""Compressions by the bytes that a file begins with."""
MAX_NOTE = 1 << 20
"""Largest size in bytes of a .json or .txt beside the audio that is read."""


class TarMember(NamedTuple):
    """A file in a tar, or a part of a tar that is not a file."""

    name: str
    place: MemberPlace
    problem: str | None = None
    """The reason why the member cannot be read; None if it can."""
    is_file: bool = True
    """Whether it is a file; False for bytes of the tar that belong to no file."""


def members(path: Path) -> Iterator[TarMember]:
    """Yields the files of a tar in their order, by their headers alone, and then the links to them. Raises OSError.

    Of files with one name the last one counts, as it does in the folder that tar makes of them: `tar -r` appends what
    has changed. Tars that were joined by `cat` have zeros between them, and each has its own files. After a damaged
    header, the next header is looked for.
    """
    files: dict[str, TarMember] = {}
    links: list[tarfile.TarInfo] = []
    archive: dict[str, TarMember] = {}

    def of_archive() -> Iterator[TarMember]:
        yield from archive.values()
        yield from _links(links, files)
        archive.clear()
        links.clear()

    with path.open("rb") as file:
        head, size = file.read(len(LFS)), file.seek(0, 2)
        file.seek(0)
        if head == LFS:
            yield TarMember(path.name, (0, size), LFS_POINTER, False)
            return
        if kind := next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None):
            yield TarMember(
                path.name, (0, size), f"compressed with {kind}: members can be read in plain tars alone", False
            )
            return
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, encoding="utf-8") as tar:
                held: Any = tar
                while (info := tar.next()) is not None:
                    held.members.clear()  # they would be all that a large tar has
                    if end < info.offset:
                        yield from of_archive()
                        yield from _gap(path, file, end, info.offset)
                    whole = info.size if info.isreg() else 0
                    end = info.offset_data + whole + -whole % BLOCK
                    if info.isreg():
                        name = posixpath.normpath(info.name)
                        archive.pop(name, None)
                        archive[name] = files[name] = _member(info, size)
                    elif info.islnk() or info.issym():
                        links.append(info)
            yield from of_archive()
            yield from _gap(path, file, end, size)
        except tarfile.TarError:  # of what follows, nothing can be told
            yield from of_archive()
            if end < size:
                yield TarMember(
                    f"{path.name}:{end}", (end, size - end), "damaged or cut off: no member from here on", False
                )


def _links(links: list[tarfile.TarInfo], files: dict[str, TarMember]) -> Iterator[TarMember]:
    """Yields links to files of a tar as these files under other names, as a folder with the links would have them."""
    targets = {}
    for info in links:  # a hard link names its target from the top of the tar on, a symbolic one from its own folder on
        folder = "" if info.islnk() else posixpath.dirname(info.name)
        targets[posixpath.normpath(info.name)] = posixpath.normpath(posixpath.join(folder, info.linkname))
    for info in links:
        name, seen = posixpath.normpath(info.name), set()
        while name in targets and name not in seen:  # a link may lead to another, and to itself
            seen.add(name)
            name = targets[name]
        problem = f"a link to {info.linkname}, which is not a file of the tar"
        found = files.get(name) or TarMember("", (info.offset, 0), problem)
        yield found._replace(name=info.name.removeprefix("./"))


def _member(info: tarfile.TarInfo, size: int) -> TarMember:
    name, place, problem = info.name.removeprefix("./"), (info.offset_data, info.size), None
    if info.issparse():
        problem = "a sparse file: its bytes do not lie side by side"
    elif info.offset_data + info.size > size:
        problem = f"cut off: {max(0, size - info.offset_data)} of {info.size} bytes are there"
    return TarMember(name, place, problem)


def _gap(path: Path, file: Any, start: int, end: int) -> Iterator[TarMember]:
    """Yields what stands for bytes between two members that are more than zeros."""
    if start >= end:
        return
    here = file.tell()
    file.seek(start)
    left = end - start
    while left and not (part := file.read(min(left, 1 << 20))).strip(b"\0"):
        left -= len(part)
        if not part:
            left = 0
    file.seek(here)
    if left:
        yield TarMember(
            f"{path.name}:{start}", (start, end - start), f"damaged: {end - start} bytes are no member", False
        )


def entries(tars: list[Path], folder: Path) -> Iterator[Listed]:
    """Yields the audio of tars, tar by tar and there in the order in which a directory of the same files is read."""
    for tar in tars:
        yield from _of_tar(tar, contained(tar, folder))


def _of_tar(tar: Path, container: str) -> Iterator[Listed]:
    found = list(members(tar))
    notes = {member.name: member for member in found if PurePosixPath(member.name).suffix in (".json", ".txt")}
    with buckets.on_disk(tar) as here:  # in a bucket, each note would be a request
        for member in sorted(found, key=lambda member: PurePosixPath(member.name).parts):
            name = PurePosixPath(member.name)
            is_hidden = any(part.startswith(".") and part != ".." for part in name.parts)
            if name.suffix.lower() in EXTENSIONS and not is_hidden:
                yield _entry(here, container, member, notes)
            elif not member.is_file:
                yield Entry(member.name, container, problem=member.problem), None


def _entry(tar: Path, container: str, member: TarMember, notes: dict[str, TarMember]) -> Listed:
    """Returns the entry of a file of audio, with what the .json and the .txt of its key say of it.

    tar: the tar, or a copy of it on this machine.
    """
    key = _key(member.name)
    said: dict[str, Any] = {}
    with contextlib.suppress(*WRONG, OSError):  # a note that cannot be read says nothing
        said = _read(tar, notes.get(f"{key}.json"), json.loads) or {}
    transcript = text(said, "text", "transcript", "transcription") if isinstance(said, dict) else None
    with contextlib.suppress(*WRONG, OSError):
        transcript = transcript or (_read(tar, notes.get(f"{key}.txt"), str.strip) or None)
    said = said if isinstance(said, dict) else {}
    seconds = None
    with contextlib.suppress(ValueError):
        seconds = number(said, "duration")
    entry = Entry(
        str(id) if type(id := said.get("id")) in (str, int, float) and id != "" else member.name,
        member.name,
        seconds=seconds,
        domain=text(said, "domain"),
        problem=member.problem,
        container=container,
        place=member.place,
    )
    return entry, transcript


def _read(tar: Path, note: TarMember | None, parse: Any) -> Any:
    if note is None or note.problem or note.place[1] > MAX_NOTE:
        return None
    return parse(Member(tar, note.name, note.place).read_bytes().decode())


def _key(name: str) -> str:
    """Returns the key of a member, which is its name up to the first dot after the last slash."""
    folders, slash, last = name.rpartition("/")
    return folders + slash + last.partition(".")[0]


def by_name(tar: Path) -> dict[str, TarMember]:
    """Returns the files of a tar by their names."""
    return {member.name: member for member in members(tar)}
