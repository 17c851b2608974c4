"""A stream gives what the whole sequence gives, however it is cut."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HOP, MIMI, OMNICODEC, normal, variables

from omnicodec_jax.model_directory import build
from omnicodec_jax.models.conv import CausalConv1d, causal_conv1d
from omnicodec_jax.models.transformer import rotary

FRAMES = 30
"""Far more than the attention looks back: 6 steps, two a frame."""
CONFIGS = {"omnicodec": OMNICODEC, "mimi": MIMI}
BATCH = 3
LENGTHS = (1, 17 * HOP, FRAMES * HOP - 7)


@cache
def whole(name: str, method: str):
    return jax.jit(partial(build(CONFIGS[name]).apply, variables(CONFIGS[name]), method=method))


@cache
def step(name: str, method: str):
    def run(state, *inputs):
        output, after = build(CONFIGS[name]).apply(
            {**variables(CONFIGS[name]), **state}, *inputs, method=method, mutable=["stream"]
        )
        return output, dict(after)

    return jax.jit(run)


def fresh(name: str, method: str, block: tuple) -> dict:
    """The state at the start: zeros."""
    state = jax.eval_shape(step(name, method), {}, *block)[1]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def stream(name: str, method: str, blocks: list[tuple], axis: int) -> np.ndarray:
    """Outputs of one block after the other."""
    state, outputs = fresh(name, method, blocks[0]), []
    for block in blocks:
        output, state = step(name, method)(state, *block)
        outputs.append(np.asarray(output))
    return np.concatenate(outputs, axis=axis)


def cut(total: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Starts and ends of chunks of these sizes, the rest in steps of one."""
    ends, position = [], 0
    for size in [*sizes, *[1] * total]:
        if position + size <= total:
            ends.append((position, position + size))
            position += size
    return ends


chunks = st.lists(st.sampled_from([1, 4]), max_size=16).map(partial(cut, FRAMES))
few = settings(max_examples=10, deadline=None, derandomize=True)


