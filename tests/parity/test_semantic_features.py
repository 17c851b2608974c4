"""Semantic features: stored by PyTorch's encoder, computed by ours, and through the tokenizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from golden import relative_error
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe, modeling_qwen3_omni_moe

import convert.qwen3_aut
from convert import semantic_features
from omnicodec_jax import cli, config_files, model_directory, semantic, signal
from omnicodec_jax.config import SemanticConfig
from omnicodec_jax.data import audio, features, prepare, records, units
from omnicodec_jax.data.features import FeatureStore
from omnicodec_jax.errors import DataError, ModelError
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer

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
    convert.qwen3_aut.main(str(checkpoint), directory)
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The bundled clips, of 3 to 9.4 s."""
    directory = tmp_path_factory.mktemp("data") / "prepared"
    prepare.run({"sound": cli.BUNDLED_CLIPS}, directory, prepare.PrepareConfig(validation=0.0), 1, units.Task())
    return directory


@pytest.fixture(scope="module")
def stored(checkpoint, prepared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("features") / "float32"
    assert semantic_features.main(prepared, str(checkpoint), directory, dtype="float32") == 0
    return directory


def whole_seconds(prepared, record: int) -> np.ndarray:
    """A prepared clip as the features are computed of it."""
    path = records.shard_path(prepared, "sound-train-000000")
    samples = records.read_samples(records.read_record(path, record)).astype(np.float32) / 32768
    return audio.fit_length(samples, -(-samples.size // 24_000) * 24_000)


def test_stored_features_are_those_of_our_encoder(prepared, stored, encoder):
    (shard,) = records.read_index(prepared)
    store = FeatureStore.open(stored, [shard])
    extract = semantic.FeatureExtractor(
        semantic.load_encoder(encoder, SemanticConfig(feature_dim=WIDTH)), jax.local_devices()[:1]
    )
    for record, samples in enumerate(shard.clips):
        ours = extract(whole_seconds(prepared, record), 24_000)
        count = 13 * -(-samples // 24_000)
        assert ours.shape == (count, WIDTH)
        # bfloat16 holds 8 bits
        assert relative_error(ours, store.read(shard, record, 0, count).astype(np.float32)) < 2**-8
    assert relative_error(extract(np.zeros(24_000, np.float32), 24_000), store.silence) < 1e-4


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


def test_batches_do_not_change_features(prepared, checkpoint, stored, tmp_path):
    semantic_features.main(prepared, str(checkpoint), tmp_path / "one", dtype="float32", batch_seconds=1)
    (shard,) = records.read_index(prepared)
    ours, theirs = (FeatureStore.open(path, [shard]) for path in (tmp_path / "one", stored))
    for record in range(len(shard.clips)):
        one, many = (store.read(shard, record, 0, 26).astype(np.float32) for store in (ours, theirs))
        np.testing.assert_allclose(one, many, atol=2**-7 * np.abs(many).max())


def test_features_of_another_format_are_refused(prepared, checkpoint, stored):
    with pytest.raises(DataError, match="another encoder or format"):
        semantic_features.main(prepared, str(checkpoint), stored, dtype="bfloat16")


def test_int8_and_its_error(prepared, checkpoint, stored, tmp_path, capsys):
    semantic_features.main(prepared, str(checkpoint), tmp_path, dtype="float32", number="int8")
    reported = float(capsys.readouterr().out.split()[-1])
    (shard,) = records.read_index(prepared)
    small, large = FeatureStore.open(tmp_path, [shard]), FeatureStore.open(stored, [shard])
    one, other = (store.read(shard, 2, 0, 13).astype(np.float32) for store in (small, large))
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
    mel = signal.log_mel(jnp.asarray(whole)[None])
    expected = model_directory.build(loaded[0]).apply(loaded[1], mel)[0]
    assert relative_error(ours, np.asarray(expected)) < 1e-4


def test_features_inside_a_jitted_step_are_those_of_transformers(checkpoint, encoder, clips):
    loaded = semantic.load_encoder(encoder, SemanticConfig(feature_dim=WIDTH))
    batch = np.stack([audio.fit_length(audio.load(clip, 24_000).samples, 72_000) for clip in clips[:2]])
    compute = jax.jit(lambda x, weights: semantic.semantic_features(x, 24_000, (loaded[0], weights)))
    ours = compute(jnp.asarray(batch)[:, None], loaded[1])
    theirs = semantic_features.Encoder(str(checkpoint), "float32")(list(batch))
    for row, expected in zip(ours, theirs, strict=True):
        # The resamplers differ: a windowed sinc in the step, soxr there.
        assert np.linalg.norm(np.asarray(row) - expected) < 0.02 * np.linalg.norm(expected)


def test_features_of_a_batch_without_an_encoder_are_stacked_log_mel(clips):
    sample = audio.load(clips[0], 24_000).samples[:48_000]
    ours = semantic.semantic_features(jnp.asarray(sample)[None, None], 24_000, None)
    theirs = transformers.WhisperFeatureExtractor(feature_size=128)(
        audio.resample(sample, 24_000, 16_000), sampling_rate=16_000, padding=False, return_tensors="np"
    )["input_features"][0]
    assert ours.shape == (1, 25, 1024)
    assert np.abs(np.asarray(ours[0, :, :128]) - theirs[:, ::8].T).mean() < 0.02


CODEC = dataclasses.replace(
    config_files.load(cli.BUNDLED_CLIPS.parents[1] / "configs" / "demo.py").codec, semantic=tiny.OMNICODEC.semantic
)


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
    with pytest.raises(ModelError, match="not the Qwen3-Omni audio encoder"):
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
