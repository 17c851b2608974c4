"""The language model against transformers' Qwen2."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import relative_error

from omnicodec_jax.config import LanguageModelConfig
from omnicodec_jax.language_model.model import LanguageModel

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

VOCABULARY = 37
SHAPES = {
    "four queries a key, tied": LanguageModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=1,
        intermediate_size=48,
        max_period=1e6,
        tie_embeddings=True,
    ),
    "two queries a key, untied": LanguageModelConfig(
        hidden_size=48, num_layers=3, num_heads=6, num_key_value_heads=3, intermediate_size=64, norm_epsilon=1e-5
    ),
}


def random_qwen2(config: LanguageModelConfig) -> Any:
    """Weights under which no part fades out."""
    theirs = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": config.max_period},
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
    )
    model = transformers.Qwen2ForCausalLM(theirs).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * normal)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * normal)
        else:
            parameter.copy_(1.5 * normal / parameter.shape[-1] ** 0.5)
    return model


def our_params(model: Any, config: LanguageModelConfig) -> dict[str, Any]:
    """Their weights; channels of queries and keys from two halves to neighbouring pairs."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"model.layers.{i}.{name}"] for i in range(config.num_layers)])

    def kernel(name: str) -> np.ndarray:
        return np.swapaxes(stacked(f"{name}.weight"), 1, 2)

    def paired(channels: np.ndarray) -> np.ndarray:
        heads = channels.reshape(*channels.shape[:-1], -1, 2, config.hidden_size // config.num_heads // 2)
        return np.swapaxes(heads, -1, -2).reshape(channels.shape)

    attention = {"out": {"kernel": kernel("self_attn.o_proj")}}
    for ours, theirs, order in (("query", "q", paired), ("key", "k", paired), ("value", "v", np.asarray)):
        name = f"self_attn.{theirs}_proj"
        attention[ours] = {"kernel": order(kernel(name)), "bias": order(stacked(f"{name}.bias"))}
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": {
            "norm_1": {"scale": stacked("input_layernorm.weight")},
            "attention": attention,
            "norm_2": {"scale": stacked("post_attention_layernorm.weight")},
            "gate_linear_1": {"kernel": kernel("mlp.gate_proj")},
            "linear_1": {"kernel": kernel("mlp.up_proj")},
            "linear_2": {"kernel": kernel("mlp.down_proj")},
        },
        "norm": {"scale": weights["model.norm.weight"]},
    }
    return params if config.tie_embeddings else params | {"head": {"kernel": weights["lm_head.weight"].T}}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_are_those_of_qwen2(config):
    theirs, ids = random_qwen2(config), np.random.default_rng(0).integers(VOCABULARY, size=(3, 19))
    params: Any = jax.tree.map(jnp.asarray, our_params(theirs, config))
    shapes = jax.eval_shape(LanguageModel(config, VOCABULARY).init, jax.random.key(0), jnp.asarray(ids)[..., None])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes["params"])

    @jax.jit
    def logits_and_gradient(params):
        def total(params):
            logits: Any = LanguageModel(config, VOCABULARY).apply({"params": params}, jnp.asarray(ids)[..., None])
            return jnp.sum(jax.nn.log_softmax(logits)[..., 0]), logits

        return jax.grad(total, has_aux=True)(params)

    gradient, logits = logits_and_gradient(params)
    theirs.requires_grad_(True)
    expected = theirs(torch.as_tensor(ids)).logits
    torch.log_softmax(expected, -1)[..., 0].sum().backward()
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    assert relative_error(gradient["embedding"], theirs.model.embed_tokens.weight.grad.numpy()) < 1e-4
    last = theirs.model.layers[-1].mlp.gate_proj.weight.grad.numpy().T
    assert relative_error(gradient["layers"]["gate_linear_1"]["kernel"][-1], last) < 1e-4


def test_sums_of_embeddings_are_those_of_several_inputs():
    """A step's ids in any order are the same; with one id a step it is Qwen2."""
    config = next(iter(SHAPES.values()))
    model: Any = LanguageModel(config, VOCABULARY)
    ids = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(2, 7, 3)))
    params: Any = {"params": jax.tree.map(jnp.asarray, our_params(theirs := random_qwen2(config), config))}
    embedded = theirs.model.embed_tokens(torch.as_tensor(np.array(ids))).sum(2)
    expected = theirs(inputs_embeds=embedded).logits
    np.testing.assert_allclose(jax.jit(model.apply)(params, ids), expected.numpy(), atol=1e-4)
