"""Audio as corpora come: tars, Parquet, Lhotse's cuts and SHAR, NeMo's tarred manifests, Kaldi's segments."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from tar_files import tar_of
from test_jobs import Quick

from omnicodec_jax.cli import corpora
from omnicodec_jax.corpus import read_tokens, runners, shards, tokenize
from omnicodec_jax.corpus.tokenize import Job
from omnicodec_jax.data import audio, braces, manifest, prepare, records, units
from omnicodec_jax.data.entries import Entry
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import AudioError, DataError, TokenError
from omnicodec_jax.evaluation import datasets, probes
from omnicodec_jax.token_file import TokenFile

RATE = 24_000
NAMES = ("b.flac", "a.wav", "deep/er.v1.ogg", "c d.wav")


def sound(seed: int, suffix: str = ".wav", seconds: float = 0.3) -> bytes:
    """A file of noise."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, round(RATE * seconds))
    file = io.BytesIO()
    soundfile.write(file, noise, RATE, format=suffix[1:])
    return file.getvalue()


def listed(path: Path) -> dict[str, Entry]:
    return {entry.id: entry for entry in manifest.read(path)}


def samples(path: Path, entry: Entry) -> np.ndarray:
    return audio.load(entry.file(manifest.folder(path)), RATE, offset=entry.offset, duration=entry.duration).samples


def of(data: bytes) -> np.ndarray:
    """What is heard of a file."""
    return audio.load(_written(data), RATE).samples


def _written(data: bytes) -> Path:
    path = Path(_written.folder) / f"{abs(hash(data))}.audio"
    path.write_bytes(data)
    return path


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory):
    _written.folder = tmp_path_factory.mktemp("scratch")


@pytest.fixture
def corpus(tmp_path) -> dict[str, bytes]:
    """Files of several formats, as they lie in tmp_path/folder and in tmp_path/all.tar."""
    made = {name: sound(seed, Path(name).suffix) for seed, name in enumerate(NAMES)}
    for name, data in made.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tar_of(tmp_path / "all.tar", {f"./{name}": data for name, data in made.items()})
    return made


# -- A tar is the folder that it was made of


def prepared(source: Path, out: Path) -> dict[str, bytes]:
    prepare.run({"sound": source}, out, PrepareConfig(validation=0.4), 1, Share())
    kept = [
        records.INDEX,
        records.REJECTS,
        *(f"{records.SHARDS}/{path.name}" for path in out.glob("shards/*.*record*")),
    ]
    return {name: (out / name).read_bytes() for name in kept}


def test_tar_is_prepared_as_the_folder_that_it_was_made_of(tmp_path, corpus):
    of_folder = prepared(tmp_path / "folder", tmp_path / "a")
    assert prepared(tmp_path / "all.tar", tmp_path / "b") == of_folder
    assert len(of_folder) > 2


def test_links_in_a_tar_are_the_files_that_they_lead_to_as_in_its_folder(tmp_path, corpus):
    folder = tmp_path / "folder"
    os.link(folder / "a.wav", folder / "deep" / "hard.wav")
    os.symlink("../b.flac", folder / "deep" / "soft.flac")
    os.symlink("deep/soft.flac", folder / "again.flac")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(folder, ".")
    assert prepared(tmp_path / "links.tar", tmp_path / "b") == prepared(folder, tmp_path / "a")
    os.symlink("elsewhere.wav", folder / "gone.wav")
    os.symlink("self.wav", folder / "self.wav")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(folder, ".")
    found = listed(tmp_path / "links.tar")
    assert list(found) == [entry.id for entry in manifest.read(folder)]
    problems = {id: entry.problem for id, entry in found.items() if entry.problem}
    assert problems == {
        "gone.wav": "a link to elsewhere.wav, which is not a file of the tar",
        "self.wav": "a link to self.wav, which is not a file of the tar",
    }


