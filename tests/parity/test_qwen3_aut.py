"""The audio encoder of Qwen3-Omni against transformers, from checkpoints that transformers wrote."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_hub import put_on_hub
from golden import relative_error
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configs
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as models

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.converters import qwen3_aut as convert_qwen3_aut
from omnicodec_jax.converters.tensors import ConversionError, from_entries
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuT, Qwen3AuTConfig, num_tokens

TINY = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
TINY |= {"downsample_hidden_size": 8, "output_dim": 24}
RELEASED = {"output_dim": 2048}

SECONDS = [0.3, 1.0, 7.9, 8.1, 10.0, 37.0]


class Pair(NamedTuple):
    theirs: models.Qwen3OmniMoeAudioEncoder
    ours: Qwen3AuT
    variables: dict

    def expected(self, mel: np.ndarray) -> np.ndarray:
        """What transformers makes of one clip [M, 128]."""
        with torch.no_grad():
            output = self.theirs(torch.from_numpy(mel.T.copy()), feature_lens=torch.tensor([len(mel)]))
        return output.last_hidden_state.numpy()

    def features(self, *arguments: np.ndarray, dtype=jnp.float32) -> np.ndarray:
        return np.asarray(run(self.ours.clone(dtype=dtype), self.variables, *map(jnp.asarray, arguments)))


@partial(jax.jit, static_argnums=0)
def run(model: Qwen3AuT, variables: dict, *arguments: jax.Array) -> jax.Array:
    return model.apply(variables, *arguments)


@torch.no_grad()
def randomize(encoder: models.Qwen3OmniMoeAudioEncoder) -> models.Qwen3OmniMoeAudioEncoder:
    """Weights under which no part fades out: attention that is not flat, and biases that padding would show."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in encoder.named_parameters():
        tensor.normal_(generator=generator)
        if name.endswith("bias"):
            tensor.mul_(0.2)
        elif tensor.ndim == 1:
            tensor.mul_(0.1).add_(1)
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name or "conv2d" in name else 1.0
            tensor.mul_(gain / tensor[0].numel() ** 0.5)
    return encoder.eval()


def random_encoder(**options) -> models.Qwen3OmniMoeAudioEncoder:
    return randomize(models.Qwen3OmniMoeAudioEncoder(configs.Qwen3OmniMoeAudioEncoderConfig(**options)))


def make_pair(encoder: models.Qwen3OmniMoeAudioEncoder) -> Pair:
    config = convert_qwen3_aut.config_from_transformers(encoder.config.to_dict())
    state_dict = {key: value.numpy() for key, value in encoder.state_dict().items()}
    variables = from_entries(state_dict, convert_qwen3_aut.key_table(config), config)
    return Pair(encoder, model_directory.build(config), jax.tree.map(jnp.asarray, variables))


@pytest.fixture(scope="module")
def tiny() -> Pair:
    return make_pair(random_encoder(**TINY))


@pytest.fixture(scope="module")
def mels(clips) -> dict[float, np.ndarray]:
    """Log-mel of 0.3 s to 37 s of the bundled clips, speech first; each begins elsewhere."""
    samples = np.concatenate([audio_files.load(path, 16_000, peak=0.95).samples for path in reversed(clips)])
    starts = [2000 * i for i in range(len(SECONDS))]
    log_mel = jax.jit(dsp.log_mel)
    return {
        seconds: np.asarray(log_mel(jnp.asarray(samples[start : start + round(16_000 * seconds)])))
        for seconds, start in zip(SECONDS, starts, strict=True)
    }


@pytest.fixture(scope="module")
def expected(tiny, mels) -> dict[float, np.ndarray]:
    return {seconds: tiny.expected(mel) for seconds, mel in mels.items()}


# -- Features


@pytest.mark.parametrize("seconds", SECONDS)
def test_features_of_a_clip_are_those_of_transformers(tiny, mels, expected, seconds):
    assert mels[seconds].shape == (round(100 * seconds), 128)
    assert expected[seconds].std(axis=0).min() > 0.1  # no constant features
    assert relative_error(tiny.features(mels[seconds][None])[0], expected[seconds]) < 1e-4


