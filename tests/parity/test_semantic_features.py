"""Semantic features: stored by PyTorch's encoder, computed by ours, and through the tokenizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soxr
import tiny
import torch
import transformers
from golden import relative_error
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe, modeling_qwen3_omni_moe

from omnicodec_jax import cli, dsp, model_directory, semantic
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import DataConfig, DomainConfig, SemanticConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import qwen3_aut as convert_qwen3_aut
from omnicodec_jax.converters import semantic_features
from omnicodec_jax.data import audio, features, prepare, records, units
from omnicodec_jax.data.features import FeatureStore
from omnicodec_jax.data.pipeline import Samples
from omnicodec_jax.errors import DataError, ModelError
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer

in_a_step = jax.jit(lambda sample: semantic.semantic_features(sample, 24_000, None))

WIDTH = 10
TINY = {"num_mel_bins": 128, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
TINY |= {"downsample_hidden_size": 6, "output_dim": WIDTH}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random encoder as transformers saves it."""
    torch.manual_seed(0)
    config = configuration_qwen3_omni_moe.Qwen3OmniMoeAudioEncoderConfig(**TINY)
    directory = tmp_path_factory.mktemp("encoder")
    modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(checkpoint, tmp_path_factory):
    """The same as a model directory."""
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert_qwen3_aut.main(str(checkpoint), directory)
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The bundled clips, of 3 to 9.4 s."""
    directory = tmp_path_factory.mktemp("data") / "prepared"
    prepare.run({"sound": BUNDLED_CLIPS}, directory, prepare.PrepareConfig(validation=0.0), 1, units.Share())
    return directory


@pytest.fixture(scope="module")
def stored(checkpoint, prepared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("features") / "float32"
    assert semantic_features.main(prepared, str(checkpoint), directory, dtype="float32") == 0
    return directory


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What the reference computes of the 24 kHz audio that a learner hears: soxr, Whisper's log-mel, the encoder."""
    listen = transformers.WhisperFeatureExtractor(feature_size=128)
    model = modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder.from_pretrained(checkpoint).eval()

    @torch.no_grad()
    def compute(samples: np.ndarray) -> np.ndarray:
        low = soxr.resample(samples, 24_000, 16_000, quality="HQ")
        options = {"padding": False, "truncation": False, "return_tensors": "pt"}
        mel = listen(low, sampling_rate=16_000, **options)["input_features"][0]
        return model(mel, torch.tensor([mel.shape[1]])).last_hidden_state.numpy()

    return compute


LENGTHS = (0.3, 3.7, 7.9, 8.4, 9.9, 10.004, 13.2, 65.0)
"""Seconds of clips: repeated, padded, cropped, and cropped from segments."""


