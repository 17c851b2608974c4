"""The training step: what moves, what does not, and that it is the same however the batch is spread."""

import dataclasses
from functools import cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal
from tiny_experiment import config as TINY
from tiny_experiment import replaced

from omnicodec_jax import model_directory
from omnicodec_jax.config import (
    Config,
    DiscriminatorConfig,
    MeshConfig,
    STFTDiscriminatorConfig,
    TransformerConfig,
)
from omnicodec_jax.config.experiment import FrozenPart
from omnicodec_jax.discriminators import Discriminators, sub_discriminators
from omnicodec_jax.distributed import sharding
from omnicodec_jax.model_directory import model_hash, tokens_hash
from omnicodec_jax.models.backbone import PARTS
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.models.transformer import Transformer
from omnicodec_jax.planning import totals as counting
from omnicodec_jax.training import state
from omnicodec_jax.training.branches import branch_metrics
from omnicodec_jax.training.gan import CodecForward, FrozenVariables, Gan, TrainInputs
from omnicodec_jax.training.learning import fixed_modules, learning
from omnicodec_jax.training.packing import pack, unpack
from omnicodec_jax.training.start import state_template
from omnicodec_jax.training.state import TrainState, start_state
from omnicodec_jax.training.step import jit_step, train_step

pytestmark = pytest.mark.minutes(3)

STEPS = 5


