"""Three consecutive training steps of the reference: every loss, every gradient norm. Minutes to compile: slow."""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import needs_golden
from test_discriminators import GOLDEN, golden_variables
from test_wavlm import golden_wavlm

from omnicodec_jax.config import Config, OptimizerConfig, TrainConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.converters import discriminators as convert_discriminators
from omnicodec_jax.converters import reference
from omnicodec_jax.training import state as states
from omnicodec_jax.training import step as steps
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.packing import unpack

TERMS = {
    "self_guidance": "self_guidance",
    "wavlm_distillation": "wavlm_distill",
    "semantic": "semantic",
    "commitment_acoustic": "commit_acoustic",
    "commitment_semantic": "commit_semantic",
    "mel": "msspec",
    "adversarial_stft": "stft_gen",
    "adversarial_waveform": "dacd_gen",
    "adversarial_wavlm": "wavlm_gen",
    "feature_matching_stft": "stft_fm",
    "feature_matching_waveform": "dacd_fm",
    "feature_matching_wavlm": "wavlm_fm",
    "discriminator_stft": "stft_disc",
    "discriminator_waveform": "dacd_disc",
    "discriminator_wavlm": "wavlm_disc",
    "total": "total",
}
L1_BIAS = "proj_se_q_gt.bias"
WEIGHTED = {"mel": 15, "wavlm_distillation": 50, "feature_matching_stft": 2}
"""What the reference's numbers hold already."""

pytestmark = [needs_golden, pytest.mark.slow]


class Run(NamedTuple):
    metrics: list[dict[str, Any]]
    generator: list[dict[str, np.ndarray]]
    """Gradients, under the reference's names and in its shapes."""
    discriminators: list[dict[str, np.ndarray]]
    state: states.TrainState


def golden_config() -> Config:
    data = golden.load()
    released = config_files.load(golden.ROOT / "configs" / "released_12hz.py")
    return dataclasses.replace(
        released,
        codec=dataclasses.replace(data.config, codebook=dataclasses.replace(data.config.codebook, dead_threshold=0.0)),
        discriminators=GOLDEN,
        optimizer=OptimizerConfig(
            weight_decay_modules=released.optimizer.weight_decay_modules, warmup_steps=0, total_steps=10**9
        ),
        train=TrainConfig(compute_dtype="float32", remat=False),
    )


def keeping_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with the last gradient in its state."""

    def update(gradient, state, params):
        updates, inner = optimizer.update(gradient, state[0], params)
        return updates, (inner, gradient)

    return optax.GradientTransformation(lambda params: (optimizer.init(params), params), update)


def drawn_by_the_reference(key: jax.Array, config: Any) -> jax.Array:
    """What its generator drew in the step that the key belongs to."""
    root = jax.random.key(golden_config().seed)
    keys = [jax.random.split(jax.random.fold_in(jax.random.fold_in(root, step), 0))[0] for step in range(3)]
    same = jnp.stack([jnp.all(jax.random.key_data(key) == jax.random.key_data(own)) for own in keys])
    return jnp.asarray([int(step["n_q"]) for step in golden.load().steps])[jnp.argmax(same)]


@cache
def run() -> Run:
    data, config = golden.load(), golden_config()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("generator_optimizer", "discriminator_optimizer"):
            kept = keeping_gradients(getattr(states, name)(config))
            patch.setattr(states, name, lambda config, kept=kept: kept)
            patch.setattr(steps, name, lambda config, kept=kept: kept)
        patch.setattr("omnicodec_jax.training.gan.draw_num_quantizers", drawn_by_the_reference)
        wavlm_config, wavlm = golden_wavlm()
        state = states.start_state(config, data.variables(), golden_variables()["params"])
        audio, features = data.inputs()
        step = jax.jit(partial(steps.train_step, gan=Gan(config, wavlm=wavlm_config)))
        result = Run([], [], [], state)
        for _ in range(3):
            state, metrics = step(state, {"audio": audio, "features": features}, FrozenVariables(wavlm=wavlm))
            gradient = {"params": unpack(state.generator_optimizer[1], state.params), "codebooks": state.codebooks}
            result.metrics.append(jax.tree.map(np.asarray, metrics))
            result.generator.append(reference.to_state_dict(gradient, config.codec))
            gradient = {"params": unpack(state.discriminator_optimizer[1], state.discriminators)}
            result.discriminators.append(convert_discriminators.to_state_dict(gradient, GOLDEN))
    return result._replace(state=state)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("ours", TERMS)
def test_loss_terms(ours, number):
    expected = golden.load().steps[number][TERMS[ours]] / WEIGHTED.get(ours, 1)
    assert float(run().metrics[number][ours]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("network", "name"), [("generator", "grad_norm_g"), ("discriminators", "grad_norm_d")])
def test_gradient_norms(network, name, number):
    theirs = {key: norm for key, norm in golden.load().steps[number][name].items() if norm is not None}
    ours = getattr(run(), network)[number]
    wrong = {
        key: (float(np.linalg.norm(ours[key])), norm)
        for key, norm in theirs.items()
        if key in ours and np.linalg.norm(ours[key]) != pytest.approx(norm, rel=1e-3, abs=1e-7)
    }
    assert not wrong
    assert len(theirs.keys() & ours.keys()) > 100
    assert all(key.startswith(reference.DROPPED) for key in theirs.keys() - ours.keys())


def test_codebooks_and_small_parameters_after_three_steps():
    data, state, config = golden.load(), run().state, golden_config()
    ours = reference.to_state_dict({"params": state.params, "codebooks": state.codebooks}, config.codec)
    theirs = {key.removeprefix("after3."): value for key, value in data.arrays.items() if key.startswith("after3.")}
    compared = {key for key in theirs if key in ours}
    assert all(key.startswith(reference.DROPPED) for key in theirs.keys() - compared)
    assert len(compared) > 100
    errors = {key: np.abs(ours[key] - theirs[key]) / np.abs(theirs[key]).max() for key in compared}
    # The semantic loss is an L1: the gradient of its bias is a mean of signs. Where as many are positive as negative it
    # is 0 but for rounding, and Adam divides what rounding leaves by its own size.
    gradients = np.stack([step[L1_BIAS] for step in run().generator])
    cancelled = (np.abs(gradients) < 1e-6 * np.abs(gradients).max()).any(axis=0)
    assert cancelled.mean() < 0.3
    errors[L1_BIAS] = errors[L1_BIAS][~cancelled]
    assert {key: float(error.max()) for key, error in errors.items() if error.max() > 1e-4} == {}
