"""Whisper's encoder against transformers, from checkpoints that transformers wrote, and through the tokenizer."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soxr
import tiny
import torch
import transformers
from fake_hub import put_on_hub
from golden import relative_error

from omnicodec_jax import cli, dsp, model_directory, semantic
from omnicodec_jax.config import DataConfig, DomainConfig, SEANetConfig, SemanticConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import semantic_features
from omnicodec_jax.converters import whisper as convert_whisper
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio, prepare, records, units
from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.pretrained.whisper import SIZES, WhisperConfig, WhisperEncoder, num_features
from omnicodec_jax.tokenizer import OmniCodecTokenizer

SMALL = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 80}
SMALL |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 60}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WIDTH = 32


def of_size(name: str) -> dict:
    """transformers' options for a released size."""
    config = SIZES[name]
    return SMALL | {
        "d_model": config.d_model,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.dim_feedforward,
        "num_mel_bins": config.num_mel_bins,
    }


@torch.no_grad()
def random_model(kind: type = transformers.WhisperModel, **options) -> transformers.PreTrainedModel:
    """Weights under which no part fades out: attention that is not flat, and biases that padding would show."""
    model = kind(transformers.WhisperConfig(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.get_encoder().named_parameters():
        if "embed_positions" in name:
            continue
        tensor.normal_(generator=generator)
        if name.endswith("bias"):
            tensor.mul_(0.2)
        elif tensor.ndim == 1:
            tensor.mul_(0.1).add_(1)
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            tensor.mul_(gain / tensor[0].numel() ** 0.5)
    return model


class Pair(NamedTuple):
    theirs: transformers.PreTrainedModel
    config: WhisperConfig
    variables: dict

    def expected(self, mel: np.ndarray) -> np.ndarray:
        """Means of the tokens that transformers makes of one window [M, bins], which is all it has positions for."""
        encoder, count = self.theirs.get_encoder(), len(mel) // 2
        whole, all_positions = encoder.config.max_source_positions, encoder.embed_positions
        encoder.config.max_source_positions = count
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(all_positions.weight[:count])
        with torch.no_grad():
            tokens = encoder(torch.from_numpy(mel.T.copy())[None]).last_hidden_state[0].numpy()
        encoder.config.max_source_positions, encoder.embed_positions = whole, all_positions
        return tokens.reshape(-1, 4, tokens.shape[1]).mean(axis=1)

    def features(self, *arguments: np.ndarray, dtype=jnp.float32) -> np.ndarray:
        return np.asarray(run(WhisperEncoder(self.config, dtype), self.variables, *map(jnp.asarray, arguments)))


@partial(jax.jit, static_argnums=0)
def run(model: WhisperEncoder, variables: dict, *arguments: jax.Array) -> jax.Array:
    return model.apply(variables, *arguments)


def make_pair(**options) -> Pair:
    theirs = random_model(**options)
    config = convert_whisper.config_from_transformers(theirs.config.to_dict())
    state_dict = {key: value.numpy() for key, value in theirs.get_encoder().state_dict().items()}
    return Pair(theirs, config, jax.tree.map(jnp.asarray, convert_whisper.from_state_dict(state_dict, config)))


@pytest.fixture(scope="module")
def small() -> Pair:
    return make_pair(**SMALL)


@pytest.fixture(scope="module")
def sound(clips) -> np.ndarray:
    """Speech first, at 24 kHz; every third quarter of a second is a whisper beside the others."""
    samples = np.concatenate([audio.load(path, 24_000, peak=0.95).samples for path in reversed(clips)])
    return samples * np.where(np.arange(samples.size) // 6000 % 3, 0.003, 1).astype(np.float32)


@pytest.fixture(scope="module")
def mel(sound) -> np.ndarray:
    """Log-mel [400, 80] of 4 s."""
    return np.asarray(jax.jit(partial(dsp.log_mel, bins=80))(jnp.asarray(sound[:64_000])))


# -- Encoder


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_features_are_the_means_of_the_tokens_of_transformers(mel, name):
    pair = make_pair(**of_size(name))
    expected = pair.expected(mel)
    assert expected.shape == (50, SIZES[name].d_model)
    assert expected.std(axis=0).min() > 0.1  # no constant features
    assert relative_error(pair.features(mel[None])[0], expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "large-v3"])
def test_window_of_thirty_seconds_is_that_of_transformers(sound, name):
    low = jnp.asarray(soxr.resample(sound, 24_000, 16_000, quality="HQ")[:480_000])
    mel = np.asarray(dsp.log_mel(low, SIZES[name].num_mel_bins))
    assert len(mel) == 3000
    pair = make_pair(**of_size(name))
    assert relative_error(pair.features(mel[None])[0], pair.expected(mel)) < 1e-4


def test_windows_in_a_padded_batch_are_those_of_each_alone(small, mel):
    lengths = [8, 64, 200, 400]
    batch = np.full((len(lengths) + 1, 400, 80), np.nan, np.float32)
    for row, length in zip(batch[:-1], lengths, strict=True):
        row[:length] = mel[:length]
    features = small.features(batch, np.array([*lengths, 0], np.int32))
    assert np.isfinite(features[:-1]).all()
    for row, length in zip(features[:-1], lengths, strict=True):
        assert relative_error(row[: num_features(length)], small.expected(mel[:length])) < 1e-4, length


def test_half_precision_stays_close_to_single(small, mel):
    features = small.features(mel[None], dtype=jnp.bfloat16)
    assert features.dtype == np.float32
    assert 1e-4 < relative_error(features[0], small.expected(mel)) < 0.1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", 7.632), ("base", 19.823), ("small", 87.002), ("medium", 305.680), ("large-v3", 635.049)],
)
def test_sizes_have_the_parameters_of_the_released_ones(name, parameters):
    """All but the positions, which are computed."""
    shapes = model_directory.expected_tensors(WhisperEncoder(SIZES[name])).values()
    with torch.device("meta"):
        theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(
            transformers.WhisperConfig(**of_size(name))
        )
    count = sum(map(math.prod, shapes))
    assert count == sum(tensor.numel() for key, tensor in theirs.state_dict().items() if "positions" not in key)
    assert count / 1e6 == pytest.approx(parameters, abs=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0: must be positive"),
        ({"d_model": 30, "num_heads": 4}, "d_model = 30: must be a multiple of num_heads=4"),
        ({"window_seconds": 5}, "window_seconds = 5: must be even, and at most 30"),
        ({"window_seconds": 32}, "window_seconds = 32: must be even, and at most 30"),
    ],
)
def test_impossible_config_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        WhisperConfig(**options)