def batch(step: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    audio = rng.normal(0, 0.1, (TINY.data.batch_size, 1, TINY.data.segment_samples)).astype(np.float32)
    return {"audio": audio, "replaced": np.zeros(TINY.data.batch_size, np.int32)}


@cache
def first_state() -> TrainState:
    """Random weights, and codebooks that hold something."""
    first = jax.device_get(jax.jit(partial(state.init_state, TINY))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    books = {
        name: {**book, "embedding_sum": rng.normal(size=book["embedding_sum"].shape).astype(np.float32)}
        for name, book in first.codebooks.items()
    }
    return first.replace(codebooks=books)


def jitted(config: Config, first: TrainState | None = None):
    """The step on one device: of TINY the very program that the runs of test_training.py compile."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    step = jit_step(Gan(config), mesh, first_state() if first is None else first, FrozenVariables())
    return lambda *arguments: jax.device_get(step(*arguments, FrozenVariables()))  # as what goes in is given away


@cache
def tiny_step():
    return jitted(TINY)


def run(config: Config = TINY, steps: int = 1, first: TrainState | None = None):
    """The state after some steps, and the metrics of each. Other programs than TINY's are not kept."""
    now, metrics = first_state() if first is None else first, []
    step = tiny_step() if config == TINY else jitted(config, now)
    for number in range(steps):
        now, result = step(now, batch(number))
        metrics.append(result)
    return now, metrics


@cache
def alone():
    return run(steps=STEPS)


def changed(before: Any, after: Any) -> list[bool]:
    """Says of each array whether any number in it differs."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [not np.array_equal(a, b) for a, b in pairs]


def test_discriminators_can_have_a_learning_rate_of_their_own():
    weights = {"layer": jnp.ones(3)}
    for rate, ratio in ((None, 1), (10 * TINY.optimizer.learning_rate, 10)):
        config = replaced(TINY, train={"discriminator_learning_rate": rate}, optimizer={"weight_decay": 0.0})
        codec, discriminators = state.generator_optimizer(config), state.discriminator_optimizer(config)
        moves = []
        for optimizer in (codec, discriminators):
            learnt = optimizer.init(weights)
            for _ in range(2):  # the first step of the warm-up has a rate of 0
                move, learnt = optimizer.update(weights, learnt, weights)
            moves.append(move["layer"])
        np.testing.assert_allclose(moves[1], ratio * moves[0], rtol=1e-5)
        assert (moves[0] < 0).all()


def test_a_step_moves_everything_that_learns():
    before, (after, metrics) = first_state(), alone()
    assert int(after.step) == STEPS
    for part in ("params", "discriminators", "codebooks", "ema_params"):
        moved = changed(getattr(before, part), getattr(after, part))
        still = 2 * len(before.codebooks) if part == "codebooks" else 0  # initialized, and a counter that came round
        assert sum(moved) >= len(moved) - still, part
    assert all(np.isfinite(value).all() for value in metrics[-1].values())
    assert metrics[0]["skipped"] == 0
    assert metrics[0]["learning_rate"] == 0
    assert metrics[-1]["learning_rate"] > 0
    assert metrics[0]["replaced_acoustic"].shape == (TINY.codec.acoustic.num_quantizers,)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    bad = {**batch(), "audio": np.full_like(batch()["audio"], np.nan)}
    before = alone()[0]
    once, metrics = tiny_step()(before, bad)
    twice, _ = tiny_step()(once, bad)
    assert not np.isfinite(metrics["total"])
    assert (int(once.skipped), int(twice.skipped), int(twice.step)) == (1, 2, STEPS + 2)
    assert not any(changed(before, twice.replace(step=before.step, skipped=before.skipped)))
    after, metrics = tiny_step()(twice, batch())
    assert int(after.skipped) == metrics["skipped"] == 0
    assert any(changed(twice.params, after.params))


def test_packed_is_the_same_there_and_back():
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (128, 128), "bias": (3,), "scale": ()}, "b": {"kernel": (129, 128)}, "c": (2, 2)}
    tree = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)), shapes, is_leaf=lambda shape: isinstance(shape, tuple)
    )
    packed = pack(tree)
    assert {module: set(arrays) for module, arrays in packed.items()} == {
        "a": {"kernel", "small"},
        "b": {"kernel"},
        "c": {"small"},
    }
    jax.tree.map(np.testing.assert_array_equal, unpack(packed, tree), tree)
    now = jax.device_put(first_state())
    jax.tree.map(np.testing.assert_array_equal, now.packed().unpacked(now), now)


def steady(**sections: dict[str, Any]) -> Config:
    """Without what is drawn at random for every micro-batch, or carried from one to the next."""
    codec = TINY.codec
    codebook = dataclasses.replace(codec.codebook, decay=1 - 1e-7, dead_threshold=0.0)
    acoustic = dataclasses.replace(codec.acoustic, min_quantizers=codec.acoustic.num_quantizers)
    return replaced(TINY, codec={"codebook": codebook, "acoustic": acoustic}, **sections)


@cache
def in_micro_batches(count: int):
    return run(steady(optimizer={"accumulation": count}), steps=2)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, parts = in_micro_batches(1), in_micro_batches(2)
    for one, two in zip(whole[1], parts[1], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert sum(changed(first_state().codebooks, parts[0].codebooks)) > 0


def test_codebooks_learn_from_each_micro_batch_as_in_pytorch():
    """So that their decay and their looks for dead codes count micro-batches, and not steps."""
    whole, parts = (in_micro_batches(count)[0].codebooks for count in (1, 2))
    for name in whole:
        left = [books[name]["steps_until_check"] for books in (whole, parts)]
        np.testing.assert_array_equal(left[0] - left[1], np.full_like(left[0], 2))


def test_simultaneous_update_uses_the_discriminators_as_they_were():
    now = alone()[0]
    alternating, simultaneous = (
        run(replaced(TINY, train={"discriminator_update": update}), first=now)[1][0]
        for update in ("alternating", "simultaneous")
    )
    for name in alternating:
        if name.startswith(("discriminator_", "grad_norm_stft", "grad_norm_waveform")):
            assert simultaneous[name] == pytest.approx(alternating[name], rel=1e-5)
    # Its optimizer begins anew, at a learning rate of 0: the discriminators stay as they are.
    still = now.replace(discriminator_optimizer=first_state().discriminator_optimizer)
    old = run(first=still)[1][0]
    for name in ("adversarial_stft", "feature_matching_waveform", "total"):
        assert simultaneous[name] == pytest.approx(old[name], rel=1e-5)
        assert simultaneous[name] != pytest.approx(alternating[name], rel=1e-5)


def test_simultaneous_update_saves_running_the_discriminators_forward():
    first, discriminate = first_state(), jax.jit(Discriminators(TINY.discriminators).apply)
    forward = discriminate.lower({"params": first.discriminators}, batch()["audio"]).cost_analysis()["flops"]
    steps = [
        traced_flops(replaced(TINY, train={"discriminator_update": update}), first)
        for update in ("alternating", "simultaneous")
    ]
    assert steps[0] - steps[1] > 1.8 * forward  # on real audio, and on reconstructed


def traced_flops(config: Config, first: TrainState, **options: bool) -> float:
    """What a step computes, as traced: nothing is left to the compiler to find."""
    step = jax.jit(partial(train_step, gan=Gan(config), **options))
    return step.lower(first, batch(), FrozenVariables()).cost_analysis()["flops"]


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_before_discriminators_begin_a_step_costs_what_it_does_without_them(accumulation):
    config = replaced(TINY, optimizer={"accumulation": accumulation})
    none = dataclasses.replace(config, discriminators=DiscriminatorConfig(stft=None, waveform=None, wavlm=None))
    without = state_template(none, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    codec_alone = traced_flops(config, first_state(), with_discriminators=False)
    assert codec_alone <= 1.001 * traced_flops(none, without)
    assert codec_alone < 0.8 * traced_flops(config, first_state())


def test_before_discriminators_begin_they_stay_as_they_are_and_the_codec_learns():
    mesh, before = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), alone()[0]
    after, metrics = jax.device_get(
        jit_step(Gan(TINY), mesh, before, FrozenVariables(), with_discriminators=False)(
            before, batch(), FrozenVariables()
        )
    )
    for part in ("discriminators", "discriminator_optimizer"):
        assert not any(changed(getattr(before, part), getattr(after, part))), part
    assert sum(changed(before.params, after.params)) > 20
    assert jax.tree.structure(after) == jax.tree.structure(before)
    names = {name.split("_")[0] for name in metrics}
    assert {"mel", "semantic", "commitment", "total"} <= names
    assert names.isdisjoint({"adversarial", "feature", "discriminator"})


def test_decoder_learns_alone_and_tokens_stay_what_they_were():
    parts = ("encoder", "quantizer")
    config, before = replaced(TINY, train={"freeze": parts}), alone()[0]
    fixed = fixed_modules(config.train)
    variables = {"params": before.params, "codebooks": before.codebooks}
    start = jax.device_get(start_state(config, variables, before.discriminators))
    after, metrics = run(config, 3, start.replace(ema_params=before.ema_params))
    for part in ("params", "ema_params"):
        old, new = getattr(before, part), getattr(after, part)
        assert not any(changed({name: old[name] for name in fixed}, {name: new[name] for name in fixed})), part
        for name in PARTS["decoder"]:
            assert any(changed(old[name], new[name])), name
    assert not any(changed(before.codebooks, after.codebooks))
    assert metrics[-1]["grad_norm_codec"] > 0
    held = " ".join(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(after.generator_optimizer))
    assert "decoder_transformer" in held
    assert "encoder_transformer" not in held
    assert "quantizer" not in held
    moved = {"params": after.params, "codebooks": after.codebooks}
    for hash, same in ((tokens_hash, True), (model_hash, False)):
        assert (hash(config.codec, moved) == hash(config.codec, variables)) == same

    @jax.jit
    def encode(variables: Any, batch: dict[str, jax.Array]) -> Any:
        features = Gan(config).inputs(batch, FrozenVariables()).features
        return OmniCodec(config.codec).apply(variables, batch["audio"], features, method="encode")

    np.testing.assert_array_equal(encode(moved, batch()), encode(variables, batch()))


@pytest.mark.parametrize("part", get_args(FrozenPart))
def test_every_part_that_can_be_frozen_keeps_its_codebooks_and_has_no_gradient(part):
    train = replaced(TINY, train={"freeze": (part,)}).train
    modules = set(PARTS[part])
    assert modules <= first_state().params.keys()
    assert learning(train, first_state().params).keys() == first_state().params.keys() - modules
    model = Gan(replaced(TINY, train={"freeze": (part,)})).codec
    learnt = jax.jit(partial(model.apply, mutable=["codebooks"]))
    given = {"params": first_state().params, "codebooks": first_state().codebooks}
    features = normal(TINY.data.batch_size, 3, 1024)
    _, after = learnt(given, batch()["audio"], features, rngs={"codebooks": jax.random.key(0)})
    still = {
        name for name in given["codebooks"] if not any(changed(given["codebooks"][name], after["codebooks"][name]))
    }
    assert still == modules & given["codebooks"].keys()


def test_dropout_of_a_branch_leaves_out_its_share_of_the_clips_until_its_last_step():
    def kept(step: int, **options: Any) -> Any:
        gan = Gan(replaced(TINY, train=options))
        return gan.branches_kept(jax.random.key(0), jnp.asarray(step, jnp.int32), 1000)

    assert kept(0) == (None, None)
    semantic, acoustic = kept(0, semantic_dropout=0.3)
    assert np.mean(semantic) == pytest.approx(0.7, abs=0.05)
    assert acoustic is None
    ending = {"semantic_dropout": 0.3, "semantic_dropout_until": 10, "acoustic_dropout": 0.2}
    semantic, acoustic = kept(9, **ending)
    assert np.mean(semantic) == pytest.approx(0.7, abs=0.05)
    assert np.mean(acoustic) == pytest.approx(0.8, abs=0.05)
    assert np.all(semantic | acoustic)
    semantic, acoustic = kept(10, **ending)
    assert np.all(semantic)
    assert np.mean(acoustic) == pytest.approx(0.8, abs=0.05)


def test_bypass_of_the_quantizers_takes_its_share_of_the_clips():
    def bypassed(share: float) -> Any:
        return Gan(replaced(TINY, train={"quantizer_bypass": share})).bypassed(jax.random.key(0), 1000)

    assert bypassed(0.0) is None
    assert np.mean(bypassed(0.3)) == pytest.approx(0.3, abs=0.05)
    assert np.all(bypassed(1.0))


def test_decoder_of_clips_under_dropout_hears_the_other_branch_alone():
    first = first_state()
    # Entries as small as the latent make sure that the acoustic codes change in time, whatever the rounding.
    book = first.codebooks["acoustic_quantizer"]
    small = {**book, "embedding_sum": 0.01 * book["embedding_sum"]}
    first = first.replace(codebooks={**first.codebooks, "acoustic_quantizer": small})

    def acoustic_share(**kept: jax.Array) -> jax.Array:
        held = {"params": first.params, "codebooks": first.codebooks}
        model, (variables, given) = model_directory.build(TINY.codec), jax.tree.map(jnp.asarray, (held, batch()))
        inputs = Gan(TINY).inputs(given, FrozenVariables())
        return branch_metrics(model.apply(variables, inputs.audio, inputs.features, **kept))["decoder_input_acoustic"]

    none = jnp.zeros(TINY.data.batch_size, bool)
    shares = [jax.jit(acoustic_share)(**kept) for kept in ({"kept": none}, {"acoustic_kept": none}, {})]
    assert shares[:2] == [pytest.approx(1), pytest.approx(0)]
    assert 0.001 < abs(shares[2]) < 0.999


def test_clips_whose_decoder_hears_no_acoustic_codes_are_not_guided_by_what_these_say():
    first = first_state()
    model, held = model_directory.build(TINY.codec), {"params": first.params, "codebooks": first.codebooks}
    variables, given = jax.tree.map(jnp.asarray, (held, batch()))
    inputs = Gan(TINY).inputs(given, FrozenVariables())
    heard = jnp.arange(TINY.data.batch_size) > 0
    output: Any = jax.jit(model.apply)(variables, inputs.audio, inputs.features, acoustic_kept=heard)
    assert output.hidden_guide is not None
    difference = jnp.abs(output.hidden_quantized - output.hidden_guide).mean(axis=(1, 2))
    assert difference[0] == 0
    assert np.all(difference[1:] > 0)


def test_real_and_reconstructed_audio_in_one_batch_give_the_gradient_of_both():
    only = DiscriminatorConfig(stft=STFTDiscriminatorConfig(filters=2, windows=(22,)), waveform=None, wavlm=None)
    gan, module = Gan(dataclasses.replace(TINY, discriminators=only)), Discriminators(only)
    (sub,) = sub_discriminators(only)
    real, fake = (jnp.asarray(batch(number)["audio"][:2, :, :300]) for number in (0, 1))
    params = jax.jit(module.init)(jax.random.key(0), real)["params"]
    forward = CodecForward(TrainInputs(real, None, None), fake, None, jnp.zeros(()), {}, {}, lambda *_: {})

    def gradient(run, params):
        return gan.discriminator_gradient(run(sub, params, forward))

    runs = gan.discriminator_forward, gan.discriminator_forward_in_one_batch
    apart, together = (jax.jit(partial(gradient, run))(params) for run in runs)
    for mine, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())
    apart, together = (jax.jit(partial(gradient, run)).lower(params).as_text().count("convolution(") for run in runs)
    assert together == apart / 2


@pytest.mark.parametrize("use", ["discriminator_gradient", "adversarial_gradient"])
def test_feature_maps_of_one_sub_discriminator_are_in_memory_at_a_time(use):
    def temporaries(*windows: int) -> int:
        only = DiscriminatorConfig(stft=STFTDiscriminatorConfig(filters=8, windows=windows), waveform=None, wavlm=None)
        gan = Gan(dataclasses.replace(TINY, discriminators=only))

        def gradients(params, audio):
            forward = CodecForward(
                TrainInputs(audio, None, None), 0.9 * audio, None, jnp.zeros(()), {}, {}, lambda *_: {}
            )
            results = gan.for_each_discriminator(params, forward, getattr(gan, use))
            return results, sum(gradient[0] for gradient, _ in results) if use == "adversarial_gradient" else 0

        params = jax.eval_shape(lambda: init_variables(Discriminators(only), jax.random.key(0)))["params"]
        audio = jax.ShapeDtypeStruct((2, 1, 24_000), np.float32)
        return jax.jit(gradients).lower(params, audio).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(196, 198, 200, 202) < 1.5 * temporaries(200)


@pytest.mark.slow  # test_precision.py has the gradients of either
def test_half_precision_and_rematerialisation_stay_near():
    metrics = run(replaced(TINY, train={"compute_dtype": "bfloat16", "remat": True}))[1][0]
    for name in ("mel", "semantic", "commitment_acoustic", "discriminator_stft"):
        assert metrics[name] == pytest.approx(alone()[1][0][name], rel=0.05)


@pytest.mark.slow
def test_rematerialisation_takes_less_memory_on_a_cpu_too():
    def temporaries(remat: bool) -> int:
        gan, mesh = Gan(replaced(TINY, train={"remat": remat})), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        lowered = jit_step(gan, mesh, first_state(), FrozenVariables()).lower(first_state(), batch(), FrozenVariables())
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.75 * temporaries(remat=False)


# -- Sharding


def test_first_steps_on_eight_devices_are_those_on_one():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    step = jit_step(Gan(TINY), mesh, first_state(), FrozenVariables())
    now = jax.device_put(first_state(), sharding.shardings(mesh, first_state()))
    for number, expected in enumerate(alone()[1]):
        now, metrics = step(now, jax.device_put(batch(number), sharding.batch_sharding(mesh)), FrozenVariables())
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{name}, step {number}")
    held = jax.tree.map(lambda leaf: leaf.sharding.spec, now)
    assert held == jax.tree.map(lambda leaf: leaf.spec, sharding.shardings(mesh, now))


def test_state_is_shared_out_over_fsdp():
    def held(**axes: int) -> int:
        mesh = sharding.make_mesh(MeshConfig(**axes))
        now = jax.device_put(first_state(), sharding.shardings(mesh, first_state()))
        (bytes_each,) = set(sharding.bytes_per_device(now).values())
        return bytes_each

    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(first_state()))
    assert held() == whole
    shared = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(first_state())
        if leaf.size >= sharding.MIN_SHARDED_SIZE and leaf.ndim > 1
    )
    assert held(fsdp=8) == pytest.approx(whole - shared * 7 / 8, rel=0.01)
    assert shared > 0.4 * whole


def test_kernels_are_gathered_once_and_every_device_computes_its_own_clips():
    model = Transformer(TransformerConfig(num_heads=4, num_layers=3, dim_feedforward=512, context=16), remat=True)
    audio = jax.ShapeDtypeStruct((16, 32, 128), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), audio)["params"]

    def totals(devices: int) -> counting.Totals:
        mesh = sharding.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
        held = sharding.shardings(mesh, params)

        def gradient(params, x):
            whole = sharding.gather(mesh, params)
            square = jax.grad(lambda params: jnp.square(model.apply({"params": params}, x)).sum())
            return sharding.shard(mesh, square(whole))

        step = jax.jit(gradient, in_shardings=(held, sharding.batch_sharding(mesh)), out_shardings=held)
        return counting.totals(step.lower(params, audio).compile().as_text() or "")

    kernels = sum(leaf.size * 4 for leaf in jax.tree.leaves(params) if leaf.size >= sharding.MIN_SHARDED_SIZE)
    one, eight = totals(1), totals(8)
    assert eight.flops == one.flops / 8
    assert eight.collectives["all-gather"] == kernels


def test_table_shares_out_the_released_recipe():
    from omnicodec_jax.config import files as config_files

    released = config_files.load("configs/released_12hz.py")
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    template = state_template(released, mesh)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(template))
    each = sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(template))
    books = sum(leaf.size * 4 for leaf in jax.tree.leaves(template.codebooks))
    assert each - books < 1.03 / 8 * (whole - books)
