"""Mimi against transformers, from a checkpoint that transformers wrote."""

import dataclasses
import json
import logging
import re
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

from omnicodec_jax.config import (
    CodebookConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
    DomainConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    STFTDiscriminatorConfig,
    TrainConfig,
)
from omnicodec_jax.converters import mimi as convert_mimi
from omnicodec_jax.converters.tensors import ConversionError
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import records
from omnicodec_jax.errors import ModelError
from omnicodec_jax.model_directory import build
from omnicodec_jax.tokenizer import OmniCodecTokenizer
from omnicodec_jax.training import export, loop

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


# -- Back to transformers


def to_transformers(model, out) -> transformers.MimiModel:
    """Converts a model, and loads it without anything missing or unexpected."""
    convert_mimi.main(checkpoint=model, out=out, to_transformers=True)
    theirs, info = transformers.MimiModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


def test_mimi_goes_to_flax_and_back_to_the_last_bit(tiny, tmp_path):
    tiny.ours.save_pretrained(tmp_path / "ours")
    back = to_transformers(tmp_path / "ours", tmp_path / "back")
    expected, found = tiny.theirs.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name in convert_mimi.config_to_transformers(tiny.ours.config):
        if name not in ("architectures", "dtype", "frame_rate", "rope_theta"):
            assert getattr(back.config, name) == getattr(tiny.theirs.config, name), name
    assert back.config.frame_rate == tiny.theirs.config.frame_rate
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "back")
    assert extractor.sampling_rate == 24_000
    convert_mimi.main(checkpoint=tmp_path / "back", out=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()


@pytest.fixture
def prepared(tmp_path, speech):
    """A second of speech as prepared audio, to train on and held out."""
    samples = (32767 * speech[0, 0, : records.SAMPLE_RATE]).astype(np.int16)
    header = records.Header("speech:0", "speech", 0, 24_000, 1.0, samples.size, samples.size)
    folder, lines = tmp_path / "prepared", []
    for split in ("train", "validation"):
        name = f"speech-{split}-000000"
        size = records.write_shard(records.shard_path(folder, name), [records.encode(header, samples)])
        shard = records.Shard(name=name, domain="speech", split=split, digest="0", clips=(samples.size,), bytes=size)
        lines.append(json.dumps(dataclasses.asdict(shard)))
    (folder / records.INDEX).write_text("\n".join(lines))
    (folder / records.SETTINGS).write_text('{"segment_seconds": 30}')
    return folder


def test_mimi_is_fine_tuned_and_given_back_with_the_same_codes(tiny, speech, prepared, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny.ours.save_pretrained(tmp_path / "ours")
    config = Config(
        codec=dataclasses.replace(tiny.ours.config, min_quantizers=2, wavlm_dim=8),
        discriminators=DiscriminatorConfig(
            stft=STFTDiscriminatorConfig(filters=4, windows=(206,)), waveform=None, wavlm=None
        ),
        loss=LossConfig(semantic=0.0, self_guidance=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=3),
        data=DataConfig(
            prepared=str(prepared),
            domains=(DomainConfig(name="speech"),),
            batch_size=2,
            segment_samples=5760,
            num_workers=0,
        ),
        train=TrainConfig(compute_dtype="float32", remat=False, quantizer_bypass=0.5),
        run=RunConfig(start_from=str(tmp_path / "ours"), validation_batches=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        assert loop.run(config, tmp_path / "run") == 0
    assert re.search(r"step 3  held-out clips: .*; by codebooks 1: \S+, 2: \S+, 4: \S+, 8: ", caplog.text)
    export.export_model(tmp_path / "run", tmp_path / "tuned")
    tuned, before = OmniCodecTokenizer.from_pretrained(tmp_path / "tuned"), tiny.ours
    assert "wavlm_head" in tuned.variables["params"]
    for name in ("encoder", "decoder"):
        kernel = tuned.variables["params"][name]["conv_in"]["kernel"]
        assert not np.array_equal(kernel, before.variables["params"][name]["conv_in"]["kernel"])
    theirs = to_transformers(tmp_path / "tuned", tmp_path / "theirs")
    with torch.no_grad():
        codes = theirs.encode(torch.from_numpy(speech)).audio_codes.numpy()
        audio = theirs.decode(torch.from_numpy(codes)).audio_values.numpy()
    np.testing.assert_array_equal(tuned.encode(speech, 24_000), codes)
    assert relative_error(tuned.decode(codes), audio) < 1e-4


def test_what_transformers_has_no_option_for_is_refused(tiny, demo_model, tmp_path):
    for config, message in (
        (dataclasses.replace(tiny.ours.config, input_peak=0.5), "input_peak = 0.5"),
        (dataclasses.replace(tiny.ours.config, codebook=CodebookConfig(epsilon=0.1)), "codebook.epsilon = 0.1"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert_mimi.config_to_transformers(config)
    with pytest.raises(ModelError, match="an omnicodec model, not Mimi"):
        convert_mimi.main(checkpoint=demo_model, out=tmp_path / "none", to_transformers=True)
    assert not (tmp_path / "none").exists()


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