# -- Log-mel


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_is_that_of_transformers_and_of_faster_whisper(sound, bins):
    low = soxr.resample(sound[:100_000], 24_000, 16_000, quality="HQ")
    listen = transformers.WhisperFeatureExtractor(feature_size=bins)
    theirs = listen(low, sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0].T
    ours = np.asarray(jax.jit(partial(dsp.log_mel, bins=bins))(jnp.asarray(low)))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3
    faster_whisper = pytest.importorskip("faster_whisper.feature_extractor", reason="needs faster-whisper (extra eval)")
    theirs = faster_whisper.FeatureExtractor(feature_size=bins)(low, padding=0).T[: len(ours)]
    assert np.abs(ours - theirs).max() < 1e-3


# -- Features of clips: in a step, on disk, in the tokenizer


@pytest.fixture(scope="module")
def encoder(small, tmp_path_factory) -> Path:
    """The converted encoder, with windows of 4 s."""
    directory = tmp_path_factory.mktemp("whisper")
    small.theirs.save_pretrained(directory / "theirs")
    convert_whisper.main(str(directory / "theirs"), directory / "ours")
    return directory / "ours"


@pytest.fixture(scope="module")
def reference(small):
    """What transformers makes of clips at 24 kHz: of every four seconds, filled up with silence to whole features."""
    listen = transformers.WhisperFeatureExtractor(feature_size=80)

    def compute(samples: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, samples.size, 96_000):
            low = soxr.resample(samples[start : start + 96_000], 24_000, 16_000, quality="HQ")
            count = -(-samples[start : start + 96_000].size // 1920)
            low = audio.fit_length(low, 1280 * count)
            mel = listen(low, sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0]
            found.append(small.expected(np.ascontiguousarray(mel.T)))
        return np.concatenate(found)

    return compute


LENGTHS = [1920, 30_720, 96_000, 96_001, 97_921, 240_000]
"""Samples of a clip: all of a window, parts of it, several."""


@pytest.mark.parametrize("samples", LENGTHS)
def test_features_of_a_clip_are_those_of_its_windows(encoder, reference, sound, samples):
    extract = semantic.FeatureExtractor(semantic.read_encoder(encoder), jax.local_devices()[:1])
    ours, expected = extract(sound[:samples], 24_000), reference(sound[:samples])
    assert len(ours) == -(-samples // 1920)  # as many as frames at 12.5 Hz
    assert relative_error(ours, expected) < 1e-3


@pytest.mark.parametrize("samples", LENGTHS)
def test_features_in_a_step_are_those_of_the_clip(encoder, reference, sound, samples):
    config, variables = semantic.read_encoder(encoder)
    batch = jnp.asarray(np.stack([sound[start:][:samples] for start in (0, 50_000)]))[:, None]
    ours = jax.jit(lambda x, weights: semantic.semantic_features(x, 24_000, (config, weights)))(batch, variables)
    for row, clip in zip(np.asarray(ours), np.asarray(batch), strict=True):
        assert relative_error(row, reference(clip[0])) < 1e-3


def test_loud_end_of_a_clip_changes_no_feature_of_the_windows_before(encoder, sound):
    extract = semantic.FeatureExtractor(semantic.read_encoder(encoder), jax.local_devices()[:1])
    louder = sound[:200_000] * np.where(np.arange(200_000) < 96_000, 0.01, 1).astype(np.float32)
    np.testing.assert_array_equal(extract(louder, 24_000)[:50], extract(louder[:96_000], 24_000))


def test_stored_features_are_those_that_the_tokenizer_will_compute(encoder, reference, sound, tmp_path):
    """A crop of a longer clip hears what is around it; a shorter clip, repeated or padded, is a crop of its own."""
    for seconds in (1.1, 3.0, 5.0, 10.0):
        audio.save(tmp_path / "audio" / f"{seconds}.wav", sound[: round(seconds * 24_000)], 24_000)
    prepared, stored = tmp_path / "prepared", tmp_path / "features"
    prepare.run({"sound": tmp_path / "audio"}, prepared, prepare.PrepareConfig(validation=0.0), 1, units.Share())
    assert semantic_features.main(prepared, str(encoder), stored, "float32", crop_seconds=3.3, batch_seconds=7) == 0
    config = DataConfig(
        prepared=str(prepared), features=str(stored), domains=(DomainConfig(name="sound"),), segment_samples=79_200
    )
    samples, starts = Samples.open(config, 0, stored_features=True), set()
    for index in range(16):
        sample = samples[index]
        assert sample["features"].shape == (42, WIDTH)
        heard, seconds = sample["audio"][0], float(re.findall(r"\d+\.\d", samples.id(index))[0])
        expected = None
        if seconds > 3.3:
            (whole,) = (records.read_samples(record) for record in recorded(prepared, samples.id(index)))
            whole = whole.astype(np.float32) / 32768
            (start,) = [n for n in range(0, whole.size - 79_199, 1920) if np.array_equal(whole[n:][:79_200], heard)]
            starts.add(start)
            expected = reference(whole)[start // 1920 :][:42]
        else:
            expected = reference(heard)
        assert relative_error(sample["features"].astype(np.float32), expected) < 2**-7, samples.id(index)
    assert len(starts) > 4


def recorded(prepared: Path, id: str) -> Iterator[bytes]:
    """The records of a clip."""
    (shard,) = records.read_index(prepared)
    path = records.shard_path(prepared, shard.name)
    for number in range(len(shard.clips)):
        record = records.read_record(path, number)
        if f"sound:{records.read_header(record).id}" == id:
            yield record


CODEC = dataclasses.replace(
    config_files.load("demo").codec,
    seanet=SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1),
    semantic=SemanticConfig(source="whisper", feature_dim=WIDTH, codebook_size=16, codebook_dim=12),
)
"""A small codec at 12.5 Hz that takes the encoder's features."""


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("codec")
    model_directory.save(directory, CODEC, tiny.variables(CODEC))
    return directory


def test_encoder_in_the_folder_of_the_model_is_used_by_itself(codec, encoder, sound, tmp_path):
    given = OmniCodecTokenizer.from_pretrained(codec, encoder=encoder)
    shutil.copytree(codec, tmp_path / "model")
    assert not OmniCodecTokenizer.from_pretrained(tmp_path / "model").computes_features
    shutil.copytree(encoder, tmp_path / "model" / "encoder")
    found = OmniCodecTokenizer.from_pretrained(tmp_path / "model")
    assert found.encoder_hash == given.encoder_hash
    assert found.model_hash == given.model_hash
    samples = sound[None, None, :30_000]
    np.testing.assert_array_equal(found.encode(samples, 24_000), given.encode(samples, 24_000))
    audio.save(tmp_path / "a.wav", sound[:30_000], 24_000)
    assert cli.encode(tmp_path / "a.wav", None, tmp_path / "model") == 0
    with pytest.raises(ModelError, match="--encoder DIR"):
        cli.encode(tmp_path / "a.wav", tmp_path / "b.safetensors", codec)


def test_codes_of_a_clip_do_not_depend_on_the_clips_beside_it(codec, encoder, sound):
    tokenizer = OmniCodecTokenizer.from_pretrained(codec, encoder=encoder)
    clips = [sound[:n] for n in (2000, 30_000, 100_000)]
    alone = [tokenizer.encode(clip[None, None], 24_000)[0] for clip in clips]
    together = dict(tokenizer.encode_each((n, tokenizer.prepare(clip)) for n, clip in enumerate(clips)))
    for n, codes in enumerate(alone):
        np.testing.assert_array_equal(together[n], codes)


@pytest.mark.parametrize(
    ("semantic_config", "message"),
    [
        (
            SemanticConfig(source="whisper"),
            "a whisper encoder, with features of width 32; the codec takes features of width 2048",
        ),
        (SemanticConfig(source="qwen3_aut", feature_dim=WIDTH), "the codec takes those of qwen3_aut"),
        (SemanticConfig(source="log_mel", feature_dim=1024), "no encoder's features"),
        (None, "no encoder's features"),
    ],
)
def test_encoder_that_the_codec_was_not_trained_with_is_refused(encoder, semantic_config, message):
    with pytest.raises(ModelError, match=message):
        semantic.load_encoder(encoder, semantic_config)


# -- Checkpoints


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (transformers.WhisperForConditionalGeneration, {}),
        (transformers.WhisperModel, {}),
        (transformers.WhisperForConditionalGeneration, {"max_shard_size": "20KB"}),
    ],
)
def test_encoder_comes_out_of_any_checkpoint(small, tmp_path, kind, options):
    random_model(kind, **SMALL).save_pretrained(tmp_path / "theirs", **options)
    convert_whisper.main(str(tmp_path / "theirs"), tmp_path / "ours")
    config, variables = model_directory.load(tmp_path / "ours")
    assert config == small.config
    for name, value in model_directory.flatten(small.variables).items():
        np.testing.assert_array_equal(model_directory.flatten(variables)[name], value)


