"""The building blocks against PyTorch's functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from omnicodec_jax import dsp
from omnicodec_jax.config import TransformerConfig
from omnicodec_jax.models.conv import CausalConv1d, CausalConvTranspose1d, Dense
from omnicodec_jax.models.transformer import Transformer


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_apply(module, x: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Random parameters, flattened and in torch, and what the module makes of x [B, C, T] under them."""
    x = jnp.asarray(x.swapaxes(1, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [jnp.asarray(normal(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)])
    flat = {
        ".".join(key.key for key in path[1:]): torch.from_numpy(np.array(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return flat, np.asarray(jax.jit(module.apply)(params, x)).swapaxes(1, 2)


def assert_close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.shape == tuple(theirs.shape)
    assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "dilation", "steps"),
    [(1, 1, 1, 4), (7, 1, 1, 20), (7, 1, 1, 3), (3, 1, 4, 20), (3, 1, 8, 5)]
    + [(8, 4, 1, 20), (8, 4, 1, 21), (8, 4, 1, 23), (10, 5, 1, 3), (4, 2, 1, 1), (4, 2, 1, 9)],
)
def test_convolution_is_torch_convolution_of_the_padded_input(size, stride, dilation, steps, replicate):
    x = normal(2, 3, steps)
    module = CausalConv1d(5, size, stride=stride, dilation=dilation, replicate=replicate)
    params, ours = random_apply(module, x)
    left, right = (size - 1) * dilation + 1 - stride, -steps % stride
    padded = F.pad(torch.from_numpy(x), (left, right), mode="replicate" if replicate else "constant")
    theirs = F.conv1d(padded, params["kernel"].permute(2, 1, 0), params["bias"], stride, dilation=dilation)
    assert theirs.shape[2] == -(-steps // stride)
    assert_close(ours, theirs)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("stride", "steps"), [(2, 7), (5, 4), (8, 1)])
def test_transposed_convolution_is_that_of_torch_cut_on_the_right(stride, steps, depthwise):
    x = normal(2, 6, steps)
    params, ours = random_apply(CausalConvTranspose1d(6 if depthwise else 4, stride, depthwise=depthwise), x)
    kernel = params["kernel"].permute((2, 1, 0) if depthwise else (1, 2, 0))
    full = F.conv_transpose1d(torch.from_numpy(x), kernel, params["bias"], stride, groups=6 if depthwise else 1)
    assert_close(ours, full[:, :, : steps * stride])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("steps", "size"), [(130, 125), (250, 130), (125, 250), (27, 27), (1, 3), (3, 1), (13, 63), (999, 125)]
)
def test_interpolation_is_that_of_torch(steps, size, array):
    x = normal(2, steps, 3)
    theirs = F.interpolate(torch.from_numpy(x).mT, size=size, mode="linear", align_corners=False).mT
    ours = dsp.interpolate(array(x), size)
    assert type(ours) is type(array(x))
    # torch finds the positions in float32, here they are exact
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * steps)


def torch_layer(params: dict[str, torch.Tensor], x: torch.Tensor, heads: int, context: int) -> torch.Tensor:
    """Pre-norm block with interleaved rotary pairs; x [B, T, C]."""
    batch, steps, width = x.shape

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), params[f"{name}.scale"], params[f"{name}.bias"], eps=1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
        turns = torch.exp(1j * torch.arange(steps)[:, None] * frequencies)
        return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns).flatten(-2).float()

    packed = norm("norm_1", x) @ params["attention.qkv.kernel"]
    q, k, v = packed.view(batch, steps, 3, heads, -1).permute(2, 0, 3, 1, 4)
    distance = torch.arange(steps)[:, None] - torch.arange(steps)[None]
    mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, (distance >= 0) & (distance < context))
    mixed = mixed.transpose(1, 2).flatten(2) @ params["attention.out.kernel"]
    x = x + params["layer_scale_1.scale"] * mixed
    hidden = F.gelu(norm("norm_2", x) @ params["linear_1.kernel"])
    return x + params["layer_scale_2.scale"] * (hidden @ params["linear_2.kernel"])


@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_transformer_layer_is_torch_layer_at_any_loudness(scale):
    """Quiet input shows the epsilon of the norms."""
    config = TransformerConfig(num_heads=2, num_layers=1, dim_feedforward=24, context=5)
    x = scale * normal(2, 16, 12)
    params, ours = random_apply(Transformer(config), x)
    params = {name.removeprefix("layer_0."): value for name, value in params.items()}
    assert_close(ours, torch_layer(params, torch.from_numpy(x).mT, 2, 5).mT)


@pytest.mark.parametrize(
    ("ours", "theirs", "channels"),
    [
        (Dense(2000), torch.nn.Linear(24, 2000), 24),
        (CausalConv1d(2000, 7), torch.nn.Conv1d(5, 2000, 7), 5),
        (CausalConvTranspose1d(2000, 3), torch.nn.ConvTranspose1d(4, 2000, 6, stride=3), 4),
        (CausalConvTranspose1d(2000, 2, depthwise=True), torch.nn.ConvTranspose1d(2000, 2000, 4, groups=2000), 2000),
    ],
    ids=["linear", "convolution", "transposed", "depthwise"],
)
def test_initial_distributions_are_those_of_torch(ours, theirs, channels):
    params = jax.jit(ours.init)(jax.random.key(0), jnp.zeros((1, 8, channels)))["params"]
    for mine, other in ((params["kernel"], theirs.weight), (params["bias"], theirs.bias)):
        mine, other = np.asarray(mine).ravel(), other.detach().numpy().ravel()
        assert mine.size == other.size
        assert mine.std() == pytest.approx(other.std(), rel=0.05)
        assert np.abs(mine).max() == pytest.approx(np.abs(other).max(), rel=0.01)
        assert abs(mine.mean()) < 0.06 * mine.std()
