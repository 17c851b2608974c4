import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnicodec_jax import model_directory
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import AudioError, ConfigError, ModelError, TokenError
from omnicodec_jax.tokenizer import OmniCodecTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return OmniCodecTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def audio(clips):
    """Some 70 s: several blocks, the last one ragged."""
    return np.concatenate([audio_files.load(clip, 24_000, 0.95).samples for clip in clips])


def test_properties(tokenizer):
    assert (tokenizer.sample_rate, tokenizer.hop_length, tokenizer.frame_rate) == (24_000, 1920, 12.5)
    assert (tokenizer.num_quantizers, tokenizer.codebook_size, tokenizer.bitrate) == (9, 256, 900)
    assert [tokenizer.num_frames(n) for n in (1, 1919, 1920, 1921)] == [1, 1, 1, 2]


def test_blocks_meet_without_a_seam(tokenizer, audio):
    """The stream of blocks gives what the model gives on the whole clip."""
    clip = audio[: 25 * 24_000 + 777]
    codes = tokenizer.encode(clip[None, None], 24_000)
    model = model_directory.build(tokenizer.config)
    features = tokenizer.extract(clip, 24_000)
    encode = jax.jit(lambda v, a, f: model.apply(v, a, f, method="encode"))
    whole = np.asarray(encode(tokenizer.variables, jnp.asarray(clip)[None, None], jnp.asarray(features)[None]))
    assert codes.shape == whole.shape
    # Equal up to ties: a compiler may round differently for every shape.
    assert (codes != whole).mean() < 1e-3

    decode = jax.jit(lambda v, c: model.apply(v, c, method="decode"))
    decoded, reference = tokenizer.decode(codes), np.asarray(decode(tokenizer.variables, jnp.asarray(codes)))
    assert decoded.shape == reference.shape == (1, 1, codes.shape[2] * 1920)
    assert np.abs(decoded - reference).max() < 1e-5 * np.abs(reference).max()


def test_audio_of_any_length_compiles_no_more_than_three_blocks(tokenizer, audio):
    batchers = tokenizer._lanes.semantic_batcher, tokenizer._lanes.encoder_batcher, tokenizer._lanes.decoder_batcher
    steps = [*(batcher.step for batcher in batchers), tokenizer.extract._log10_mel]
    before = [step._cache_size() for step in steps]  # all tokenizers of this model share them
    for length in (5000, 100_000, 400_000, 700_000):
        codes = tokenizer.encode(audio[None, None, :length], 24_000)
        assert codes.shape == (1, 9, -(-length // 1920))
        tokenizer.decode(codes)
    for step, held in zip(steps, before, strict=True):
        assert step._cache_size() - held <= 3


def test_one_short_clip_after_the_other_is_not_traced_again(tokenizer, monkeypatch):
    codes = np.zeros((1, 9, 6), np.int32)
    first = tokenizer.decode(codes)
    monkeypatch.setattr(jax, "eval_shape", None)
    np.testing.assert_array_equal(tokenizer.decode(codes), first)


@pytest.mark.parametrize(("frames", "computed"), [(150, 150), (149, 120 + 30), (127, 120 + 2 * 6), (25, 30), (2, 6)])
def test_only_the_last_few_frames_are_padded(tokenizer, audio, frames, computed):
    before = tokenizer.use
    tokenizer.encode(audio[None, None, : frames * 1920 - 960], 24_000)
    assert tokenizer.use.frames - before.frames == computed
    assert tokenizer.use.valid - before.valid == pytest.approx(frames - 0.5)


def test_a_row_does_not_depend_on_the_others(tokenizer, audio):
    lengths = [30_001, 245_000, 3000]
    batch = np.stack([np.pad(audio[i * 50_000 :][:n], (0, 245_000 - n)) for i, n in enumerate(lengths)])[:, None]
    codes = tokenizer.encode(batch, 24_000, lengths=lengths)
    for row, length in enumerate(lengths):
        frames = tokenizer.num_frames(length)
        alone = tokenizer.encode(batch[row : row + 1, :, :length], 24_000)
        np.testing.assert_array_equal(codes[row, :, :frames], alone[0])
        assert not codes[row, :, frames:].any()


def test_integers_are_taken_by_their_full_scale(tokenizer, audio):
    integers = np.rint(32_767 * audio[None, None, :9600]).astype(np.int16)
    expected = tokenizer.encode(integers / np.float32(32_768), 24_000)
    np.testing.assert_array_equal(tokenizer.encode(integers, 24_000), expected)
    np.testing.assert_array_equal(tokenizer.encode(integers.astype(np.int32) << 16, 24_000), expected)
    np.testing.assert_array_equal(tokenizer.encode(integers.astype(">i2"), 24_000), expected)
    ((_, codes),) = tokenizer.encode_each([(None, tokenizer.prepare(integers[0, 0]))])
    np.testing.assert_array_equal(codes, expected[0])


def test_given_features_are_used(tokenizer, audio):
    clip = audio[None, None, :48_000]
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 26, 1024)).astype(np.float32)  # 13 a second
    codes = tokenizer.encode(clip, 24_000, semantic_features=features)
    assert (codes[:, 0] != tokenizer.encode(clip, 24_000)[:, 0]).any()


