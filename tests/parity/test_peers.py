"""Peers through transformers: tiny random models of each, against what transformers itself gives."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="peers run on PyTorch")
transformers = pytest.importorskip("transformers")

from omnicodec_jax.errors import ModelError  # noqa: E402
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


MODELS = {"mimi": _mimi, "dac": _dac, "encodec": _encodec, "xcodec": _xcodec}


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
    codec = PeerRequest.parse(f"{request.param}={folder}").load((2, 3))
    return request.param, transformers.AutoModel.from_pretrained(folder).eval(), codec


def test_it_gives_what_transformers_gives(peer):
    name, model, codec = peer
    audio = np.random.default_rng(0).normal(0, 0.1, codec.sample_rate).astype(np.float32)
    outputs = list(codec.reconstruct(audio))
    for system, output in zip(codec.systems, outputs, strict=True):
        count = len(system.codebook_sizes)
        with torch.no_grad():
            x = torch.from_numpy(audio)[None, None]
            if name in ("encodec", "xcodec"):
                given = {"bandwidth": count * system.frame_rate * 10 / 1000}
            else:
                given = {"num_quantizers" if name == "mimi" else "n_quantizers": count}
            whole = model(x, **given)
        np.testing.assert_allclose(output.samples, whole.audio_values.numpy().reshape(-1), atol=1e-5)
        assert output.codes.shape == (count, output.codes.shape[1])
        assert output.bits == pytest.approx(output.codes.size * np.log2(system.codebook_sizes[0]))
        # One second: the frames are as many as the rate says.
        assert abs(output.codes.shape[1] - system.frame_rate) <= 1


def test_its_identity_is_that_of_its_weights(peer, tmp_path):
    name, model, codec = peer
    again = PeerRequest.parse(f"{name}={model.config._name_or_path}").load((2, 3))
    assert again.identity() == codec.identity()
    other = copy.deepcopy(model)  # the tests share the model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path)
    assert PeerRequest.parse(f"{name}={tmp_path}").load((2, 3)).identity() != codec.identity()


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ModelError, match=f"Mimi: {tmp_path} cannot be loaded"):
        PeerRequest.parse(f"mimi={tmp_path}").load((8,))
