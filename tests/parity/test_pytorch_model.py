"""The Flax model against the PyTorch model that is given away with it: two implementations that share no line.

Codes are identical and audio agrees to 1e-4. A directory is loaded as a stranger does, with transformers' Auto classes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny
import torch
from fake_hub import put_on_hub
from golden import relative_error
from safetensors.numpy import load_file
from test_qwen3_aut import TINY as TINY_AUT
from test_qwen3_aut import make_pair, random_encoder
from transformers import AutoFeatureExtractor, AutoModel

from omnicodec_jax import model_directory
from omnicodec_jax.config import CodecConfig, DiscriminatorConfig, SEANetConfig, SemanticConfig, TransformerConfig
from omnicodec_jax.config import discriminators as discriminator_configs
from omnicodec_jax.config.identity import TRAINING_ONLY
from omnicodec_jax.converters import from_torch, pytorch_model, reference, to_torch
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import ModelError
from omnicodec_jax.model_directory import build
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.whisper import WhisperConfig, WhisperEncoder
from omnicodec_jax.semantic import semantic_features
from omnicodec_jax.tokenizer import OmniCodecTokenizer

RATE = 24_000
SMALL = {
    "dimension": 16,
    "transformer": TransformerConfig(num_heads=2, num_layers=1, dim_feedforward=32, context=20),
    "acoustic": dataclasses.replace(tiny.OMNICODEC.acoustic, num_quantizers=3),
    "wavlm_dim": 6,
}
LOG_MEL = SemanticConfig(source="log_mel", feature_dim=1024, codebook_size=16, codebook_dim=12)
WHISPER = SemanticConfig(source="whisper", feature_dim=24, codebook_size=16, codebook_dim=12)
AUT = SemanticConfig(source="qwen3_aut", feature_dim=24, codebook_size=16, codebook_dim=12)


def real_rate(frame_rate: float, semantic: SemanticConfig) -> CodecConfig:
    """A codec at a frame rate of the paper's, in as few layers as that takes."""
    seanet = SEANetConfig(n_filters=2, ratios={12.5: (32, 30), 6.25: (60, 32)}[frame_rate], n_residual_layers=1)
    config = CodecConfig(**SMALL, seanet=seanet, semantic=semantic)
    assert config.frame_rate == frame_rate
    return config


STORED = dataclasses.replace(tiny.OMNICODEC, sample_rate=300)
"""A codec of stored features, for which few samples are seconds."""
CONFIGS = {
    "stored features": STORED,
    "no semantic branch": dataclasses.replace(tiny.OMNICODEC, semantic=None, wavlm_dim=None),
    "no adapter 1": dataclasses.replace(STORED, adapter_1=False),
    "12.5 frames a second": real_rate(12.5, LOG_MEL),
    "6.25 frames a second": real_rate(6.25, LOG_MEL),
}


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def random_codes(config: CodecConfig, batch: int, frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 16, (batch, config.num_quantizers, frames)).astype(np.int32)


@cache
def ours(config: CodecConfig, method: str) -> Any:
    apply = jax.jit(partial(build(config).apply, method=method))
    return lambda *inputs: np.asarray(apply(tiny.variables(config), *inputs))


def ours_from_audio(config: CodecConfig, encoder: Any = None) -> Any:
    """What Flax makes of audio [B, 1, T] alone, with the encoder of a `Pair` if there is one."""

    @jax.jit
    def codes(variables: Any, frozen: Any, audio: jax.Array) -> jax.Array:
        features = semantic_features(audio, RATE, None if encoder is None else (encoder.ours.config, frozen))
        return build(config).apply(variables, audio, features, method="encode")

    frozen = None if encoder is None else encoder.variables
    return lambda audio: np.asarray(codes(tiny.variables(config), frozen, audio))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Any:
    """Makes the directory of a config, as `omnicodec convert to-torch` writes it."""

    @cache
    def made(config: CodecConfig) -> Path:
        folder = tmp_path_factory.mktemp("torch")
        model_directory.save(folder / "flax", config, tiny.variables(config))
        to_torch.main(model=folder / "flax", out=folder / "torch")
        return folder / "torch"

    return made


