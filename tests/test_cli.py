import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
import tiny
from safetensors import safe_open
from safetensors.numpy import save_file

from omnicodec_jax import cli, compilation_cache, model_directory, shipped, targets
from omnicodec_jax.cli import codec
from omnicodec_jax.config import files
from omnicodec_jax.data.audio import EXTENSIONS
from omnicodec_jax.errors import AudioError, ConfigError, ModelError, OmniCodecError, TokenError
from omnicodec_jax.models import initialize
from omnicodec_jax.streaming import Stream
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.tokenizer import OmniCodecTokenizer

pytestmark = pytest.mark.minutes(1)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, clips):
    """Good files and bad ones, in a tree."""
    root = tmp_path / "in"
    (root / "deep" / "er").mkdir(parents=True)
    samples, rate = soundfile.read(clips[0], dtype="float32", stop=60_000)
    soundfile.write(root / "good.wav", samples, rate)
    soundfile.write(root / "good.flac", samples[:50_000], rate)
    soundfile.write(root / "deep" / "er" / "low.wav", samples[::3], rate // 3)
    soundfile.write(root / "silent.wav", np.zeros(rate), rate)
    (root / "empty.mp3").touch()
    (root / "cut.wav").write_bytes((root / "good.wav").read_bytes()[:50_000])
    (root / "text.ogg").write_text("no sound at all")
    soundfile.write(root / "one.wav", samples[:1], rate)
    soundfile.write(root / "nan.wav", np.append(samples, np.nan), rate, subtype="FLOAT")
    (root / "notes.txt").write_text("not looked at")
    return root


def tree(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_encode_and_decode_a_tree_with_bad_files_in_it(folder, tmp_path, demo_model, capsys):
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    printed = capsys.readouterr()
    assert "3 of 9 files" in printed.out
    errors = dict(line.removeprefix("error: ").split(": ", 1) for line in printed.err.splitlines() if "error" in line)
    reasons = {os.path.basename(path): message.split()[0].strip(":") for path, message in errors.items()}
    assert reasons == {
        "empty.mp3": "empty",
        "silent.wav": "silent",
        "cut.wav": "truncated",
        "text.ogg": "not",
        "one.wav": "too",
        "nan.wav": "holds",
    }
    assert tree(tmp_path / "tokens") == ["deep/er/low.safetensors", "good.flac.safetensors", "good.wav.safetensors"]

    assert cli.decode(tmp_path / "tokens", tmp_path / "out", model=demo_model) == 0
    for name, source in {"deep/er/low": "deep/er/low.wav", "good.flac": "good.flac", "good.wav": "good.wav"}.items():
        original, decoded = soundfile.info(folder / source), soundfile.info(tmp_path / "out" / f"{name}.wav")
        assert (decoded.frames, decoded.samplerate, decoded.channels) == (original.frames, original.samplerate, 1)


def test_an_unforeseen_fault_costs_its_file_only(folder, tmp_path, demo_model, monkeypatch, capsys):
    from omnicodec_jax.data import audio

    real = audio.load

    def fault(path, *options):
        return 1 / 0 if path.name == "good.flac" else real(path, *options)

    monkeypatch.setattr(audio, "load", fault)
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    assert f"error: {folder / 'good.flac'}: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert len(tree(tmp_path / "tokens")) == 2


def test_decoding_beside_the_original_keeps_the_original(folder, demo_model):
    source = folder / "good.wav"
    before = source.read_bytes()
    assert cli.encode(source, model=demo_model) == 0
    assert cli.decode(source.with_suffix(".safetensors"), model=demo_model) == 0
    assert source.read_bytes() == before
    assert (folder / "good_decoded.wav").is_file()
    with pytest.raises(OmniCodecError, match=r"token files end in \.safetensors"):
        cli.encode(source, folder / "other.wav", model=demo_model)


def test_an_output_where_no_directory_can_be_is_refused_before_any_work(folder, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("in/good.wav", "in/good.wav/deep", "dangling"):
        with pytest.raises(OmniCodecError, match=f"{tmp_path / name}: .* is no directory; choose another output"):
            targets.choose(folder, tmp_path / name, EXTENSIONS, ".safetensors", "_tokens")


@pytest.mark.parametrize("metadata", [[1], "x", None, {"gain": 1e-50}, {"frame_rate": "fast"}, {"model": 5}])
def test_metadata_of_other_types_is_no_token_file(tmp_path, metadata):
    path, codes = tmp_path / "a.safetensors", np.zeros((9, 13), np.uint16)
    TokenFile(codes=codes, model="0", frame_rate=12.5, sample_rate=24_000, num_samples=24_000, gain=1.0).save(path)
    with safe_open(path, "np") as file:
        fields = json.loads(file.metadata()["omnicodec"])
    given = fields | metadata if isinstance(metadata, dict) else metadata
    save_file({"codes": codes}, path, {"omnicodec": json.dumps(given)})
    with pytest.raises(TokenError, match=f"{path}: (not a token file|gain = 1e-50|frame_rate = 'fast'|model = 5)"):
        TokenFile.load(path)


def test_outputs_are_named_after_the_input(folder, demo_model):
    source = folder / "good.wav"
    assert cli.encode(source, model=demo_model) == 0
    assert cli.decode(source.with_suffix(".safetensors"), folder / "deep", model=demo_model) == 0
    assert (folder / "deep" / "good.wav").is_file()
    assert cli.encode(folder, model=demo_model) == 1
    assert (folder.parent / "in_tokens" / "deep" / "er" / "low.safetensors").is_file()


def test_the_current_directory_needs_no_out(folder, monkeypatch):
    def target(given):
        ((_, target),) = targets.choose(given, None, frozenset({".wav"}), ".safetensors", "_tokens")
        return target.resolve().relative_to(folder).as_posix()

    monkeypatch.chdir(folder / "deep" / "er")
    assert target(Path(".")) == "deep/er_tokens/low.safetensors"
    for given in (Path(".."), folder / "deep" / "er" / "..", Path("../../deep")):
        assert target(given) == "deep_tokens/er/low.safetensors"
    with pytest.raises(OmniCodecError, match="/: name the directory to write to"):
        targets.outside(Path("/"), "_tokens")


def test_every_file_keeps_a_name_of_its_own(tmp_path, clips, demo_model, capsys):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "sound.wav", soundfile.read(clips[0], stop=5000)[0], 24_000)
    sound = (tmp_path / "sound.wav").read_bytes()  # whatever it is called
    long = "名" * 83
    for name in ("a.wav", "a.flac", "a.wav.mp3", f"{long}.wav", "é.ogg"):
        (tmp_path / "in" / name).write_bytes(sound)
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.wav", "wb") as file:
        file.write(sound)
    assert cli.encode(tmp_path / "in", tmp_path / "tokens", model=demo_model) == 0
    assert "6 of 6 files" in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "tokens").iterdir()}
    assert {f"{name}.safetensors" for name in ("a.wav", "a.flac", "a.wav.mp3", "é", "caf\udce9")} < made
    assert len(made) == 6
    back = targets.choose(tmp_path / "tokens", tmp_path, frozenset({".safetensors"}), ".wav", "_decoded")
    assert len({target for _, target in back}) == 6
    one = targets.choose(tmp_path / "in" / f"{long}.wav", None, frozenset({".wav"}), ".safetensors", "_tokens")
    assert one[0][1].name in made


