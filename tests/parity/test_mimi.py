"""Mimi against transformers, from a checkpoint that transformers wrote."""

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from golden import ROOT, relative_error
from safetensors.numpy import load_file, save_file

from omnicodec_jax.converters import mimi as convert_mimi
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.model_directory import build
from omnicodec_jax.tokenizer import OmniCodecTokenizer

TINY = {"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TINY |= {"num_key_value_heads": 4, "intermediate_size": 64, "codebook_size": 64, "codebook_dim": 16}
TINY |= {"vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 8, "sliding_window": 10}


class Pair(NamedTuple):
    theirs: transformers.MimiModel
    ours: OmniCodecTokenizer

    def part(self, name: str) -> torch.nn.Module:
        """One of their modules, by the end of its name or by its type."""
        return next(m for n, m in self.theirs.named_modules() if name in (n.split(".")[-1], type(m).__name__))

    def run(self, part: str, x: np.ndarray) -> jax.Array:
        """One of our modules, over [B, T, C]."""

        def call(variables, x):
            return build(self.ours.config).apply(variables, x, method=lambda model, x: getattr(model, part)(x))

        return jax.jit(call)(self.ours.variables, jnp.asarray(x))


def random_mimi(**options) -> transformers.MimiModel:
    """Weights under which no part fades out, and codebooks that are not empty."""
    model = transformers.MimiModel(transformers.MimiConfig(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        normal = torch.randn(tensor.shape, generator=generator)
        if name.endswith("embed_sum"):
            tensor.copy_(0.5 * normal)
        elif name.endswith("cluster_usage"):
            tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=generator))
        elif name.endswith("initialized"):
            tensor.fill_(1)
        elif name.endswith("scale"):
            tensor.copy_(0.3 + 0.05 * normal)
        elif name.endswith("bias"):
            tensor.copy_(0.02 * normal)
        elif name.endswith("layernorm.weight"):
            tensor.copy_(1 + 0.1 * normal)
        elif name.endswith("weight"):
            tensor.copy_(normal / tensor[0].numel() ** 0.5)
    return model


def make_pair(directory, **options) -> Pair:
    theirs = random_mimi(**options)
    theirs.save_pretrained(directory / "theirs")
    convert_mimi.main(checkpoint=directory / "theirs", out=directory / "ours")
    return Pair(theirs, OmniCodecTokenizer.from_pretrained(directory / "ours"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("mimi"), **TINY)


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """A checkpoint as transformers saves it."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny.theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """3.03 s, more steps than the tiny model's attention looks back, and no whole number of frames."""
    samples = audio_files.load(ROOT / "omnicodec_jax/clips/speech_french_patte_pente.flac", 24_000).samples
    assert samples.size % 1920
    return samples[None, None]


@pytest.fixture(scope="module")
def codes(tiny, speech) -> np.ndarray:
    with torch.no_grad():
        return tiny.theirs.encode(torch.from_numpy(speech)).audio_codes.numpy()


def test_codes_are_those_of_transformers(tiny, speech, codes):
    assert len(np.unique(codes)) > 32  # no constant codes
    np.testing.assert_array_equal(tiny.ours.encode(speech, 24_000), codes)


@pytest.mark.parametrize("codebooks", [8, 3, 1])
def test_audio_of_any_prefix_of_the_codebooks_is_that_of_transformers(tiny, codes, codebooks):
    with torch.no_grad():
        theirs = tiny.theirs.decode(torch.from_numpy(codes[:, :codebooks])).audio_values.numpy()
    assert relative_error(tiny.ours.decode(codes[:, :codebooks]), theirs) < 1e-4


@pytest.mark.parametrize(("part", "theirs"), [("encoder", "MimiEncoder"), ("decoder", "MimiDecoder")])
def test_seanet_gives_what_transformers_gives(tiny, speech, part, theirs):
    x = speech if part == "encoder" else np.random.default_rng(0).normal(size=(2, 32, 21)).astype(np.float32)
    with torch.no_grad():
        y = tiny.part(theirs)(torch.from_numpy(x)).numpy()
    ours = tiny.run(part, x.swapaxes(1, 2))
    ours = ours[0] if part == "encoder" else ours  # beside it are the valid lengths
    assert relative_error(ours.swapaxes(1, 2), y) < 1e-4


@pytest.mark.parametrize("part", ["encoder_transformer", "decoder_transformer"])
def test_transformer_gives_what_transformers_gives(tiny, part):
    x = np.random.default_rng(0).normal(size=(2, 35, 32)).astype(np.float32)
    with torch.no_grad():
        y = tiny.part(part)(torch.from_numpy(x))[0].numpy()
    assert relative_error(tiny.run(part, x), y) < 1e-4


@pytest.mark.parametrize(("part", "steps"), [("downsample", 34), ("downsample", 35), ("upsample", 21)])
def test_resampler_gives_what_transformers_gives(tiny, part, steps):
    x = np.random.default_rng(0).normal(size=(2, 32, steps)).astype(np.float32)
    with torch.no_grad():
        y = tiny.part(part)(torch.from_numpy(x)).numpy()
    assert relative_error(tiny.run(part, x.swapaxes(1, 2)).swapaxes(1, 2), y) < 1e-4


@pytest.mark.slow
def test_full_size_model_gives_what_transformers_gives(tmp_path, clips):
    pair = make_pair(tmp_path)
    clip = np.concatenate([audio_files.load(path, 24_000).samples for path in clips[:2]])[: 13 * 24_000 + 7]
    with torch.no_grad():
        codes = pair.theirs.encode(torch.from_numpy(clip[None, None])).audio_codes
        audio = pair.theirs.decode(codes).audio_values.numpy()
    np.testing.assert_array_equal(pair.ours.encode(clip[None, None], 24_000), codes.numpy())
    assert relative_error(pair.ours.decode(codes.numpy()), audio) < 1e-4


# -- Wrong checkpoints


@pytest.fixture
def checkpoint(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "checkpoint")


def test_checkpoint_with_wrong_tensors_is_refused_with_every_key(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["encoder_transformer.layers.0.self_attn.q_proj.weight"], tensors["downsample.conv.weight"]
    tensors["encoder.layers.0.conv.bias"] = np.zeros(5, np.float32)
    tensors["head.weight"] = np.zeros(1, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert_mimi.main(checkpoint=checkpoint, out=tmp_path / "ours")
    for line in (
        "missing: downsample.conv.weight",
        "missing: encoder_transformer.layers.0.self_attn.q",
        "misshapen: encoder.layers.0.conv.bias is [5], the config wants [4]",
        "unexpected: head.weight",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_type", "encodec"), ("pad_mode", "reflect"), ("use_causal_conv", False), ("num_key_value_heads", 2)]
    + [("upsample_groups", 1), ("trim_right_ratio", 0.5), ("vector_quantization_hidden_dimension", 8)],
)
def test_variant_that_mimi_never_had_is_refused_by_name_and_value(checkpoint, tmp_path, name, value):
    config = json.loads((checkpoint / "config.json").read_text()) | {name: value}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=f"{name} = {value!r}"):
        convert_mimi.main(checkpoint=checkpoint, out=tmp_path / "ours")


@pytest.mark.parametrize("content", ["{}", "not json", None])
def test_directory_without_a_mimi_config_is_refused(checkpoint, tmp_path, content):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    with pytest.raises(ConversionError, match=r"config\.json"):
        convert_mimi.main(checkpoint=checkpoint, out=tmp_path / "ours")