@pytest.fixture(scope="module")
def load(directory) -> Any:
    """The model of a config, as a stranger loads it: strictly."""

    @cache
    def loaded(config: CodecConfig, **options: Any) -> Any:
        model, report = AutoModel.from_pretrained(
            directory(config), trust_remote_code=True, output_loading_info=True, **options
        )
        assert not any(report.values()), report
        return model

    return loaded


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


class Ragged(NamedTuple):
    clips: list[np.ndarray]
    batch: np.ndarray
    lengths: list[int]

    @classmethod
    def of(cls, clips: list[np.ndarray]) -> "Ragged":
        """A batch whose padding would poison whatever looked at it."""
        batch = np.full((len(clips), 1, max(map(len, clips))), 9.0, np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[0, : len(clip)] = clip
        return cls(clips, batch, [len(clip) for clip in clips])

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.batch.shape[2])[None] < torch.tensor(self.lengths)[:, None]


@pytest.fixture(scope="module")
def speech(clips) -> Ragged:
    """Parts of bundled clips: of no whole number of frames, and one of a single frame of log-mel vectors."""
    samples = [audio_files.load(clips[i], RATE, peak=0.95).samples for i in (-1, 0, 4)]
    return Ragged.of([samples[0][:20_001], samples[1][9000 : 9000 + 13_333], samples[2][4000:4900]])


# -- Codes


@pytest.mark.parametrize("name", ["stored features", "no semantic branch", "no adapter 1"])
def test_codes_of_a_batch_are_those_of_flax(load, name):
    config = CONFIGS[name]
    audio, features = noise(2, 1, 12 * 50 + 5, scale=0.1), noise(2, 27, 10, seed=1)
    given = {} if config.semantic is None else {"semantic_features": torch.from_numpy(features)}
    expected = ours(config, "encode")(audio, *([] if config.semantic is None else [features]))
    found = load(config).encode(torch.from_numpy(audio), **given).audio_codes
    assert len(np.unique(expected)) > 8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["12.5 frames a second", "6.25 frames a second"])
def test_codes_of_a_ragged_batch_of_speech_are_those_of_flax_from_audio_alone(load, speech, name):
    model, flax = load(CONFIGS[name]), ours_from_audio(CONFIGS[name])
    found = model.encode(torch.from_numpy(speech.batch), speech.mask).audio_codes
    for row, clip in zip(found, speech.clips, strict=True):
        alone = flax(clip[None, None])[0]
        np.testing.assert_array_equal(row[:, : alone.shape[1]], alone)
        np.testing.assert_array_equal(model.encode(torch.from_numpy(clip[None, None])).audio_codes[0], alone)
        assert not row[:, alone.shape[1] :].any()


def test_ragged_features_are_each_clips_own(load):
    config, model = STORED, load(STORED)
    batch = Ragged.of([noise(500, scale=0.1), noise(137, seed=1, scale=0.1)])
    features = [noise(21, 10, seed=2), noise(8, 10, seed=3)]
    padded = np.full((2, 21, 10), np.nan, np.float32)
    padded[0], padded[1, :8] = features
    mask = torch.arange(21)[None] < torch.tensor([21, 8])[:, None]
    found = model.encode(
        torch.from_numpy(batch.batch),
        batch.mask,
        semantic_features=torch.from_numpy(padded),
        semantic_features_mask=mask,
    ).audio_codes
    for row in range(2):
        alone = ours(config, "encode")(batch.clips[row][None, None], features[row][None])[0]
        np.testing.assert_array_equal(found[row, :, : alone.shape[1]], alone)
        assert not found[row, :, alone.shape[1] :].any()