def test_features_are_those_of_the_file_and_not_of_its_namesake(tmp_path):
    for name in ("a.wav", "a.flac", "b.wav"):
        (tmp_path / name).touch()
    (tmp_path / "features").mkdir()
    path = codec._features_of(tmp_path / "features", tmp_path)
    names = [path(tmp_path / name).name for name in ("a.wav", "a.flac", "b.wav")]
    assert names == ["a.wav.npy", "a.flac.npy", "b.npy"]
    with pytest.raises(AudioError, match="must be a directory"):
        codec._features_of(tmp_path / "a.npy", tmp_path)


def test_the_token_file_tells_all(folder, tmp_path, demo_model, capsys):
    cli.encode(folder / "good.wav", tmp_path / "t.safetensors", model=demo_model)
    tokens = TokenFile.load(tmp_path / "t.safetensors")
    assert tokens.codes.dtype == np.uint16
    assert tokens.codes.shape == (9, -(-tokens.num_samples * 24_000 // (tokens.sample_rate * 1920)))
    assert (tokens.sample_rate, tokens.num_samples, tokens.frame_rate) == (44_100, 60_000, 12.5)
    assert cli.inspect(tmp_path / "t.safetensors") == 0
    assert cli.inspect(demo_model) == 0
    assert cli.inspect(folder) == 1
    printed = capsys.readouterr().out
    assert f"model {tokens.model}" in printed
    assert "9 codebooks of 256 entries" in printed


def test_tokens_of_another_model_are_not_replaced_without_a_word(folder, tmp_path, demo_model, capsys):
    out = tmp_path / "tokens"
    assert cli.encode(folder, out, model=demo_model) == 1
    whole = (out / "good.wav.safetensors").read_bytes()
    assert cli.encode(folder, out, model=demo_model) == 1  # its own are made again
    good = TokenFile.load(out / "good.wav.safetensors")
    foreign = dataclasses.replace(good, model="0123456789abcdef", tokens_hash="0123456789abcdef")
    for name in ("good.wav", "good.flac"):
        foreign.save(out / f"{name}.safetensors")
    (out / "deep" / "er" / "low.safetensors").unlink()
    with pytest.raises(TokenError, match=r"tokens of model 0123456789abcdef.*as do 1 others; .*--overwrite"):
        cli.encode(folder, out, model=demo_model)
    assert tree(out) == ["good.flac.safetensors", "good.wav.safetensors"]  # nothing was begun
    assert cli.encode(folder, out, model=demo_model, overwrite=True) == 1
    assert (out / "good.wav.safetensors").read_bytes() == whole


def test_a_file_that_holds_no_tokens_is_never_replaced(folder, demo_model):
    weights = demo_model / "model.safetensors"
    before = weights.stat().st_mtime_ns
    for overwrite in (False, True):
        with pytest.raises(TokenError, match=r"not a token file .*; it is not replaced: choose another"):
            cli.encode(folder / "good.wav", weights, model=demo_model, overwrite=overwrite)
    assert weights.stat().st_mtime_ns == before


def test_fewer_codebooks(folder, tmp_path, demo_model):
    cli.encode(folder / "good.wav", tmp_path / "t.safetensors", model=demo_model)
    cli.decode(tmp_path / "t.safetensors", tmp_path / "all.wav", model=demo_model)
    cli.decode(tmp_path / "t.safetensors", tmp_path / "one.wav", model=demo_model, num_quantizers=1)
    everything, one = (soundfile.read(tmp_path / name)[0] for name in ("all.wav", "one.wav"))
    assert everything.shape == one.shape
    assert (everything != one).any()
    for wrong in (-1, 0, 10):
        for command in (cli.decode, cli.stream_decode):
            with pytest.raises(TokenError, match="this model has 1 to 9"):
                command(tmp_path / "t.safetensors", tmp_path / "no", model=demo_model, num_quantizers=wrong)
    assert not (tmp_path / "no").exists()


def test_a_stream_is_as_loud_as_the_clip(folder, tmp_path, demo_model):
    samples, _ = soundfile.read(folder / "good.wav", stop=24_000)
    soundfile.write(tmp_path / "quiet.wav", 0.01 * samples / np.abs(samples).max(), 24_000, subtype="FLOAT")
    cli.encode(tmp_path / "quiet.wav", tmp_path / "t.safetensors", model=demo_model)
    cli.decode(tmp_path / "t.safetensors", tmp_path / "whole.wav", model=demo_model)
    cli.stream_decode(tmp_path / "t.safetensors", tmp_path / "raw", model=demo_model)
    whole, stream = soundfile.read(tmp_path / "whole.wav")[0], np.fromfile(tmp_path / "raw", "<i2") / 32768
    np.testing.assert_allclose(stream[: whole.size], whole, atol=2 / 32768)


def test_no_frame_of_a_stream_waits_for_the_compiler(tmp_path, demo_model, monkeypatch):
    """Every frame runs the program that was compiled before the first one."""
    model, programs, run = codec._load_model(demo_model, None).model_hash, [], Stream.__call__

    def recorded(self: Stream, fresh: np.ndarray | None, held: np.ndarray | None, *inputs: np.ndarray) -> jax.Array:
        programs.append((fresh is None, held is None, *(each.shape for each in inputs)))
        return run(self, fresh, held, *inputs)

    monkeypatch.setattr(Stream, "__call__", recorded)
    about = {"frame_rate": 12.5, "sample_rate": 24_000, "num_samples": 5760, "gain": 1.0}
    TokenFile(codes=np.zeros((9, 3)), model=model, **about).save(tmp_path / "t.safetensors")
    cli.stream_decode(tmp_path / "t.safetensors", tmp_path / "raw", model=demo_model)
    assert len(programs) == 4
    assert set(programs[1:]) == {programs[0]}


def test_tokens_that_do_not_fit_are_refused(tmp_path, demo_model, capsys):
    def tokens(name, codes, model, **options):
        fields = {"frame_rate": 12.5, "sample_rate": 24_000, "num_samples": 3 * 1920, "gain": 1.0} | options
        TokenFile(codes=codes, model=model, **fields).save(tmp_path / "t" / f"{name}.safetensors")

    (tmp_path / "t").mkdir()
    ours = codec._load_model(demo_model, None).model_hash
    tokens("foreign", np.zeros((9, 3)), "0123456789abcdef")
    tokens("range", np.full((9, 3), 300), ours)
    tokens("many", np.zeros((11, 3)), ours)
    tokens("good", np.zeros((9, 3)), ours)
    tokens("few", np.zeros((4, 3)), ours)
    tokens("long", np.zeros((9, 3)), ours, num_samples=3 * 1920 + 1)
    with safe_open(tmp_path / "t" / "good.safetensors", "np") as file:
        about = json.loads(file.metadata()["omnicodec"])
        for name, wrong in (("gain", {"gain": 0.0}), ("rate", {"sample_rate": -1})):
            changed = {"omnicodec": json.dumps(about | wrong)}
            save_file({"codes": file.get_tensor("codes")}, tmp_path / "t" / f"{name}.safetensors", changed)
    (tmp_path / "t" / "junk.safetensors").write_bytes(b"junk")
    assert cli.decode(tmp_path / "t", tmp_path / "out", model=demo_model) == 1
    errors = dict(line.removeprefix("error: ").split(": ", 1) for line in capsys.readouterr().err.splitlines())
    errors = {os.path.basename(path): message for path, message in errors.items()}
    assert "tokens of model 0123456789abcdef" in errors["foreign.safetensors"]
    assert "code 300 in codebook 0" in errors["range.safetensors"]
    assert "not a token file" in errors["junk.safetensors"]
    assert "11 codebooks" in errors["many.safetensors"]
    assert "3 frames do not fit 5761 samples" in errors["long.safetensors"]
    assert "gain = 0.0: must be a positive number" in errors["gain.safetensors"]
    assert "sample_rate = -1" in errors["rate.safetensors"]
    assert tree(tmp_path / "out") == ["few.wav", "good.wav"]
    for name, message in (("range", "range.safetensors: code 300 in codebook 0"), ("long", "do not fit 5761 samples")):
        with pytest.raises(TokenError, match=message):
            cli.stream_decode(tmp_path / "t" / f"{name}.safetensors", tmp_path / "raw", model=demo_model)
    assert not (tmp_path / "raw").exists()
    assert cli.decode(tmp_path / "t" / "few.safetensors", model=demo_model, num_quantizers=5) == 1
    assert "holds 4 codebooks, --num-quantizers asks for 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "codes", [np.zeros((1, 9, 3), int), np.full((9, 3), -1), np.full((9, 3), 1 << 16), np.full((9, 3), 0.5)]
)
def test_codes_that_a_token_file_cannot_hold_are_not_written(tmp_path, codes):
    tokens = TokenFile(codes=codes, model="0" * 16, frame_rate=12.5, sample_rate=24_000, num_samples=5000, gain=1.0)
    with pytest.raises(
        TokenError, match=r"a\.safetensors: codes of shape .*: must be whole numbers \[K, N\], each from 0 "
    ):
        tokens.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_tokens_of_a_later_version_are_refused_by_the_field_that_is_not_known(tmp_path):
    about = {"model": "m", "frame_rate": 12.5, "sample_rate": 1, "num_samples": 1, "gain": 1.0, "brightness": 2}
    codes = {"codes": np.zeros((1, 1), np.uint16)}
    save_file(codes, tmp_path / "t.safetensors", {"omnicodec": json.dumps(about)})
    with pytest.raises(TokenError, match=r"t\.safetensors: unknown field 'brightness': a later version"):
        TokenFile.load(tmp_path / "t.safetensors")


def test_features_from_files(folder, tmp_path, demo_model, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "good.npy", rng.standard_normal((18, 1024), np.float32))
    assert cli.encode(folder / "good.wav", tmp_path / "a.safetensors", model=demo_model) == 0
    given = tmp_path / "features" / "good.npy"
    assert cli.encode(folder / "good.wav", tmp_path / "b.safetensors", model=demo_model, features=given) == 0
    own, other = (TokenFile.load(tmp_path / f"{name}.safetensors").codes for name in "ab")
    assert (own[0] != other[0]).any()
    assert cli.encode(folder, tmp_path / "c", model=demo_model, features=tmp_path / "features") == 1
    assert "no semantic features in" in capsys.readouterr().err


def test_a_model_of_stored_features_asks_for_them_once(folder, tmp_path, demo_model):
    demo = OmniCodecTokenizer.from_pretrained(demo_model)
    semantic = dataclasses.replace(demo.config.semantic, source="stored")
    stored = OmniCodecTokenizer(dataclasses.replace(demo.config, semantic=semantic), demo.variables)
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match="--features"):
        cli.encode(folder, tmp_path / "tokens", model=tmp_path / "stored")