def codes_of(name: str) -> jax.Array:
    sizes = np.array(CONFIGS[name].codebook_sizes)[None, :, None]
    return jnp.asarray(np.random.default_rng(0).integers(0, sizes, (BATCH, sizes.size, FRAMES)), jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
@few
@given(chunks=chunks)
def test_decoding_in_chunks_is_decoding_the_whole(name, chunks):
    codes = codes_of(name)
    expected = np.asarray(whole(name, "decode")(codes))
    streamed = stream(name, "decode", [(codes[:, :, a:b],) for a, b in chunks], axis=2)
    assert np.abs(streamed - expected).max() <= 1e-5 * np.abs(expected).max()


@few
@given(chunks=chunks)
def test_semantic_branch_in_chunks_is_that_of_the_whole(chunks):
    features = normal(BATCH, FRAMES, 10)
    expected = np.asarray(whole("omnicodec", "semantic_hidden")(features))
    streamed = stream("omnicodec", "semantic_hidden", [(features[:, a:b],) for a, b in chunks], axis=1)
    assert np.abs(streamed - expected).max() <= 1e-5 * np.abs(expected).max()


def semantic_codes(name: str) -> jax.Array | None:
    return codes_of(name)[:, :1] if name == "omnicodec" else None


@cache
def codes_alone(name: str, length: int) -> np.ndarray:
    """Codes of every row of clips that end after `length` samples."""
    frames, semantic = -(-length // HOP), semantic_codes(name)
    audio = normal(BATCH, 1, FRAMES * HOP)[:, :, :length]
    return np.asarray(whole(name, "encode_frames")(audio, None if semantic is None else semantic[:, :, :frames]))


@pytest.mark.parametrize("name", CONFIGS)
@few
@given(chunks=chunks, lengths=st.tuples(*[st.sampled_from(LENGTHS)] * BATCH))
def test_ragged_rows_encoded_in_chunks_have_the_codes_of_each_row_alone(name, chunks, lengths):
    ends = jnp.array(lengths)
    audio = normal(BATCH, 1, FRAMES * HOP)
    audio = jnp.where(jnp.arange(FRAMES * HOP)[None, None] < ends[:, None, None], audio, jnp.nan)  # never looked at
    semantic = semantic_codes(name)
    blocks = [
        (
            audio[:, :, a * HOP : b * HOP],
            None if semantic is None else semantic[:, :, a:b],
            jnp.clip(ends - a * HOP, 0, (b - a) * HOP),
        )
        for a, b in chunks
    ]
    codes = stream(name, "encode_frames", blocks, axis=2)
    for row, length in enumerate(lengths):
        alone = codes_alone(name, length)[row]
        np.testing.assert_array_equal(codes[row, :, : alone.shape[1]], alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_batch_at_once_has_the_codes_of_each_row_alone(name):
    audio, semantic = normal(BATCH, 1, FRAMES * HOP), semantic_codes(name)
    codes = np.asarray(whole(name, "encode_frames")(audio, semantic, jnp.array(LENGTHS)))
    for row, length in enumerate(LENGTHS):
        alone = codes_alone(name, length)[row]
        np.testing.assert_array_equal(codes[row, :, : alone.shape[1]], alone)


@pytest.mark.parametrize(("channels", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 1, 4), (3, 2, 1)])
def test_long_block_of_a_convolution_follows_its_past(channels, stride, dilation):
    """It is joined to its past, where it need not be cut into cells as well: a TPU then moves half as much."""
    kernel, x = normal(4, channels, 5), normal(2, 80, channels, seed=1)
    reach = 3 * dilation + 1 - stride
    convolve = jax.jit(partial(causal_conv1d, stride=stride, dilation=dilation))
    expected = convolve(x, kernel, past=None)[:, 40 // stride :]
    past, block = x[:, 40 - reach : 40], x[:, 40:]
    np.testing.assert_allclose(convolve(block, kernel, past=past), expected, rtol=0, atol=1e-5)
    added_in_place = "dynamic_update_slice" in convolve.lower(block, kernel, past=past).as_text()
    assert added_in_place == (stride > 1)


def test_replicating_convolution_starts_a_stream_with_its_first_step():
    module, x = CausalConv1d(2, 4, stride=2, replicate=True), 10 + normal(1, 8, 3)
    params = jax.jit(module.init)(jax.random.key(0), x)
    expected = jax.jit(module.apply)(params, x)
    first, state = jax.jit(partial(module.apply, mutable=["stream"]))(params, x[:, :2])
    rest, _ = jax.jit(partial(module.apply, mutable=["stream"]))({**params, **state}, x[:, 2:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), expected, rtol=1e-5)
    twice_earlier = jnp.concatenate([x[:, :1], x[:, :1], x], axis=1)
    np.testing.assert_allclose(first, jax.jit(module.apply)(params, twice_earlier)[:, 1:2], rtol=1e-5)


def test_row_whose_state_is_zeroed_starts_anew_and_the_others_go_on():
    codes, decode = codes_of("omnicodec"), step("omnicodec", "decode")
    first, second = codes[:, :, :4], codes[:, :, 4:8]
    _, state = decode(fresh("omnicodec", "decode", (first,)), first)
    restarted = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.zeros_like(leaf[1])), state)
    audio = decode(restarted, second)[0]
    going_on = whole("omnicodec", "decode")(codes)[:, :, 4 * HOP : 8 * HOP]
    anew = whole("omnicodec", "decode")(jnp.roll(codes, -4, axis=2))[:, :, : 4 * HOP]
    for row, expected in enumerate((going_on, anew, going_on)):
        np.testing.assert_allclose(audio[row], expected[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("hours", [1, 24, 24 * 365])
def test_attention_is_as_precise_after_hours_of_a_stream_as_in_its_first_second(hours):
    """Queries and keys meet at the same angle, however late in the stream of 25 steps a second."""
    q, k = normal(1, 1, 40, 64), normal(1, 1, 40, 64, seed=1)

    def logits(start: int) -> np.ndarray:
        positions = start + jnp.arange(40)[None]
        q_turned, k_turned = (np.asarray(rotary(x, positions, 10_000.0))[0, 0] for x in (q, k))
        return q_turned @ k_turned.T

    np.testing.assert_allclose(logits(hours * 3600 * 25), logits(0), rtol=0, atol=2e-5)


# -- Causality


@pytest.mark.parametrize("frame", [1, 8, FRAMES - 1])
@pytest.mark.parametrize("name", ["omnicodec", "mimi"])
def test_audio_from_a_frame_on_changes_no_latent_frame_before_it(name, frame):
    audio = normal(1, 1, FRAMES * HOP)
    latent, changed = (
        np.asarray(whole(name, "acoustic_latent")(x)) for x in (audio, audio.at[:, :, frame * HOP :].add(1.0))
    )
    np.testing.assert_array_equal(changed[:, :frame], latent[:, :frame])
    assert (changed[:, frame] != latent[:, frame]).any()


@pytest.mark.parametrize("frame", [1, 8, FRAMES - 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_from_a_frame_on_change_no_sample_before_it(name, frame):
    codes = codes_of(name)
    audio, changed = (
        np.asarray(whole(name, "decode")(x)) for x in (codes, codes.at[:, :, frame:].set(15 - codes[:, :, frame:]))
    )
    np.testing.assert_array_equal(changed[:, :, : frame * HOP], audio[:, :, : frame * HOP])
    assert (changed[:, :, frame * HOP : (frame + 1) * HOP] != audio[:, :, frame * HOP : (frame + 1) * HOP]).any()
