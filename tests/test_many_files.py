"""`encode` and `decode` of many files at once: the lanes are filled, and one bad file costs itself."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omnicodec_jax import cli
from omnicodec_jax.cli import codec
from omnicodec_jax.data import audio
from omnicodec_jax.files import replacing
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.tokenizer import OmniCodecTokenizer, PreparedClip

pytestmark = pytest.mark.quick

LANES = 4


class Quick(OmniCodecTokenizer):
    """Compiles nothing: it takes as many clips as it has lanes, and gives them back in another order."""

    fails_at = -1
    """Number of the batch at which the device fails."""

    def prepare(self, samples, features=None):
        return PreparedClip(samples)

    def encode_each(self, clips):
        def encode(clip: PreparedClip) -> np.ndarray:
            return np.full((self.num_quantizers, self.num_frames(clip.samples.size)), clip.samples.size % 256, np.int32)

        return self._batches(clips, encode)

    def decode_each(self, tokens):
        return self._batches(
            tokens, lambda codes: np.full((1, codes.shape[1] * self.hop_length), 0.1 * len(codes), np.float32)
        )

    def _batches(self, inputs, compute):
        inputs = iter(inputs)
        while batch := list(itertools.islice(inputs, LANES)):
            Quick.fails_at -= 1
            if Quick.fails_at == 0:
                raise RuntimeError("device lost")
            yield from ((key, compute(given)) for key, given in reversed(batch))


@pytest.fixture(autouse=True)
def _compile_nothing(monkeypatch):
    monkeypatch.setattr(codec, "_load_model", lambda model, *_: Quick.from_pretrained(model))
    monkeypatch.setattr(Quick, "fails_at", -1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten clips, each of another length, of which number 3 is no audio."""
    root = tmp_path / "in"
    root.mkdir()
    for number in range(10):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 4000 + 2000 * number)
        soundfile.write(root / f"{number}.wav", noise, 24_000)
    (root / "3.wav").write_text("no sound at all")
    return root


def test_lanes_are_filled_and_files_are_read_no_further_than_that(folder, tmp_path, demo_model, monkeypatch):
    read, out = [], tmp_path / "tokens"
    waiting = []  # files that have been read and not written, whenever another one is read

    real = audio.load

    def load(path, *options):
        waiting.append(len(read) - len(list(out.glob("*"))))
        clip = real(path, *options)
        read.append(path.name)
        return clip

    monkeypatch.setattr(audio, "load", load)
    assert cli.encode(folder, out, model=demo_model) == 1
    assert waiting == [0, 1, 2, 3, 3, 0, 1, 2, 3, 0]  # results are written before the next batch is read
    assert len(read) == 9


def test_every_file_gets_its_own_result_and_the_bad_one_is_named(folder, tmp_path, demo_model, capsys):
    out = tmp_path / "tokens"
    assert cli.encode(folder, out, model=demo_model) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {folder / '3.wav'}: ")
    assert printed.err.count("\n") == 1
    assert printed.out.count("9 codebooks x ") == 9
    assert "encode: 9 of 10 files" in printed.out.splitlines()[-1]
    for number in set(range(10)) - {3}:
        tokens = TokenFile.load(out / f"{number}.safetensors")
        assert (tokens.num_samples, tokens.codes[0, 0]) == (4000 + 2000 * number, (4000 + 2000 * number) % 256)

    assert cli.decode(out, tmp_path / "back", model=demo_model) == 0
    assert "decode: 9 of 9 files" in capsys.readouterr().out
    for number in set(range(10)) - {3}:
        assert soundfile.info(tmp_path / "back" / f"{number}.wav").frames == 4000 + 2000 * number


def test_what_is_no_file_costs_itself_and_is_not_waited_for(folder, tmp_path, demo_model, capsys):
    (folder / "5.wav").unlink()
    (folder / "5.wav").symlink_to(os.devnull)  # a pipe would be waited for for ever
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    assert f"error: {folder / '5.wav'}: a directory, a pipe or a device; only files are read" in capsys.readouterr().err


def test_a_device_that_fails_costs_the_files_that_it_had(folder, tmp_path, demo_model, monkeypatch, capsys):
    monkeypatch.setattr(Quick, "fails_at", 2)
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    printed = capsys.readouterr()
    lost = [line for line in printed.err.splitlines() if line.endswith("RuntimeError: device lost")]
    assert [Path(line.split(": ")[1]).stem for line in lost] == ["5", "6", "7", "8"]
    assert "5 of 10 files" in printed.out
    assert {path.stem for path in (tmp_path / "tokens").iterdir()} == {"0", "1", "2", "4", "9"}


def test_a_fault_of_the_model_before_the_first_file_is_raised(folder, tmp_path, demo_model, monkeypatch):
    monkeypatch.setattr(Quick, "encode_each", lambda self, clips: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.encode(folder, tmp_path / "tokens", model=demo_model)


def test_ctrl_c_keeps_what_is_written(folder, tmp_path, demo_model, monkeypatch):
    real = audio.load

    def interrupted(path, *options):
        if path.name == "6.wav":
            raise KeyboardInterrupt
        return real(path, *options)

    monkeypatch.setattr(audio, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.encode(folder, tmp_path / "tokens", model=demo_model)
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {f"{n}.safetensors" for n in (0, 1, 2, 4)}


def test_a_failed_write_costs_one_file(folder, tmp_path, demo_model, monkeypatch, capsys):
    real = TokenFile.save

    def save(tokens, path):
        if path.stem == "5":
            raise OSError(28, "No space left on device", str(path))
        real(tokens, path)

    monkeypatch.setattr(TokenFile, "save", save)
    assert cli.encode(folder, tmp_path / "tokens", model=demo_model) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(list((tmp_path / "tokens").iterdir())) == 8


def leave(path: Path) -> Path:
    """Puts what a killed process leaves of a file beside it."""
    leftover = path.with_name(f".{path.stem}.{32 * '0'}.partial{path.suffix}")
    leftover.write_bytes(b"half")
    return leftover


def test_what_a_killed_command_has_left_half_written_is_cleared_by_the_next(folder, tmp_path, demo_model):
    tokens, back, clips = tmp_path / "tokens", tmp_path / "back", tmp_path / "clips"
    commands = {
        tokens / "1.safetensors": lambda: cli.encode(folder, tokens, model=demo_model),
        back / "1.wav": lambda: cli.decode(tokens, back, model=demo_model),
        clips / "sound_bell.flac": lambda: cli.clips(clips),
    }
    for made, command in commands.items():
        command()
        assert made.is_file()
        leftover, of_another = leave(made), leave(made.with_name(f"other{made.suffix}"))
        with replacing(made) as under_way:
            command()
            assert [path.exists() for path in (leftover, under_way, of_another)] == [False, True, True]
            under_way.write_bytes(made.read_bytes())