@pytest.fixture
def job(tmp_path, demo_model, monkeypatch):
    monkeypatch.setattr(tokenize, "OmniCodecTokenizer", Quick)
    monkeypatch.setattr(Quick, "encoded", 0)
    monkeypatch.setattr(corpora, "_share_of_this_host", Share)

    def run(source: Path, out: str) -> dict[str, bytes]:
        made = Job(sources={"sound": source}, out=tmp_path / out, model=str(demo_model), num_readers=1)
        runners.run(made, "here", 1, Share())
        return {path.name: path.read_bytes() for path in shards.shards(tmp_path / out)}

    return run


def test_tar_is_tokenized_as_the_folder_that_it_was_made_of(tmp_path, corpus, job):
    of_folder = job(tmp_path / "folder", "a")
    assert job(tmp_path / "all.tar", "b") == of_folder
    assert [clip.id for clip in read_tokens(tmp_path / "b")] == sorted(NAMES)


def test_tokens_of_a_tar_are_made_once_and_those_of_another_one_in_its_place_anew(tmp_path, corpus, job):
    job(tmp_path / "all.tar", "tokens")
    assert Quick.encoded == 4
    job(tmp_path / "all.tar", "tokens")
    assert Quick.encoded == 4
    tar_of(tmp_path / "all.tar", {name: sound(9 + seed) for seed, name in enumerate(NAMES)})
    job(tmp_path / "all.tar", "tokens")
    assert Quick.encoded == 8


def test_lists_that_lie_in_no_container_are_the_units_that_they_were():
    entries = [Entry("a", "b.wav", 1.0, 2.0, 2.0, "speech")]
    before = '[["a", "b.wav", 1.0, 2.0, 2.0, "speech", null]]'
    assert units.entries_digest(entries, 8) == hashlib.blake2b(before.encode(), digest_size=8).hexdigest()
    inside = [entries[0]._replace(container="x.tar", place=(0, 1))]
    assert units.entries_digest(inside, 8) == units.entries_digest(entries, 8)


# -- Tars


def test_tars_with_braces_are_read_one_after_the_other(tmp_path):
    for number in range(9, 12):
        tar_of(tmp_path / f"shard-{number:03d}.tar", {f"{number}.wav": sound(number)})
    ((domain, path),) = manifest.parse_sources(f"speech={tmp_path}/shard-{{009..011}}.tar").items()
    found = listed(path)
    assert (domain, list(found)) == ("speech", ["9.wav", "10.wav", "11.wav"])
    np.testing.assert_array_equal(samples(path, found["10.wav"]), of(sound(10)))
    with pytest.raises(DataError, match=r"shard-012.tar: no such file"):
        manifest.parse_sources(f"speech={tmp_path}/shard-{{009..013}}.tar")
    assert [file.name for file in manifest.files(Path("a/{x,y}-{1..2}.tar"))] == [
        *("x-1.tar", "x-2.tar", "y-1.tar", "y-2.tar")
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{{0..1},5}", "0 1 5"),
        ("{a,{b,c}d}e", "ae bde cde"),
        ("{0..4..2}", "0 2 4"),
        ("{2..0}", "2 1 0"),
        ("{008..10}", "008 009 010"),
        ("{8..10}", "8 9 10"),
        ("{a..c}", "a b c"),
        ("{-1..1}", "-1 0 1"),
        ("x__OP_0..1_CL_", "x_0 x_1"),
        ("{0..1}{a,b}", "0a 0b 1a 1b"),
        ("{a}", "{a}"),
        ("{a..1}", "{a..1}"),
        ("{a,b", "{a,b"),
        ("{a{0..1}", "{a0 {a1"),
        ("{x}{0..1}", "{x}0 {x}1"),
        ("{,a}b", "b ab"),
    ],
)
def test_braces_are_expanded_as_bash_does(text, names):
    assert braces.expand(text) == names.split()


