"""Gradients of the residual quantizer against PyTorch's autograd on the plain, differentiable formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omnicodec_jax.config import CodebookConfig
from omnicodec_jax.models.quantize import ResidualVectorQuantizer

LAYERS, SIZE, WIDTH, FEATURES = 12, 32, 8, 16


def quantizer(layers: int = LAYERS, bias: bool = False) -> ResidualVectorQuantizer:
    return ResidualVectorQuantizer(layers, SIZE, WIDTH, FEATURES, CodebookConfig(), use_bias=bias)


def random_variables(rng: np.random.Generator, model: ResidualVectorQuantizer) -> dict:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, FEATURES))))
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), jnp.float32), shapes)
    usage = rng.uniform(0.5, 2, variables["codebooks"]["cluster_usage"].shape)
    variables["codebooks"]["cluster_usage"] = jnp.asarray(usage, jnp.float32)
    return variables


def torch_gradients(variables: dict, x: np.ndarray, weight: np.ndarray, active: int) -> dict[str, np.ndarray]:
    """The gradients of sum(weight · output) + 3 · commitment with respect to the input and the projections."""
    leaf = partial(torch.tensor, dtype=torch.float64, requires_grad=True)
    parameters = {
        f"{projection}.{name}": leaf(np.asarray(value))
        for projection, values in variables["params"].items()
        for name, value in values.items()
    }
    inputs = leaf(x)

    def project(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ parameters[f"{name}.kernel"] + parameters.get(f"{name}.bias", 0)

    residual = projected = project("project_in", inputs)
    quantized, penalties = torch.zeros_like(projected), []
    for i in range(active):
        usage = np.asarray(variables["codebooks"]["cluster_usage"][i], np.float64)
        entries = torch.tensor(np.asarray(variables["codebooks"]["embedding_sum"][i], np.float64) / usage[:, None])
        chosen = entries[torch.cdist(residual.detach(), entries[None]).argmin(-1)]
        penalties.append(torch.mean((residual - chosen.detach()) ** 2))
        residual, quantized = residual - chosen.detach(), quantized + chosen
    output = project("project_out", projected + (quantized - projected).detach())
    (torch.sum(torch.tensor(weight) * output) + 3 * torch.stack(penalties).mean()).backward()
    return {"x": inputs.grad.numpy()} | {name: value.grad.numpy() for name, value in parameters.items()}


@pytest.mark.parametrize(("layers", "active", "bias"), [(LAYERS, 8, False), (LAYERS, 12, False), (1, 1, True)])
def test_gradients_pass_straight_through_as_in_pytorch(layers, active, bias):
    rng = np.random.default_rng(0)
    model = quantizer(layers, bias)
    variables = random_variables(rng, model)
    x, weight = (rng.normal(size=(2, 40, FEATURES)).astype(np.float32) for _ in range(2))

    def loss(params, x, active):
        variables_now = {"params": params, "codebooks": variables["codebooks"]}
        output = model.apply(variables_now, x, active)
        return jnp.sum(weight * output.output) + 3 * output.commitment

    params, x_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], jnp.asarray(x), active)
    theirs = torch_gradients(variables, x, weight, active)
    assert np.abs(x_gradient - theirs.pop("x")).max() < 1e-5
    for name, gradient in theirs.items():
        projection, leaf = name.split(".")
        scale = np.abs(gradient).max()
        assert np.abs(params[projection][leaf] - gradient).max() / scale < 1e-5, name


def test_drawing_another_number_of_layers_compiles_nothing_anew():
    model = quantizer()
    variables = random_variables(np.random.default_rng(0), model)
    x, traces = jnp.ones((1, 4, FEATURES)), []

    @jax.jit
    def step(params, active, key):
        traces.append(active)

        def loss(params):
            variables_now = {"params": params, "codebooks": variables["codebooks"]}
            output, _ = model.apply(variables_now, x, active, mutable=["codebooks"], rngs={"codebooks": key})
            return output.commitment, output.codes

        return jax.value_and_grad(loss, has_aux=True)(params)

    for active in (8, 12, 9):
        (_, codes), _ = step(variables["params"], jnp.int32(active), jax.random.key(0))
        assert [int((layer >= 0).all()) for layer in codes[0]] == [1] * active + [0] * (LAYERS - active)
    assert len(traces) == 1