@pytest.fixture(scope="module")
def lengths(clips, tmp_path_factory):
    """Prepared clips of all kinds of length, and where their features go."""
    directory = tmp_path_factory.mktemp("lengths")
    sound = np.concatenate([audio.load(clip, 24_000, 0.5).samples for clip in clips])
    # A whisper beside a shout: normalised by what else there is, it would be another.
    sound *= np.where(np.arange(sound.size) // 60_000 % 3, 0.003, 1).astype(np.float32)
    for seconds in LENGTHS:
        audio.save(directory / "audio" / f"{seconds}.wav", sound[: round(seconds * 24_000)], 24_000)
    prepare.run({"sound": directory / "audio"}, directory, prepare.PrepareConfig(validation=0.0), 1, units.Share())
    return directory


@pytest.mark.parametrize(("crop_seconds", "stride"), [(10.0, None), (5.5, 2.5)])
def test_the_learner_sees_the_features_that_the_reference_computes_of_what_it_hears(
    lengths, checkpoint, reference, tmp_path, crop_seconds, stride
):
    options = {"crop_seconds": crop_seconds, "stride_seconds": stride}
    assert semantic_features.main(lengths, str(checkpoint), tmp_path, dtype="float32", **options) == 0
    config = DataConfig(
        prepared=str(lengths),
        features=str(tmp_path),
        domains=(DomainConfig(name="sound"),),
        segment_samples=round(crop_seconds * 24_000),
    )
    samples = Samples.open(config, 0, stored_features=True)
    for index in range(2 * len(LENGTHS)):
        sample = samples[index]
        expected = reference(sample["audio"][0])
        assert sample["features"].shape == expected.shape
        assert relative_error(sample["features"].astype(np.float32), expected) < 2**-8, samples.id(index)


def test_crops_of_another_length_than_those_stored_are_refused(prepared, stored):
    config = DataConfig(
        prepared=str(prepared),
        features=str(stored),
        domains=(DomainConfig(name="sound"),),
        segment_samples=120_000,
    )
    with pytest.raises(DataError, match=r"of crops of 10 s; .*semantic-features --crop-seconds 5 with another --out"):
        Samples.open(config, 0, stored_features=True)


def test_crops_of_no_length_are_refused(prepared, checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"--stride-seconds 0\.01: must be"):
        semantic_features.main(prepared, str(checkpoint), tmp_path, stride_seconds=0.01)
    with pytest.raises(DataError, match=r"--crop-seconds nan, .*: must be"):
        semantic_features.main(prepared, str(checkpoint), tmp_path, crop_seconds=float("nan"))


def test_the_encoders_hash_is_that_of_the_converted_model(stored, encoder):
    config, variables = model_directory.load(encoder)
    format = json.loads((stored / features.SETTINGS).read_text())
    assert format["encoder"] == model_directory.model_hash(config, variables)
    assert format["compute"] == "float32"


def test_what_is_done_is_not_done_again_and_the_rest_is(prepared, stored, checkpoint, tmp_path, monkeypatch):
    (shard,) = records.read_index(prepared)
    path = features.shard_path(stored, shard)
    before, data = path.stat().st_mtime_ns, path.read_bytes()
    semantic_features.main(prepared, str(checkpoint), stored, dtype="float32")
    assert path.stat().st_mtime_ns == before
    leftover = path.with_name(f".{path.stem}.1.partial.array_record")
    leftover.write_bytes(b"half")
    path.unlink()
    semantic_features.main(prepared, str(checkpoint), stored, dtype="float32")
    assert path.read_bytes() == data
    assert not leftover.exists()
    for size in (0, len(data) // 2):  # as a power failure may leave it
        path.write_bytes(data[:size])
        semantic_features.main(prepared, str(checkpoint), stored, dtype="float32")
        assert path.read_bytes() == data


def test_batches_do_not_change_features(prepared, checkpoint, stored, tmp_path):
    semantic_features.main(prepared, str(checkpoint), tmp_path / "one", dtype="float32", batch_seconds=1)
    (shard,) = records.read_index(prepared)
    ours, theirs = (FeatureStore.open(path, [shard], 240_000) for path in (tmp_path / "one", stored))
    for record in range(len(shard.clips)):
        one, many = (store.read_crop(shard, record, 0).astype(np.float32) for store in (ours, theirs))
        np.testing.assert_allclose(one, many, atol=2**-7 * np.abs(many).max())


def test_features_of_another_format_are_refused(prepared, checkpoint, stored):
    with pytest.raises(DataError, match="another encoder, format or crops"):
        semantic_features.main(prepared, str(checkpoint), stored, dtype="bfloat16")


def test_int8_and_its_error(prepared, checkpoint, stored, tmp_path, capsys):
    semantic_features.main(prepared, str(checkpoint), tmp_path, dtype="float32", number="int8")
    reported = float(capsys.readouterr().out.split()[-1])
    (shard,) = records.read_index(prepared)
    small, large = (FeatureStore.open(path, [shard], 240_000) for path in (tmp_path, stored))
    one, other = (store.read_crop(shard, 2, 0).astype(np.float32) for store in (small, large))
    error = np.linalg.norm(one - other) / np.linalg.norm(other)
    assert 1e-4 < error < 0.01
    assert 1e-4 < reported < 0.01


def test_a_damaged_shard_is_named_and_the_others_are_done(prepared, checkpoint, tmp_path, capsys):
    copy = tmp_path / "prepared"
    (copy / records.SHARDS).mkdir(parents=True)
    for name in (records.INDEX, records.SETTINGS):
        (copy / name).write_bytes((prepared / name).read_bytes())
    source = records.shard_path(prepared, "sound-train-000000").read_bytes()
    damaged = bytearray(source)
    damaged[len(damaged) // 2] ^= 255
    records.shard_path(copy, "sound-train-000000").write_bytes(damaged)
    (line,) = (copy / records.INDEX).read_text().splitlines()
    other = line.replace("sound-train-000000", "sound-train-000001")
    (copy / records.INDEX).write_text(f"{line}\n{other}\n")
    records.shard_path(copy, "sound-train-000001").write_bytes(source)
    assert semantic_features.main(copy, str(checkpoint), tmp_path / "out", dtype="float32") == 1
    written = [path.name for path in (tmp_path / "out" / records.SHARDS).iterdir()]
    assert len(written) == 1
    assert written[0].startswith("sound-train-000001")
    assert "sound-train-000000" in capsys.readouterr().err


# -- Computed where they are needed


@pytest.mark.parametrize("seconds", [0.3, 8.0, 16.5])
def test_windows_side_by_side_are_the_clip_in_one_piece(encoder, clips, seconds):
    loaded = semantic.load_encoder(encoder, SemanticConfig(feature_dim=WIDTH))
    whole = np.concatenate([audio.load(clip, 16_000).samples for clip in clips])[: int(seconds * 16_000)]
    ours = semantic.FeatureExtractor(loaded, jax.local_devices()[:1])(whole, 16_000)
    mel = dsp.log_mel(jnp.asarray(whole)[None])
    expected = model_directory.build(loaded[0]).apply(loaded[1], mel)[0]
    assert relative_error(ours, np.asarray(expected)) < 1e-4


def test_features_inside_a_jitted_step_are_those_of_transformers(checkpoint, encoder, clips):
    loaded = semantic.load_encoder(encoder, SemanticConfig(feature_dim=WIDTH))
    batch = np.stack([audio.fit_length(audio.load(clip, 24_000).samples, 72_000) for clip in clips[:2]])
    compute = jax.jit(lambda x, weights: semantic.semantic_features(x, 24_000, (loaded[0], weights)))
    ours = compute(jnp.asarray(batch)[:, None], loaded[1])
    theirs = semantic_features.TorchEncoder(str(checkpoint), "float32")(list(batch))
    for row, expected in zip(ours, theirs, strict=True):
        assert relative_error(np.asarray(row), expected) < 1e-3


@pytest.mark.parametrize("index", range(0, 11, 2))
def test_features_are_the_same_in_a_step_in_the_tokenizer_and_in_the_reference(clips, index):
    """Stacked log-mel; the upper eight of 128 bands lie where low-pass filters differ."""
    sample = audio.load(clips[index], 24_000, 0.95).samples[: 72_000 - index]
    in_step = np.asarray(in_a_step(jnp.asarray(sample)[None, None])[0])
    in_tokenizer = semantic.FeatureExtractor(None, jax.local_devices()[:1])(sample, 24_000)
    listen = transformers.WhisperFeatureExtractor(feature_size=128)
    low = soxr.resample(sample, 24_000, 16_000, quality="HQ")
    theirs = listen(low, sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0]
    in_reference = dsp.stack_frames(theirs.T)
    assert in_step.shape == in_tokenizer.shape == in_reference.shape
    assert np.abs(in_step - in_tokenizer).max() < 1e-3
    assert np.abs(in_step - in_reference).max() < 1e-3


CODEC = dataclasses.replace(config_files.load("demo").codec, semantic=tiny.OMNICODEC.semantic)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A small codec at 12.5 Hz that takes the encoder's features."""
    directory = tmp_path_factory.mktemp("codec")
    model_directory.save(directory, CODEC, tiny.variables(CODEC))
    return directory


def test_a_tokenizer_with_the_encoder_needs_no_features(codec, encoder, clips):
    sample = audio.load(clips[0], 24_000).samples[None, None, :48_000]
    with_encoder = OmniCodecTokenizer.from_pretrained(codec, encoder=encoder)
    loaded = semantic.load_encoder(encoder, CODEC.semantic)
    given = semantic.FeatureExtractor(loaded, jax.local_devices()[:1])(sample[0, 0], 24_000)
    plain = OmniCodecTokenizer.from_pretrained(codec)
    expected = plain.encode(sample, 24_000, semantic_features=[given])
    np.testing.assert_array_equal(with_encoder.encode(sample, 24_000), expected)


def test_another_width_and_another_kind_of_model_are_refused(encoder, codec):
    with pytest.raises(ModelError, match="width 10; the codec takes features of width 2048"):
        semantic.load_encoder(encoder, SemanticConfig())
    with pytest.raises(ModelError, match="no encoder's features"):
        semantic.load_encoder(encoder, SemanticConfig(source="log_mel", feature_dim=1024))
    with pytest.raises(ModelError, match="an omnicodec model, not an audio encoder; omnicodec convert whisper or"):
        semantic.load_encoder(codec, SemanticConfig())
    with pytest.raises(ModelError, match="a qwen3_aut model, not a codec"):
        OmniCodecTokenizer.from_pretrained(encoder)


def test_the_command_takes_the_encoder(codec, encoder, clips, tmp_path, capsys):
    assert cli.encode(clips[0], tmp_path / "a.safetensors", codec, encoder=encoder) == 0
    with pytest.raises(ModelError, match="--encoder DIR"):
        cli.encode(clips[0], tmp_path / "b.safetensors", codec)


def test_whole_clips_are_interpolated_from_13_to_the_codecs_rate():
    """130 vectors in 10 s become 125 frames; PyTorch's interpolation is the reference's (spec §1.6)."""
    model = OmniCodec(tiny.OMNICODEC)
    variables, given = tiny.variables(tiny.OMNICODEC), tiny.normal(1, 130, WIDTH)
    ours, before = jax.jit(
        lambda x: (
            model.apply(variables, x, 125, method="semantic_frames"),
            model.apply(variables, x, method="semantic_hidden"),
        )
    )(given)
    theirs = torch.nn.functional.interpolate(torch.tensor(np.asarray(before)).mT, 125, mode="linear").mT.numpy()
    assert relative_error(ours, theirs) < 1e-5
