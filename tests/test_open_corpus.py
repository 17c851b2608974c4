"""The lists of open audio that the small codec is trained on."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.open_corpus import SOURCES, Source, clips, probes

pytestmark = pytest.mark.quick


def unpacked(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_files_of_a_package_are_in_one_list_only(tmp_path):
    names = (
        "animals/cow.ogg",
        "animals/cow_desc_da.ogg",
        "animals/cow_desc_fr.ogg",
        "animals/cow_desc_es.ogg",
        "cow.png",
    )
    package = "tuxpaint-stamps-default"
    folder = unpacked(tmp_path / package, *(f"usr/share/stamps/{name}" for name in names))
    lists = {
        (source.domain, source.held_out): [Path(line["id"]).name for line in clips(source, folder)]
        for source in SOURCES
        if source.package == package
    }
    assert lists == {
        ("speech", False): ["cow_desc_fr.ogg"],
        ("speech", True): ["cow_desc_da.ogg"],
        ("sound", True): ["cow.ogg"],
    }


def test_voices_of_a_game_are_neither_its_music_nor_its_sounds(tmp_path):
    folder = unpacked(tmp_path / "0ad-data", "m/audio/music/a.ogg", "m/audio/voice/b.ogg", "m/audio/actor/c.ogg")
    lists = [[Path(line["id"]).name for line in clips(s, folder)] for s in SOURCES if s.package == "0ad-data"]
    assert lists == [["a.ogg"], ["c.ogg"]]


def test_clips_have_the_words_that_are_said_in_them(tmp_path):
    folder = unpacked(tmp_path / "package", "librivox/one-0870.wav", "librivox/two.wav")
    (folder / "librivox/transcription").write_text("<s> mister john dashwood </s> (one-0870)\n")
    lines = list(clips(Source("package", "speech", "/librivox/|^librivox/"), folder))
    assert [line.get("text") for line in lines] == ["mister john dashwood", None]
    assert [line["id"] for line in lines] == ["package/librivox/one-0870.wav", "package/librivox/two.wav"]
    assert Path(lines[0]["audio_filepath"]).is_absolute()


def test_lists_for_probes_have_the_voices_and_languages_of_clips(tmp_path):
    folders = {
        "asterisk-core-sounds-en-g722": [f"usr/sounds/{number}.g722" for number in range(130)],
        "klettres-data": [f"usr/klettres/{place}/a-{n}.ogg" for place in ("en_GB", "nds", "en") for n in range(60)],
        "festvox-ru": ["usr/wav/ru_0001.wav", "usr/wav/ru_0002.wav"],
    }
    lines = []
    for package, names in folders.items():
        folder = unpacked(tmp_path / package, *names)
        if package == "festvox-ru":
            (folder / "etc").mkdir()
            (folder / "etc/txt.done.data").write_text('( ru_0001 "Пр+яди, волос." )\n( ru_0002 "Она" )\n')
        lines += clips(Source(package, "speech"), folder)
    lists = dict(probes(lines))
    assert Counter(line["speaker"] for line in lists["speaker"]) == {
        "asterisk-core-sounds-en-g722 en": 60,
        "klettres-data en": 60,
        "klettres-data en_GB": 60,
        "klettres-data nds": 60,
    }
    assert len({line["id"] for line in lists["speaker"]}) == 240
    assert Counter(line["language"] for line in lists["language"]) == {"en": 120}
    assert [(line["text"], "speaker" in line) for line in lists["text"]] == [("Пряди, волос.", False), ("Она", False)]
