"""Live streams: they give what the whole clip gives, and depend on no more of the future than they say."""

import dataclasses

import numpy as np
import pytest
import tiny
from test_streaming import codes_of, whole

from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.streaming import StreamingDecoder, StreamingEncoder
from omnicodec_jax.tokenizer import OmniCodecTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return OmniCodecTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def audio(clips) -> np.ndarray:
    """Two rows of 7.03 s."""
    from omnicodec_jax.data import audio as audio_files

    samples = np.concatenate([audio_files.load(clip, 24_000, 0.95).samples for clip in clips])
    return samples[: 2 * 168_777].reshape(2, 1, -1)


# -- Decoding


@pytest.mark.parametrize("name", ["omnicodec", "mimi"])
def test_frame_by_frame_is_the_whole(name):
    config = {"omnicodec": tiny.OMNICODEC, "mimi": tiny.MIMI}[name]
    codes = np.asarray(codes_of(name))
    decode = StreamingDecoder(OmniCodecTokenizer(config, tiny.variables(config)), sessions=len(codes))
    audio = np.concatenate([decode(codes[:, :, n : n + 1]) for n in range(codes.shape[2])], axis=2)
    expected = np.asarray(whole(name, "decode")(codes))
    assert np.abs(audio - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sessions_begin_anew_one_by_one():
    codes = np.asarray(codes_of("omnicodec"))
    tokenizer = OmniCodecTokenizer(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC))
    decode, alone = StreamingDecoder(tokenizer, sessions=3), StreamingDecoder(tokenizer, sessions=3)
    before = [decode(codes[:, :, n : n + 1]) for n in range(5)]
    after = [decode(codes[:, :, n : n + 1], reset=[1] if n == 5 else []) for n in range(5, 9)]
    anew = [alone(codes[:, :, n : n + 1]) for n in range(5, 9)]
    going_on = np.asarray(whole("omnicodec", "decode")(codes))
    hop = before[0].shape[2]
    np.testing.assert_array_equal(np.concatenate(after, axis=2)[1], np.concatenate(anew, axis=2)[1])
    np.testing.assert_allclose(np.concatenate(after, axis=2)[0], going_on[0, :, 5 * hop : 9 * hop], rtol=0, atol=1e-5)


def test_wrong_codes_and_numbers_of_sessions_are_refused(tokenizer):
    decode = StreamingDecoder(tokenizer, sessions=2)
    with pytest.raises(ModelError, match="codes of 1 sessions: this decoder has 2"):
        decode(np.zeros((1, 9, 1), np.int32))
    with pytest.raises(TokenError, match="code 256"):
        decode(np.full((2, 9, 1), 256))


# -- Encoding


def encode(tokenizer, audio: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    """Codes, and how many frames were out after each chunk."""
    stream, position, codes, out = StreamingEncoder(tokenizer, sessions=len(audio)), 0, [], []
    for size in sizes:
        codes.append(stream(audio[:, :, position : position + size]))
        position += size
        out.append(sum(part.shape[2] for part in codes))
    assert position >= audio.shape[2]
    return np.concatenate([*codes, stream.flush()], axis=2), out


def test_chunks_of_any_size_give_the_same_codes(tokenizer, audio):
    at_once, _ = encode(tokenizer, audio, [audio.shape[2]])
    assert at_once.shape == (2, 9, -(-audio.shape[2] // 1920))
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in rng.integers(1, 30_000, 100)]
    in_chunks, _ = encode(tokenizer, audio, sizes[: int(np.searchsorted(np.cumsum(sizes), audio.shape[2])) + 1])
    np.testing.assert_array_equal(in_chunks, at_once)


def test_codes_come_as_soon_as_the_look_ahead_allows(tokenizer, audio):
    look_ahead = StreamingEncoder(tokenizer).look_ahead
    assert look_ahead == 2.08
    _, out = encode(tokenizer, audio, [1920] * 88)
    for chunk, frames in enumerate(out):
        assert frames >= int((chunk + 1) - look_ahead * 12.5 - 1e-6)


@pytest.mark.parametrize("frame", [3, 30, 50])
def test_future_beyond_the_look_ahead_changes_no_code(tokenizer, audio, frame):
    codes, _ = encode(tokenizer, audio, [audio.shape[2]])
    changed = audio.copy()
    beyond = (frame + 1) * 1920 + round(2.08 * 24_000)
    changed[:, :, beyond:] = np.random.default_rng(0).normal(0, 0.3, changed[:, :, beyond:].shape)
    other, _ = encode(tokenizer, changed, [audio.shape[2]])
    np.testing.assert_array_equal(other[:, :, : frame + 1], codes[:, :, : frame + 1])
    assert (other != codes).any()


def test_mostly_the_codes_of_the_whole_clip(tokenizer, audio):
    """Semantic features are of windows, and the range of the first is not that of the clip."""
    streamed, _ = encode(tokenizer, audio, [audio.shape[2]])
    offline = tokenizer.encode(audio, 24_000)
    assert (streamed[:, 0] == offline[:, 0]).mean() > 0.5


def test_without_a_semantic_branch_nothing_waits():
    mimi = OmniCodecTokenizer(tiny.MIMI, tiny.variables(tiny.MIMI))
    audio = np.asarray(tiny.normal(2, 1, 20 * tiny.HOP + 5))
    stream = StreamingEncoder(mimi, sessions=2)
    assert stream.look_ahead == 0
    codes = [stream(audio[:, :, n * tiny.HOP : (n + 1) * tiny.HOP]) for n in range(21)]
    assert [part.shape[2] for part in codes] == [1] * 20 + [0]
    streamed = np.concatenate([*codes, stream.flush()], axis=2)
    np.testing.assert_array_equal(streamed, mimi.encode(audio, mimi.sample_rate))


def test_audio_that_is_refused(tokenizer):
    with pytest.raises(AudioError, match=r"shape \[1, 1, 5\]: must be \[2, 1, T\]"):
        StreamingEncoder(tokenizer, sessions=2)(np.zeros((1, 1, 5)))
    with pytest.raises(AudioError, match="NaN"):
        StreamingEncoder(tokenizer)(np.full((1, 1, 5), np.nan))
    semantic = dataclasses.replace(tokenizer.config.semantic, source="stored")
    stored = OmniCodecTokenizer(dataclasses.replace(tokenizer.config, semantic=semantic), tokenizer.variables)
    with pytest.raises(ModelError, match="needs semantic features"):
        StreamingEncoder(stored)