def test_only_the_needed_files_are_downloaded(small, tmp_path, monkeypatch):
    source, local = tmp_path / "source", tmp_path / "local"
    random_model(transformers.WhisperForConditionalGeneration, **SMALL).save_pretrained(source)
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    put_on_hub(monkeypatch, "openai/whisper-small", source, local)
    convert_whisper.main("openai/whisper-small", tmp_path / "ours")
    assert {path.name for path in local.iterdir()} == {"config.json", "model.safetensors"}


def edited(directory: Path, **values) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


@pytest.mark.parametrize(
    ("name", "value"), [("activation_function", "relu"), ("model_type", "mimi"), ("scale_embedding", True)]
)
def test_variant_that_is_not_supported_is_refused_by_name_and_value(small, tmp_path, name, value):
    small.theirs.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=f"{name} = {value!r}"):
        convert_whisper.main(str(edited(tmp_path, **{name: value})), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_positions_that_were_trained_are_refused(small):
    state_dict = {key: value.numpy() for key, value in small.theirs.get_encoder().state_dict().items()}
    state_dict["embed_positions.weight"] = state_dict["embed_positions.weight"] + 0.01
    with pytest.raises(ConversionError, match="other positions than Whisper's sinusoids"):
        convert_whisper.from_state_dict(state_dict, small.config)


def test_checkpoint_that_is_not_converted_is_refused_with_the_command(small, tmp_path):
    small.theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="omnicodec convert whisper --checkpoint"):
        semantic.load_encoder(tmp_path, CODEC.semantic)
    with pytest.raises(ModelError, match="omnicodec convert whisper --checkpoint"):
        semantic_features.open_encoder(str(tmp_path), "float32")