def test_nothing_to_do_is_an_error(tmp_path, demo_model):
    with pytest.raises(OmniCodecError, match="holds no file"):
        cli.encode(tmp_path, model=demo_model)
    with pytest.raises(OmniCodecError, match="no such file"):
        cli.encode(tmp_path / "nothing", model=demo_model)


def test_a_full_disk_costs_one_file_and_leaves_no_half(folder, tmp_path, demo_model, monkeypatch, capsys):
    from omnicodec_jax import token_file

    write, calls = token_file.save_tensors, []

    def full_at_first(tensors, path, metadata):
        calls.append(path)
        write(tensors, path, metadata)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_file, "save_tensors", full_at_first)
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(tree(tmp_path / "tokens")) == 2


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_full_disk_in_decode_is_called_so(tmp_path, suffix):
    """A limit on the size of files stands for the disk's."""
    from omnicodec_jax.data import audio

    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 100_000).astype(np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large; .*out{suffix}"):
                audio.save(tmp_path / f"out{suffix}", noise, 24_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def omnicodec(*arguments, **options):
    code = "from omnicodec_jax.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_second_call_compiles_nothing(folder, tmp_path, demo_model):
    environment = os.environ | {"OMNICODEC_MODEL": str(demo_model), "OMNICODEC_CACHE": str(tmp_path / "cache")}

    def compiled():
        process = omnicodec("encode", folder / "good.wav", tmp_path / "t.safetensors", env=environment)
        output, errors = process.communicate()
        assert process.returncode == 0, output + errors
        return {p.name for p in (tmp_path / "cache").rglob("*-cache")}

    first = compiled()
    assert first
    assert compiled() == first


def test_errors_are_one_line_and_an_exit_code(tmp_path, demo_model):
    process = omnicodec("encode", tmp_path / "nothing.wav", "--model", demo_model)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines() == [f"error: {tmp_path / 'nothing.wav'}: no such file or directory"]
    assert not output


def test_interrupted_it_keeps_what_is_done_and_nothing_half(clips, tmp_path, demo_model):
    process = omnicodec("encode", clips[0].parent, tmp_path / "tokens", "--model", demo_model)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("tokens/[!.]*.safetensors")) and time.monotonic() < deadline:  # none that is begun
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if process.returncode != 0:  # it may just have finished
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted"
    done = list((tmp_path / "tokens").iterdir())
    assert done
    for path in done:
        TokenFile.load(path)


@pytest.mark.parametrize("words", [["encode", "--help"], ["inspect", "CLIPS"], ["encode", "CLIPS", "OUT"]])
def test_who_reads_only_the_first_lines_sees_no_errors(words, clips, tmp_path, demo_model):
    places = {"CLIPS": clips[0].parent, "OUT": tmp_path / "tokens"}
    process = omnicodec(
        *[places.get(word, word) for word in words], env=os.environ | {"OMNICODEC_MODEL": str(demo_model)}
    )
    process.stdout.close()  # as `head` does when it has read enough
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE
    for path in tmp_path.glob("tokens/*"):
        TokenFile.load(path)


def test_a_closed_standard_output_costs_nothing(clips):
    shell = ["sh", "-c", '"$0" -m omnicodec_jax inspect "$1" >&-', sys.executable, clips[0]]
    ended = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_the_demo_says_what_it_did(tmp_path, monkeypatch, capsys):
    from examples import demo

    # Three steps in place of some dozens, on eight devices.
    short = "optimizer=replace(full.optimizer, total_steps=3, warmup_steps=1)"
    for name in ("small_fine_tune", "language_model_demo"):
        more = ", data=replace(full.data, batch_size=8)" if name == demo.CONFIG else ""
        (tmp_path / f"{name}.py").write_text(
            f"from dataclasses import replace\nfrom omnicodec_jax.recipes.{name} import config as full\n"
            f"config = replace(full, {short}{more})\n"
        )
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "small_fine_tune.py")
    monkeypatch.setattr(demo, "LANGUAGE_MODEL", tmp_path / "language_model_demo.py")
    monkeypatch.setattr(compilation_cache, "use", lambda: None)
    monkeypatch.setattr(cli.command, "log_progress", lambda: None)
    demo.main()
    printed = capsys.readouterr().out
    for part in (
        "four minutes",
        "| untrained-16L |",
        "| shipped-16L | 1024 | 2000 |",
        "| fine-tuned-16L |",
        "| Opus-6k |",
        "x real time",
        "index.html",
        "continuation.wav",
    ):
        assert part in printed
    assert len(demo.scores(held_out=True)) == 3
    assert all(len(of) >= 4 for of in demo.scores(held_out=False))
    assert len(list((tmp_path / "tokens" / "shards").glob("*.parquet"))) == 3
    assert soundfile.info(tmp_path / "continuation.wav").duration == pytest.approx(4)


