"""What tokens mean: stability of ids, drift over long clips, and what probes tell from frozen codes."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omnicodec_jax.data import audio, manifest
from omnicodec_jax.errors import ConfigError, DataError
from omnicodec_jax.evaluation import drift, probes, reconstruct, spelling, stability, study
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.systems import Output, System
from omnicodec_jax.evaluation.token_studies import TokenMeasurer, TokenStudies

HOP, RATE, SIZE = 240, 24_000, 64


class Levels:
    """Codes are the power of a frame in rough and in fine steps, relative to the loudest; decoding is lossless."""

    systems = (System("levels-1L", "", (SIZE,), RATE / HOP), System("levels-2L", "", (SIZE, SIZE), RATE / HOP))
    sample_rate = RATE
    any_length = True
    calls = 0

    def identity(self, known: str | None = None) -> str:
        return "levels"

    def encode(self, samples: np.ndarray) -> np.ndarray:
        type(self).calls += 1
        frames = samples[: samples.size // HOP * HOP].reshape(-1, HOP)
        power = np.square(frames).mean(1)
        decibels = -10 * np.log10(power / max(power.max(), 1e-9) + 1e-9)
        return np.stack([np.clip(decibels / step, 0, SIZE - 1) for step in (5, 0.05)]).astype(np.int64)

    def reconstruct(self, samples: np.ndarray, systems=None) -> Iterator[Output]:
        for system in systems or self.systems:
            yield Output(samples, 1.0, self.encode(samples)[: len(system.codebook_sizes)], 0.1)


class Drifting(Levels):
    """What it makes gets worse all the time."""

    def reconstruct(self, samples: np.ndarray, systems=None) -> Iterator[Output]:
        noise = np.random.default_rng(0).normal(0, 0.05, samples.size) * np.linspace(0.1, 1, samples.size)
        for output in super().reconstruct(samples, systems):
            yield output._replace(samples=(samples + noise).astype(np.float32))


class Whole(Levels):
    """It fills up the last frame, so that a clip of any length has codes."""

    def encode(self, samples: np.ndarray) -> np.ndarray:
        return super().encode(np.pad(samples, (0, max(0, HOP - samples.size))))


class Silent(Levels):
    """What it makes is silence."""

    systems = (System("silent-2L", "", (SIZE, SIZE), RATE / HOP),)

    def reconstruct(self, samples: np.ndarray, systems=None) -> Iterator[Output]:
        for output in super().reconstruct(samples, systems):
            yield output._replace(samples=np.zeros_like(output.samples))


class Breaking(Levels):
    """It raises what no one expects."""

    systems = (System("breaking-2L", "", (SIZE, SIZE), RATE / HOP),)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        raise IndexError("pad of an empty tensor")


class Short(Levels):
    """It cannot take long clips."""

    systems = (System("short-2L", "", (SIZE, SIZE), RATE / HOP),)
    any_length = False


@pytest.fixture
def speech() -> np.ndarray:
    rng = np.random.default_rng(0)
    envelope = np.interp(np.arange(2 * RATE), np.arange(0, 2 * RATE + 1, 2400), rng.uniform(0.05, 0.5, 21))
    return (envelope * rng.normal(size=2 * RATE)).astype(np.float32)


# -- Stability of ids


def test_the_share_of_ids_that_stay_is_counted_for_each_change_and_codebook(speech):
    kept = stability.shares_kept(Levels(), speech)
    assert list(kept.keys() - stability.titles()) == []
    assert kept["shifted 1 frame"] == [1.0, 1.0]  # a whole frame moves the codes and changes none
    assert kept["re-encoded 5 ×"] == kept["× 0.5"] == [1.0, 1.0]
    for title in ("shifted 1/8 frame", "shifted 1/2 frame", "noise −40 dB", "by 16 kHz"):
        rough, fine = kept[title]
        assert 0 < rough < 1 or title == "noise −40 dB", title
        assert fine < rough, title
    order = [kept[title][0] for title in ("shifted 1/8 frame", "shifted 1/4 frame", "shifted 1/2 frame")]
    assert order == sorted(order, reverse=True)
    assert kept["noise −60 dB"][1] > kept["noise −40 dB"][1]


@pytest.mark.parametrize("size", [HOP, HOP + 10, 3 * HOP])
def test_a_change_that_leaves_nothing_of_a_short_clip_is_left_out(speech, size, monkeypatch):
    monkeypatch.setattr(audio, "MIN_SECONDS", 1 / RATE)
    with np.errstate(all="raise"):
        kept = stability.shares_kept(Whole(), speech[:size])
    assert ("shifted 1 frame" in kept) is (size > 2 * HOP)
    assert (stability.CHANCE in kept) is (size >= 2 * HOP)  # one frame has no other to be like
    assert all(np.isfinite(shares).all() for shares in kept.values())


def test_chance_is_what_frames_at_random_have_in_common():
    codes = np.array([[0, 0, 1, 1], [5, 5, 5, 5]])
    assert stability.chance(codes) == [1 / 3, 1.0]  # of six pairs of frames two are alike
    assert stability.share_equal(codes, codes[:, 1:], 1) == [1.0, 1.0]
    assert stability.share_equal(codes, codes[:, 1:]) == [2 / 3, 1.0]


# -- Drift


@pytest.fixture
def short_minutes(monkeypatch) -> None:
    """A minute lasts five seconds, so that tests are quick."""
    monkeypatch.setattr(drift, "SECONDS", 5)


def test_drift_shows_minute_by_minute_and_its_absence_does(speech, short_minutes):
    whole = drift.repeated_minute([speech[:RATE], speech], RATE, 3)
    assert whole.size == 3 * 5 * RATE
    np.testing.assert_array_equal(whole[: 5 * RATE], whole[5 * RATE : 10 * RATE])
    (steady,), (drifting,) = (list(codec.reconstruct(whole, codec.systems[-1:])) for codec in (Levels(), Drifting()))
    assert drift.by_minute(whole, steady.samples, RATE) == [100.0] * 3
    falling = drift.by_minute(whole, drifting.samples, RATE)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] - falling[-1] > 3
    first, last = drift.mel_of_ends(whole, drifting.samples, RATE)
    assert 0 < first < last
    assert drift.mel_of_ends(whole, steady.samples, RATE) == [0.0, 0.0]


# -- Probes


def labelled(count: int, label: str = "language", speakers: int | None = None) -> list[dict]:
    """Lines of a manifest with two labels in turn; speakers have one label each."""
    rows = [{"audio_filepath": f"{n}.wav", label: "ab"[n % 2]} for n in range(count)]
    return rows if speakers is None else [{**row, "speaker": n % speakers} for n, row in enumerate(rows)]


def written(folder: Path, rows: list[dict]) -> Path:
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "list.jsonl"


def test_a_corpus_is_split_in_the_same_way_wherever_it_lies(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, labelled(80))
    (lists,) = (tmp_path / "here").iterdir()
    monkeypatch.chdir(tmp_path / "here")
    paths = [lists, tmp_path / "there" / lists.name, Path(lists.name)]
    first, *others = [probes.split(probes.read(path, "language"), "language") for path in paths]
    assert all(other == first for other in others)


def test_a_probe_tells_a_label_from_the_codebook_that_has_it_and_from_no_other(tmp_path):
    rng = np.random.default_rng(0)
    clips = probes.read(written(tmp_path, labelled(80)), "language")
    codes = [
        np.stack([rng.integers(0, 4, 50) + 4 * (clip.label == "b"), *rng.integers(0, 8, (9, 50))]) for clip in clips
    ]
    figures = probes.measure(clips, codes, (8,) * 10, 12.5, "language")
    assert figures["first codebook"] == figures["first 8"] == figures["all"] == 1.0
    for name in ("second", "all but the first", probes.CHANCE):
        assert 0.15 < figures[name] < 0.85, name
    assert figures[probes.CLIPS] == 20
    alone = probes.measure(clips, [clip[:1] for clip in codes], (8,), 12.5, "language")
    assert set(alone) == {"first codebook", "all", probes.CHANCE, probes.CLIPS}


def test_clips_of_a_speaker_stay_together_so_that_a_voice_tells_nothing(tmp_path):
    clips = probes.read(written(tmp_path, labelled(80, speakers=16)), "language")
    parts = probes.split(clips, "language")
    groups = [{clips[number].group for number in part} for part in parts]
    assert not groups[0] & groups[1]
    assert [len(group) for group in groups] == [12, 4]
    assert {clips[number].label for number in parts.test} == {"a", "b"}
    assert probes.split(clips, "language") == parts
    voices = probes.read(written(tmp_path, labelled(80, speakers=16)), "speaker")
    assert {len({voices[n].label for n in part}) for part in probes.split(voices, "speaker")} == {16}


def test_labels_that_cannot_be_divided_are_refused_before_anything_is_encoded(tmp_path):
    one_speaker_each = labelled(20, speakers=2)
    with pytest.raises(DataError, match="0 labels have clips to learn from"):
        probes.split(probes.read(written(tmp_path, one_speaker_each), "language"), "language")
    with pytest.raises(DataError, match=r"list\.jsonl: no line of a clip has the field class"):
        probes.read(written(tmp_path, labelled(20)), "class")
    with pytest.raises(DataError, match="needs at least 8"):
        probes.read(written(tmp_path, labelled(7)), "language")
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        probes.read(tmp_path, "language")
    with pytest.raises(ConfigError, match="--stability -1"):
        TokenStudies(stability=-1)


def test_lines_without_the_label_and_broken_ones_are_passed_over_and_counted(tmp_path, caplog):
    text = '\ufeff{"audio_filepath": "a.wav", "class": 3}\n\n{broken\n{"audio_filepath": "b.wav", "class": null}\n[]\n'
    text += '{"audio_filepath": "c.wav", "class": " "}\n{"audio_filepath": "d.wav"}\n'
    (tmp_path / "m.jsonl").write_text(text)
    assert [(entry.path, fields["class"]) for entry, fields in manifest.labelled(tmp_path / "m.jsonl", "class")] == [
        ("a.wav", 3)
    ]
    assert "m.jsonl: passed over 5 lines that are no clips, or have no class" in caplog.text


def test_labelled_lists_may_be_several_files_and_one_that_is_not_there_is_named(tmp_path):
    for number in (0, 1):
        rows = [{**row, "audio_filepath": f"{number}/{row['audio_filepath']}"} for row in labelled(4)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(probes.read(tmp_path / "{0..1}.jsonl", "language")) == 8
    with pytest.raises(DataError, match=r"2\.jsonl: no such file"):
        probes.read(tmp_path / "{0..2}.jsonl", "language")


def test_labels_of_a_single_file_are_left_out_and_the_table_says_which(tmp_path):
    single = [{"audio_filepath": f"{label}.wav", "language": label} for label in ("rare", "too")]
    rows = labelled(20) + single
    clips = probes.read(written(tmp_path, rows), "language")
    assert {clips[number].label for part in probes.split(clips, "language") for number in part} == {"a", "b"}
    assert probes.labels_told(clips, "language") == (
        "There are 2 labels. Left out, as all clips of each are of one file or speaker: rare, too."
    )
    assert probes.labels_told(clips[:20], "language") == "There are 2 labels."


def test_clips_whose_speaker_is_not_known_are_not_taken_for_those_of_one(tmp_path):
    rows = [{**row, "speaker": ("", None, " ")[number % 3]} for number, row in enumerate(labelled(12))]
    clips = probes.read(written(tmp_path, rows), "language")
    assert len({clip.group for clip in clips}) == 12


def test_a_network_spells_what_codes_say():
    rng, letters = np.random.default_rng(0), " abcdé"
    spoken = ["".join(rng.choice(list(letters), 6)).strip() for _ in range(60)]

    def codes(text: str) -> np.ndarray:
        said = np.array([[letters.index(letter)] * 3 + [len(letters)] for letter in text]).reshape(-1)
        return np.stack([said, rng.integers(0, 5, said.size)])

    examples = [(codes(text), text) for text in spoken]
    speller = spelling.learn(examples[:50], (7, 5), 12.5, steps=80)
    alike = [difflib.SequenceMatcher(a=text, b=speller(clip)).ratio() for clip, text in examples[50:]]
    assert np.mean(alike) > 0.85
    assert spelling.plain("  Déjà-vu, IT'S “2”! ") == "deja vu it's 2"


def test_a_probe_of_transcripts_gives_the_word_error(tmp_path, monkeypatch):
    pytest.importorskip("jiwer")
    rows = [{"audio_filepath": f"{n}.wav", "text": "one two" if n % 2 else "three"} for n in range(16)]
    clips = probes.read(written(tmp_path, rows), "text")
    monkeypatch.setattr(spelling, "learn", lambda *_: lambda codes: "one two")
    figures = probes.measure(clips, [np.zeros((2, 5), int)] * 16, (4, 4), 12.5, "text")
    heard = [clips[number].label for number in probes.split(clips, "text").test]
    wrong, said = sum(2 for text in heard if text == "three"), sum(len(text.split()) for text in heard)
    assert figures["all"] == pytest.approx(wrong / said)


# -- In an evaluation


@pytest.fixture
def measured(speech, tmp_path, short_minutes):
    """A function that measures codecs, and returns their studies; it may be called again."""
    soundfile.write(tmp_path / "a.wav", speech, RATE)
    for number in range(8):
        soundfile.write(tmp_path / f"{number}.wav", np.roll(speech, 7000 * number)[:RATE], RATE)
    (tmp_path / "7.wav").write_text("no sound")
    options = TokenStudies(stability=1, drift=2, probes={"language": written(tmp_path, labelled(9))})

    def measure(*codecs) -> list[study.Study]:
        with Journal(tmp_path / "out" / "journal.jsonl") as journal:
            clip = EvalClip("a", "speech", tmp_path / "a.wav")
            found = list(reconstruct.originals([clip], tmp_path / "out", journal))
            measurer = TokenMeasurer(options, found, tmp_path / "out", journal)
            for codec in codecs:
                measurer.measure(codec)
            return measurer.studies()

    return measure


def test_studies_have_a_row_for_each_codec_and_say_what_is_missing(measured):
    found = {one.title: one for one in measured(Levels(), Short())}
    assert list(found) == ["Drift", "Probe of language", "Stability of ids"]
    rows = {row.name: row for row in found["Drift"].rows}
    assert rows["levels-2L"].cells == [0.0, 0.0, *[100.0] * 4, None]  # two minutes tell nothing of an hour
    assert rows["short-2L"].why == "its memory grows with the length of a clip"
    assert found["Drift"].curves is not None
    assert found["Drift"].curves.series == {"levels-2L": [(1.0, 100.0), (2.0, 100.0)]}
    assert [row.name for row in found["Probe of language"].rows] == ["levels-2L, 2 clips", "short-2L, 2 clips"]
    stable = {row.name: row.cells for row in found["Stability of ids"].rows}
    assert stable["levels-2L, × 0.5"] == [1.0, 1.0, 1.0]
    assert len(stable) == 2 * len(stability.titles())


def test_rows_of_stability_say_how_many_clips_they_are_of_where_some_are_too_short(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "MIN_SECONDS", 1 / RATE)
    clips = []
    for name, size in {"long": 2 * RATE, "short": HOP}.items():
        soundfile.write(tmp_path / f"{name}.wav", speech[:size], RATE)
        clips.append(EvalClip(name, "speech", tmp_path / f"{name}.wav"))
    with Journal(tmp_path / "out" / "journal.jsonl") as journal:
        found = list(reconstruct.originals(clips, tmp_path / "out", journal))
        measurer = TokenMeasurer(TokenStudies(stability=2), found, tmp_path / "out", journal)
        measurer.measure(Whole())
        (stable,) = measurer.studies()
    rows = {row.name: row.cells for row in stable.rows}
    assert stable.notes == ["levels-2L: 2 of 2 clips"]
    assert "levels-2L, × 0.5" in rows
    assert rows["levels-2L, shifted 1 frame (n = 1)"] == [1.0, 1.0, 1.0]
    long = stability.shares_kept(Whole(), audio.load(tmp_path / "long.wav", RATE).samples)
    assert rows["levels-2L, chance (n = 1)"][1:] == pytest.approx(long[stability.CHANCE])


def test_a_codec_that_makes_silence_or_breaks_has_reasons_in_place_of_numbers(measured):
    found = {one.title: {row.name: row for row in one.rows} for one in measured(Silent(), Breaking())}
    assert found["Drift"]["silent-2L"].why == "SI-SDR: what was made of it is silent"
    why = "IndexError: pad of an empty tensor"
    assert found["Drift"]["breaking-2L"].why == found["Stability of ids"]["breaking-2L"].why == why
    assert found["Probe of language"]["breaking-2L"].cells == [None] * 6


def test_what_was_measured_is_not_measured_again(measured, monkeypatch):
    first = measured(Levels())

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Levels, "encode", never)
    monkeypatch.setattr(Levels, "reconstruct", never)
    assert measured(Levels()) == first


def test_a_probe_hears_audio_that_was_put_in_the_place_of_other(measured, tmp_path):
    first = measured(Levels())
    Levels.calls = 0
    soundfile.write(tmp_path / "0.wav", 0.5 * np.sin(np.arange(2 * RATE) / 10), RATE)
    second = measured(Levels())
    assert Levels.calls == 1
    assert [one.title for one in first] == [one.title for one in second]


def test_studies_are_tables_in_markdown(measured):
    text = study.markdown(measured(Levels(), Short()))
    assert "## Stability of ids: speech" in text
    assert "| Model | first codebook | second | first 8 | all but the first | all | chance |" in text
    assert "| levels-2L | 0.00 | 0.00 | 100.00 | 100.00 | 100.00 | 100.00 | – |" in text
    assert "- short-2L: its memory grows with the length of a clip" in text
    assert "- levels-2L: 1 of 1 clips" in text
    assert "- levels-2L: 7 of 9 clips; the others: not audio, damaged" in text
    assert "There are 2 labels." in text
    assert study.markdown([]) == ""
