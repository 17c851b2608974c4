"""Sizes of the models that the configs describe (spec §6)."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from omnicodec_jax.config import CodecConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables

pytestmark = pytest.mark.quick

CONFIGS = Path(__file__).parents[1] / "configs"
DEAD = 263_168
"""A layer of the reference that is never used, and left out here."""
TRANSFORMER = 25_190_400
COMMON = {
    "encoder_transformer": TRANSFORMER,
    "decoder_transformer": TRANSFORMER,
    "semantic_encoder": TRANSFORMER,
    "semantic_decoder": TRANSFORMER,
    "downsample": 1_048_576,
    "upsample": 2_048,
    "semantic_in": 1_049_088,
    "adapter_1": 262_656,
    "adapter_2": 262_656,
    "semantic_out": 1_050_624,
    "semantic_quantizer": 1_050_112,
    "acoustic_quantizer": 262_144,
    "wavlm_head": 393_984,
}


def load(name: str, **seanet) -> CodecConfig:
    codec = config_files.load(CONFIGS / f"{name}.py").codec
    return dataclasses.replace(codec, seanet=dataclasses.replace(codec.seanet, **seanet))


@cache
def shapes(codec: CodecConfig) -> dict:
    """Returns the shapes of all variables, without making any of them."""
    return jax.eval_shape(lambda: init_variables(OmniCodec(codec), jax.random.key(0)))


def sizes(codec: CodecConfig, collection: str) -> dict[str, int]:
    """Elements of each top-level module."""
    return {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(module))
        for name, module in shapes(codec)[collection].items()
    }


@pytest.mark.parametrize(
    ("name", "blocks", "encoder", "decoder", "total"),
    [
        ("released_12hz", 4, 14_721_536, 16_817_921, 137_946_113 - DEAD),
        ("released_12hz", 2, 13_326_016, 15_422_401, 135_155_073 - DEAD),
        ("released_12hz", 1, 12_628_256, 14_724_641, 133_759_553 - DEAD),
        ("released_6hz", 4, 19_440_128, 21_536_513, 147_383_297 - DEAD),
    ],
)
def test_every_module_has_the_parameters_of_the_reference(name, blocks, encoder, decoder, total):
    counts = sizes(load(name, n_residual_layers=blocks), "params")
    assert counts == COMMON | {"encoder": encoder, "decoder": decoder}
    assert sum(counts.values()) == total


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("released_12hz", 137_946_113 - DEAD),
        ("released_6hz", 147_383_297 - DEAD),
        ("paper_12hz", 133_759_553 - DEAD - COMMON["wavlm_head"]),
        ("demo", 994_089),
    ],
)
def test_recipe_has_as_many_parameters_as_it_says(name, total):
    assert sum(sizes(load(name), "params").values()) == total
    assert f"{total / 1e6:.1f} M parameters" in (CONFIGS / f"{name}.py").read_text()


@pytest.mark.parametrize(("name", "layers"), [("released_12hz", 32), ("paper_12hz", 31)])
def test_codebooks_hold_sums_usage_flag_and_countdown(name, layers):
    semantic, acoustic = 2048 * 1024 + 2048 + 1, layers * (2048 * 256 + 2048 + 1)
    assert (semantic, acoustic) == (2_099_201, {32: 16_842_784, 31: 16_316_447}[layers])
    countdown = {"semantic_quantizer": 1, "acoustic_quantizer": layers}
    assert sizes(load(name), "codebooks") == {
        "semantic_quantizer": semantic + countdown["semantic_quantizer"],
        "acoustic_quantizer": acoustic + countdown["acoustic_quantizer"],
    }
