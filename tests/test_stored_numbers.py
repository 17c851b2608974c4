"""What a model's weights are stored as: they take less space, and compute in float32."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omnicodec_jax import model_directory
from omnicodec_jax.errors import ModelError
from omnicodec_jax.pretrained.whisper import WhisperConfig

CONFIG = WhisperConfig(d_model=8, num_heads=2, num_layers=2, dim_feedforward=12)


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)
    shapes = model_directory.expected_tensors(model_directory.build(CONFIG))
    return model_directory.unflatten(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    )


def stored(directory, variables, number) -> tuple[dict, dict]:
    """What the file holds, and what is loaded of it."""
    model_directory.save(directory, CONFIG, variables, number)
    return load_file(directory / model_directory.WEIGHTS), model_directory.flatten(model_directory.load(directory)[1])


@pytest.mark.parametrize(("number", "error"), [("float32", 0), ("float16", 2**-11), ("int8", 1 / 254)])
def test_weights_are_loaded_as_float32_whatever_they_are_stored_as(tmp_path, variables, number, error):
    _, loaded = stored(tmp_path, variables, number)
    for name, value in model_directory.flatten(variables).items():
        assert loaded[name].dtype == np.float32
        assert np.abs(loaded[name] - value).max() <= 1.01 * error * np.abs(value).max()


def test_int8_takes_a_quarter_and_vectors_stay_as_they_are(tmp_path, variables):
    held, loaded = stored(tmp_path, variables, "int8")
    for name, value in model_directory.flatten(variables).items():
        assert held[name].dtype == (np.int8 if value.ndim > 1 else np.float32)
        if value.ndim < 2:
            np.testing.assert_array_equal(loaded[name], value)


def test_a_model_stored_in_less_keeps_its_hash_when_it_is_saved_again(tmp_path, variables):
    for number in ("float16", "int8"):
        model_directory.save(tmp_path / number, CONFIG, variables, number)
        config, loaded = model_directory.load(tmp_path / number)
        hash = model_directory.model_hash(config, loaded)
        for again in (number, "float32"):
            model_directory.save(tmp_path / "again", config, loaded, again)
            assert model_directory.model_hash(*model_directory.load(tmp_path / "again")) == hash
        assert hash != model_directory.model_hash(CONFIG, variables)


def test_weights_that_float16_cannot_hold_are_refused_and_nothing_is_written(tmp_path, variables):
    variables["params"]["conv_1"]["kernel"][0, 0, 0] = 1e5
    with pytest.raises(ModelError, match=r"conv_1\.kernel: holds weights that are too large for float16"):
        model_directory.save(tmp_path / "model", CONFIG, variables, "float16")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("number", ["float32", "float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, variables, number, value):
    model_directory.save(tmp_path / "model", CONFIG, variables, number)
    weights = tmp_path / "model/model.safetensors"
    held = load_file(weights)
    vector = next(name for name, array in held.items() if array.dtype != np.int8)
    save_file({**held, vector: np.full_like(held[vector], value)}, weights)
    with pytest.raises(ModelError, match=f"not finite: {vector.removesuffix(model_directory.SCALE)}"):
        model_directory.load(tmp_path / "model")

    variables["params"]["conv_1"]["kernel"][0, 0, 0] = value
    with pytest.raises(ModelError, match=r"conv_1\.kernel: holds weights that are NaN or infinite"):
        model_directory.save(tmp_path / "other", CONFIG, variables, number)
    assert not (tmp_path / "other").exists()
