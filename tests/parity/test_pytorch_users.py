"""What users do to the PyTorch model beside what its documentation shows: what is refused, and what changes nothing."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_pytorch_model import CONFIGS, STORED, noise, random_codes
from transformers import AutoFeatureExtractor, AutoModel

from omnicodec_jax import model_directory
from omnicodec_jax.converters import from_torch, pytorch_model
from omnicodec_jax.converters.pytorch.feature_extraction_omnicodec import OmniCodecFeatureExtractor

AUDIO = torch.from_numpy(noise(2, 1, 240, scale=0.1))
FEATURES = torch.from_numpy(noise(2, 9, 10, seed=1))
CODES = torch.from_numpy(random_codes(STORED, 2, 20))


@pytest.fixture(scope="module")
def model() -> Any:
    return pytorch_model.build(STORED, tiny.variables(STORED))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("users") / "torch"
    config = CONFIGS["12.5 frames a second"]
    pytorch_model.save(folder, config, tiny.variables(config))
    return folder


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.inference_mode():
        yield


def right(*lengths: int, steps: int = 240) -> torch.Tensor:
    return (torch.arange(steps) < torch.tensor(lengths)[:, None]).long()


# -- What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_values": AUDIO[..., :0]}, r"\[2, 1, 0\]: must be .* not empty"),
        ({"input_values": AUDIO[:, 0]}, r"\[2, 240\]: must be \[batch, 1, samples\]"),
        ({"input_values": (AUDIO * 32767).to(torch.int16)}, "torch.int16: must be floating-point numbers"),
        ({"input_values": AUDIO * np.nan}, "input_values reach nan: must be finite, and of full scale ±1"),
        ({"input_values": AUDIO / 0}, "input_values reach (nan|inf)"),
        ({"input_values": AUDIO * 32767}, r"input_values reach [\d.e+]+: must be finite, and of full scale ±1"),
        ({"semantic_features": FEATURES * np.nan}, "semantic_features hold values that are NaN or infinite"),
        ({"num_quantizers": 0}, "num_quantizers = 0: must be between 1 and 5"),
        ({"padding_mask": right(240, 100).flip(-1)}, "padding_mask: .* padding is on the right"),
        ({"padding_mask": right(240, 0)}, "padding_mask: must have a valid step in every row"),
        ({"padding_mask": right(240, 100, steps=480)}, r"padding_mask of shape \[2, 480\]: must be \[2, 240\]"),
        ({"padding_mask": right(240)}, r"padding_mask of shape \[1, 240\]: must be \[2, 240\]"),
        ({"semantic_features": FEATURES[:1]}, r"\[1, 9, 10\]: must be \[2, vectors, 10\]"),
        ({"semantic_features": FEATURES[..., :8]}, r"\[2, 9, 8\]: must be \[2, vectors, 10\]"),
        ({"semantic_features": FEATURES[0]}, r"\[9, 10\]: must be \[2, vectors, 10\]"),
        ({"semantic_features": FEATURES[:, :0]}, r"\[2, 0, 10\]: must be \[2, vectors, 10\]"),
        ({"semantic_features_mask": right(9, 3, steps=9).flip(-1)}, "semantic_features_mask: .* on the right"),
        ({"semantic_features": FEATURES.repeat(1, 2, 1)}, "18 vectors for 0.80 s in row 0: another clip's"),
        ({"padding_mask": right(240, 100)}, "9 vectors for 0.33 s in row 1: .* needs semantic_features_mask"),
        ({"semantic_features_mask": right(9, 4, steps=9)}, "4 vectors for 0.80 s in row 1"),
    ],
)
def test_what_cannot_be_meant_is_not_encoded(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.encode(**{"input_values": AUDIO, "semantic_features": FEATURES} | arguments)


def test_features_are_refused_where_there_is_no_semantic_branch():
    config = dataclasses.replace(tiny.OMNICODEC, semantic=None, wavlm_dim=None)
    model = pytorch_model.build(config, tiny.variables(config))
    assert model.encode(AUDIO).audio_codes.shape == (2, 4, 20)
    with pytest.raises(ValueError, match="no semantic branch"):
        model.encode(AUDIO, semantic_features=FEATURES)


def test_a_clip_too_short_for_features_is_refused_among_longer_ones(directory):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    with pytest.raises(ValueError, match="a clip of 599 samples: too short"):
        model.encode(torch.zeros(2, 1, 2000), right(2000, 599, steps=2000))
    assert model.encode(torch.zeros(2, 1, 2000), right(2000, 600, steps=2000)).audio_codes.shape == (2, 4, 2)


def replaced(row: int, k: int, step: int, code: int) -> torch.Tensor:
    codes = CODES.clone()
    codes[row, k, step] = code
    return codes


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[0], r"\[5, 20\]: must be \[batch, 1 to 5, frames\]"),
        (CODES[:, :0], r"\[2, 0, 20\]"),
        (CODES[..., :0], r"\[2, 5, 0\]"),
        (CODES.float(), "torch.float32: must be integers"),
        (CODES > 0, "torch.bool: must be integers"),
        (replaced(1, 0, 3, -1), "code -1 of codebook 0: must be between 0 and 15"),
        (replaced(1, 2, 3, -2), "code -2 of codebook 2: must be between -1 and 15"),
        (replaced(0, 4, 19, 16), "code 16 of codebook 4: must be between -1 and 15"),
    ],
)
def test_codes_that_no_encoder_gives_are_not_decoded(model, codes, message):
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


def test_a_cache_of_other_sessions_is_refused(model):
    with pytest.raises(ValueError, match="2 rows of codes, and a cache of 3"):
        model.decode(CODES, decoder_cache=model.empty_decoder_cache(3))


def test_a_model_that_a_device_map_has_spread_is_refused(model):
    spread = copy.deepcopy(model)
    spread.hf_device_map = {"encoder": "cpu", "decoder": "disk"}  # where transformers and accelerate say what is where
    for use in (lambda: spread.decode(CODES), lambda: spread.encode(AUDIO, semantic_features=FEATURES)):
        with pytest.raises(ValueError, match="device_map: the model is on cpu, disk; it must be on one"):
            use()
    spread.hf_device_map = {"": "cpu"}
    assert torch.equal(spread.decode(CODES).audio_values, model.decode(CODES).audio_values)


@pytest.mark.parametrize(
    ("clips", "options", "message"),
    [
        ([], {}, "no samples"),
        (np.zeros(0), {}, "no samples"),
        ([np.ones(5), np.zeros(0)], {}, "no samples"),
        (np.array([0.1, np.nan]), {}, "NaN or infinite"),
        (np.ones((2, 100)), {}, r"a clip of shape \[2, 100\]: must be \[samples\], mono"),
        (np.ones((100, 2)), {}, r"a clip of shape \[100, 2\]: must be \[samples\], mono"),
        ([np.ones((1, 100))], {}, r"a clip of shape \[1, 100\]: must be \[samples\], mono"),
        (np.ones(5, np.uint8), {}, "uint8: must be floating-point numbers, int16 or int32"),
        ([0, 16_384], {}, "int64: must be"),
        (np.ones(5), {"sampling_rate": 16_000}, "24000"),
        ([np.ones(5)], {"semantic_features": [np.ones(3)]}, r"\[3\]: must be \[vectors, width\]"),
    ],
)
def test_clips_that_cannot_be_meant_are_refused(clips, options, message):
    with pytest.raises(ValueError, match=message):
        OmniCodecFeatureExtractor()(clips, **{"sampling_rate": 24_000} | options)


# -- What changes nothing


@pytest.mark.parametrize("valid", [True, 1.0, 255])
@pytest.mark.parametrize("lengths", [(240, 100), (240, 240)])
def test_a_mask_says_with_any_number_but_zero_which_steps_are_valid(model, lengths, valid):
    masks = {"semantic_features_mask": right(9, 9 * lengths[1] // 240, steps=9), "semantic_features": FEATURES}
    expected = model.encode(AUDIO, right(*lengths), **masks).audio_codes
    mask = torch.where(right(*lengths).bool(), torch.tensor(valid), torch.zeros((), dtype=torch.tensor(valid).dtype))
    assert torch.equal(model.encode(AUDIO, mask[:, None], **masks).audio_codes, expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("peak", [0.95, None])
def test_samples_as_they_stand_in_wav_files_are_those_between_minus_and_plus_one(peak, order):
    extract = OmniCodecFeatureExtractor(input_peak=peak)
    samples = np.array([0, 16_384, -32_768], f"{order}i2")
    found = extract(samples, sampling_rate=24_000)["input_values"][0]
    expected = extract([0.0, 0.5, -1.0], sampling_rate=24_000)["input_values"][0]
    np.testing.assert_array_equal(found, expected)


def test_shapes_are_known_without_any_values(directory):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True).to("meta")
    codes = model.encode(torch.zeros(2, 1, 5000, device="meta"), right(5000, 5000, steps=5000).to("meta")).audio_codes
    assert codes.shape == (2, 4, 3)
    assert model.decode(codes).audio_values.shape == (2, 1, 5760)


def test_the_attention_that_it_has_may_be_asked_for(directory):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, attn_implementation="sdpa")
    assert model.encode(torch.zeros(1, 1, 2000)).audio_codes.shape == (1, 4, 2)


def test_autocast_changes_nothing(model):
    codes = model.encode(AUDIO, semantic_features=FEATURES).audio_codes
    audio = model.decode(codes).audio_values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(AUDIO, semantic_features=FEATURES).audio_codes, codes)
        assert torch.equal(model.decode(codes).audio_values, audio)


def test_codes_may_be_of_any_integer_type(model):
    expected = model.decode(CODES).audio_values
    for dtype in (torch.uint8, torch.uint16, torch.int64):
        assert torch.equal(model.decode(CODES.to(dtype)).audio_values, expected)


def test_a_copied_and_a_pickled_model_give_the_same_codes(model):
    expected = model.encode(AUDIO, semantic_features=FEATURES).audio_codes
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same.encode(AUDIO, semantic_features=FEATURES).audio_codes, expected)


def test_what_is_saved_again_is_loaded_again_with_its_code(directory, tmp_path):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    extract = AutoFeatureExtractor.from_pretrained(directory, trust_remote_code=True)
    extract.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    extract_again = AutoFeatureExtractor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    clip = noise(5000, scale=0.1)
    inputs = extract(clip, sampling_rate=24_000, return_tensors="pt")
    assert torch.equal(
        inputs["input_values"], extract_again(clip, sampling_rate=24_000, return_tensors="pt").input_values
    )
    assert torch.equal(again.encode(**inputs).audio_codes, model.encode(**inputs).audio_codes)
    from_torch.main(checkpoint=tmp_path / "again", out=tmp_path / "back")
    config = CONFIGS["12.5 frames a second"]
    found = model_directory.load(tmp_path / "back")
    assert model_directory.model_hash(*found) == model_directory.model_hash(config, tiny.variables(config))
