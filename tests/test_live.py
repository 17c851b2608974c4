"""Live streams: they give what the whole clip gives, and depend on no more of the future than they say."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_streaming import codes_of, whole

from omnicodec_jax import model_directory
from omnicodec_jax.config import SEANetConfig, SemanticConfig
from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.whisper import WhisperConfig
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
    with pytest.raises(ModelError, match="session 2: there are 2, counted from 0"):
        decode(np.zeros((2, 9, 1), np.int32), reset=[2])


@pytest.mark.parametrize("sessions", [0, -1])
@pytest.mark.parametrize("stream", [StreamingDecoder, StreamingEncoder])
def test_numbers_of_sessions_that_cannot_be_are_refused(tokenizer, stream, sessions):
    with pytest.raises(ModelError, match=f"sessions = {sessions}: must be how many streams there are, 1 or more"):
        stream(tokenizer, sessions=sessions)


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


SAMPLES = 83_003
"""3.46 s: at 6.25 Hz, windows of a second end before frames whose features they complete."""
SMALL = {"transformer": dataclasses.replace(tiny.OMNICODEC.transformer, num_layers=1), "sample_rate": 24_000}
RATIOS = {12.5: (8, 6, 5, 4), 6.25: (12, 8, 5, 4)}
SEMANTIC = {
    "log_mel": SemanticConfig(source="log_mel", feature_dim=1024, codebook_size=16, codebook_dim=12),
    "qwen3_aut": SemanticConfig(source="qwen3_aut", feature_dim=10, codebook_size=16, codebook_dim=12),
    "whisper": SemanticConfig(source="whisper", feature_dim=8, codebook_size=16, codebook_dim=12),
}
CASES = [(source, rate) for source in (*SEMANTIC, "none") for rate in RATIOS]


@cache
def frozen_encoder(source: str):
    """A random one of a few thousand parameters; None for stacked log-mel frames."""
    if source == "log_mel":
        return None
    config = {
        "qwen3_aut": Qwen3AuTConfig(
            conv_channels=4, d_model=16, num_heads=2, num_layers=1, dim_feedforward=16, output_dim=10
        ),
        "whisper": WhisperConfig(d_model=8, num_heads=2, num_layers=1, dim_feedforward=16, window_seconds=2),
    }[source]
    model = model_directory.build(config)
    return config, jax.jit(model.init)(jax.random.key(0), *model.example_inputs())


@cache
def live_tokenizer(source: str, rate: float) -> OmniCodecTokenizer:
    """Makes a small tokenizer of 24 kHz audio with this many frames a second."""
    small = {**SMALL, "seanet": SEANetConfig(n_filters=2, ratios=RATIOS[rate], n_residual_layers=1)}
    if source == "none":
        config = dataclasses.replace(tiny.MIMI, **small)
        return OmniCodecTokenizer(config, tiny.variables(config))
    config = dataclasses.replace(tiny.OMNICODEC, semantic=SEMANTIC[source], **small)
    return OmniCodecTokenizer(config, tiny.variables(config), frozen_encoder(source))


def sound(rows: int, samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes with every tenth of a second."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(10 ** rng.uniform(-3, -0.5, (rows, 1, samples // 2400 + 1)), 2400, axis=2)
    return (loudness[:, :, :samples] * rng.normal(size=(rows, 1, samples))).astype(np.float32)


@cache
def codes_of_the_whole(source: str, rate: float) -> np.ndarray:
    stream = StreamingEncoder(live_tokenizer(source, rate))
    return np.concatenate([stream(sound(1, SAMPLES)), stream.flush()], axis=2)


@pytest.mark.parametrize(("source", "rate"), CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@example(sizes=[24_000] * 4)
@given(sizes=st.lists(st.sampled_from([1, 480, 1920, 3841, 12_000, 23_999, 24_000, 48_000]), max_size=12))
def test_a_code_that_has_gone_out_is_that_of_the_whole_clip(source, rate, sizes):
    stream, audio, codes, position = StreamingEncoder(live_tokenizer(source, rate)), sound(1, SAMPLES), [], 0
    whole = codes_of_the_whole(source, rate)
    assert whole.shape[2] == -(-SAMPLES // live_tokenizer(source, rate).hop_length)
    for size in [*sizes, SAMPLES]:
        codes.append(stream(audio[:, :, position : position + size]))
        position = min(SAMPLES, position + size)
        frames = sum(part.shape[2] for part in codes)
        assert int((position / 24_000 - stream.look_ahead) * rate - 1e-6) <= frames <= position * rate / 24_000
    np.testing.assert_array_equal(np.concatenate([*codes, stream.flush()], axis=2), whole)


@pytest.mark.parametrize("samples", [SAMPLES, 48_000, 48_001, 1000])
def test_live_codes_of_whisper_are_those_of_the_clip_on_disk(samples):
    """Its windows are clips of their own, so that nothing after a window changes its features."""
    tokenizer, audio = live_tokenizer("whisper", 12.5), sound(1, samples)
    audio[:, :, 40_000:] *= 30  # the second window is far louder than the first
    stream = StreamingEncoder(tokenizer)
    live = np.concatenate([stream(audio[:, :, :700]), stream(audio[:, :, 700:]), stream.flush()], axis=2)
    np.testing.assert_array_equal(live, tokenizer.encode(audio, 24_000))


def test_look_ahead_is_a_window_of_the_encoder_and_a_vector():
    assert StreamingEncoder(live_tokenizer("whisper", 12.5)).look_ahead == 2.08


@pytest.mark.parametrize(("source", "rate"), [("qwen3_aut", 6.25), ("none", 12.5)])
def test_a_session_begins_anew_while_the_others_go_on(source, rate):
    """Not at a frame's end, nor at a window's; each session has the codes of its streams alone."""
    tokenizer = live_tokenizer(source, rate)
    audio, change, chunk = sound(2, 5 * 24_000), 61_111, 7000
    alone = StreamingEncoder(tokenizer, sessions=2)  # as many rows, as a compiler rounds differently for others

    def codes_alone(row: int, start: int, end: int) -> np.ndarray:
        part = np.repeat(audio[row : row + 1, :, start:end], 2, axis=0)
        return np.concatenate([alone(part), alone.flush()], axis=2)[row]

    stream, parts = StreamingEncoder(tokenizer, sessions=2), [[], []]

    def take(codes: np.ndarray) -> None:
        for row, out in zip(codes, parts, strict=True):
            assert (np.diff((row[0] >= 0).astype(int)) <= 0).all()  # what is missing is missing at the end
            out.append(row[:, row[0] >= 0])

    for start in range(0, change, chunk):
        take(stream(audio[:, :, start : min(change, start + chunk)]))
    rest = stream.flush([1, 1])
    assert (rest[0] == -1).all()
    take(rest)
    first_stream, parts[1] = parts[1], []
    take(stream(audio[:, :, change : change + chunk]))
    for start in range(change + chunk, audio.shape[2], chunk):
        take(stream(audio[:, :, start : start + chunk]))
    take(stream.flush())
    np.testing.assert_array_equal(np.concatenate(parts[0], axis=1), codes_alone(0, 0, audio.shape[2]))
    np.testing.assert_array_equal(np.concatenate(first_stream, axis=1), codes_alone(1, 0, change))
    np.testing.assert_array_equal(np.concatenate(parts[1], axis=1), codes_alone(1, change, audio.shape[2]))


@pytest.mark.parametrize("marks", [[False, True], [0, 2], [-1]])
def test_sessions_are_named_by_their_numbers(tokenizer, audio, marks):
    """A mark of False would be taken for session 0."""
    with pytest.raises(ModelError, match=r"named by their numbers|session (2|-1): there are 2, counted from 0"):
        StreamingEncoder(tokenizer, sessions=2)(audio[:, :, :1000], reset=marks)


def test_a_stream_of_a_few_samples_is_a_frame(tokenizer, audio):
    stream = StreamingEncoder(tokenizer, sessions=2)
    assert stream(audio[:, :, :5]).shape[2] == 0
    assert stream.flush().shape[2] == 1


def test_a_session_that_is_reset_owes_nothing(tokenizer, audio):
    stream = StreamingEncoder(tokenizer, sessions=2)
    stream(audio[:, :, :70_000])
    codes = stream(audio[:, :, 70_000:150_000], reset=[0])
    alone = StreamingEncoder(tokenizer, sessions=2)(audio[:, :, 70_000:150_000])
    assert codes.shape[2] > alone.shape[2] > 0
    np.testing.assert_array_equal(codes[0, :, : alone.shape[2]], alone[0])
    assert (codes[0, :, alone.shape[2] :] == -1).all()
    assert (codes[1] >= 0).all()


DAY = 86_400
"""Seconds; a whole number of frames, windows and vectors."""


def numbers(x: object) -> int:
    """In all arrays."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(x))