def ragged(clips: list[np.ndarray], frames: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch whose padding would poison whatever looked at it."""
    batch = np.full((len(clips), frames, 128), np.nan, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch, np.array([len(clip) for clip in clips], np.int32)


def test_features_in_a_padded_batch_are_those_of_each_clip_alone(tiny, mels, expected):
    features = tiny.features(*ragged([*mels.values(), np.zeros((0, 128))], 3701))
    assert features.shape == (len(SECONDS) + 1, num_tokens(3701), 24)
    assert np.isfinite(features).all()
    for row, alone in zip(features[:-1], expected.values(), strict=True):
        assert relative_error(row[: len(alone)], alone) < 1e-4


def test_a_tail_of_any_length_is_that_of_transformers(tiny, mels):
    clips = [mels[7.9][:frames] for frames in (1, 8, 9, 50, 97, 99, 101, 107, 108, 150, 197, 200)]
    for row, clip in zip(tiny.features(*ragged(clips, 300)), clips, strict=True):
        assert relative_error(row[: num_tokens(len(clip))], tiny.expected(clip)) < 1e-4, len(clip)


@pytest.mark.parametrize("seconds", [8.1, 37.0])
def test_clip_may_be_cut_into_rows_between_its_windows(tiny, mels, expected, seconds):
    windows = np.split(mels[seconds], range(800, len(mels[seconds]), 800))
    features = tiny.features(*ragged(windows, 800), np.arange(len(windows)) > 0)
    assert relative_error(features.reshape(-1, 24)[: len(expected[seconds])], expected[seconds]) < 1e-4


def test_windows_of_any_number_of_chunks_are_those_of_transformers(mels):
    pair = make_pair(random_encoder(**TINY, n_window_infer=200))
    assert relative_error(pair.features(mels[7.9][None])[0], pair.expected(mels[7.9])) < 1e-4


@pytest.mark.parametrize("parameters", [jnp.float32, jnp.bfloat16])
def test_half_precision_stays_close_to_single(tiny, mels, expected, parameters):
    variables = jax.tree.map(lambda leaf: leaf.astype(parameters), tiny.variables)
    features = tiny._replace(variables=variables).features(mels[8.1][None], dtype=jnp.bfloat16)
    assert features.dtype == np.float32
    assert 1e-4 < relative_error(features[0], expected[8.1]) < 0.05


@pytest.mark.parametrize("array", [int, np.asarray, jnp.asarray])
def test_number_of_features_is_that_of_transformers(array):
    frames = np.arange(2000)
    theirs = models._get_feat_extract_output_lengths(torch.from_numpy(frames)).tolist()
    ours = [num_tokens(int(n)) for n in frames] if array is int else num_tokens(array(frames)).tolist()
    assert ours == theirs


def test_default_config_has_the_parameters_of_the_released_encoder():
    shapes = model_directory.expected_tensors(Qwen3AuT(Qwen3AuTConfig())).values()
    assert sum(map(math.prod, shapes)) == 647_927_168


@pytest.mark.slow
def test_full_size_encoder_gives_what_transformers_gives(mels):
    config = configs.Qwen3OmniMoeAudioEncoderConfig(**RELEASED)
    with torch.device("meta"):
        encoder = models.Qwen3OmniMoeAudioEncoder(config)
    encoder.to_empty(device="cpu")
    positions = encoder.positional_embedding
    positions.positional_embedding.copy_(positions.compute_default_singular_positional_embedding())
    pair = make_pair(randomize(encoder))
    assert pair.ours.config == Qwen3AuTConfig()
    features = pair.features(*ragged([mels[0.3], mels[8.1]], 810))
    for row, mel in zip(features, (mels[0.3], mels[8.1]), strict=True):
        assert relative_error(row[: num_tokens(len(mel))], pair.expected(mel)) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0: must be positive"),
        ({"d_model": 30, "num_heads": 4}, "d_model = 30: must be a multiple of num_heads=4"),
        ({"d_model": 5, "num_heads": 5}, "d_model = 5: must be even"),
    ],
)
def test_impossible_config_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Qwen3AuTConfig(**options)


# -- Checkpoints

ENCODER, THINKER, WHOLE = "encoder", "thinker", "whole"
TEXT = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 200}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """The same encoder, in bfloat16, by itself and as part of a thinker and of all of Qwen3-Omni, in many shards."""
    directory = tmp_path_factory.mktemp("checkpoints")
    thinker = configs.Qwen3OmniMoeThinkerConfig(audio_config=TINY, text_config=TEXT, vision_config=VISION).to_dict()
    whole = configs.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    model = models.Qwen3OmniMoeForConditionalGeneration(whole).to(torch.bfloat16)
    encoder = model.thinker.model.audio_tower
    randomize(encoder)
    encoder.save_pretrained(directory / ENCODER)
    model.thinker.save_pretrained(directory / THINKER, max_shard_size="20KB")
    model.save_pretrained(directory / WHOLE, max_shard_size="20KB")
    return directory


@pytest.fixture
def checkpoints(originals, tmp_path) -> Path:
    return shutil.copytree(originals, tmp_path / "checkpoints")


def shards_with_audio(checkpoint: Path) -> set[str]:
    """By what the shards hold, not by the index."""
    found = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            if any("audio_tower" in key for key in file.keys()):  # noqa: SIM118
                found.add(path.name)
    return found


def edit_config(checkpoint: Path, **values) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("layout", [ENCODER, THINKER, WHOLE])
def test_encoder_comes_out_of_any_checkpoint_bit_for_bit(originals, tmp_path, mels, layout):
    convert_qwen3_aut.main(checkpoint=str(originals / layout), out=tmp_path / "ours")
    config, variables = model_directory.load(tmp_path / "ours")
    theirs = models.Qwen3OmniMoeAudioEncoder.from_pretrained(originals / ENCODER, dtype=torch.float32).eval()
    assert config == convert_qwen3_aut.config_from_transformers(theirs.config.to_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name
    pair = Pair(theirs, model_directory.build(config), jax.tree.map(jnp.asarray, variables))
    jax.tree.map(np.testing.assert_array_equal, pair.variables, make_pair(theirs).variables)
    assert relative_error(pair.features(mels[0.3][None])[0], pair.expected(mels[0.3])) < 1e-4


@pytest.mark.parametrize("layout", [ENCODER, THINKER, WHOLE])
def test_state_dict_is_that_of_the_encoder_in_its_own_type(originals, layout):
    mapping, state_dict = convert_qwen3_aut.load_audio_tower(originals / layout)
    assert mapping["model_type"] == "qwen3_omni_moe_audio_encoder"
    theirs = load_file(originals / ENCODER / "model.safetensors")
    assert state_dict.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(state_dict[key], value, strict=True)


@pytest.mark.parametrize("layout", [THINKER, WHOLE])
def test_no_other_shard_is_opened(checkpoints, layout):
    directory = checkpoints / layout
    needed, every = shards_with_audio(directory), sorted(path.name for path in directory.glob("*.safetensors"))
    garbage, *absent = [name for name in every if name not in needed]
    assert len(needed) > 1
    assert absent
    (directory / garbage).write_bytes(b"no safetensors")
    for name in absent:
        (directory / name).unlink()
    assert len(convert_qwen3_aut.load_audio_tower(directory)[1]) > 40


def test_only_the_needed_files_are_downloaded(originals, tmp_path, monkeypatch):
    source, local = originals / WHOLE, tmp_path / "snapshot"
    put_on_hub(monkeypatch, "Qwen/Qwen3-Omni", source, local)
    _, state_dict = convert_qwen3_aut.load_audio_tower("Qwen/Qwen3-Omni")
    assert len(state_dict) > 40
    expected = {"config.json", "model.safetensors.index.json", *shards_with_audio(source)}
    assert {path.name for path in local.iterdir()} == expected


def test_what_is_neither_here_nor_on_the_hub_is_refused(monkeypatch):
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConversionError, match="Qwen/nothing: no such directory, .* from the hub: no connection$"):
        convert_qwen3_aut.load_audio_tower("Qwen/nothing")


def test_checkpoint_with_wrong_tensors_is_refused_with_every_key(checkpoints, tmp_path):
    path = checkpoints / ENCODER / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.self_attn.q_proj.bias"], tensors["ln_post.weight"]
    tensors["conv2d2.weight"] = np.zeros((8, 8, 3, 5), np.float32)
    tensors["layers.2.fc1.bias"] = np.zeros(1, np.float32)
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=r"4 key\(s\)") as caught:
        convert_qwen3_aut.main(checkpoint=str(checkpoints / ENCODER), out=tmp_path / "ours")
    for line in (
        "missing: layers.1.self_attn.q_proj.bias",
        "missing: ln_post.weight",
        "misshapen: conv2d2.weight is [8, 8, 3, 5], the config wants [8, 8, 3, 3]",
        "unexpected: layers.2.fc1.bias",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("name", "value"), [("activation_function", "relu"), ("n_window", 25)])
def test_variant_that_the_encoder_never_had_is_refused_by_name_and_value(checkpoints, tmp_path, name, value):
    edit_config(checkpoints / ENCODER, **{name: value})
    with pytest.raises(ConversionError, match=f"{name} = {value!r}"):
        convert_qwen3_aut.main(checkpoint=str(checkpoints / ENCODER), out=tmp_path / "ours")


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "not json", None])
def test_directory_without_a_config_of_the_encoder_is_refused(checkpoints, tmp_path, content):
    path = checkpoints / ENCODER / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConversionError, match=r"config\.json"):
        convert_qwen3_aut.main(checkpoint=str(checkpoints / ENCODER), out=tmp_path / "ours")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no safetensors")])
def test_shard_that_is_missing_or_broken_is_named(checkpoints, damage):
    name = min(shards_with_audio(checkpoints / WHOLE))
    damage(checkpoints / WHOLE / name)
    with pytest.raises(ConversionError, match=f"{name}: not a readable safetensors file"):
        convert_qwen3_aut.load_audio_tower(checkpoints / WHOLE)