def test_codes_of_fewer_codebooks_are_the_first_ones(load):
    model = load(STORED)
    audio, features = torch.from_numpy(noise(1, 1, 240, scale=0.1)), torch.from_numpy(noise(1, 9, 10))
    whole = model.encode(audio, semantic_features=features).audio_codes
    for count in range(1, 6):
        some = model.encode(audio, num_quantizers=count, semantic_features=features).audio_codes
        assert torch.equal(some, whole[:, :count])


def test_features_of_transformers_encoder_give_the_codes_of_ours(load, speech):
    config = real_rate(12.5, AUT)
    pair = make_pair(random_encoder(**TINY_AUT))
    model = load(config)
    audio = torch.from_numpy(speech.batch)
    with pytest.raises(ValueError, match="set model.frozen_encoder"):
        model.encode(audio, speech.mask)
    model.frozen_encoder = pair.theirs
    found = model.encode(audio, speech.mask).audio_codes
    flax = ours_from_audio(config, pair)
    for row, clip in list(zip(found, speech.clips, strict=True))[1:]:
        alone = flax(clip[None, None])[0]
        np.testing.assert_array_equal(row[:, : alone.shape[1]], alone)


class Whisper(NamedTuple):
    """What `ours_from_audio` needs of an encoder: a small one, whose windows are two seconds."""

    ours: WhisperEncoder
    variables: Any


@pytest.fixture(scope="module")
def with_whisper(tmp_path_factory) -> tuple[Whisper, Path]:
    """An encoder, and the directory of a codec that goes with it."""
    small = WhisperConfig(d_model=24, num_heads=4, num_layers=2, dim_feedforward=48, window_seconds=2)
    encoder = Whisper(WhisperEncoder(small), jax.jit(partial(init_variables, build(small)))(jax.random.key(0)))
    folder, codec = tmp_path_factory.mktemp("whisper"), real_rate(12.5, WHISPER)
    model_directory.save(folder / "flax", codec, tiny.variables(codec))
    model_directory.save(folder / "flax" / model_directory.ENCODER, small, encoder.variables)
    to_torch.main(model=folder / "flax", out=folder / "torch")
    return encoder, folder / "torch"


def test_encoder_and_discriminators_of_a_model_on_the_hub_go_along(with_whisper, tmp_path, monkeypatch):
    source = tmp_path / "flax"
    shutil.copytree(with_whisper[1].parent / "flax", source)
    stft = discriminator_configs.STFTDiscriminatorConfig(filters=4, windows=(206,))
    few = DiscriminatorConfig(stft=stft, waveform=None, wavlm=None)
    weights = jax.jit(partial(init_variables, build(few)))(jax.random.key(0))
    model_directory.save(source / model_directory.DISCRIMINATORS, few, weights)
    put_on_hub(monkeypatch, "you/codec", source, tmp_path / "downloaded")
    to_torch.main(model=Path("you/codec"), out=tmp_path / "torch")
    assert pytorch_model.load_discriminators(tmp_path / "torch") is not None
    assert any(key.startswith(pytorch_model.FROZEN) for key in load_file(tmp_path / "torch" / "model.safetensors"))


