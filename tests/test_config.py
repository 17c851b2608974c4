"""Configs: there and back as JSON, from Python files, and refused by field and value."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from flax.traverse_util import flatten_dict

from omnicodec_jax.config import (
    AcousticConfig,
    CodebookConfig,
    CodecConfig,
    Config,
    DataConfig,
    LossConfig,
    MimiConfig,
    OptimizerConfig,
    PerplexityConfig,
    SEANetConfig,
    SemanticConfig,
    TrainConfig,
    TransformerConfig,
)
from omnicodec_jax.config.files import load, load_as, run_config, to_dict
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.model_directory import compute_alike, from_json, to_json

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.py") if "language_model" not in path.stem)
MODELS = {path.stem: load(path).codec for path in RECIPES} | {
    "mimi": MimiConfig(),
    "no semantic branch": CodecConfig(semantic=None, wavlm_dim=None, input_peak=None),
}


ABLATED = {
    "without_semantic_branch": {"codec.semantic", "codec.acoustic", "loss.semantic", "optimizer.weight_decay_modules"},
    "without_self_guidance": {"loss.self_guidance"},
    "without_adapter_1": {"codec.adapter_1"},
    "speech_only": {"data.domains"},
    "fine_tuned": {"data.domains", *(f"optimizer.{n}" for n in ("learning_rate", "warmup_steps", "total_steps"))},
    "log_mel_source": {"codec.semantic"},
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem)
def test_a_config_begins_with_the_first_line_of_its_recipe(path):
    recipe = ROOT / "omnicodec_jax" / "recipes" / path.relative_to(ROOT / "configs")
    assert path.read_text().splitlines()[0].rstrip('"') == recipe.read_text().splitlines()[0].rstrip('"')


def test_ablations_change_what_they_say_and_nothing_else():
    assert len(RECIPES) == 10 + len(ABLATED)
    configs = {path.stem: dataclasses.asdict(load(path)) for path in RECIPES}
    whole = configs["paper_12hz"]
    for name, fields in ABLATED.items():
        changed = {
            f"{part}.{field}"
            for part in whole
            if part != "seed"
            for field in whole[part]
            if configs[name][part][field] != whole[part][field]
        }
        assert changed == fields
    assert MODELS["without_semantic_branch"].num_quantizers == MODELS["paper_12hz"].num_quantizers


@pytest.mark.parametrize("name", MODELS)
def test_config_comes_back_from_json_as_it_was(name):
    assert from_json(to_json(MODELS[name])) == MODELS[name]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_config_is_hashable_and_cannot_be_changed(path):
    config = load(path)
    assert hash(config) == hash(load(path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


# -- Values that cannot be


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (SEANetConfig, "n_filters", 0),
        (SEANetConfig, "n_filters", 7),
        (SEANetConfig, "ratios", ()),
        (SEANetConfig, "ratios", (8, 1)),
        (SEANetConfig, "n_residual_layers", -1),
        (SEANetConfig, "dilation_base", 0),
        (TransformerConfig, "context", 0),
        (TransformerConfig, "max_period", -1.0),
        (SemanticConfig, "codebook_size", 0),
        (AcousticConfig, "min_quantizers", 0),
        (AcousticConfig, "min_quantizers", 33),
        (AcousticConfig, "codebook_dim", -4),
        (CodebookConfig, "decay", 1.0),
        (CodebookConfig, "dead_threshold", 1.0),
        (CodebookConfig, "dead_threshold", -0.1),
        (CodebookConfig, "check_every", 0),
        (CodecConfig, "dimension", 500),
        (CodecConfig, "sample_rate", 0),
        (MimiConfig, "num_quantizers", 1),
        (MimiConfig, "min_quantizers", 32),
        (TrainConfig, "quantizer_bypass", -0.5),
        (LossConfig, "mel", -1.0),
        (LossConfig, "mel", float("inf")),
        (OptimizerConfig, "weight_decay", float("inf")),
        (OptimizerConfig, "betas", (0.5, 1.0)),
        (OptimizerConfig, "learning_rate", float("inf")),
        (OptimizerConfig, "learning_rate", float("nan")),
        (OptimizerConfig, "warmup_steps", 500_000),
        (OptimizerConfig, "accumulation", 0),
        (DataConfig, "batch_size", 0),
        (TrainConfig, "discriminator_from", -1),
        (TrainConfig, "discriminator_learning_rate", 0.0),
        (TrainConfig, "discriminator_learning_rate", float("inf")),
        (TrainConfig, "semantic_dropout", 1.5),
        (TrainConfig, "semantic_dropout_until", -1),
        (TrainConfig, "acoustic_dropout", 1.5),
        (TrainConfig, "latent_cepstrum_until", -1),
        (LossConfig, "latent_cepstrum", -1.0),
        (TrainConfig, "freeze", ("encoder", "quantizer", "decoder")),
        (Config, "seed", -1),
        (PerplexityConfig, "seed", -1),
        (Config, "seed", 2**63),
        (PerplexityConfig, "seed", 2**63),
    ],
)
def test_value_out_of_range_is_refused_by_field_and_value(cls, field, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{field: value})
    assert f"{cls.__name__}.{field} = {value!r}: must be " in str(caught.value)


@pytest.mark.parametrize("tenths", range(11))
def test_two_dropouts_may_add_up_to_all_clips(tenths: int):
    TrainConfig(semantic_dropout=tenths / 10, acoustic_dropout=(10 - tenths) / 10)
    with pytest.raises(ConfigError, match="acoustic_dropout"):
        TrainConfig(semantic_dropout=tenths / 10, acoustic_dropout=(10.1 - tenths) / 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticConfig(source="log_mel"), "SemanticConfig.feature_dim = 2048"),
        (lambda: CodecConfig(semantic=None), "CodecConfig.wavlm_dim = 768"),
        (lambda: Config(codec=CodecConfig(semantic=None, wavlm_dim=None)), "LossConfig.semantic = 1.0"),
        (
            lambda: Config(codec=CodecConfig(wavlm_dim=None), loss=LossConfig(wavlm_distillation=50.0)),
            "LossConfig.wavlm_distillation = 50.0",
        ),
        (
            lambda: Config(data=DataConfig(batch_size=5), optimizer=OptimizerConfig(accumulation=2)),
            "DataConfig.batch_size = 5",
        ),
        (
            lambda: Config(
                codec=CodecConfig(semantic=None, wavlm_dim=None),
                loss=LossConfig(semantic=0.0),
                train=TrainConfig(semantic_dropout=0.5),
            ),
            "TrainConfig.semantic_dropout = 0.5",
        ),
        (
            lambda: Config(
                codec=CodecConfig(semantic=None, wavlm_dim=None),
                loss=LossConfig(semantic=0.0),
                train=TrainConfig(freeze=("decoder", "semantic")),
            ),
            "TrainConfig.freeze = ('decoder', 'semantic'): must be without semantic, which is not there",
        ),
    ],
    ids=[
        *("features of log-mel", "head without branch", "loss without branch", "loss without head", "odd batch"),
        *("dropout without branch", "freezing without branch"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_by_field_and_value(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


# -- JSON


def changed(*path: str, **values) -> str:
    """A config's JSON with values set, or taken out if None, in the object at the path."""
    whole = json.loads(to_json(CodecConfig()))
    place = whole
    for name in path:
        place = place[name]
    for name, value in values.items():
        if value is None:
            del place[name]
        else:
            place[name] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(dimensoin=4), "model/config.json: unknown field 'dimensoin'; did you mean 'dimension'?"),
        (changed("transformer", num_head=4), "transformer: unknown field 'num_head'; did you mean 'num_heads'?"),
        (changed(zzz=4), "unknown field 'zzz'"),
        (changed(dimension="512"), "dimension = '512': must be int"),
        (changed(dimension=512.0), "dimension = 512.0: must be int"),
        (changed(dimension=True), "dimension = True: must be int"),
        (changed(adapter_1=1), "adapter_1 = 1: must be bool"),
        (changed(wavlm_dim="wide"), "wavlm_dim = 'wide': must be int"),
        (changed("seanet", ratios=8), "seanet: ratios = 8: must be"),
        (changed("seanet", ratios=[8, "6"]), "seanet: ratios = '6': must be int"),
        (changed("semantic", source="mel"), "semantic: source = 'mel': must be"),
        (changed(seanet=3), "seanet: 3: must be an object"),
        (changed("codebook", decay=2), "CodebookConfig.decay = 2.0: must be between 0 and 1"),
        (changed(dimension=500), "CodecConfig.dimension = 500: must be a multiple"),
        (changed(format="1"), "format = '1': must be a whole number"),
        (changed(format=0), "format = 0: must be a whole number, 1 or more"),
        (changed(model_type="encodec"), "model_type = 'encodec': must be one of omnicodec, mimi"),
        (changed(model_type=None), "model_type = None: must be one of omnicodec, mimi"),
        ("[1]", "model_type = None"),
        ("{", "not JSON"),
    ],
)
def test_wrong_json_is_refused_with_its_place(text, message):
    with pytest.raises(ConfigError) as caught:
        from_json(text, "model/config.json")
    assert str(caught.value).startswith("model/config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["mimi", "omnicodec"])
def test_any_one_field_that_is_absent_takes_its_default(name):
    config = {"mimi": MimiConfig(), "omnicodec": CodecConfig()}[name]
    whole = json.loads(to_json(config))
    for path in [*flatten_dict(whole), *((name,) for name, value in whole.items() if isinstance(value, dict))]:
        if path != ("model_type",):
            assert from_json(json.dumps(without(whole, path))) == config, path


def without(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    name, *inner = path
    rest = {key: value for key, value in values.items() if key != name}
    return rest | {name: without(values[name], tuple(inner))} if inner else rest


def test_absent_field_takes_its_default_whatever_the_others_are():
    read = from_json(
        '{"model_type": "omnicodec", "transformer": {"num_layers": 3}, "semantic": null, "wavlm_dim": null}'
    )
    assert read == CodecConfig(transformer=TransformerConfig(num_layers=3), semantic=None, wavlm_dim=None)


def test_field_without_a_default_must_be_there():
    with pytest.raises(ConfigError, match=r"^runs/4: data: domains: missing field\(s\) name$"):
        run_config({"data": {"domains": [{"weight": 2.0}]}}, "runs/4")


@pytest.mark.parametrize("betas", [[0.5], [0.5, 0.9, 0.99]])
def test_pair_of_values_is_no_more_and_no_less_than_two(betas: list[float]):
    with pytest.raises(ConfigError, match=r"^runs/4: optimizer: betas = \[.*\]: must be 2 values$"):
        run_config({"optimizer": {"betas": betas}}, "runs/4")


def test_file_of_a_newer_format_is_refused_in_one_line_that_says_what_wrote_it():
    newer = changed(format=2, made_by="omnicodec_jax 0.9.0", dimension="as wide as it goes", brightness=3)
    with pytest.raises(ConfigError) as caught:
        from_json(newer, "model/config.json")
    assert str(caught.value).startswith("model/config.json: in format 2, written by omnicodec_jax 0.9.0; this is ")
    assert "upgrade it (in a checkout: git pull && pip install -e ." in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="written by a later version"):
        from_json('{"format": 2}')


def test_file_says_its_format_and_what_wrote_it():
    whole = json.loads(to_json(CodecConfig()))
    assert whole["format"] == 1
    assert whole["made_by"].startswith("omnicodec_jax ")


def test_whole_numbers_in_json_are_taken_for_floats():
    config = from_json(changed("transformer", max_period=10000))
    assert isinstance(config.transformer.max_period, float)


# -- Python files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from omnicodec_jax.config import Config\nconfig = Config(sead=1)\n", "sead"),
        ("config = (\n", "never closed"),
        ("config = Confg()\n", "Confg"),
        ("import omnicodec_jaxx\n", "omnicodec_jaxx"),
        ("cofnig = 1\n", "defines no `config` of type omnicodec_jax.config.Config; recipes that do: ablations/"),
        ("config = 3\n", "defines no `config` of type omnicodec_jax.config.Config, but one of type int; recipes"),
        (
            "from omnicodec_jax.config import CodebookConfig\nconfig = CodebookConfig(decay=3.0)\n",
            "CodebookConfig.decay = 3.0",
        ),
    ],
)
def test_wrong_config_file_is_refused_by_name_and_reason(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_config_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.py: no such config file"):
        load(tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("released_12Hz", "did you mean released_12hz"),
        ("paper-6hz.py", "did you mean paper_6hz"),
        ("nothing_like_it", "there are ablations/fine_tuned, "),
    ],
)
def test_a_mistyped_recipe_is_answered_with_the_one_that_was_meant(name, hint):
    with pytest.raises(ConfigError, match=f"{name}: no such config file, nor a recipe; {hint}"):
        load(name)


