"""Which row of the sharding table each kernel of the real configs gets."""

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from omnicodec_jax import model_directory
from omnicodec_jax.config import MeshConfig, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.distributed import sharding
from omnicodec_jax.language_model.layout import Layout
from omnicodec_jax.language_model.model import LanguageModel
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import WavLMConfig
from omnicodec_jax.pretrained.whisper import WhisperConfig

CONFIGS = Path(__file__).parents[1] / "configs"

ROWS = {
    P("fsdp", "tensor"): (
        *("{transformer}.attention.qkv", "{transformer}.linear_1"),
        *("language_model.layers.attention.query", "language_model.layers.attention.key"),
        *("language_model.layers.attention.value", "language_model.layers.gate_linear_1"),
        "language_model.layers.linear_1",
        *("wavlm.layer_#.attention.query", "wavlm.layer_#.attention.key", "wavlm.layer_#.attention.value"),
        "wavlm.layer_#.feed_forward.linear_1",
        *("encoder.layers.attention.query", "encoder.layers.attention.key", "encoder.layers.attention.value"),
        "encoder.layers.linear_1",
    ),
    P("tensor", "fsdp"): (
        *("{transformer}.attention.out", "{transformer}.linear_2"),
        *("language_model.layers.attention.out", "language_model.layers.linear_2"),
        *("wavlm.layer_#.attention.out", "wavlm.layer_#.feed_forward.linear_2"),
        *("encoder.layers.attention.out", "encoder.layers.linear_2"),
    ),
    P("fsdp", None): (
        *("codec.encoder.stage_#_down", "codec.encoder.stage_#_residual_#.conv_#", "codec.encoder.conv_out"),
        *("codec.decoder.stage_#_up", "codec.decoder.stage_#_residual_#.conv_#", "codec.decoder.conv_in"),
        *("codec.downsample", "codec.adapter_#", "codec.semantic_in", "codec.semantic_out", "codec.wavlm_head"),
        *("codec.acoustic_quantizer.project_in", "codec.acoustic_quantizer.project_out"),
        *("codec.semantic_quantizer.project_in", "codec.semantic_quantizer.project_out"),
        *("discriminators.stft.window_#.conv_#", "discriminators.wavlm.conv_#", "discriminators.wavlm.conv_in"),
        *("discriminators.waveform.period_#.conv_#", "discriminators.waveform.rate_#.conv_#"),
        "discriminators.waveform.window_#.band_#_conv_#",
        "language_model.head",
        *("wavlm.feature_encoder.conv_#", "wavlm.feature_projection", "wavlm.position_conv"),
        *("encoder.front_end.conv_#", "encoder.front_end.out", "encoder.proj_#", "encoder.conv_#"),
    ),
}
TRANSFORMERS = ("encoder_transformer", "decoder_transformer", "semantic_encoder", "semantic_decoder")


def expected() -> dict[str, P]:
    rows: dict[str, P] = {}
    for row, names in ROWS.items():
        for name in names:
            whole = [name.format(transformer=f"codec.{each}.layer_#") for each in TRANSFORMERS]
            rows |= dict.fromkeys(whole, row)
    return rows


@cache
def shapes(config: Any) -> Any:
    """Returns the shapes of a network's parameters."""
    return jax.eval_shape(partial(init_variables, model_directory.build(config)), jax.random.key(0)).get("params", {})


def trees() -> Iterator[dict[str, Any]]:
    """Shapes of all networks of all configs."""
    for file in sorted(CONFIGS.glob("*.py")):
        if file.stem.startswith("language_model"):
            config = config_files.load_as((PerplexityConfig,), file)
            layout = Layout(config.layout, (2048,) * config.num_codebooks)
            model = LanguageModel(config.model, layout.vocabulary)
            ids = np.zeros((1, 1, 1), np.int32)
            yield {"language_model": jax.eval_shape(model.init, jax.random.key(0), ids)["params"]}
        else:
            experiment = config_files.load(file)
            yield {"codec": shapes(experiment.codec), "discriminators": shapes(experiment.discriminators)}
    yield {"wavlm": shapes(WavLMConfig()), "encoder": shapes(Qwen3AuTConfig())}
    yield {"encoder": shapes(WhisperConfig())}


@pytest.fixture(scope="module")
def kernels() -> dict[str, set[P]]:
    """Rows by name, with # for a number, of all kernels that are large enough to be shared out."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    found: dict[str, set[P]] = {}
    for tree in trees():
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if leaf.size >= sharding.MIN_SHARDED_SIZE and name.endswith(".kernel"):
                row = sharding.partition_spec(mesh, name, leaf.shape)[-2:]
                label = re.sub(r"(?<!linear_)\d+", "#", name.removesuffix(".kernel"))
                found.setdefault(label, set()).add(P(*row))
    return found


def test_every_kernel_of_the_real_configs_gets_the_row_that_is_meant_for_it(kernels):
    assert kernels == {name: {row} for name, row in expected().items()}


def test_tensor_splits_the_largest_kernel_of_the_codec(kernels):
    assert kernels["codec.encoder_transformer.layer_#.attention.qkv"] == {P("fsdp", "tensor")}