def test_the_demo_fails_where_ears_would_order_the_codecs_otherwise():
    from examples.demo import as_ears_would_order_them

    def scores(distances: str, stoi: str = "0.2 0.8 0.8 0.9") -> dict[str, dict[str, float]]:
        systems = ("untrained", "shipped", "fine-tuned", "Opus")
        values = zip(map(float, distances.split()), map(float, stoi.split()), strict=True)
        return {system: {"mel_distance": mel, "stoi": of} for system, (mel, of) in zip(systems, values, strict=True)}

    held_out = [scores("7.0 3.0 3.5 4.0")]
    learnt = [scores("7.0 3.0 2.5 4.0"), scores("6.0 2.0 2.1 4.0")]
    assert as_ears_would_order_them(held_out, learnt)
    assert not as_ears_would_order_them([], learnt)
    assert not as_ears_would_order_them(held_out, [])
    assert not as_ears_would_order_them(held_out, learnt[1:])
    assert not as_ears_would_order_them(held_out, [scores("7.0 3.0 3.0 4.0")])
    for wrong in ("3.0 3.5 2.0 2.5", "3.0 2.0 3.5 2.5", "3.0 2.0 2.0 3.5"):  # the untrained one beats another
        assert not as_ears_would_order_them([*held_out, scores(wrong)], learnt)
    for wrong in ("0.5 0.4 0.8 0.9", "0.5 0.8 0.4 0.9", "0.5 0.8 0.8 0.4", "0.5 nan 0.8 0.9"):
        assert not as_ears_would_order_them([*held_out, scores("7.0 3.0 3.5 4.0", wrong)], learnt)


