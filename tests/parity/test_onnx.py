"""ONNX programs in ONNX Runtime against the Flax model: any batch, any length, frame by frame."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from golden import relative_error
from test_pytorch_model import (
    CONFIGS,
    RATE,
    WHISPER,
    noise,
    ours_from_audio,
    random_codes,
    real_rate,
    with_whisper,  # noqa: F401 (a fixture)
)

from omnicodec_jax.cli import models
from omnicodec_jax.converters.onnx_program import export_onnx
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.errors import ModelError
from omnicodec_jax.model_directory import build, model_hash
from omnicodec_jax.model_directory import save as save_model

pytest.importorskip("onnxscript", reason="needs onnx and onnxscript, which make the programs")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, which runs the programs")

LOG_MEL = CONFIGS["12.5 frames a second"]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Any:
    """Makes a program by the command, and what runs it."""

    def started(config: Any, what: Any) -> Any:
        folder: Path = tmp_path_factory.mktemp("onnx")
        save_model(folder / "model", config, tiny.variables(config))
        path = folder / "out" / f"{what}.onnx"
        models.export(what=what, out=path, model=folder / "model", format="onnx")
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # the weights are inside
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    return started


def run(session: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    return session.run(None, dict(zip([value.name for value in session.get_inputs()], inputs, strict=True)))


def ours(method: str, *inputs: np.ndarray) -> np.ndarray:
    apply = jax.jit(partial(build(tiny.OMNICODEC).apply, method=method))
    return np.asarray(apply(tiny.variables(tiny.OMNICODEC), *inputs))


def test_decoder_takes_any_batch_and_length(session, capsys):
    program = session(tiny.OMNICODEC, "decoder")
    assert "decoder.onnx: (audio_codes [batch, 5, frames]) → audio_values" in capsys.readouterr().out
    for batch, frames in ((1, 1), (3, 40)):
        codes = random_codes(tiny.OMNICODEC, batch, frames)
        (audio,) = run(program, codes.astype(np.int64))
        assert relative_error(audio, ours("decode", codes)) < 1e-4
    codes[:, 2:] = -1  # left out
    (audio,) = run(program, codes.astype(np.int64))
    assert relative_error(audio, ours("decode", codes[:, :2])) < 1e-4
    about = program.get_modelmeta().custom_metadata_map
    assert about["model"] == model_hash(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    assert (about["sample_rate"], about["hop_length"], about["num_quantizers"]) == ("24000", "12", "5")


def test_decoder_step_gives_piece_by_piece_what_the_decoder_gives(session):
    program = session(tiny.OMNICODEC, "decoder-step")
    first, *others = program.get_inputs()
    assert first.shape == ["batch", 5, "frames"]
    for batch in (1, 3):
        codes = random_codes(tiny.OMNICODEC, batch, 24)
        cache = [
            np.zeros([batch, *value.shape[1:]], np.int64 if "int64" in value.type else np.float32) for value in others
        ]
        found = []
        for piece in np.split(codes.astype(np.int64), np.cumsum([1, 2, 5, 1, 1, 5, 2]), axis=2):  # and the last seven
            audio, *cache = run(program, piece, *cache)
            found.append(audio)
        assert relative_error(np.concatenate(found, axis=2), ours("decode", codes)) < 1e-4
    names = [value.name for value in others]
    assert [value.name.replace("next.", "cache.") for value in program.get_outputs()[1:]] == names


def test_encoder_takes_audio_and_features_of_any_length(session):
    program = session(tiny.OMNICODEC, "encoder")
    for batch, samples, vectors in ((1, 60, 4), (2, 611, 33)):
        audio, features = noise(batch, 1, samples, scale=0.1), noise(batch, vectors, 10, seed=1)
        (codes,) = run(program, audio, features)
        np.testing.assert_array_equal(codes, ours("encode", audio, features))


def test_encoder_from_audio_computes_the_log_mel_itself(session):
    program, flax = session(LOG_MEL, "encoder-from-audio"), ours_from_audio(LOG_MEL)
    for samples in (9_001, 24_000):
        audio = noise(2, 1, samples, scale=0.1)
        (codes,) = run(program, audio)
        np.testing.assert_array_equal(codes, flax(audio))


def test_encoder_from_audio_has_the_encoder_of_whisper_that_lies_with_the_model(with_whisper, tmp_path):  # noqa: F811
    encoder, directory = with_whisper
    path, codec = tmp_path / "encoder.onnx", real_rate(12.5, WHISPER)
    models.export(what="encoder-from-audio", out=path, model=directory.parent / "flax", format="onnx")
    program = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    flax = ours_from_audio(codec, encoder)
    for samples in (100, RATE, 5 * RATE + 1000):  # a part of a window, and two whole ones and a tail
        audio = noise(1, 1, samples, seed=samples, scale=0.1)
        (codes,) = run(program, np.concatenate([audio, 0.5 * audio[..., ::-1]]))
        np.testing.assert_array_equal(codes[:1], flax(audio))
    with pytest.raises(ConversionError, match="'whisper', and no encoder of Whisper lies with it: .* --what encoder"):
        export_onnx(codec, tiny.variables(codec), "encoder-from-audio", tmp_path / "alone.onnx")


def test_what_has_no_program_is_refused_in_words(tmp_path):
    tensors = tiny.variables(tiny.OMNICODEC)
    with pytest.raises(ConversionError, match="must end in .onnx"):
        export_onnx(tiny.OMNICODEC, tensors, "decoder", tmp_path / "decoder.stablehlo")
    with pytest.raises(ConversionError, match="'stored': this model's program takes its features; use --what encoder"):
        export_onnx(tiny.OMNICODEC, tensors, "encoder-from-audio", tmp_path / "encoder.onnx")
    with pytest.raises(ConversionError, match="mimi model: only OmniCodec"):
        export_onnx(tiny.MIMI, tiny.variables(tiny.MIMI), "decoder", tmp_path / "decoder.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_that_only_onnx_has_is_refused_in_the_other_format(tmp_path):
    with pytest.raises(ModelError, match="only with --format onnx"):
        models.export(what="encoder-from-audio", out=tmp_path / "x.stablehlo", model="none")
