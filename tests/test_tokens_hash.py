"""Tokens stay valid when only the decoder of their model has learnt more, and are refused when anything else has."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import MIMI, OMNICODEC, variables

from omnicodec_jax import model_directory
from omnicodec_jax.cli.codec import _check_maker, _makers, _tokens_of
from omnicodec_jax.corpus import shards, tokenize
from omnicodec_jax.corpus.detokenize import detokenize
from omnicodec_jax.data.units import Share
from omnicodec_jax.errors import DataError, TokenError
from omnicodec_jax.model_directory import tokens_hash
from omnicodec_jax.token_file import TokenFile
from omnicodec_jax.tokenizer import OmniCodecTokenizer

FIELDS = {"frame_rate": 12.5, "sample_rate": 24_000, "num_samples": 5000, "gain": 1.0}


def with_other(config, module: str) -> dict:
    """The variables of a tiny model, of which one module, or the codebooks of one, have learnt more."""
    given = variables(config)
    kind = "codebooks" if module.endswith("codebooks") else "params"
    name = module.removesuffix(" codebooks")
    return {**given, kind: {**given[kind], name: jax.tree.map(lambda leaf: leaf + 0.25, given[kind][name])}}


@pytest.mark.parametrize("config", [OMNICODEC, MIMI], ids=["omnicodec", "mimi"])
def test_hash_of_tokens_covers_what_makes_them_and_not_the_decoder(config):
    given = variables(config)
    modules = [*given["params"], *(f"{name} codebooks" for name in given["codebooks"])]
    same = {name for name in modules if tokens_hash(config, with_other(config, name)) == tokens_hash(config, given)}
    assert same == given["params"].keys() & {
        *("upsample", "decoder_transformer", "decoder"),
        *("adapter_2", "semantic_decoder", "semantic_out", "wavlm_head"),
    }


@pytest.fixture
def models(demo_model, tmp_path) -> dict[str, Path]:
    """The demo's model, and the same with more learnt by its decoder or its encoder."""
    config, given = model_directory.load(demo_model)
    found = {"first": demo_model}
    for name in ("decoder", "encoder"):
        found[name] = tmp_path / f"other {name}"
        more = jax.tree.map(lambda leaf: leaf + np.float32(0.01), given["params"][name])
        model_directory.save(found[name], config, {**given, "params": {**given["params"], name: more}})
    return found


def test_token_file_of_a_model_is_of_those_with_other_decoders_too(models, tmp_path):
    first, decoder, encoder = (OmniCodecTokenizer.from_pretrained(path) for path in models.values())
    codes = np.zeros((9, 3), np.uint16)
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    TokenFile(codes=codes, model=first.model_hash, tokens_hash=first.tokens_hash, **FIELDS).save(new)
    TokenFile(codes=codes, model=first.model_hash, **FIELDS).save(old)
    assert TokenFile.load(new).tokens_hash == first.tokens_hash
    for path in (new, old):
        assert _tokens_of(first, path, None)[0].codes.shape == (9, 3)
        with pytest.raises(TokenError, match=f"tokens of model {first.model_hash}, but"):
            _tokens_of(encoder, path, None)
    assert _tokens_of(decoder, new, None)[0].codes.shape == (9, 3)
    with pytest.raises(TokenError, match="tokens of model"):  # it says nothing of what has made its tokens alone
        _tokens_of(decoder, old, None)


def test_tokens_are_replaced_by_those_of_a_model_with_another_decoder_and_not_of_one_with_another_encoder(
    models, tmp_path
):
    first, decoder, encoder = (OmniCodecTokenizer.from_pretrained(path) for path in models.values())
    path, codes = tmp_path / "a.safetensors", np.zeros((9, 3), np.uint16)
    TokenFile(codes=codes, model=first.model_hash, tokens_hash=first.tokens_hash, **FIELDS).save(path)
    _check_maker(_makers([path]), decoder)
    with pytest.raises(TokenError, match="holds tokens of model"):
        _check_maker(_makers([path]), encoder)


def test_directory_of_tokens_is_gone_on_with_by_a_model_with_another_decoder(models, tmp_path):
    def job(name: str) -> tokenize.Job:
        return tokenize.Job(sources={}, out=tmp_path / "tokens", model=str(models[name]))

    begun = tokenize.described(job("first"))
    tokenize.keep(job("first"), begun)
    assert tokenize.described(job("decoder")) == begun
    tokenize.check(job("decoder"), tokenize.described(job("decoder")))
    with pytest.raises(DataError, match="model = "):
        tokenize.check(job("encoder"), tokenize.described(job("encoder")))
    settings = tmp_path / "tokens" / shards.STATE / shards.SETTINGS
    older = {name: value for name, value in json.loads(settings.read_text()).items() if name != "tokens_hash"}
    settings.write_text(json.dumps(older))
    tokenize.check(job("first"), tokenize.described(job("first")))
    with pytest.raises(DataError, match="model = "):
        tokenize.check(job("decoder"), tokenize.described(job("decoder")))


def test_shards_of_a_model_are_decoded_by_one_with_another_decoder(models, tmp_path):
    first, decoder, encoder = (OmniCodecTokenizer.from_pretrained(path) for path in models.values())
    contract = tokenize.described(tokenize.Job(sources={}, out=tmp_path / "none", model=str(models["first"])))
    clip = shards.Clip("a.wav", "speech", np.zeros((3, 9), np.uint16), 1.0, 24_000, 5000, "")
    shards.write(shards.shard_path(tmp_path / "tokens", "speech-000000"), [clip], contract)
    marker = shards.marker_path(tmp_path / "tokens", "speech-000000")
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")

    def decoded(codec: OmniCodecTokenizer, out: str) -> list[str]:
        return [done.path.name for done in detokenize(tmp_path / "tokens", tmp_path / out, codec, 1, ".wav", Share())]

    assert decoded(first, "first") == decoded(decoder, "decoder") == ["a.wav"]
    with pytest.raises(TokenError, match=f"tokens of model {first.model_hash}"):
        decoded(encoder, "encoder")
    with pytest.raises(DataError, match="made otherwise"):  # audio depends on the decoder
        decoded(decoder, "first")