def test_clips_with_and_without_features_of_their_own_are_encoded_together(tokenizer, audio):
    rng, clips = np.random.default_rng(0), {}
    for name in "abcde":
        samples = audio[: int(rng.integers(10_000, 60_000))]
        vectors = round(13 * samples.size / 24_000)
        given = rng.standard_normal((vectors, 1024)).astype(np.float32) if name in "bce" else None
        clips[name] = samples, given
    together = dict(tokenizer.encode_each((name, tokenizer.prepare(*clip)) for name, clip in clips.items()))
    for name, (samples, given) in clips.items():
        features = None if given is None else given[None]
        alone = tokenizer.encode(samples[None, None], 24_000, semantic_features=features)
        np.testing.assert_array_equal(together[name], alone[0])


def test_clips_of_other_numbers_of_codebooks_are_decoded_together(tokenizer):
    rng = np.random.default_rng(0)
    clips = {name: rng.integers(0, 256, (k, n)) for name, k, n in (("a", 9, 5), ("b", 4, 3), ("c", 4, 7), ("d", 9, 2))}
    together = dict(tokenizer.decode_each(clips.items()))
    for name, codes in clips.items():
        np.testing.assert_array_equal(together[name], tokenizer.decode(codes[None])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sample_rate=16_000), "16000 Hz: this model takes 24000 Hz"),
        (dict(audio=np.zeros(100)), r"shape \[100\]"),
        (dict(audio=np.zeros((1, 2, 100))), "mono"),
        (dict(lengths=[0]), "each between 1"),
        (dict(lengths=[1, 2]), "one per row"),
        (dict(audio=np.zeros((1, 1, 100))), "too short"),
        (dict(audio=np.full((1, 1, 24_000), np.nan)), "NaN or infinite"),
        (dict(audio=np.full((1, 1, 24_000), 9000.0)), "out of range: float samples reach 9000, where full scale is 1"),
        (dict(audio=np.zeros((1, 1, 24_000), np.int64)), "type int64: must be float"),
        (dict(semantic_features=np.zeros((1, 5, 7))), r"must be \[S, 1024\]"),
        (dict(semantic_features=np.full((1, 13, 1024), np.nan)), "hold values that are NaN"),
        (dict(semantic_features=np.zeros((1, 40, 1024))), "40 semantic feature vectors for 1.00 s"),
    ],
)
def test_audio_that_is_refused(tokenizer, arguments, message):
    with pytest.raises(AudioError, match=message):
        tokenizer.encode(**{"audio": np.zeros((1, 1, 24_000)), "sample_rate": 24_000} | arguments)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 10, 3), int), "10 codebooks: this model has 9"),
        (np.zeros((9, 3), int), r"integers \[B, k, N\]"),
        (np.zeros((1, 9, 3)), "integers"),
        (np.full((1, 2, 3), 256), "code 256 in codebook 0, frame 0: must be between 0 and 255"),
        (np.full((1, 2, 3), -1), "code -1"),
    ],
)
def test_codes_that_are_refused(tokenizer, codes, message):
    with pytest.raises(TokenError, match=message):
        tokenizer.decode(codes)