def test_an_untrained_model_with_an_encoder_has_it_beside_it(tmp_path, clips, monkeypatch):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / clips[0].name).symlink_to(clips[0])
    (tmp_path / "small.py").write_text(
        "from dataclasses import replace\nfrom omnicodec_jax.config import SEANetConfig, SemanticConfig\n"
        "from omnicodec_jax.recipes.demo import config as full\n"
        "codec = replace(full.codec, seanet=SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1),\n"
        "    transformer=replace(full.codec.transformer, num_layers=1),\n"
        "    semantic=SemanticConfig(source='whisper', feature_dim=384, codebook_size=32, codebook_dim=8))\n"
        "config = replace(full, codec=codec)\n"
    )
    recipe, encoder = tmp_path / "small.py", shipped.MODELS["small"] / "encoder"
    with pytest.raises(ConfigError, match=r"semantic.source = 'whisper': init needs the directory of its --encoder"):
        cli.init(recipe, tmp_path / "model", tmp_path / "audio")
    with pytest.raises(ModelError, match="the codec takes no encoder's features"):
        cli.init("demo", tmp_path / "model", tmp_path / "audio", encoder=encoder)
    assert not (tmp_path / "model").exists()
    assert cli.init(recipe, tmp_path / "model", tmp_path / "audio", encoder=encoder) == 0
    tokenizer = OmniCodecTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.computes_features
    assert all(np.all(collection["initialized"]) for collection in tokenizer.variables["codebooks"].values())


