"""What a model's hash covers: the weights, and of the config what changes what the model computes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from omnicodec_jax import model_directory
from omnicodec_jax.config import (
    AcousticConfig,
    CodebookConfig,
    CodecConfig,
    DiscriminatorConfig,
    MimiConfig,
    SemanticConfig,
    TransformerConfig,
    identity,
)
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.model_directory import KINDS, Kind, hash_of_0_1, model_hash
from omnicodec_jax.pretrained.wavlm import WavLMConfig

WEIGHTS = {"params": {"w": np.arange(4, dtype=np.float32)}}
MODELS = [
    CodecConfig(),
    CodecConfig(dimension=64, transformer=TransformerConfig(context=50), codebook=CodebookConfig(decay=0.9)),
    CodecConfig(semantic=None, wavlm_dim=None),
    MimiConfig(),
    WavLMConfig(num_layers=2),
    DiscriminatorConfig(stft=None),
]

TRAINING_ONLY = {
    *(f"codebook.{name}" for name in ("decay", "dead_threshold", "check_every", "kmeans_iterations")),
    *("transformer.layer_scale", "acoustic.min_quantizers", "wavlm_dim"),
}


def other(value: Any) -> Any:
    """Another value of the same type, in the range of every field that has such a one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:-1]
    return {"stored": "qwen3_aut"}.get(value) if isinstance(value, str) else value * 2 if value > 1 else value / 2


def variants(config: Any) -> Iterator[tuple[str, Any]]:
    """The config with another value in one field, for each of its fields and those of the configs in it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = variants(value) if dataclasses.is_dataclass(value) else [("", other(value))]
        for name, changed in inner:
            path = f"{field.name}.{name}" if name else field.name
            yield path, dataclasses.replace(config, **{field.name: changed})


def test_hash_is_that_of_what_the_model_computes_and_not_of_how_it_is_trained():
    one = model_hash(CodecConfig(), WEIGHTS)
    hashes = {name: model_hash(config, WEIGHTS) for name, config in variants(CodecConfig())}
    assert {name for name, hash in hashes.items() if hash == one} == TRAINING_ONLY
    different = [hash for name, hash in hashes.items() if name not in TRAINING_ONLY]
    assert len(set(different)) == len(different)


def test_every_weight_is_covered():
    moved = {"params": {"w": WEIGHTS["params"]["w"] + np.float32(1e-6)}}
    assert model_hash(CodecConfig(), moved) != model_hash(CodecConfig(), WEIGHTS)


def test_part_that_is_left_out_differs_from_one_with_all_defaults():
    assert model_hash(CodecConfig(semantic=None, wavlm_dim=None), WEIGHTS) != model_hash(CodecConfig(), WEIGHTS)
    assert model_hash(DiscriminatorConfig(wavlm=None), WEIGHTS) != model_hash(DiscriminatorConfig(), WEIGHTS)


def test_whole_number_for_a_float_is_the_same_model():
    config = CodecConfig(transformer=TransformerConfig(max_period=5000.0))
    given = CodecConfig(transformer=TransformerConfig())
    object.__setattr__(given.transformer, "max_period", 5000)  # which only these tests would refuse
    assert model_hash(given, WEIGHTS) == model_hash(config, WEIGHTS)


# -- The next option


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTransformer(TransformerConfig):
    """A transformer of a later version."""

    window: int | None = None
    """An option that changes what the model computes."""
    dropout: float = dataclasses.field(default=0.0, metadata=identity.TRAINING_ONLY)
    """An option of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextCodec(CodecConfig):
    """A codec of a later version: options of its own, and in a part that it has."""

    bright: bool = False
    transformer: NextTransformer = NextTransformer()
    extra: SemanticConfig | None = None


@pytest.fixture
def later(monkeypatch):
    """The package as of a later version."""
    monkeypatch.setitem(KINDS, "omnicodec", Kind(NextCodec, KINDS["omnicodec"].module))


def test_new_option_with_a_default_changes_no_hash_and_reads_old_files(later, monkeypatch):
    new = {"transformer": NextTransformer(context=50), "dimension": 64, "codebook": CodebookConfig(decay=0.9)}
    now, hashes = NextCodec(**new), (model_hash(NextCodec(**new), WEIGHTS), hash_of_0_1(NextCodec(**new), WEIGHTS))
    monkeypatch.undo()
    config = CodecConfig(**new | {"transformer": TransformerConfig(context=50)})
    text = model_directory.to_json(config)
    assert hashes == (model_hash(config, WEIGHTS), hash_of_0_1(config, WEIGHTS))
    monkeypatch.setitem(KINDS, "omnicodec", Kind(NextCodec, KINDS["omnicodec"].module))
    assert model_directory.from_json(text) == now
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unknown field 'bright'"):
        model_directory.from_json(text.replace('"dimension"', '"bright": true, "dimension"'))


@pytest.mark.parametrize(
    "option",
    [{"bright": True}, {"transformer": NextTransformer(window=8)}, {"extra": SemanticConfig()}],
    ids=["its own", "of a part", "a new part"],
)
def test_new_option_with_another_value_is_another_model_also_for_version_0_1(later, option):
    assert model_hash(NextCodec(**option), WEIGHTS) != model_hash(NextCodec(), WEIGHTS)
    assert hash_of_0_1(NextCodec(**option), WEIGHTS) is None
    old = hash_of_0_1(NextCodec(), WEIGHTS)
    assert model_hash(NextCodec(**option), WEIGHTS, known=old) == model_hash(NextCodec(**option), WEIGHTS)


def test_new_option_of_training_changes_no_hash(later):
    trained = NextCodec(transformer=NextTransformer(dropout=0.1))
    assert model_hash(trained, WEIGHTS) == model_hash(NextCodec(), WEIGHTS)
    assert hash_of_0_1(trained, WEIGHTS) == hash_of_0_1(NextCodec(), WEIGHTS)


def test_kind_of_model_that_version_0_1_did_not_know_has_no_hash_of_it(monkeypatch):
    monkeypatch.setitem(KINDS, "later", Kind(AcousticConfig, KINDS["mimi"].module))
    assert hash_of_0_1(AcousticConfig(), WEIGHTS) is None


@pytest.mark.parametrize("config", MODELS, ids=lambda config: type(config).__name__)
def test_hash_that_version_0_1_gave_is_known_and_no_other(config):
    old, new = hash_of_0_1(config, WEIGHTS), model_hash(config, WEIGHTS)
    assert old != new
    assert model_hash(config, WEIGHTS, known=old) == old
    assert {model_hash(config, WEIGHTS, known=known) for known in (None, new, "0123456789abcdef", "")} == {new}