def test_lists_in_several_folders_with_braces_name_files_beside_themselves(tmp_path):
    for number, name in enumerate(("dev", "train")):
        folder = tmp_path / name
        tar_of(folder / "audio_0.tar", {"c.wav": sound(number)})
        (folder / "a.wav").write_bytes(sound(number))
        lines = [{"audio_filepath": file, "label": "x"} for file in ("a.wav", str(tmp_path / "dev" / "a.wav"))]
        lines.append({"audio_filepath": "c.wav", "duration": 0.3, "shard_id": 0, "label": "x"})
        (folder / "m.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / "wav.scp").write_text("r a.wav\n")
        (folder / "segments").write_text(f"{name} r 0.1 0.2\n")
    for folders, first in (("{dev,train}", 0), ("{train,dev}", 1)):
        path = tmp_path / folders / "m.json"
        listed_once = manifest.Manifest(path)
        heard = [audio.load(entry.file(listed_once.folder), RATE).samples for entry in listed_once]
        assert len(heard) == 6
        wanted = [of(sound(number)) for number in (first, 0, first, 1 - first, 0, 1 - first)]
        np.testing.assert_array_equal(heard, wanted)
        own = ("dev", "train")[first]
        assert [entry.path for entry in listed_once][:2] == [f"{own}/a.wav", str(tmp_path / "dev" / "a.wav")]
        labelled = [samples(path, entry) for entry, _ in manifest.labelled(path, "label")]
        np.testing.assert_array_equal(labelled, wanted)
    path = tmp_path / "{dev,train}" / "wav.scp"
    segments = listed(path)
    assert list(segments) == ["dev", "train"]
    assert len(samples(path, segments["train"])) == 2400


def test_commands_are_refused_in_one_line():
    with pytest.raises(DataError, match=r"^--manifest speech: pipe:cat x.tar: a command; only files are read"):
        manifest.parse_sources("speech=pipe:cat x.tar")


def test_directory_of_nothing_but_tars_is_read(tmp_path, corpus):
    tar_of(tmp_path / "tars" / "1.tar", {"x.wav": sound(1)})
    tar_of(tmp_path / "tars" / "0.tar", {"y.wav": sound(2)})
    assert list(listed(tmp_path / "tars")) == ["y.wav", "x.wav"]
    assert [clip.id for clip in datasets.clips(tmp_path / "tars", "sound", None)] == ["y", "x"]


def test_what_is_said_beside_the_audio_of_a_tar_is_kept(tmp_path):
    note = {"id": "first", "domain": "speech", "duration": 0.3, "text": "said"}
    members = {"1.wav": sound(1), "1.json": json.dumps(note).encode(), "2.wav": sound(2), "2.txt": b"other\n"}
    members |= {"3.wav": sound(3), "3.json": b"{not json", "4.wav": sound(4), "4.json": b"[1]", ".5.wav": b""}
    members |= {"6.wav": sound(6), "6.json": b'{"id": 17, "domain": null}'}
    path = tar_of(tmp_path / "x.tar", members)
    found = list(manifest.transcribed(path))
    assert [(entry.id, entry.domain, entry.seconds, text) for entry, text in found] == [
        ("first", "speech", 0.3, "said"),
        ("2.wav", None, None, "other"),
        ("3.wav", None, None, None),
        ("4.wav", None, None, None),
        ("17", None, None, None),
    ]


def test_members_above_the_folder_of_a_tar_are_not_hidden(tmp_path):
    path = tar_of(tmp_path / "x.tar", {"../a.wav": sound(1), "b/../c.wav": sound(2), "b/.d.wav": sound(3)})
    assert list(listed(path)) == ["../a.wav", "b/../c.wav"]


def test_broken_member_costs_itself_alone(tmp_path):
    good = {f"{number}.wav": sound(number) for number in range(4)}
    path = tar_of(tmp_path / "x.tar", good)
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second, third = tar.getmember("1.wav"), tar.getmember("2.wav")
    raw[second.offset : second.offset + 512] = b"\xff" * 512  # its header
    raw[third.offset_data : third.offset_data + 100] = b"\xff" * 100  # its audio
    path.write_bytes(raw[:-15_000])
    found = listed(path)
    assert list(found) == ["0.wav", "2.wav", "3.wav", f"x.tar:{second.offset}"]
    assert "bytes are no member" in (found[f"x.tar:{second.offset}"].problem or "")
    assert "cut off: " in (found["3.wav"].problem or "")
    np.testing.assert_array_equal(samples(path, found["0.wav"]), of(good["0.wav"]))
    with pytest.raises(AudioError, match=r"x.tar: 2.wav: not audio"):
        samples(path, found["2.wav"])


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    first, second = (tar_of(tmp_path / f"{n}.tar", {f"{n}.wav": sound(n)}).read_bytes() for n in range(2))
    (tmp_path / "both.tar").write_bytes(first + second)
    assert {id: entry.problem for id, entry in listed(tmp_path / "both.tar").items()} == {"0.wav": None, "1.wav": None}


def test_of_a_member_that_was_appended_again_the_last_one_counts(tmp_path, corpus):
    tar = tmp_path / "all.tar"
    with tarfile.open(tar, "a") as appended:
        for name in ("a.wav", "./a.wav"):
            info = tarfile.TarInfo(name)
            info.size = len(data := sound(sum(map(ord, name))))
            appended.addfile(info, io.BytesIO(data))
    (tmp_path / "folder/a.wav").write_bytes(data)
    assert prepared(tar, tmp_path / "b") == prepared(tmp_path / "folder", tmp_path / "a")


def test_tars_that_were_joined_keep_their_clips_of_one_name(tmp_path):
    both = [tar_of(tmp_path / f"{n}.tar", {"0.wav": sound(n), "1.wav": sound(n + 2)}).read_bytes() for n in range(2)]
    (tmp_path / "both.tar").write_bytes(b"".join(both))
    entries = list(manifest.read(tmp_path / "both.tar"))
    assert [entry.id for entry in entries] == ["0.wav", "0.wav", "1.wav", "1.wav"]
    assert len({samples(tmp_path / "both.tar", entry).tobytes() for entry in entries}) == 4


@pytest.mark.parametrize(
    "data", [gzip.compress(b"x" * 2000), b"no tar at all" * 100, b""], ids=["gzip", "text", "nothing"]
)
def test_what_is_no_plain_tar_is_told(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x.tar: lists no audio"):
        list(manifest.transcribed(tmp_path / "x.tar"))


# -- Parquet


def test_parquet_of_hugging_face_is_read_row_by_row(tmp_path):
    rows = [
        {
            "id": "one",
            "audio": {"bytes": sound(1), "path": "a.wav"},
            "text": "said",
            "domain": "speech",
            "duration": 0.3,
        },
        {"id": None, "audio": {"bytes": sound(2), "path": "b.wav"}, "text": None, "domain": None, "duration": None},
        {"id": "", "audio": {"bytes": sound(3), "path": None}, "text": "", "domain": None, "duration": None},
        {"id": "four", "audio": {"bytes": None, "path": "c.wav"}, "text": "", "domain": None, "duration": float("nan")},
    ]
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    found = list(manifest.transcribed(path))
    assert [(entry.id, entry.domain, entry.seconds, text) for entry, text in found] == [
        ("one", "speech", 0.3, "said"),
        ("b.wav", None, None, None),
        ("train-00000-of-00001-00000002", None, None, None),
        ("four", None, None, None),
    ]
    assert {entry.problem for entry, _ in found} == {None}
    for seed, (entry, _) in enumerate(found[:3], 1):
        np.testing.assert_array_equal(samples(path, entry), of(sound(seed)))
    with pytest.raises(AudioError, match=r"c.wav: no audio in this row"):
        samples(path, found[3][0])
    assert [entry.id for entry in manifest.read(path.parent)] == [entry.id for entry, _ in found]


def test_parquet_without_audio_and_what_is_no_parquet_are_told(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="has no column of audio: a struct of bytes and path"):
        list(manifest.transcribed(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match="damaged, or no Parquet"):
        list(manifest.transcribed(tmp_path / "y.parquet"))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst", "a.tgz"])
def test_a_compressed_tar_is_named_so_whatever_its_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: a compressed tar: .* uncompress it first"):
        list(manifest.read(tmp_path / name))


def test_parquet_that_is_damaged_inside_or_encrypted_costs_what_is_damaged(tmp_path, clips):
    rows = [{"audio": {"bytes": clip.read_bytes(), "path": clip.name}} for clip in clips[:3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1, compression="gzip")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    start = (middle.dictionary_page_offset or middle.data_page_offset) + 1000
    data[start : start + 2000] = b"\xff" * 2000
    (tmp_path / "a.parquet").write_bytes(data)
    first, second, third = (entry.file(tmp_path) for entry in manifest.read(tmp_path / "a.parquet"))
    assert (first.read_bytes(), third.read_bytes()) == (clips[0].read_bytes(), clips[2].read_bytes())
    with pytest.raises(AudioError, match="damaged: "):
        second.read_bytes()
    (tmp_path / "b.parquet").write_bytes(b"PARE" + data[4:-4] + b"PARE")
    entries = list(manifest.read(tmp_path))
    assert [entry.problem is None for entry in entries] == [True] * 3 + [False]


def test_tokens_that_are_written_beside_parquet_do_not_change_its_list(tmp_path, demo_model, monkeypatch):
    monkeypatch.setattr(tokenize, "OmniCodecTokenizer", Quick)
    rows = [{"audio": {"bytes": sound(seed), "path": f"{seed}.wav"}} for seed in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    job = Job(sources={"speech": tmp_path}, out=tmp_path / "tokens", model=str(demo_model), num_readers=1)
    assert runners.run(job, "here", 1, Share()).tried == 2
    again = runners.run(job, "here", 1, Share())
    assert (again.listed, again.tried) == (2, 0)
    with pytest.raises(DataError, match="lists no audio"):
        manifest.read_all({"speech": job.out})


# -- Lhotse


def test_a_line_with_a_path_is_no_cut_whatever_else_it_says(tmp_path):
    line = {"audio_filepath": "a.wav", "recording": "studio 1", "sources": ["web"], "type": "ShortCut"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    assert list(manifest.read(tmp_path / "a.jsonl")) == [Entry("a.wav", "a.wav")]


def recording(path: str, **fields) -> dict:
    source = {"type": "file", "channels": [0], "source": path}
    return {"id": "rec", "sources": [source], "sampling_rate": RATE, "duration": 0.3, "channel_ids": [0], **fields}


def cut(id: str, **fields) -> dict:
    return {"id": id, "start": 0.0, "duration": 0.3, "channel": 0, "type": "MonoCut", "supervisions": [], **fields}


def test_cuts_of_lhotse_keep_their_ids_offsets_and_durations(tmp_path, corpus):
    supervisions = [{"id": "s", "text": "said"}, {"id": "t"}]
    rows = [
        cut("whole", recording=recording("folder/a.wav"), custom={"domain": "speech"}, supervisions=supervisions),
        cut("part", start=0.1, duration=0.1, recording=recording("folder/a.wav")),
        cut("left", recording=recording("x.wav", channel_ids=[0, 1])),
        cut("command", recording=recording("x") | {"sources": [{"type": "command", "source": "sox x"}]}),
        cut("sped", recording=recording("x.wav", transforms=[{"name": "Speed"}])),
        cut("mix", type="MixedCut"),
        recording("folder/b.flac"),
    ]
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = list(manifest.transcribed(path))
    assert found[0] == (Entry("whole", "folder/a.wav", seconds=0.3, domain="speech"), "said")
    assert found[1] == (Entry("part", "folder/a.wav", 0.1, 0.1, 0.1), None)
    assert found[6] == (Entry("rec", "folder/b.flac", seconds=0.3), None)
    problems = [entry.problem for entry, _ in found[2:6]]
    wanted = ("channel 0 of [0, 1]", "a command; only files", "has transforms", "MixedCut: only cuts of one recording")
    assert all(words in problem for words, problem in zip(wanted, problems, strict=True))
    np.testing.assert_array_equal(samples(path, found[0][0]), of(corpus["a.wav"]))


def test_shar_of_lhotse_is_read_from_its_tars(tmp_path):
    folder = tmp_path / "shar"
    for shard in range(2):
        cuts = [cut(f"{shard}-{n}", recording=recording("") | {"sources": [{"type": "shar"}]}) for n in range(3)]
        members = {f"{shard}-{n}.flac": sound(10 * shard + n, ".flac") for n in range(2)} | {f"{shard}-2.nodata": b""}
        members |= {f"{shard}-{n}.json": b"{}" for n in range(2)} | {f"{shard}-2.nometa": b""}
        tar_of(folder / f"recording.{shard:06d}.tar", members)
        (folder / f"cuts.{shard:06d}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    found = list(manifest.read(folder))
    assert [entry.id for entry in found if not entry.problem] == ["0-0", "0-1", "1-0", "1-1"]
    assert [entry.problem for entry in found if entry.problem] == [
        f"no clip: {shard}-2: recording.{shard:06d}.tar has no audio of it" for shard in range(2)
    ]
    np.testing.assert_array_equal(samples(folder, found[4]), of(sound(11, ".flac")))


def test_shar_in_one_piece_and_in_the_formats_of_its_originals_is_read(tmp_path):
    """What Lhotse writes with shard_size=None and fields={"recording": "original"}."""
    cuts = [cut(f"a.b-{n}", recording=recording("") | {"sources": [{"type": "shar"}]}) for n in range(2)]
    members = {f"a.b-{n}.original": sound(n, ".flac") for n in range(2)} | {f"a.b-{n}.json": b"{}" for n in range(2)}
    tar_of(tmp_path / "shar/recording.tar", members)
    (tmp_path / "shar/cuts.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    found = listed(tmp_path / "shar")
    assert {id: entry.problem for id, entry in found.items()} == {"a.b-0": None, "a.b-1": None}
    np.testing.assert_array_equal(samples(tmp_path / "shar", found["a.b-1"]), of(sound(1, ".flac")))


# -- NeMo


@pytest.mark.parametrize("name", ["tarred_audio_manifest.json", "sharded_manifests/manifest_{0..1}.json"])
def test_tarred_manifests_of_nemo_are_read(tmp_path, name):
    for shard in range(2):
        tar_of(tmp_path / f"audio_{shard}.tar", {f"{shard}{n}.wav": sound(10 * shard + n) for n in range(2)})
    rows = [
        {"audio_filepath": f"{shard}{n}.wav", "duration": 0.3, "text": f"said {n}", "shard_id": shard}
        for shard in range(2)
        for n in range(3)
    ]
    for file in manifest.files(tmp_path / name):
        file.parent.mkdir(exist_ok=True)
        own = [row for row in rows if f"_{row['shard_id']}.json" in file.name or "tarred" in file.name]
        file.write_text("\n".join(map(json.dumps, own)))
    found = list(manifest.transcribed(tmp_path / name))
    assert [(entry.id, text) for entry, text in found] == [(row["audio_filepath"], row["text"]) for row in rows]
    assert [entry.problem for entry, _ in found[2::3]] == [f"audio_{n}.tar has no such member" for n in range(2)]
    np.testing.assert_array_equal(samples(tmp_path / name, found[4][0]), of(sound(11)))


def test_segments_of_one_file_in_a_tarred_manifest_of_nemo_are_read_from_it(tmp_path):
    """NeMo puts a file into the tar once, and calls it -sub1, -sub2 … in the lines after the first one."""
    tar_of(tmp_path / "audio_0.tar", {"_data_a.wav": sound(1), "_data_b.flac": sound(2, ".flac")})
    names = ("_data_a.wav", "_data_a-sub1.wav", "_data_a-sub2.wav", "_data_b.wav")
    rows = [
        {"audio_filepath": name, "offset": 0.1 * n, "duration": 0.1, "shard_id": 0} for n, name in enumerate(names[:3])
    ]
    rows.append({"audio_filepath": names[3], "duration": 0.3, "shard_id": 0})  # of before --force_codec flac
    (tmp_path / "tarred_audio_manifest.json").write_text("\n".join(map(json.dumps, rows)))
    found = listed(tmp_path / "tarred_audio_manifest.json")
    assert list(found) == list(names)
    assert {entry.problem for entry in found.values()} == {None}
    assert [entry.path for entry in found.values()] == [*["_data_a.wav"] * 3, "_data_b.flac"]
    part = samples(tmp_path / "tarred_audio_manifest.json", found["_data_a-sub1.wav"])
    np.testing.assert_array_equal(part, of(sound(1))[2400:4800])


def test_labelled_lines_of_a_tarred_manifest_are_read_from_the_tar(tmp_path):
    tar_of(tmp_path / "audio_0.tar", {f"{n}.wav": sound(n) for n in range(8)})
    rows = [{"audio_filepath": f"{n}.wav", "shard_id": 0, "gender": "fm"[n % 2]} for n in range(8)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips = probes.read(tmp_path / "labelled.jsonl", "gender")
    np.testing.assert_array_equal(audio.load(clips[5].path, RATE).samples, of(sound(5)))


# -- Kaldi


def test_segments_of_kaldi_are_parts_of_its_recordings(tmp_path, corpus):
    (tmp_path / "wav.scp").write_text("rec1 folder/a.wav\nrec2 folder/b.flac\npiped sox x.wav -t wav - |\n")
    (tmp_path / "segments").write_text(
        "utt1 rec1 0.05 0.25\nutt2 rec2 0.1 -1\n\nutt3 piped 0 1\nutt4 rec9 0 1\nutt5 rec1 0.2 0.1\nutt6 rec1 x 1\n"
    )
    found = list(manifest.read(tmp_path / "wav.scp"))
    assert found[0]._replace(duration=None, seconds=None) == Entry("utt1", "folder/a.wav", 0.05)
    assert found[0].duration == found[0].seconds == pytest.approx(0.2)
    assert found[1] == Entry("utt2", "folder/b.flac", 0.1)
    problems = [(entry.id, entry.problem) for entry in found[2:]]
    assert [id for id, _ in problems] == ["utt3", "utt4", "utt5", "segments:7"]
    wanted = ("a command; only files", "wav.scp has no recording rec9", "ends at 0.1 s, before", "must be `utterance")
    assert all(words in problem for words, (_, problem) in zip(wanted, problems, strict=True))
    part = samples(tmp_path / "wav.scp", found[0])
    np.testing.assert_array_equal(part, of(corpus["a.wav"])[1200:6000])


def test_segments_of_single_channels_are_refused_and_those_of_a_file_of_one_channel_are_not(tmp_path):
    (tmp_path / "wav.scp").write_text("call call.wav\ntalk talk.wav\n")
    lines = ["a call 0 1 0", "b call 0 1 1", "c talk 0 1 0", "d talk 1 2 -1", "e talk 2 3"]
    (tmp_path / "segments").write_text("\n".join(lines))
    found = listed(tmp_path / "wav.scp")
    assert [id for id, entry in found.items() if entry.problem is None] == ["c", "d", "e"]
    assert all("segments of single channels; only the mix" in str(found[id].problem) for id in "ab")


def test_wav_scp_of_commands_alone_is_refused_in_one_line(tmp_path):
    (tmp_path / "wav.scp").write_text("piped sox x.wav -t wav - |\n")
    with pytest.raises(DataError, match=r"lists no audio; wav.scp:1: no clip: a command; only files are read: run it"):
        list(manifest.transcribed(tmp_path / "wav.scp"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["list.jsonl", "list.json", "wav.scp"])
def test_lists_that_git_lfs_did_not_fetch_are_named_so(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DataError, match=f"{name}: a pointer of Git LFS, not the file itself; run: git lfs pull"):
        list(manifest.read(tmp_path / name))


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_containers_that_git_lfs_did_not_fetch_are_named_so(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    (entry,) = manifest.read(tmp_path)
    assert entry.problem.startswith("a pointer of Git LFS")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.m4a"])
def test_audio_that_git_lfs_did_not_fetch_is_named_so(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(AudioError, match=f"{name}: a pointer of Git LFS"):
        audio.load(tmp_path / name, RATE)


def test_tokens_that_git_lfs_did_not_fetch_are_named_so(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(POINTER)
    with pytest.raises(TokenError, match="a.safetensors: a pointer of Git LFS"):
        TokenFile.load(tmp_path / "a.safetensors")
    (tmp_path / "a.parquet").write_bytes(POINTER)
    with pytest.raises(DataError, match="a.parquet: a pointer of Git LFS"):
        shards.read_contract(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: a pointer of Git LFS"), shards.opened(tmp_path / "a.parquet"):
        pass
