"""Other codecs: tiny random models of each, against what their own packages give."""

import copy
import json
import sys
import types
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_hubert import SIZES as HUBERT

torch = pytest.importorskip("torch", reason="peers run on PyTorch")
transformers = pytest.importorskip("transformers")

from omnicodec_jax.data import audio as files  # noqa: E402
from omnicodec_jax.errors import ModelError  # noqa: E402
from omnicodec_jax.evaluation import peers  # noqa: E402
from omnicodec_jax.evaluation.peers import PeerRequest  # noqa: E402


def _mimi():
    return transformers.MimiModel(
        transformers.MimiConfig(
            hidden_size=32,
            num_filters=4,
            upsampling_ratios=[8, 6, 5, 4],
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_quantizers=4,
            codebook_size=16,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            upsample_groups=32,
        )
    )


def _dac():
    return transformers.DacModel(
        transformers.DacConfig(
            encoder_hidden_size=8,
            decoder_hidden_size=32,
            n_codebooks=4,
            codebook_size=16,
            codebook_dim=4,
            hidden_size=128,
            sampling_rate=24_000,
        )
    )


def _encodec():
    return transformers.EncodecModel(
        transformers.EncodecConfig(
            target_bandwidths=[1.5, 3.0], num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1
        )
    )


def _xcodec():
    from transformers import DacConfig, HubertConfig, XcodecConfig, XcodecModel

    acoustic = DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[8, 5, 4, 2],
        decoder_hidden_size=32,
        upsampling_ratios=[8, 5, 4, 2],
        hidden_size=16,
        codebook_dim=16,
    )
    semantic = HubertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return XcodecModel(
        XcodecConfig(
            target_bandwidths=[0.5, 1, 1.5, 2],
            acoustic_model_config=acoustic,
            semantic_model_config=semantic,
        )
    )


def _wavtokenizer():
    return transformers.WavTokenizerModel(
        transformers.WavTokenizerConfig(
            num_filters=4,
            num_lstm_layers=1,
            hidden_size=16,
            codebook_size=64,
            codebook_dim=16,
            decoder_hidden_size=16,
            decoder_intermediate_size=32,
            decoder_num_layers=1,
            decoder_attention_num_groups=4,
        )
    )


def _semantic_and_acoustic() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "encoder_hidden_size": 1,
        "quantization_dim": 64,
        "quantization_levels": (4, 4, 4),
        "semantic_model_config": transformers.Wav2Vec2BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, layerdrop=0.0
        ),
    }


def _xcodec2():
    return transformers.Xcodec2Model(transformers.Xcodec2Config(**_semantic_and_acoustic()))


def _neucodec():
    return transformers.NeuCodecModel(transformers.NeuCodecConfig(**_semantic_and_acoustic()))


def _higgs():
    acoustic = transformers.DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[8, 5, 4, 2],
        decoder_hidden_size=32,
        upsampling_ratios=[8, 5, 4, 2],
        hidden_size=16,
    )
    semantic = transformers.HubertConfig(**HUBERT, mask_time_prob=0.0)
    config = transformers.HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        sample_rate=16_000,
        codebook_dim=8,
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
    )
    return transformers.HiggsAudioV2TokenizerModel(config)


MODELS = {
    "mimi": _mimi,
    "dac": _dac,
    "encodec": _encodec,
    "xcodec": _xcodec,
    "wavtokenizer": _wavtokenizer,
    "xcodec2": _xcodec2,
    "neucodec": _neucodec,
    "higgs": _higgs,
}
EXTRACTORS = {"xcodec2": "Xcodec2FeatureExtractor", "neucodec": "NeuCodecFeatureExtractor"}
COUNTS = {"mimi": "num_quantizers", "dac": "n_quantizers"}
"""The argument of a model that takes a number of codebooks."""


