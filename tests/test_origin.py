"""What is there already: made again of the same source, and never lost to another."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omnicodec_jax import cli
from omnicodec_jax.cli import codec
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.detokenize import detokenize
from omnicodec_jax.corpus.webdataset import convert
from omnicodec_jax.data import audio
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import DataError, ModelError, OmniCodecError, TokenError
from omnicodec_jax.evaluation import reconstruct
from omnicodec_jax.evaluation.datasets import EvalClip
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.systems import Folder
from omnicodec_jax.origin import Origin
from omnicodec_jax.stablehlo import export_stablehlo
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip


class Quick(OmniCodecTokenizer):
    """Compiles nothing: codes are zeros, and decode to a tone."""

    def prepare(self, samples, features=None):
        return PreparedClip(samples)

    def encode_each(self, clips):
        for key, clip in clips:
            yield key, np.zeros((self.num_quantizers, self.num_frames(clip.samples.size)), np.int32)

    def decode_each(self, tokens):
        for key, codes in tokens:
            yield key, 0.1 * np.sin(np.arange(codes.shape[1] * self.hop_length, dtype=np.float32))[None]


@pytest.fixture(autouse=True)
def _compile_nothing(monkeypatch):
    monkeypatch.setattr(codec, "_load_model", lambda model, *_: Quick.from_pretrained(model))


def sound(path: Path, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 5000), 24_000)
    return path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_encoding_a_flac_after_its_wav_does_not_replace_the_tokens(tmp_path, demo_model):
    wav, flac = sound(tmp_path / "a.wav", 0), sound(tmp_path / "a.flac", 1)
    assert cli.encode(wav, model=demo_model) == 0
    before = contents(tmp_path)
    with pytest.raises(OmniCodecError, match=r"a\.safetensors: was made of a\.wav, not of .*a\.flac; .*--overwrite"):
        cli.encode(flac, model=demo_model)
    assert contents(tmp_path) == before
    assert cli.encode(sound(wav, 2), model=demo_model) == 0  # edited in its place: made again
    assert TokenFile.load(tmp_path / "a.safetensors").source == Origin.of(wav, tmp_path / "a.safetensors")
    assert cli.encode(flac, model=demo_model, overwrite=True) == 0
    assert TokenFile.made_by(tmp_path / "a.safetensors")[1] == Origin.of(flac, tmp_path / "a.safetensors")


def test_clips_of_one_name_from_two_folders_do_not_replace_each_other(tmp_path, demo_model):
    (tmp_path / "out").mkdir()
    first, second = sound(tmp_path / "x" / "a.wav", 0), sound(tmp_path / "y" / "a.wav", 1)
    assert cli.encode(first, tmp_path / "out", model=demo_model) == 0
    for source in (second, second.parent):
        with pytest.raises(OmniCodecError, match=r"was made of \.\./x/a\.wav, not of .*y/a\.wav"):
            cli.encode(source, tmp_path / "out", model=demo_model)
    shutil.copy(first, second)  # the same, moved
    assert cli.encode(second, tmp_path / "out", model=demo_model) == 0
    assert cli.decode(tmp_path / "out", tmp_path / "x2", model=demo_model) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "out2")
    sound(tmp_path / "y" / "a.wav", 2)
    assert cli.encode(second, tmp_path / "out2", model=demo_model) == 0  # where it was, seen from the copy
    with pytest.raises(OmniCodecError, match=r"x2/a\.wav: was made of \.\./out/a\.safetensors, not of .*out2"):
        cli.decode(tmp_path / "out2", tmp_path / "x2", model=demo_model)


def test_what_an_earlier_run_has_left_under_another_name_is_named(tmp_path, demo_model, capsys):
    def says() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if "of an earlier run" in line]

    flac = sound(tmp_path / "in" / "a.flac", 0)
    tokens, back = tmp_path / "tokens", tmp_path / "back"
    assert cli.encode(flac.parent, tokens, model=demo_model) == 0
    assert cli.decode(tokens, back, model=demo_model) == 0
    sound(tmp_path / "in" / "a.wav", 1)
    (tokens / "a.wav").mkdir()
    assert not says()
    assert cli.encode(flac.parent, tokens, model=demo_model) == 0
    old = tokens / "a.safetensors"
    assert says() == [f"{old}: of an earlier run; what is made of {flac} is a.flac.safetensors now; remove it"]
    old.unlink()
    assert cli.encode(flac.parent, tokens, model=demo_model) == 0
    assert not says()
    (tmp_path / "in" / "a.wav").unlink()
    assert cli.encode(flac.parent, tokens, model=demo_model) == 0
    (line,) = says()
    assert line.startswith(
        f"{tokens / 'a.flac.safetensors'}: of an earlier run; what is made of {flac} is a.safetensors"
    )
    (tokens / "a.safetensors").write_bytes(b"of something else")
    assert cli.encode(tmp_path / "in" / "a.flac", tokens / "b.safetensors", model=demo_model) == 0
    assert not says()  # a name that was chosen


def test_tokens_that_do_not_say_what_they_are_of_are_not_replaced(tmp_path, demo_model):
    model = Quick.from_pretrained(demo_model).model_hash
    fields = {"frame_rate": 12.5, "sample_rate": 24_000, "num_samples": 5000, "gain": 1.0}
    TokenFile(codes=np.zeros((9, 3)), model=model, **fields).save(tmp_path / "a.safetensors")
    source = sound(tmp_path / "a.wav", 0)
    with pytest.raises(OmniCodecError, match="does not say that it was made of .*--overwrite"):
        cli.encode(source, model=demo_model)
    assert cli.encode(source, model=demo_model, overwrite=True) == 0
    assert cli.encode(source, model=demo_model) == 0


def test_decoding_does_not_replace_the_original(tmp_path, demo_model):
    source = sound(tmp_path / "in" / "a.wav", 0)
    assert cli.encode(source, model=demo_model) == 0
    tokens, original = source.with_suffix(".safetensors"), source.read_bytes()
    for given, out in ((tokens, source), (tokens, source.parent), (source.parent, source.parent)):
        with pytest.raises(OmniCodecError, match=r"in/a\.wav: is there already, .*another output, or .*--overwrite"):
            cli.decode(given, out, model=demo_model)
    assert source.read_bytes() == original
    for suffix in (".wav", ".flac"):
        out = tmp_path / f"out{suffix}"
        assert cli.decode(tokens, out, model=demo_model) == 0
        assert cli.decode(tokens, out, model=demo_model, num_quantizers=2) == 0  # its own
    assert cli.decode(tokens, source, model=demo_model, overwrite=True) == 0


def test_a_stream_does_not_replace_a_file(tmp_path, demo_model):
    (tmp_path / "a.wav").write_bytes(b"precious")
    with pytest.raises(OmniCodecError, match=r"a\.wav: is there already; .*--overwrite"):
        cli.stream_decode(tmp_path / "a.safetensors", tmp_path / "a.wav", model=demo_model)
    assert (tmp_path / "a.wav").read_bytes() == b"precious"


def test_tokens_are_not_replaced_by_what_is_decoded_of_them(tmp_path, demo_model):
    cli.encode(sound(tmp_path / "a.wav", 0), model=demo_model)
    tokens = tmp_path / "a.safetensors"
    (tmp_path / "link.wav").symlink_to(tokens)
    before = tokens.read_bytes()
    for output in (tokens, tmp_path / "link.wav", tmp_path / "." / "a.safetensors"):
        for command in (cli.decode, cli.stream_decode):
            with pytest.raises(OmniCodecError, match="is the input itself, which would be lost; choose another output"):
                command(tokens, output, model=demo_model, overwrite=True)
    assert tokens.read_bytes() == before


@pytest.fixture
def corpus(tmp_path, demo_model):
    """Writes token shards of one clip, "speech/a", made of the audio with that hash."""
    codec = Quick.from_pretrained(demo_model)

    def write(name: str, source: str, **contract) -> Path:
        held = {"model": codec.model_hash, "codebook_sizes": [256] * 9} | contract
        clip = shards.Clip("a.wav", "speech", np.zeros((3, 9), np.uint16), 1.0, 24_000, 5000, source)
        shards.write(shards.shard_path(tmp_path / name, "speech-000000"), [clip], held)
        marker = shards.marker_path(tmp_path / name, "speech-000000")
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("{}")
        return tmp_path / name

    return codec, write


def test_detokenize_keeps_audio_of_something_else_and_does_not_call_it_done(tmp_path, corpus):
    codec, write = corpus

    def decoded(tokens):
        return [
            file.path.name for file in detokenize(tokens, tmp_path / "speech_corpus", codec, None, ".flac", Share())
        ]

    (tmp_path / "speech_corpus" / "speech").mkdir(parents=True)
    original = sound(tmp_path / "speech_corpus" / "speech" / "a.flac", 0)
    before, tokens = original.read_bytes(), write("tokens", "hash 1")
    with pytest.raises(DataError, match=r"speech/a\.flac: is there already, and was not made by detokenize"):
        decoded(tokens)
    assert original.read_bytes() == before
    original.unlink()
    assert decoded(tokens) == ["a.flac"]
    assert decoded(tokens) == []
    with pytest.raises(DataError, match=r"was made of \.\./tokens/speech/a\.wav, not of \.\./others/speech/a\.wav"):
        decoded(write("others", "hash 2"))
    assert decoded(write("tokens", "hash 3")) == ["a.flac"]  # its audio was replaced
    assert decoded(write("moved", "hash 3")) == []


def test_damaged_tokens_cost_their_own_clip_and_are_no_audio(tmp_path, corpus):
    codec, write = corpus
    tokens = write("tokens", "hash 1")
    (path,) = shards.shards(tokens)
    (good,) = shards.read_shard(path)
    bad = [good._replace(id=f"{n}.wav", codes=np.full((3, 9), 300 * n, np.uint16), num_samples=n) for n in (1, 2)]
    short = good._replace(id="short.wav", num_samples=3 * 1920 + 1)
    shards.write(path, [bad[0], good, short, bad[1]], shards.read_contract(path))
    done = {file.path.name: file.error for file in detokenize(tokens, tmp_path / "out", codec, None, ".wav", Share())}
    assert done.pop("a.wav") is None
    assert {name: str(error) for name, error in done.items()} == {
        "1.wav": f"{path}: speech/1.wav: code 300 in codebook 0, frame 0: must be between 0 and 255 (27 out of range)",
        "2.wav": f"{path}: speech/2.wav: code 600 in codebook 0, frame 0: must be between 0 and 255 (27 out of range)",
        "short.wav": f"{path}: speech/short.wav: damaged: 3 frames do not fit 5761 samples; encode the audio again",
    }
    assert [path.name for path in (tmp_path / "out" / "speech").iterdir()] == ["a.wav"]


def test_audio_that_an_older_version_has_detokenized_stays(tmp_path, corpus):
    codec, write = corpus
    tokens = write("tokens", "hash")
    assert len(list(detokenize(tokens, tmp_path / "out", codec, None, ".flac", Share()))) == 1
    audio.save(tmp_path / "out" / "speech" / "a.flac", np.zeros(5000, np.float32), 24_000)
    assert list(detokenize(tokens, tmp_path / "out", codec, None, ".flac", Share())) == []


def test_audio_that_a_power_failure_has_left_empty_is_decoded_again(tmp_path, corpus):
    codec, write = corpus
    tokens, path = write("tokens", "hash"), tmp_path / "out" / "speech" / "a.flac"
    list(detokenize(tokens, tmp_path / "out", codec, None, ".flac", Share()))
    before = path.read_bytes()
    path.write_bytes(b"")
    assert [file.path for file in detokenize(tokens, tmp_path / "out", codec, None, ".flac", Share())] == [path]
    assert path.read_bytes() == before


def test_an_exported_program_does_not_replace_tokens(tmp_path, demo_model):
    codec = Quick.from_pretrained(demo_model)
    fields = {"frame_rate": 12.5, "sample_rate": 24_000, "num_samples": 5000, "gain": 1.0}
    TokenFile(codes=np.zeros((9, 3)), model=codec.model_hash, **fields).save(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors: is there already, and no exported .*--out another name"):
        export_stablehlo(codec, "decoder", 1.0, tmp_path / "a.stablehlo")


def test_an_evaluation_does_not_replace_clips_of_the_same_name(tmp_path):
    first, second = (EvalClip("a", "speech", sound(tmp_path / folder / "a.wav", 0)) for folder in "xy")
    with Journal(tmp_path / "journal.jsonl") as journal:
        list(reconstruct.originals([first], tmp_path, journal))
        reconstruct.check_same_sources([first], tmp_path, journal)
        with pytest.raises(DataError, match=r"holds speech/a of .*x/a\.wav; that of .*y/a\.wav .*use another --out"):
            reconstruct.check_same_sources([second], tmp_path, journal)


def test_an_evaluation_tells_clips_apart_wherever_it_is_started(tmp_path, monkeypatch):
    for folder in "xy":
        (tmp_path / folder).mkdir()
    files = [sound(tmp_path / folder / "clips" / "a.wav", seed) for seed, folder in enumerate("xy")]
    (tmp_path / "link").symlink_to(tmp_path / "x")
    here = EvalClip("a", "speech", Path("clips/a.wav"))
    with Journal(tmp_path / "journal.jsonl") as journal:
        monkeypatch.chdir(tmp_path / "x")
        (before,) = reconstruct.originals([here], tmp_path, journal)
        monkeypatch.chdir(tmp_path / "y")
        with pytest.raises(DataError, match=r"holds speech/a of .*x/clips/a\.wav; that of clips/a\.wav would replace"):
            reconstruct.check_same_sources([here], tmp_path, journal)
        for same in (files[0], Path("../x/clips/a.wav"), tmp_path / "link" / "clips" / "a.wav"):
            reconstruct.check_same_sources([here._replace(path=same)], tmp_path, journal)
            target = reconstruct.audio_path(tmp_path, reconstruct.ORIGINAL, here)
            written = target.stat().st_mtime_ns
            assert [clip.digest for clip in reconstruct.originals([here._replace(path=same)], tmp_path, journal)] == [
                before.digest
            ]
            assert target.stat().st_mtime_ns == written  # nothing is done again


def test_webdataset_does_not_mix_tokens_of_two_models(tmp_path, corpus):
    _, write = corpus
    for _ in range(2):
        assert convert(write("tokens", "hash"), tmp_path / "tars") == 1
    with pytest.raises(DataError, match="tars: holds tokens that were made otherwise"):
        convert(write("others", "hash", model="another"), tmp_path / "tars")


@pytest.mark.parametrize("inside", ["", "shards"])
def test_nothing_is_written_between_the_shards_that_it_is_made_of(tmp_path, corpus, inside):
    tokenizer, write = corpus
    tokens = write("tokens", "hash")
    before = sorted(tokens.rglob("*"))
    with pytest.raises(DataError, match="holds tokens .*, with which tars would be mixed; use another OUT"):
        convert(tokens, tokens / inside)
    with pytest.raises(DataError, match="with which detokenized audio would be mixed; use another OUT"):
        list(detokenize(tokens, tokens / inside, tokenizer, None, ".flac", Share()))
    assert sorted(tokens.rglob("*")) == before


def test_webdataset_does_not_mix_tars_of_other_tokens_of_the_model(tmp_path, corpus):
    _, write = corpus
    tokens = write("tokens", "hash")
    for _ in range(2):
        assert convert(tokens, tmp_path / "tars") == 1
    (path,) = (tokens / "shards").iterdir()
    for shard in (path, shards.marker_path(tokens, path.stem)):
        shard.rename(shard.with_stem("another"))
    with pytest.raises(DataError, match=f"tars: holds tars that are not of .*such as {path.stem}.tar; use another OUT"):
        convert(tokens, tmp_path / "tars")
    assert [tar.stem for tar in (tmp_path / "tars").glob("*.tar")] == [path.stem]


def unchecked(**fields: Any) -> TokenFile:
    """A token file without the checks of types that only tests have."""
    tokens = TokenFile(
        codes=np.zeros((9, 3)), model="0" * 16, frame_rate=12.5, sample_rate=24_000, num_samples=5000, gain=1.0
    )
    for name, value in fields.items():
        object.__setattr__(tokens, name, value)
    return tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gain": 0.0}, "gain = 0.0: must be a positive number"),
        ({"gain": float("nan")}, "gain = nan"),
        ({"sample_rate": 0}, "sample_rate = 0: must be a positive whole number"),
        ({"num_samples": 1.5}, "num_samples = 1.5: must be a positive whole number"),
        ({"num_samples": True}, "num_samples = True"),
        ({"frame_rate": -1.0}, "frame_rate = -1.0"),
        ({"codes": np.zeros((9, 0))}, "codes of shape \\[9, 0\\]"),
    ],
)
def test_tokens_that_nobody_could_read_are_not_written(tmp_path, wrong, message):
    tokens = unchecked(**wrong)
    with pytest.raises(TokenError, match=message):
        tokens.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    numbers = {"frame_rate": np.float64(12.5), "num_samples": np.int64(5000), "gain": np.float32(1)}
    unchecked(**numbers).save(tmp_path / "a.safetensors")
    tokens = TokenFile.load(tmp_path / "a.safetensors")
    assert (tokens.frame_rate, tokens.num_samples, tokens.gain) == (12.5, 5000, 1.0)


def test_a_full_disk_is_no_verdict_on_the_clips_of_an_evaluation(tmp_path, monkeypatch):
    clip = EvalClip("a", "speech", sound(tmp_path / "x" / "a.wav", 0))
    folder = Folder("other", clip.path.parent)

    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with Journal(tmp_path / "journal.jsonl") as journal:
        (original,) = reconstruct.originals([clip], tmp_path, journal)
        monkeypatch.setattr(audio, "save", full)
        for work in (
            lambda: reconstruct.originals([clip], tmp_path / "elsewhere", journal),
            lambda: reconstruct.by_folder(folder, [original], tmp_path, journal),
        ):
            with pytest.raises(OSError, match="No space left on device"):
                list(work())
        clip.path.unlink()
        (failure,) = reconstruct.originals([clip], tmp_path / "elsewhere", journal)
    assert failure.why == "no such file"