@pytest.mark.parametrize("recipe", ["small.py", pytest.param("demo", marks=pytest.mark.slow)])
def test_an_untrained_model_has_codebooks_that_fit_the_audio(recipe, tmp_path, clips, monkeypatch):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / clips[0].name).symlink_to(clips[0])
    small = "seanet=SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1)"
    small += ", transformer=replace(full.codec.transformer, num_layers=1)"
    (tmp_path / "small.py").write_text(
        "from dataclasses import replace\nfrom omnicodec_jax.config import SEANetConfig\n"
        "from omnicodec_jax.recipes.demo import config as full\n"
        f"config = replace(full, codec=replace(full.codec, {small}))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.init(recipe, tmp_path / "model", tmp_path / "audio") == 0
    tokenizer = OmniCodecTokenizer.from_pretrained(tmp_path / "model")
    books = tokenizer.variables["codebooks"]
    assert all(np.all(collection["initialized"]) for collection in books.values())


def test_an_untrained_model_does_not_take_the_place_of_another(tmp_path, clips, monkeypatch):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / clips[0].name).symlink_to(clips[0])
    (tmp_path / "recipe.py").write_text(
        "from dataclasses import replace\nfrom omnicodec_jax.recipes.demo import config as full\n"
        "from omnicodec_jax.recipes.ablations.without_semantic_branch import ablate\nconfig = ablate(full)\n"
    )
    codec_config = files.load(tmp_path / "recipe.py").codec
    draw = partial(initialize.init_variables, model_directory.build(codec_config))
    shapes = jax.eval_shape(draw, jax.random.key(0))
    weights = [jax.tree.map(lambda leaf, n=n: np.full(leaf.shape, n, leaf.dtype), shapes) for n in range(2)]
    monkeypatch.setattr(initialize, "init_variables", lambda *_: np.zeros(()))
    monkeypatch.setattr(initialize, "initialize_codebooks", lambda *_: weights[0])
    assert cli.init(tmp_path / "recipe.py", tmp_path / "model", tmp_path / "audio") == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert cli.init(tmp_path / "recipe.py", tmp_path / "model", tmp_path / "audio") == 0
    monkeypatch.setattr(initialize, "initialize_codebooks", lambda *_: weights[1])
    with pytest.raises(ModelError, match=r"holds model [0-9a-f]{16}, which would be lost; choose another --out"):
        cli.init(tmp_path / "recipe.py", tmp_path / "model", tmp_path / "audio")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_features_for_a_model_without_a_semantic_branch_are_refused_before_any_work(clips, tmp_path):
    config = dataclasses.replace(tiny.OMNICODEC, semantic=None, wavlm_dim=None)
    model_directory.save(tmp_path / "model", config, tiny.variables(config))
    with pytest.raises(ModelError, match="--features: this model has no semantic branch"):
        cli.encode(clips[0], tmp_path / "out", model=tmp_path / "model", features=tmp_path / "features.npy")
    assert not (tmp_path / "out").exists()


def test_training_and_tokenizing_import_no_torch_and_touch_no_device(tmp_path):
    code = """
import sys, pkgutil, importlib, omnicodec_jax
for module in pkgutil.walk_packages(omnicodec_jax.__path__, "omnicodec_jax."):
    if not module.name.startswith("omnicodec_jax.converters.pytorch."):  # code for transformers, which has torch
        importlib.import_module(module.name)
from omnicodec_jax.training.events import EventWriter
EventWriter(__import__("pathlib").Path(sys.argv[1]), 0).scalars(1, {"loss": 0.5})
for name in ("torch", "transformers", "librosa", "huggingface_hub"):
    assert name not in sys.modules, name
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