@pytest.mark.parametrize("samples", [np.zeros((1, 9600), np.float32), np.zeros(0, np.float32), np.array(0.5)])
def test_a_clip_that_is_not_one_row_of_samples_is_refused(tokenizer, samples):
    with pytest.raises(AudioError, match=r"samples of shape .*: must be \[T\], mono"):
        tokenizer.prepare(samples)


@pytest.mark.parametrize(
    "codes", [np.zeros((9, 0), int), np.zeros((10, 3), int), np.zeros((9, 3)), np.full((9, 3), 256)]
)
def test_codes_of_one_clip_that_are_refused(tokenizer, codes):
    with pytest.raises(TokenError, match=r"must be integers|this model has 9|code 256 in codebook 0"):
        list(tokenizer.decode_each([("clip", codes)]))


def test_a_model_that_needs_features_says_so(tokenizer):
    semantic = dataclasses.replace(tokenizer.config.semantic, source="stored")
    stored = OmniCodecTokenizer(dataclasses.replace(tokenizer.config, semantic=semantic), tokenizer.variables)
    with pytest.raises(AudioError, match="pass semantic_features"):
        stored.encode(np.zeros((1, 1, 24_000)), 24_000)


def test_features_are_refused_where_there_is_no_semantic_branch():
    config = dataclasses.replace(tiny.OMNICODEC, semantic=None, wavlm_dim=None)
    codec = OmniCodecTokenizer(config, tiny.variables(config))
    with pytest.raises(AudioError, match="no semantic branch"):
        codec.encode(np.zeros((1, 1, 24_000)), 24_000, semantic_features=np.zeros((1, 13, 10)))


def test_precision_that_there_is_none_of_is_refused(demo_model):
    """In a process of its own, where types are not checked, as in those of users."""
    code = "import sys, omnicodec_jax\n"
    code += "for option in ('precision', 'encoder_precision'):\n"
    code += "    try: omnicodec_jax.OmniCodecTokenizer.from_pretrained(sys.argv[1], **{option: 'int8'})\n"
    code += "    except omnicodec_jax.errors.ConfigError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", code, demo_model], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"{option} = 'int8': must be one of float32, bfloat16" for option in ("precision", "encoder_precision")
    ], done.stderr


def test_a_model_is_not_saved_in_the_place_of_one_of_another_kind(tokenizer, tmp_path):
    """Such as an encoder in that of the codec that it is for."""
    tokenizer.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ModelError, match="holds a model of the kind omnicodec of this package, which would be lost"):
        model_directory.save(tmp_path, tiny.MIMI, tiny.variables(tiny.MIMI))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    tokenizer.save_pretrained(tmp_path)


def test_saved_and_loaded_is_the_same_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = OmniCodecTokenizer.from_pretrained(tmp_path / "copy")
    assert copy.config == tokenizer.config
    assert copy.model_hash == tokenizer.model_hash
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]


def test_the_hash_tells_models_apart(tokenizer):
    config, variables = tokenizer.config, tokenizer.variables
    other = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, context=49))
    shifted = jax.tree.map(lambda x: x, variables)
    shifted["params"]["decoder"]["conv_out"]["bias"] += 1e-6
    hashes = {
        model_directory.model_hash(*pair) for pair in [(config, variables), (other, variables), (config, shifted)]
    }
    assert len(hashes) == 3


def test_models_that_are_refused(tokenizer, tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        OmniCodecTokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"config.json is missing"):
        OmniCodecTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not to be had from the hub"):
        OmniCodecTokenizer.from_pretrained("someone/some-model")

    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_filters": 2', '"n_filters": 4'))
    with pytest.raises(ModelError, match=r"misshapen: params.encoder.conv_in.kernel is \[7, 1, 2\]"):
        OmniCodecTokenizer.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"n_filters"', '"n_filter"'))
    with pytest.raises(ConfigError, match="unknown field 'n_filter'; did you mean 'n_filters'"):
        OmniCodecTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    config.write_text(model_directory.to_json(tokenizer.config))
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        OmniCodecTokenizer.from_pretrained(tmp_path)


def test_a_hub_model_is_downloaded_at_its_revision(demo_model, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(demo_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    OmniCodecTokenizer.from_pretrained("someone/some-model", revision="v1")
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v1")