def test_encoder_of_whisper_goes_along_and_gives_the_codes_of_ours(with_whisper):
    encoder, directory = with_whisper
    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    flax = ours_from_audio(real_rate(12.5, WHISPER), encoder)
    lengths = (100, RATE, 5 * RATE + 1000)  # a part of a window, and two whole ones and a tail
    clips = [noise(length, seed=length, scale=0.1) for length in lengths]
    batch = torch.zeros(len(clips), 1, max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    for row, clip in zip(batch, clips, strict=True):
        row[0, : len(clip)] = torch.from_numpy(clip)
    found = model.encode(batch, mask).audio_codes
    for row, clip in zip(found, clips, strict=True):
        alone = flax(clip[None, None])[0]
        np.testing.assert_array_equal(row[:, : alone.shape[1]], alone)
        assert len(np.unique(alone[0])) > 1 or alone.shape[1] == 1


def test_a_directory_with_an_encoder_comes_back_with_it(with_whisper, tmp_path):
    from_torch.main(checkpoint=with_whisper[1], out=tmp_path / "back")
    for part in (".", model_directory.ENCODER):
        assert_same_models(tmp_path / "back" / part, with_whisper[1].parent / "flax" / part)


@pytest.mark.parametrize("how", ["converted", "saved"])
def test_a_model_without_an_encoder_takes_the_place_of_one_with_it(directory, with_whisper, tmp_path, how):
    """With the other model's encoder beside it, it could not be loaded."""
    source = directory(CONFIGS["12.5 frames a second"])
    shutil.copytree(with_whisper[1].parent / "flax", tmp_path / "model")
    if how == "converted":
        from_torch.main(checkpoint=source, out=tmp_path / "model")
    else:
        OmniCodecTokenizer.from_pretrained(source.parent / "flax").save_pretrained(tmp_path / "model")
    loaded = OmniCodecTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.model_hash == OmniCodecTokenizer.from_pretrained(source.parent / "flax").model_hash


def test_a_model_is_not_converted_over_one_in_the_other_format_such_as_itself(with_whisper, tmp_path):
    for name, convert in {"flax": to_torch.main, "torch": from_torch.main}.items():
        folder = tmp_path / name
        shutil.copytree(with_whisper[1].parent / name, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ModelError, match=rf"{name}: holds a model .*, which would be lost; choose another"):
            convert(folder, folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    weights = tmp_path / "flax" / "model.safetensors"
    with pytest.raises(ConversionError, match="the weights of the model in"):
        to_torch.main(model=tmp_path / "flax", out=weights)
    assert weights.read_bytes() == (with_whisper[1].parent / "flax" / "model.safetensors").read_bytes()


def test_encoder_of_whisper_may_be_set_where_none_goes_along(load, with_whisper):
    _, directory = with_whisper
    whole, alone = AutoModel.from_pretrained(directory, trust_remote_code=True), load(real_rate(12.5, WHISPER))
    audio = torch.from_numpy(noise(1, 1, RATE // 2, scale=0.1))
    with pytest.raises(ValueError, match="set model.frozen_encoder"):
        alone.encode(audio)
    alone.frozen_encoder = whole.frozen_encoder
    assert torch.equal(alone.encode(audio).audio_codes, whole.encode(audio).audio_codes)


# -- Audio


@pytest.mark.parametrize("count", range(1, 6))
def test_audio_of_every_prefix_of_the_codebooks_is_that_of_flax(load, count):
    codes = random_codes(tiny.OMNICODEC, 2, 40)[:, :count]
    found = load(tiny.OMNICODEC).decode(torch.from_numpy(codes)).audio_values
    assert relative_error(found, ours(tiny.OMNICODEC, "decode")(codes)) < 1e-4


@pytest.mark.parametrize("name", ["no semantic branch", "12.5 frames a second", "6.25 frames a second"])
def test_audio_of_other_models_is_that_of_flax(load, name):
    codes = random_codes(CONFIGS[name], 2, 9)
    found = load(CONFIGS[name]).decode(torch.from_numpy(codes)).audio_values
    assert relative_error(found, ours(CONFIGS[name], "decode")(codes)) < 1e-4


def test_calling_the_model_encodes_and_decodes(load, speech):
    model = load(CONFIGS["12.5 frames a second"])
    audio = torch.from_numpy(speech.batch)
    output = model(audio, speech.mask, num_quantizers=2)
    assert output.audio_values.shape == audio.shape
    assert torch.equal(output.audio_codes, model.encode(audio, speech.mask, num_quantizers=2).audio_codes)
    whole = model.decode(output.audio_codes).audio_values
    assert torch.equal(output.audio_values, whole[..., : audio.shape[2]])
    codes, values = model(audio, speech.mask, num_quantizers=2, return_dict=False)
    assert torch.equal(codes, output.audio_codes)
    assert torch.equal(values, output.audio_values)


# -- Streams


def test_frames_one_by_one_give_what_they_give_together_and_rows_begin_anew(load):
    model = load(tiny.OMNICODEC)
    codes = torch.from_numpy(random_codes(tiny.OMNICODEC, 2, 30))
    whole = model.decode(codes).audio_values
    cache, found = model.empty_decoder_cache(batch_size=2), []
    for step in codes.split([1, 1, 3, 7, 18], dim=2):
        before = {name: tensor.clone() for name, tensor in cache.items()}
        audio, after = model.decode(step, decoder_cache=cache, return_dict=False)
        assert all(torch.equal(before[name], cache[name]) for name in before)  # what is given is not changed
        found.append(audio)
        cache = after
    assert relative_error(torch.cat(found, dim=2), whole.numpy()) < 1e-5
    for tensor in cache.values():
        tensor[1] = 0
    audio, _ = model.decode(codes, decoder_cache=cache, return_dict=False)
    assert relative_error(audio[1:], whole[1:].numpy()) < 1e-5
    assert relative_error(audio[:1], whole[:1].numpy()) > 1e-2  # the other one goes on


def test_a_stream_of_two_days_is_as_precise_as_its_beginning(load):
    model = load(tiny.OMNICODEC)
    codes = torch.from_numpy(random_codes(tiny.OMNICODEC, 1, 30))
    cache = model.decode(codes[:, :, :12], decoder_cache=model.empty_decoder_cache()).decoder_cache
    late = {name: tensor + (5_000_000 if tensor.ndim == 1 else 0) for name, tensor in cache.items()}
    turned = model.decode(codes[:, :, 12:], decoder_cache=late).audio_values[..., 12 * 12 :]  # past the window
    early = model.decode(codes[:, :, 12:], decoder_cache=cache).audio_values[..., 12 * 12 :]
    assert relative_error(turned, early.numpy()) < 1e-4


# -- Precision and compilation


@pytest.mark.parametrize("cast", ["when loaded", "afterwards"])
def test_bfloat16_keeps_codebooks_and_audio_in_float32(load, cast):
    config = STORED
    model = load(config, dtype=torch.bfloat16)
    if cast == "afterwards":
        model = pytorch_model.build(config, tiny.variables(config)).to(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if "_codebook" in name or name.startswith("log_mel")}
    audio, features = torch.from_numpy(noise(2, 1, 600, scale=0.1)), torch.from_numpy(noise(2, 27, 10, seed=1))
    exact = load(config)
    codes = exact.encode(audio, semantic_features=features).audio_codes
    found = model.encode(audio, semantic_features=features).audio_codes
    assert (found == codes)[:, :2].float().mean() > 0.9
    values = model.decode(codes).audio_values
    assert values.dtype == torch.float32
    assert relative_error(values, exact.decode(codes).audio_values.numpy()) < 0.05


def test_torch_compile_takes_it_as_one_graph(load):
    model = load(CONFIGS["12.5 frames a second"])
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    audio = torch.from_numpy(noise(2, 1, 9_001, scale=0.1))
    codes = model.encode(audio).audio_codes
    assert torch.equal(compiled(model.encode)(audio).audio_codes, codes)
    values, step = model.decode(codes).audio_values, compiled(model.decode)
    assert torch.equal(step(codes).audio_values, values)
    cache, found = model.empty_decoder_cache(2), []
    for frame in codes.split(1, dim=2):
        audio, cache = step(frame, decoder_cache=cache, return_dict=False)
        found.append(audio)
    assert relative_error(torch.cat(found, dim=2), values.numpy()) < 1e-5


def test_torch_compile_takes_the_encoder_of_whisper_into_the_graph(with_whisper):
    model = AutoModel.from_pretrained(with_whisper[1], trust_remote_code=True)
    audio = torch.from_numpy(noise(1, 1, 3 * RATE, scale=0.1))
    compiled = torch.compile(model.encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(audio).audio_codes, model.encode(audio).audio_codes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs a C++ compiler")
def test_what_torchs_own_compiler_makes_of_it_computes_the_same(load):
    model = load(CONFIGS["12.5 frames a second"])
    audio = torch.from_numpy(noise(2, 1, 9_001, scale=0.1))
    codes = model.encode(audio).audio_codes
    found = torch.compile(model.encode, fullgraph=True)(audio).audio_codes
    assert (found == codes).float().mean() > 0.99  # sums in another order
    values = torch.compile(model.decode, fullgraph=True)(codes).audio_values
    assert relative_error(values, model.decode(codes).audio_values.numpy()) < 1e-5


# -- There and back


def assert_same_models(found: Path, expected: Path) -> None:
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_comes_back_bit_for_bit_with_its_config(directory, tmp_path, name):
    from_torch.main(checkpoint=directory(CONFIGS[name]), out=tmp_path / "back")
    assert_same_models(tmp_path / "back", directory(CONFIGS[name]).parent / "flax")


def test_what_was_fine_tuned_in_pytorch_comes_back(directory, tmp_path):
    config = CONFIGS["12.5 frames a second"]
    model = AutoModel.from_pretrained(directory(config), trust_remote_code=True)
    model.proj_se_q_ac_q.weight.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    from_torch.main(checkpoint=tmp_path / "tuned", out=tmp_path / "back")
    found, variables = model_directory.load(tmp_path / "back")
    assert found == config
    before, after = model_directory.flatten(tiny.variables(config)), model_directory.flatten(variables)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["params.adapter_2.kernel"]


def test_discriminators_travel_along(tmp_path):
    config = DiscriminatorConfig(
        stft=discriminator_configs.STFTDiscriminatorConfig(filters=4, windows=(32,)), waveform=None, wavlm=None
    )
    model_directory.save(tmp_path / "flax", tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    shapes = model_directory.expected_tensors(build(config))
    leaves = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    model_directory.save(tmp_path / "flax/discriminators", config, model_directory.unflatten(leaves))
    to_torch.main(model=tmp_path / "flax", out=tmp_path / "torch")
    authors = load_file(tmp_path / "torch/discriminators.safetensors")
    assert "net_msstftd.discriminators.0.convs.1.conv.weight_g" in authors
    from_torch.main(checkpoint=tmp_path / "torch", out=tmp_path / "back")
    assert_same_models(tmp_path / "back", tmp_path / "flax")
    assert_same_models(tmp_path / "back/discriminators", tmp_path / "flax/discriminators")
    shutil.rmtree(tmp_path / "flax/discriminators")  # a model without them takes the place of the one with them
    to_torch.main(model=tmp_path / "flax", out=tmp_path / "torch")
    assert pytorch_model.load_discriminators(tmp_path / "torch") is None
    from_torch.main(checkpoint=tmp_path / "torch", out=tmp_path / "back")
    assert not (tmp_path / "back/discriminators/config.json").exists()


def test_one_file_of_weights_takes_the_place_of_several(directory, tmp_path):
    other = real_rate(12.5, LOG_MEL)
    model = AutoModel.from_pretrained(directory(other), trust_remote_code=True)
    model.save_pretrained(tmp_path / "torch", max_shard_size="20KB")
    assert len(list((tmp_path / "torch").glob("model-*.safetensors"))) > 1
    changed = jax.tree.map(lambda leaf: leaf + 1, dict(tiny.variables(other)))
    model_directory.save(tmp_path / "flax", other, changed)
    to_torch.main(model=tmp_path / "flax", out=tmp_path / "torch")
    from_torch.main(checkpoint=tmp_path / "torch", out=tmp_path / "back")
    found, wanted = (model_directory.load(tmp_path / name)[1]["params"] for name in ("back", "flax"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_checkpoint_in_it_is_the_authors_one(directory):
    variables = tiny.variables(tiny.OMNICODEC)
    expected = reference.to_state_dict(variables, tiny.OMNICODEC)
    found = torch.load(directory(tiny.OMNICODEC) / "omnicodec.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_every_option_that_changes_what_a_model_computes_goes_along():
    """An option that is only for training may go as it is; the PyTorch model must know every other one."""

    def computed(cls: type, before: str = "") -> set[str]:
        names = set()
        for field in dataclasses.fields(cls):
            nested = {"seanet": SEANetConfig, "transformer": TransformerConfig, "semantic": SemanticConfig}
            nested |= {"acoustic": type(tiny.OMNICODEC.acoustic), "codebook": type(tiny.OMNICODEC.codebook)}
            if field.name in nested:
                names |= computed(nested[field.name], f"{field.name}.")
            elif not TRAINING_ONLY.items() <= field.metadata.items():
                names.add(before + field.name)
        return names

    assert computed(CodecConfig) <= set(pytorch_model.NAMES.values())


# -- What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_values": torch.zeros(1, 2, 100)}, r"\[1, 2, 100\]: must be \[batch, 1, samples\], mono"),
        ({"input_values": torch.zeros(1, 1, 100)}, "semantic features"),
        ({"input_values": torch.zeros(1, 1, 100), "num_quantizers": 6}, "num_quantizers = 6: must be between 1 and 5"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_words(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(tiny.OMNICODEC).encode(**arguments)


def test_codes_of_another_model_are_refused_in_words(load):
    with pytest.raises(ValueError, match=r"\[1, 6, 4\]: must be \[batch, 1 to 5, frames\]"):
        load(tiny.OMNICODEC).decode(torch.zeros(1, 6, 4, dtype=torch.long))


def test_a_directory_for_transformers_is_no_model_directory_here_and_the_message_says_what_to_do(directory):
    with pytest.raises(ModelError, match="omnicodec convert from-torch --checkpoint"):
        model_directory.load(directory(tiny.OMNICODEC))


def test_a_directory_has_its_own_config_and_a_file_has_none(directory, tmp_path):
    folder = directory(tiny.OMNICODEC)
    with pytest.raises(ConversionError, match="leave out --config"):
        from_torch.main(checkpoint=folder, config=Path("demo"), out=tmp_path)
    with pytest.raises(ConversionError, match="give the --config"):
        from_torch.main(checkpoint=folder / "omnicodec.pth", out=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mimi"}))
    with pytest.raises(ConversionError, match="omnicodec convert mimi takes such a checkpoint"):
        from_torch.main(checkpoint=tmp_path, out=tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "omnicodec"}))
    with pytest.raises(ConversionError, match="not what omnicodec convert to-torch has written"):
        from_torch.main(checkpoint=tmp_path, out=tmp_path / "out")


# -- Strangers

STRANGER = """
import sys
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
extract = AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
clips = [np.sin(np.arange(9000) / 20), 0.1 * np.sin(np.arange(5000) / 30)]
inputs = extract(clips, sampling_rate=24_000, return_tensors="pt")
assert abs(inputs["input_values"].abs().amax((1, 2)) - 0.95).max() < 1e-6
assert inputs["padding_mask"].sum(1).tolist() == [9000, 5000]
output = model(**inputs)
assert output.audio_codes.shape == (2, 4, 5) and output.audio_values.shape == (2, 1, 9000)
assert model.get_audio_codes_mask(inputs["padding_mask"]).sum(1).tolist() == [5, 3]
assert model.config.frame_rate == 12.5 and model.config.num_codebooks == 4
assert not any(name.startswith(("omnicodec_jax", "jax", "flax")) for name in sys.modules)
"""


def test_a_stranger_runs_it_with_torch_and_transformers_alone(directory, tmp_path):
    folder = directory(CONFIGS["12.5 frames a second"])
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", STRANGER, str(folder)], check=True, cwd=tmp_path, env=environment)


def test_the_feature_extractor_fills_up_semantic_features(directory):
    extract = AutoFeatureExtractor.from_pretrained(directory(tiny.OMNICODEC), trust_remote_code=True)
    features = [noise(5, 10), noise(3, 10)]
    inputs = extract([noise(90), noise(40)], semantic_features=features, sampling_rate=RATE, return_tensors="pt")
    assert inputs["semantic_features"].shape == (2, 5, 10)
    assert inputs["semantic_features_mask"].sum(1).tolist() == [5, 3]
    np.testing.assert_array_equal(inputs["semantic_features"][1, :3], features[1])
    with pytest.raises(ValueError, match="1 arrays of semantic features for 2 clips"):
        extract([noise(90), noise(40)], semantic_features=features[:1], sampling_rate=RATE)


AUTHORS = Path(os.environ.get("OMNICODEC_REFERENCE", Path(__file__).parents[2].parent / "shared" / "OmniCodec"))
LOAD_AUTHORS = """
import sys
from unittest import mock
import torch, transformers
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen
for name in ("einops", "einx"):  # which the class needs to compute, not to load
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = mock.MagicMock()
sys.path.insert(0, sys.argv[1])
with mock.patch.object(qwen.Qwen3OmniMoeAudioEncoder, "from_pretrained", lambda *a, **k: torch.nn.Linear(1, 1)), \\
     mock.patch.object(transformers.WhisperFeatureExtractor, "from_pretrained", lambda *a, **k: None):
    from models.compression_omnicodec import build_model
    seanet = dict(channels=1, dimension=512, causal=True, n_filters=2, n_residual_layers=1, activation="ELU",
        compress=2, dilation_base=2, disable_norm_outer_blocks=0, kernel_size=7, residual_kernel_size=3,
        last_kernel_size=3, norm="none", pad_mode="constant", ratios=[8, 6, 5, 4], true_skip=True)
    transformer = dict(d_model=512, num_heads=8, num_layers=1, causal=True, layer_scale=0.01, context=250,
        conv_layout=True, max_period=10000, gating="none", norm="layer_norm", positional_embedding="rope",
        dim_feedforward=32, input_dimension=512, output_dimensions=[512])
    semantic = dict(ema_new=False, dim=512, codebook_size=16, codebook_dim=12)
    acoustic = dict(dimension=8, n_q=4, bins=16, input_dimension=512, output_dimension=512, q_dropout=True,
        ema_new=False)
    model = build_model(24000, 12.5, 8, 12, seanet, transformer, semantic, acoustic)
state = torch.load(sys.argv[2], weights_only=True)
own = {key: value for key, value in model.state_dict().items() if key.startswith(("qwen_encoder.", "transform."))}
model.load_state_dict(state | own, strict=True)
"""


@pytest.mark.skipif(
    not AUTHORS.is_dir(), reason="needs the authors' code, at $OMNICODEC_REFERENCE or ../shared/OmniCodec"
)
def test_the_authors_class_loads_our_checkpoint_strictly(directory):
    config = CodecConfig(
        seanet=SEANetConfig(n_filters=2, n_residual_layers=1),
        transformer=TransformerConfig(num_layers=1, dim_feedforward=32),
        semantic=SemanticConfig(codebook_size=16, codebook_dim=12),
        acoustic=tiny.OMNICODEC.acoustic,
    )
    checkpoint = directory(config) / "omnicodec.pth"
    subprocess.run([sys.executable, "-c", LOAD_AUTHORS, str(AUTHORS), str(checkpoint)], check=True)
