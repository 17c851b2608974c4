"""What callers of the Python API give by mistake: refused by name, never cut, counted or taken for something else."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from omnicodec_jax.codec_lanes import PreparedClip, check_prepared
from omnicodec_jax.data.levels import as_float
from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.given import as_array, rows_of_batch, whole_number, whole_numbers
from omnicodec_jax.streaming import check_sessions
from omnicodec_jax.tokenizer import OmniCodecTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model) -> OmniCodecTokenizer:
    return OmniCodecTokenizer.from_pretrained(demo_model)


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), np.array(3), jnp.array(3), np.array(3, ">i2")])
def test_whole_numbers_of_any_library_count(value):
    number = whole_number(value, "n", AudioError)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize(
    "value", [True, np.True_, jnp.array(True), "3", b"3", None, 2.5, float("nan"), float("inf"), [3], np.array([3]), 3j]
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(TokenError, match=r"^lengths\b.*: must be a whole number$"):
        whole_number(value, "lengths", TokenError)


@pytest.mark.parametrize("values", [5000, None, "50", jnp.array(3)])
def test_what_is_no_list_of_numbers_is_refused_by_name(values):
    with pytest.raises(AudioError, match="lengths = .*: must be a list of whole numbers"):
        whole_numbers(values, "lengths", AudioError)


def test_lengths_are_not_cut():
    audio = np.zeros((2, 1, 100), np.float32)
    assert [row.size for row in rows_of_batch(audio, jnp.array([100, 7]))] == [100, 7]
    assert [row.size for row in rows_of_batch(audio)] == [100, 100]
    with pytest.raises(AudioError, match=r"lengths = 99\.6: must be a whole number"):
        rows_of_batch(audio, [100, 99.6])
    with pytest.raises(AudioError, match="lengths = True"):
        rows_of_batch(audio, [100, True])


def test_marks_are_not_taken_for_numbers_of_sessions():
    torch = pytest.importorskip("torch")
    for marks in ([True, False], np.array([True, False]), jnp.array([True, False]), torch.tensor([True, False])):
        with pytest.raises(ModelError, match="named by their numbers, not marked"):
            check_sessions(marks, 2)
    for numbers in ([1], np.array([1]), jnp.array([1]), torch.tensor([1]), {1}, iter([1, 1])):
        assert check_sessions(numbers, 2) == [1]
    with pytest.raises(ModelError, match="sessions = 1: must be a list"):
        check_sessions(1, 2)


def test_ragged_lists_and_tensors_with_gradients_are_no_arrays():
    torch = pytest.importorskip("torch")
    for value in ([[0.1], [0.1, 0.2]], torch.zeros(3, requires_grad=True)):
        with pytest.raises(AudioError, match="audio: cannot be read as an array: "):
            as_float(value)
    with pytest.raises(TokenError, match="codes: cannot be read as an array"):
        as_array([[1], [1, 2]], "codes", TokenError)


def test_clips_that_are_not_made_ready_are_refused():
    samples = np.full(5000, 0.1, np.float32)
    ready = "a", PreparedClip(samples)
    assert check_prepared(ready)[1] is ready[1]
    for keyed in (("a", samples), samples, PreparedClip(samples), None):
        with pytest.raises(AudioError, match="pairs of a key and a clip that `prepare` has made ready"):
            check_prepared(keyed)


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_tokenizer_goes_to_another_process(tokenizer, copied):
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 1, 5000)).astype(np.float32)
    other = copied(tokenizer)
    assert other.model_hash == tokenizer.model_hash
    np.testing.assert_array_equal(other.encode(sound, 24_000), tokenizer.encode(sound, 24_000))


def test_a_tokenizer_of_no_devices_is_refused(demo_model):
    with pytest.raises(ModelError, match="devices: there must be one or more"):
        OmniCodecTokenizer.from_pretrained(demo_model, devices=[])