@pytest.fixture(scope="module", params=list(MODELS))
def peer(request, tmp_path_factory) -> tuple[str, object, object]:
    """Name, transformers' model, and ours around the same weights."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_sum", "embed")):
            buffer.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    if request.param in EXTRACTORS:
        getattr(transformers, EXTRACTORS[request.param])().save_pretrained(folder)
    codec = PeerRequest.parse(f"{request.param}={folder}").load((2, 3))
    return request.param, transformers.AutoModel.from_pretrained(folder).eval(), codec


def test_it_gives_what_transformers_gives(peer):
    name, model, codec = peer
    audio = np.random.default_rng(0).normal(0, 0.1, codec.sample_rate).astype(np.float32)
    outputs = list(codec.reconstruct(audio))
    for system, output in zip(codec.systems, outputs, strict=True):
        count = len(system.codebook_sizes)
        with torch.no_grad():
            given: dict[str, Any] = {"input_values": torch.from_numpy(audio)[None, None]}
            if name in ("encodec", "xcodec", "higgs"):
                given["bandwidth"] = count * system.frame_rate * 10 / 1000
            elif name in COUNTS:
                given[COUNTS[name]] = count
            elif name in EXTRACTORS:
                given = getattr(transformers, EXTRACTORS[name])()(audio, sampling_rate=16_000, return_tensors="pt")
            whole = model(**given)
        expected = whole.audio_values.numpy().reshape(-1)
        if name == "neucodec":  # what comes out has another sample rate
            expected = files.resample(expected, 24_000, 16_000)
        size = min(expected.size, audio.size)
        np.testing.assert_allclose(output.samples[:size], expected[:size], atol=1e-5)
        assert output.samples.size == size
        np.testing.assert_array_equal(output.codes, whole.audio_codes.numpy().reshape(count, -1))
        assert output.bits == pytest.approx(output.codes.size * np.log2(system.codebook_sizes[0]))
        # One second: the frames are as many as the rate says.
        assert abs(output.codes.shape[1] - system.frame_rate) <= 1
    np.testing.assert_array_equal(codec.encode(audio), outputs[-1].codes)
    (last,) = codec.reconstruct(audio, codec.systems[-1:])
    np.testing.assert_array_equal(last.samples, outputs[-1].samples)


def test_its_identity_is_that_of_its_weights(peer, tmp_path):
    name, model, codec = peer
    again = PeerRequest.parse(f"{name}={model.config._name_or_path}").load((2, 3))
    assert again.identity() == codec.identity()
    other = copy.deepcopy(model)  # the tests share the model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path)
    if name in EXTRACTORS:
        getattr(transformers, EXTRACTORS[name])().save_pretrained(tmp_path)
    assert PeerRequest.parse(f"{name}={tmp_path}").load((2, 3)).identity() != codec.identity()


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ModelError, match=f"Mimi: {tmp_path} cannot be loaded"):
        PeerRequest.parse(f"mimi={tmp_path}").load((8,))


@pytest.mark.parametrize(("options", "why"), [({}, "header"), ({"num_filters": "many"}, "num_filters")])
def test_weights_and_configs_that_are_damaged_leave_the_other_systems_their_evaluation(tmp_path, options, why):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mimi", **options}))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=f"Mimi: {tmp_path} cannot be loaded: .*{why}"):
        PeerRequest.parse(f"mimi={tmp_path}").load((8,))


def test_weights_that_a_checkpoint_lacks_are_not_left_random(tmp_path):
    """Such as all of them in the checkpoint of another codec, which transformers takes with a warning."""
    _mimi().save_pretrained(tmp_path / "mimi")
    tensors = load_file(tmp_path / "mimi" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    save_file(kept, tmp_path / "mimi" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"Mimi: {tmp_path}/mimi lacks \d+ weights, decoder\.\S+ for one"):
        PeerRequest.parse(f"mimi={tmp_path}/mimi").load((2,))
    _dac().save_pretrained(tmp_path / "dac")
    with pytest.raises(ModelError, match=rf"Mimi: {tmp_path}/dac"):
        PeerRequest.parse(f"mimi={tmp_path}/dac").load((2,))


def test_a_codec_that_this_transformers_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["transformers"], "Qwen3TTSTokenizerMultiCodebookModel", raising=False)
    with pytest.raises(ModelError, match=r"Qwen3-TTS-12Hz: transformers 5\.\S+ has no Qwen3TTSTokenizerMultiCodebook"):
        PeerRequest.parse(f"qwen3tts={tmp_path}").load((8,))


def test_one_entry_of_the_table_is_all_that_a_new_codec_of_transformers_needs(tmp_path, monkeypatch):
    _mimi().save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "NewCodecModel", transformers.MimiModel, raising=False)
    entry = peers.Peer("New", "NewCodecModel", "new/codec", peers._quantizers, "num_quantizers")
    monkeypatch.setitem(peers.PEERS, "new", entry)
    codec = PeerRequest.parse(f"new={tmp_path}").load((2,))
    (output,) = codec.reconstruct(np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32))
    assert codec.systems[0].name == "New-2L"
    assert output.codes.shape[0] == 2


@pytest.fixture
def auv(tmp_path, monkeypatch):
    """AUV with random weights and few layers, and the file of its checkpoint."""
    package = pytest.importorskip("auv.model", reason="needs auv")
    codec_parts = sys.modules["auv.modules.codec"]
    encoder = codec_parts.ConformerEncoder

    def small(**options: Any) -> Any:
        return encoder(**{**options, "num_layers": 1, "ffn_mult": 1})

    monkeypatch.setattr(codec_parts, "ConformerEncoder", small)
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "load", lambda *_, **__: {})  # so that its own loader makes the parts
    model = package.AUV()
    monkeypatch.setattr(model, "load_state_dict", lambda *_: None)
    model.from_pretrained("")
    monkeypatch.undo()
    monkeypatch.setattr(codec_parts, "ConformerEncoder", small)
    torch.save(model.state_dict(), tmp_path / "auv.pt")
    return model.eval(), tmp_path


def test_auv_gives_what_its_package_gives(auv):
    model, folder = auv
    audio = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    for source in (folder, folder / "auv.pt"):
        codec = PeerRequest.parse(f"auv={source}").load((8,))
        (output,) = codec.reconstruct(audio)
        encoded = model.encode({"sample": torch.from_numpy(audio)[None], "sample_rate": 16_000})
        np.testing.assert_array_equal(output.codes, encoded["tokens"].numpy().reshape(1, -1))
        np.testing.assert_allclose(output.samples, model.decode(encoded["quantized"]).numpy().reshape(-1), atol=1e-5)
        np.testing.assert_array_equal(codec.encode(audio), output.codes)
        assert output.codes.shape == (1, 50)
        assert codec.systems[0].codebook_sizes == (20_480,)


def test_a_checkpoint_that_is_none_of_auv_is_refused(auv, tmp_path):
    (tmp_path / "bad").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "bad" / "auv.pt")
    with pytest.raises(ModelError, match=r"AUV: \S+bad cannot be loaded: "):
        PeerRequest.parse(f"auv={tmp_path / 'bad'}").load((8,))
    for content in ("no checkpoint", ""):
        (tmp_path / "bad" / "auv.pt").write_text(content)
        with pytest.raises(ModelError, match=r"AUV: \S+bad cannot be loaded: "):
            PeerRequest.parse(f"auv={tmp_path / 'bad'}").load((8,))


def test_without_its_package_auv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "auv", types.ModuleType("auv"))
    monkeypatch.delitem(sys.modules, "auv.model", raising=False)
    with pytest.raises(ModelError, match="pip install --no-deps auv einops"):
        PeerRequest.parse("auv=x").load((8,))