def test_recipes_that_are_named_are_those_of_the_right_kind():
    with pytest.raises(ConfigError) as caught:
        load_as((PerplexityConfig,), "demo")
    assert str(caught.value).endswith(
        "of type omnicodec_jax.config.PerplexityConfig, but one of type Config; recipes that do: language_model, "
        "language_model_demo"
    )
    with pytest.raises(ConfigError, match="there are language_model, language_model_demo$"):
        load_as((PerplexityConfig,), "nothing_like_it")
    with pytest.raises(ConfigError) as caught:
        load("nothing_like_it")
    assert "language_model" not in str(caught.value)


# -- Runs of several codecs


def test_run_of_mimi_comes_back_from_json_as_it_was_and_a_codec_without_a_kind_is_omnicodec():
    config = load("mimi")
    values = json.loads(json.dumps(to_dict(config, "run")))
    assert values["codec"]["model_type"] == "mimi"
    values.pop("model_type"), values.pop("format"), values.pop("made_by")
    assert run_config(values, "here") == config
    ours = json.loads(json.dumps(to_dict(load("demo"), "run")))
    assert "model_type" not in ours["codec"]
    values["codec"]["model_type"] = "encodec"
    with pytest.raises(ConfigError, match="here: codec: model_type = 'encodec': must be one of omnicodec, mimi"):
        run_config(values, "here")


def test_mimi_without_what_it_has_none_of_is_refused_by_field():
    loss = load("mimi").loss
    for name in ("semantic", "self_guidance"):
        with pytest.raises(ConfigError, match=f"LossConfig.{name} = 1.0: must be 0"):
            Config(codec=MimiConfig(wavlm_dim=8), loss=dataclasses.replace(loss, **{name: 1.0}))
    with pytest.raises(ConfigError, match="LossConfig.wavlm_distillation = 1.0"):
        Config(codec=MimiConfig(), loss=loss)


def test_mimi_is_the_same_model_with_a_head_for_training_and_without():
    assert compute_alike(MimiConfig(wavlm_dim=1024, min_quantizers=4), MimiConfig())
    assert not compute_alike(MimiConfig(num_quantizers=8), MimiConfig())