def live_for_twelve_seconds(source: str, rate: float, monkeypatch, skip: int = 0) -> tuple[list[np.ndarray], list]:
    """Codes of each second; numbers held after it, and in what went into its steps. skip: seconds, after the eighth."""
    stream, passed = StreamingEncoder(live_tokenizer(source, rate)), []

    def counting(step):
        def counted(*inputs):
            passed.append(numbers(inputs))
            return step(*inputs)

        return counted

    for name in ("_semantic_stream", "_encoder_stream"):
        monkeypatch.setattr(stream, name, counting(getattr(stream, name)))
    audio, codes, counts = sound(1, 12 * 24_000), [], []
    for second in range(12):
        if second == 8:
            (session,) = stream._sessions
            session.start += skip * 24_000
            session.windowed += skip * 24_000
            session.frames += round(skip * rate)
            session.first += round(skip * (13 if source == "qwen3_aut" else 12.5))
        passed.clear()
        codes.append(stream(audio[:, :, second * 24_000 : (second + 1) * 24_000]))
        counts.append((numbers(vars(stream._sessions[0])), sum(passed), len(passed)))
    return codes, counts


@pytest.mark.parametrize(("source", "rate"), CASES)
def test_a_session_of_a_day_holds_and_takes_what_one_of_four_seconds_does(source, rate, monkeypatch):
    codes, counts = live_for_twelve_seconds(source, rate, monkeypatch)
    assert counts[4:8] == counts[8:]  # frames, windows and seconds fall together every four seconds
    day_later, day_counts = live_for_twelve_seconds(source, rate, monkeypatch, skip=DAY)
    assert day_counts == counts
    for one, other in zip(codes, day_later, strict=True):
        np.testing.assert_array_equal(one, other)


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
    with pytest.raises(ModelError, match="session -1: there are 1"):
        StreamingEncoder(tokenizer)(np.zeros((1, 1, 5)), reset=[-1])
    with pytest.raises(ModelError, match="session 1: there are 1"):
        StreamingEncoder(tokenizer).flush([1])
    semantic = dataclasses.replace(tokenizer.config.semantic, source="stored")
    stored = OmniCodecTokenizer(dataclasses.replace(tokenizer.config, semantic=semantic), tokenizer.variables)
    with pytest.raises(ModelError, match="needs semantic features"):
        StreamingEncoder(stored)
