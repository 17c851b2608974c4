"""Laws of the EMA codebooks and of the residual quantizer."""

import dataclasses
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import normal

from omnicodec_jax.config import AcousticConfig, CodebookConfig
from omnicodec_jax.models.quantize import (
    Codebook,
    ResidualVectorQuantizer,
    draw_num_quantizers,
    ema_update,
    fit_residual_codebooks,
    kmeans,
    nearest,
)

LAYERS, SIZE, WIDTH, FEATURES = 4, 16, 6, 8
CONFIG = CodebookConfig(kmeans_iterations=20)


def quantizer(config: CodebookConfig = CONFIG, **options) -> ResidualVectorQuantizer:
    return ResidualVectorQuantizer(LAYERS, SIZE, WIDTH, FEATURES, config, **options)


@cache
def initial(model: ResidualVectorQuantizer) -> dict:
    """Random projections and random entries with a mean usage of 1.25."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, FEATURES)))
    books = dict(variables["codebooks"])
    usage = np.random.default_rng(1).uniform(0.5, 2, (LAYERS, SIZE))
    books["cluster_usage"] = jnp.asarray(usage, jnp.float32)
    books["embedding_sum"] = 0.3 * normal(LAYERS, SIZE, WIDTH, seed=2)
    return {"params": variables["params"], "codebooks": books}


def train(model: ResidualVectorQuantizer, variables: dict, x: jax.Array, active: int = LAYERS):
    """What a quantizer returns in training, and its codebooks after it."""

    def step(variables, x, active):
        rngs = {"codebooks": jax.random.key(3)}
        return model.apply(variables, x, active, mutable=["codebooks"], rngs=rngs)

    output, state = jax.jit(step)(variables, x, active)
    return output, state["codebooks"]


@pytest.fixture(scope="module")
def sharding():
    """Batch over all eight devices."""
    assert jax.device_count() == 8
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))


def test_training_on_eight_devices_is_training_on_one(sharding):
    model = quantizer(dataclasses.replace(CONFIG, check_every=1, dead_threshold=0.9))
    variables, x = initial(model), normal(16, 10, FEATURES)
    alone, alone_state = train(model, variables, x)
    spread, spread_state = train(model, variables, jax.device_put(x, sharding))
    assert alone.replaced.min() > 0
    np.testing.assert_array_equal(spread.codes, alone.codes)
    np.testing.assert_allclose(spread.output, alone.output, rtol=0, atol=1e-5)
    for name, value in alone_state.items():
        np.testing.assert_allclose(spread_state[name], value, rtol=0, atol=1e-5)


def test_kmeans_of_residuals_on_eight_devices_is_that_on_one(sharding):
    x, books = normal(640, WIDTH), Codebook(*map(jnp.zeros, ((3, SIZE, WIDTH), (3, SIZE), (3,), (3,))))
    alone = fit_residual_codebooks(jax.random.key(0), x, books, CONFIG)
    spread = fit_residual_codebooks(jax.random.key(0), jax.device_put(x, sharding), books, CONFIG)
    for one, eight in zip(alone, spread, strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)


# -- Dead codes


def update(book: Codebook, x: jax.Array, config: CodebookConfig) -> tuple[Codebook, jax.Array]:
    def step(book, x):
        return ema_update(book, x, nearest(x, book.embedding(config)), jax.random.key(0), config)

    return jax.jit(step)(book, x)


def book_with_dead_codes(config: CodebookConfig) -> Codebook:
    """Entries 3 and 7 lie far from all data and were next to never used."""
    usage = jnp.ones(SIZE).at[jnp.array([3, 7])].set(0.01)
    entries = normal(SIZE, WIDTH, seed=2).at[jnp.array([3, 7])].set(1e3)
    return Codebook(entries * usage[:, None], usage, jnp.ones(()), jnp.full((), float(config.check_every)))


def test_dead_codes_become_vectors_of_the_batch_with_mean_usage_when_the_check_is_due():
    config, x = dataclasses.replace(CONFIG, check_every=3), normal(50, WIDTH)
    book, shares = book_with_dead_codes(config), []
    for _ in range(3):
        before = book
        book, share = update(book, x, config)
        shares.append(float(share))
    assert shares == [0, 0, pytest.approx(2 / SIZE)]
    assert float(book.steps_until_check) == 3
    mean_usage = float(before.cluster_usage.mean())
    for code in (3, 7):
        assert float(book.cluster_usage[code]) == pytest.approx(config.decay * mean_usage)
        distances = jnp.abs(x - book.embedding(config)[code][None]).max(axis=1)
        assert distances.min() < 1e-5


def test_codes_in_use_are_not_replaced():
    config = dataclasses.replace(CONFIG, check_every=1)
    book, x = book_with_dead_codes(config), normal(50, WIDTH)
    after, _ = update(book, x, config)
    kept, _ = update(book, x, dataclasses.replace(config, dead_threshold=0.0))
    alive = np.delete(np.arange(SIZE), [3, 7])
    np.testing.assert_array_equal(after.embedding_sum[alive], kept.embedding_sum[alive])
    np.testing.assert_array_equal(after.cluster_usage[alive], kept.cluster_usage[alive])


def test_threshold_zero_replaces_nothing():
    config = dataclasses.replace(CONFIG, check_every=1, dead_threshold=0.0)
    book = book_with_dead_codes(config)._replace(cluster_usage=jnp.zeros(SIZE).at[0].set(1.0))
    assert float(update(book, normal(50, WIDTH), config)[1]) == 0


# -- The residual quantizer


@pytest.mark.parametrize("active", [1, 3])
def test_layers_left_out_keep_their_state_bit_for_bit_and_have_no_codes(active):
    model = quantizer(dataclasses.replace(CONFIG, check_every=2))
    variables = initial(model)
    output, after = train(model, variables, normal(2, 10, FEATURES), active)
    assert (output.codes[:, active:] == -1).all()
    assert (output.codes[:, :active] >= 0).all()
    for name, value in variables["codebooks"].items():
        np.testing.assert_array_equal(after[name][active:], value[active:])
    changing = ("embedding_sum", "cluster_usage", "steps_until_check")
    assert all((after[name][i] != variables["codebooks"][name][i]).any() for name in changing for i in range(active))


def test_evaluation_changes_no_codebook_and_uses_all_layers():
    model = quantizer()
    variables, x = initial(model), normal(2, 10, FEATURES)
    output, codes = jax.jit(lambda v, x: (model.apply(v, x), model.apply(v, x, method="encode")))(variables, x)
    np.testing.assert_array_equal(output.codes, codes)
    decoded = jax.jit(lambda v, c: model.apply(v, c, method="decode"))(variables, codes)
    np.testing.assert_allclose(decoded, output.output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("active", [2, LAYERS])
def test_commitment_has_the_gradient_of_the_plain_formula(active):
    model = quantizer()
    variables, x = initial(model), normal(2, 10, FEATURES)

    def ours(params, x):
        return model.apply({**variables, "params": params}, x, active).commitment

    def plain(params, x):
        residual = (x @ params["project_in"]["kernel"]).reshape(-1, WIDTH)
        total = jnp.zeros(())
        for i in range(active):
            book = Codebook(**{name: value[i] for name, value in variables["codebooks"].items()})
            entries = book.embedding(CONFIG)
            chosen = entries[nearest(jax.lax.stop_gradient(residual), entries)]
            total = total + jnp.mean((residual - chosen) ** 2)
            residual = residual - chosen
        return total / active

    (value, gradient), (expected, expected_gradient) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(variables["params"], x) for f in (ours, plain)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_codebooks_get_no_gradient():
    model = quantizer()
    variables, x = initial(model), normal(2, 10, FEATURES)

    def loss(books):
        output = model.apply({**variables, "codebooks": books}, x)
        return output.output.sum() + output.commitment

    gradients = jax.jit(jax.grad(loss))(variables["codebooks"])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_codebooks_and_losses_stay_float32_under_bfloat16():
    model = quantizer()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), initial(model)["params"])
    with jax.numpy_dtype_promotion("standard"):
        output, after = train(model, initial(model) | {"params": half}, normal(2, 10, FEATURES).astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(np.float32)}
    assert output.commitment.dtype == output.usage_entropy.dtype == np.float32


@pytest.mark.parametrize(
    ("usage", "entropy"),
    [(np.full(SIZE, 3.0), 1.0), (np.eye(SIZE)[5], 0.0), (np.repeat([1.0, 0.0], SIZE // 2), 0.75)],
    ids=["uniform", "single", "half"],
)
def test_usage_entropy_runs_from_collapse_to_perfect_use(usage, entropy):
    model = quantizer()
    variables = initial(model)
    books = variables["codebooks"] | {"cluster_usage": jnp.tile(jnp.asarray(usage, jnp.float32), (LAYERS, 1))}
    output = jax.jit(model.apply)({**variables, "codebooks": books}, normal(1, 4, FEATURES))
    np.testing.assert_allclose(output.usage_entropy, entropy, atol=1e-6)


# -- k-means


def test_kmeans_finds_well_separated_clusters():
    centres = 100 * normal(5, WIDTH, seed=4)
    sizes = np.array([40, 60, 30, 50, 20])
    x = jnp.repeat(centres, sizes, axis=0, total_repeat_length=200) + 0.1 * normal(200, WIDTH)
    means, counts = jax.jit(kmeans, static_argnums=(2, 3))(jax.random.key(0), x, 8, 50)
    # eight means for five clusters: those that share a cluster are weighed by their counts
    owner = np.asarray(nearest(means, centres))
    for i in range(5):
        mine = owner == i
        assert float(counts[mine].sum()) == sizes[i]
        weighted = (means[mine] * counts[mine][:, None]).sum(0) / float(sizes[i])
        np.testing.assert_allclose(weighted, x[sizes[:i].sum() : sizes[: i + 1].sum()].mean(0), atol=1e-3)


def test_kmeans_that_ends_when_it_gains_little_quantizes_as_well():
    x, others = normal(1000, WIDTH), normal(500, WIDTH, seed=5)

    def error(enough: float) -> float:
        means, _ = jax.jit(kmeans, static_argnums=(2, 3, 4))(jax.random.key(0), x, SIZE, 50, enough)
        return float(((others - means[nearest(others, means)]) ** 2).mean())

    assert error(0.01) < 1.02 * error(-1.0)


@pytest.mark.parametrize("vectors", [1000, 10 * SIZE])
def test_fitted_codebooks_are_all_initialized_and_lower_the_residual_layer_by_layer(vectors):
    x = normal(vectors, WIDTH)
    books = Codebook(*map(jnp.zeros, ((LAYERS, SIZE, WIDTH), (LAYERS, SIZE), (LAYERS,), (LAYERS,))))
    books = fit_residual_codebooks(jax.random.key(0), x, books, CONFIG)
    assert (books.initialized == 1).all()
    assert (books.steps_until_check == CONFIG.check_every).all()
    assert (books.cluster_usage >= 1).all()
    embedding = books.embedding(CONFIG)
    assert (jnp.abs(embedding).max(axis=-1) > 0).all()  # no zero rows
    residual, errors = x, [float((x**2).mean())]
    for i in range(LAYERS):
        residual = residual - embedding[i][nearest(residual, embedding[i])]
        errors.append(float((residual**2).mean()))
    assert all(after < before for before, after in pairwise(errors))


def test_quantizer_dropout_draws_every_number_of_its_range():
    config = AcousticConfig(num_quantizers=12, min_quantizers=8)
    draws = jax.vmap(lambda key: draw_num_quantizers(key, config))(jax.random.split(jax.random.key(0), 500))
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [8, 9, 10, 11, 12]
    assert counts.min() > 60
