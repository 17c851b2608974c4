"""Perplexity of tokens: where the answer is known, what counts and what does not, over meshes."""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnicodec_jax import cli, compilation_cache
from omnicodec_jax.buckets import BucketError, as_path
from omnicodec_jax.cli import PERPLEXITY, command
from omnicodec_jax.config import LanguageModelConfig, MeshConfig, OptimizerConfig, PerplexityConfig
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import read_tokens, shards
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from omnicodec_jax.language_model import continuation, perplexity, training
from omnicodec_jax.language_model.continuation import Sampling
from omnicodec_jax.language_model.layout import Layout
from omnicodec_jax.language_model.learning import Learnt
from omnicodec_jax.language_model.model import LanguageModel
from omnicodec_jax.language_model.perplexity import NOTE, Perplexity, measure
from omnicodec_jax.language_model.training import Trainer
from omnicodec_jax.language_model.windows import TokenCorpus, batches
from omnicodec_jax.recipes import language_model_demo, small

LAYOUTS = ("flat", "delayed", "parallel")
TINY = PerplexityConfig(
    model=LanguageModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_key_value_heads=1, intermediate_size=32),
    num_codebooks=2,
    window_frames=16,
    held_out=0.2,
    batch_size=16,
    optimizer=OptimizerConfig(
        learning_rate=2e-2, betas=(0.9, 0.95), weight_decay_modules=("layers",), warmup_steps=20, total_steps=150
    ),
    compute_dtype="float32",
    remat=False,
    num_workers=0,
    log_every=100,
)
SIZES = (4, 3)

TRANSITION = np.array([[0.7, 0.1, 0.1, 0.1], [0.0, 0.8, 0.1, 0.1], [0.1, 0.0, 0.1, 0.8], [0.5, 0.4, 0.1, 0.0]])
"""Transition probabilities of the first codebook from frame to frame."""
EMISSION = np.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9], [0.3, 0.3, 0.4]])
"""Probabilities of the second codebook, given the first."""


def write(out: Path, clips: dict[str, np.ndarray], sizes: tuple[int, ...] = SIZES, source: str = "") -> Path:
    """Token shards, one per domain; an id is domain/number, and all clips have one source."""
    for domain in sorted({id.split("/")[0] for id in clips}):
        path = shards.shard_path(out, domain)
        rows = [
            Clip(id, domain, codes.astype(np.uint16), 1.0, 24_000, 1920 * len(codes), source)
            for id, codes in clips.items()
            if id.startswith(f"{domain}/")
        ]
        shards.write(path, rows, {"codebook_sizes": list(sizes), "model": "none"})
        path.with_suffix(".json").touch()
    return out


def draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """An index for each row."""
    return (probabilities.cumsum(-1) < rng.random((len(probabilities), 1))).sum(-1)


def stationary() -> np.ndarray:
    return np.linalg.matrix_power(TRANSITION, 200)[0]


def markov(clips: int, frames: int, seed: int = 0) -> np.ndarray:
    """[clips, frames, 2]"""
    rng, codes = np.random.default_rng(seed), np.zeros((clips, frames, 2), int)
    state = draw(rng, np.tile(stationary(), (clips, 1)))
    for frame in range(frames):
        codes[:, frame, 0], codes[:, frame, 1] = state, draw(rng, EMISSION[state])
        state = draw(rng, TRANSITION[state])
    return codes


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """The entropy of each row, in nats."""
    return -np.sum(probabilities * np.log(np.maximum(probabilities, 1e-30)), axis=-1)


def expected_perplexity(layout: str, frames: int) -> list[float]:
    """exp of the entropy of a window's codes; nothing is known before its first frame."""
    start, rate = stationary(), stationary() @ entropy(TRANSITION)
    first = (entropy(start) + (frames - 1) * rate) / frames
    second = start @ entropy(EMISSION)
    if layout == "parallel":
        unseen = start @ entropy(TRANSITION @ EMISSION)
        second = (entropy(start @ EMISSION) + (frames - 1) * unseen) / frames
    return np.exp([first, second]).tolist()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Token shards of the Markov source: two domains, 500 clips, 80 frames each: five whole windows."""
    clips = {f"{('speech', 'music')[i % 2]}/{i}": codes for i, codes in enumerate(markov(500, 80))}
    return write(tmp_path_factory.mktemp("markov"), clips)


def measured(tokens: Path, config: PerplexityConfig) -> Perplexity:
    """`measure` on one device, which is quicker than eight that are not there."""
    corpus, mesh = TokenCorpus.open(tokens, config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    trainer = Trainer(config, corpus.layout)
    return perplexity.evaluate(Learnt(trainer, training.train(trainer, corpus, mesh), corpus, mesh))


# -- Where the answer is known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_perplexity_of_a_markov_source_is_that_of_its_entropy_rate(tokens, layout):
    result = measured(tokens, dataclasses.replace(TINY, layout=layout))
    expected = expected_perplexity(layout, TINY.window_frames)
    # 16 000 held-out codes: their own entropy is within 2 % (three standard deviations) of the source's.
    assert 7000 < result.tokens / 2 < 9000
    for found, right in zip(result.ppl, expected, strict=True):
        assert 0.98 * right < found < 1.04 * right
    assert result.ppl0 == result.ppl[0]
    assert result.ppl_mean == pytest.approx(sum(result.ppl) / 2)
    assert result.layout == layout
    assert set(result.domains) == {"speech", "music"}
    assert sum(each.tokens for each in result.domains.values()) == result.tokens


def test_perplexity_of_noise_is_the_size_of_the_codebook(tmp_path):
    codes = np.random.default_rng(0).integers((30, 12), size=(150, 48, 2))
    write(tmp_path, {f"noise/{i}": clip for i, clip in enumerate(codes)}, (30, 12))
    short = dataclasses.replace(TINY.optimizer, learning_rate=5e-3, total_steps=60)
    result = measured(tmp_path, dataclasses.replace(TINY, optimizer=short))
    np.testing.assert_allclose(result.ppl, (30, 12), rtol=0.05)


# -- What counts


def test_layouts_show_every_code_once():
    codes = np.array([[1, 2], [3, 0], [0, 1]])
    flat, delayed, parallel = (Layout(name, SIZES).steps(codes.astype(np.uint16), 4).tolist() for name in LAYOUTS)
    assert flat == [[7], [1], [6], [3], [4], [0], [5], [7], [7]]
    assert delayed == [[7, 7], [1, 7], [3, 6], [0, 4], [7, 5], [7, 7]]
    assert parallel == [[7, 7], [1, 6], [3, 4], [0, 5], [7, 7]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_cross_entropy_is_that_of_the_softmax_and_padding_does_not_count(name):
    layout, rng = Layout(name, SIZES), np.random.default_rng(0)
    codes = rng.integers(SIZES, size=(5, 2)).astype(np.uint16)
    targets = layout.steps(codes, 8)[1:]
    logits = rng.normal(size=(len(targets), layout.vocabulary)).astype(np.float32)
    logits[:, layout.blank] = 50.0  # which would make blanks certain
    nats, counts = layout.cross_entropy(jnp.asarray(logits)[None], jnp.asarray(targets)[None])
    expected = np.zeros(2)
    for row, step in zip(logits.astype(np.float64), targets, strict=True):
        for code in step[step != layout.blank]:
            k = int(code >= SIZES[0])
            expected[k] -= row[code] - np.log(np.exp(np.split(row, (4, 7))[k]).sum())
    np.testing.assert_allclose(nats[0], expected, rtol=1e-5)
    assert counts.tolist() == [[5, 5]]


def test_windows_hold_every_frame_of_their_side_once(tmp_path):
    frames = np.random.default_rng(0).integers(0, 60, 40)
    clips = {f"a/{i}": markov(1, max(1, n), i)[0][:n] for i, n in enumerate(frames)}
    corpus = TokenCorpus.open(write(tmp_path, clips), dataclasses.replace(TINY, layout="parallel"))
    seen: dict[str, list] = {"train": [], "held_out": []}
    for side, rows in seen.items():
        windows = getattr(corpus, side)
        for index in range(len(windows)):
            steps = windows[index]["tokens"]
            assert steps.shape == (17, 2)
            rows += [tuple(row) for row in (steps[1:] - [0, 4]) if row[0] != 7]
    assert len(seen["held_out"]) > 0
    assert sorted(seen["train"] + seen["held_out"]) == sorted(tuple(row) for codes in clips.values() for row in codes)
    with pytest.raises(IndexError):
        corpus.train[len(corpus.train)]


def test_a_clip_stays_on_its_side_whatever_is_added(tmp_path):
    clips = {f"a/{i}": np.zeros((3, 2)) for i in range(60)}
    few = TokenCorpus.open(write(tmp_path / "few", dict(list(clips.items())[:30])), TINY)
    many = TokenCorpus.open(write(tmp_path / "many", clips), TINY)
    held_out = set(many.held_out.clips.tolist())
    assert {i for i in held_out if i < 30} == set(few.held_out.clips.tolist())
    assert 2 <= len(held_out) <= 25
    assert held_out.isdisjoint(many.train.clips)


def test_batches_depend_on_seed_and_step_alone(tokens):
    def rows(config: PerplexityConfig, count: int) -> np.ndarray:
        corpus, mesh = TokenCorpus.open(tokens, config), sharding.make_mesh(MeshConfig())
        with closing(batches(corpus.training_order(config.seed), config, mesh)) as windows:
            return np.concatenate([next(windows)["tokens"] for _ in range(count)])

    first = rows(TINY, 4)
    np.testing.assert_array_equal(rows(dataclasses.replace(TINY, batch_size=32), 2), first)
    assert not np.array_equal(rows(dataclasses.replace(TINY, seed=1), 4), first)


def test_perplexity_weighs_codes_and_not_windows():
    nats, counts = np.log([[2.0, 4.0], [8.0, 4.0]]) * [[3], [1]], np.array([[3, 3], [1, 1]])
    result = Perplexity.from_sums("flat", nats, counts, np.array(["music", "speech"]))
    np.testing.assert_allclose(result.ppl, [2 ** (6 / 4), 4])
    np.testing.assert_allclose(result.domains["music"].ppl, [2, 4])
    assert (result.tokens, result.domains["speech"].tokens) == (8, 2)
    assert result.ppl_mean == pytest.approx((2**1.5 + 4) / 2)


def test_domains_without_a_name_are_not_shown():
    assert Perplexity.from_sums("flat", np.zeros((2, 1)), np.ones((2, 1)), np.array(["", ""])).domains == {}


# -- The model


@pytest.mark.parametrize("columns", [1, 3])
def test_a_step_does_not_see_what_comes_after_it(columns):
    model, rng = LanguageModel(TINY.model, 9), np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(9, size=(1, 12, columns)))
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    apply: Any = jax.jit(model.apply)
    logits = apply(variables, ids)
    for step in (0, 5, 11):
        changed = apply(variables, ids.at[:, step, -1].set((ids[:, step, -1] + 1) % 9))
        np.testing.assert_array_equal(changed[:, :step], logits[:, :step])
        assert (np.abs(changed[:, step:] - logits[:, step:]).max(-1) > 1e-6).all()


@pytest.mark.parametrize(("layout", "tied", "total"), [("flat", False, 100_699_392), ("parallel", True, 88_115_712)])
def test_the_full_size_has_the_papers_parameters(layout, tied, total):
    path = Path(__file__).parents[1] / "configs" / "language_model.py"
    config = config_files.load_as((PerplexityConfig,), path)
    model = dataclasses.replace(config.model, tie_embeddings=tied)
    trainer = Trainer(dataclasses.replace(config, model=model), Layout(layout, (2048,) * 8))
    shapes = jax.eval_shape(trainer.init, jax.random.key(0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total
    if not tied:
        assert total == pytest.approx(100e6, rel=0.1)
        assert f"{total / 1e6:.1f} M parameters" in path.read_text()


def test_the_model_of_the_demo_has_the_parameters_that_it_says():
    config = language_model_demo.config
    trainer = Trainer(config, Layout(config.layout, small.config.codec.codebook_sizes[:8]))
    total = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(trainer.init, jax.random.key(0)).params))
    assert f": {total / 1e6:.1f} M parameters for 8 codebooks." in language_model_demo.__doc__.splitlines()[0]


def test_rounding_of_the_layers_changes_little():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", remat=True)
    layout, batch = Layout("flat", SIZES), markov(16, 16)
    tokens = jnp.asarray(np.stack([Layout("flat", SIZES).steps(codes.astype(np.uint16), 16) for codes in batch]))
    state = jax.jit(Trainer(TINY, layout).init)(jax.random.key(0))
    nats, counts = jax.jit(Trainer(TINY, layout).evaluate)(state.params, {"tokens": tokens})
    rounded, loss = jax.jit(Trainer(config, layout).train_step)(state, {"tokens": tokens})
    exact = float(nats.sum() / counts.sum())
    assert float(loss) == pytest.approx(exact, rel=1e-2)
    assert loss != exact
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded.params)} == {jnp.dtype(jnp.float32)}


# -- Continuation


@pytest.fixture(scope="module", params=LAYOUTS)
def learnt(request, tmp_path_factory) -> Learnt:
    """A model that has learnt to say 0, 1, 2, 3, 0, … and beside it, in the second codebook, 2, 1, 0, 2, …"""
    clips = {f"a/{i}": counting(i, 40) for i in range(24)}
    config = dataclasses.replace(TINY, layout=request.param, window_frames=10)
    corpus = TokenCorpus.open(write(tmp_path_factory.mktemp("counting"), clips), config)
    trainer, mesh = Trainer(config, corpus.layout), sharding.make_mesh(config.mesh, jax.devices()[:1])
    return Learnt(trainer, training.train(trainer, corpus, mesh), corpus, mesh)


def counting(start: int, frames: int) -> np.ndarray:
    numbers = np.arange(start, start + frames)
    return np.stack([numbers % 4, 2 - numbers % 3], axis=1)


def test_what_repeats_goes_on_repeating_over_many_windows(learnt):
    drawn = continuation.draw(learnt, counting(5, 14), 23, sampling=Sampling(temperature=0.1))
    np.testing.assert_array_equal(drawn, counting(19, 23))
    assert drawn.dtype == np.uint16


def test_a_short_start_is_continued_too(learnt):
    assert continuation.draw(learnt, counting(2, 4), 3, sampling=Sampling(temperature=0.0)).tolist() == (
        counting(6, 3).tolist()
    )
    assert continuation.draw(learnt, counting(2, 4), 0).shape == (0, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_at_temperature_0_every_code_is_the_likeliest_of_its_codebook(name):
    layout = Layout(name, SIZES)
    trainer = Trainer(dataclasses.replace(TINY, layout=name), layout)
    params = jax.tree.map(lambda leaf: 30 * leaf, jax.jit(trainer.init)(jax.random.key(3)).params)
    learnt = Learnt(trainer, params, None, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))  # type: ignore
    heard = markov(1, 5)[0]
    drawn = continuation.draw(learnt, heard, 6, sampling=Sampling(temperature=0.0))
    said = np.concatenate([heard, drawn]).astype(np.uint16)
    assert len(np.unique(drawn, axis=0)) > 1

    @jax.jit
    def totals(rows: jax.Array, shorter: jax.Array) -> jax.Array:
        logits = trainer.logits(params, rows[:, :-1])
        return layout.cross_entropy(jnp.repeat(logits, len(shorter), axis=0), shorter[:, 1:])[0]

    def nats(codes: np.ndarray) -> np.ndarray:
        """The cross-entropy of each code in its place: what is added when its frame counts, too."""
        shorter = [layout.steps(codes[:frames], 16) for frames in range(len(codes) + 1)]
        return np.diff(totals(jnp.asarray(shorter[-1:]), jnp.asarray(shorter)), axis=0)

    chosen = nats(said)
    for frame in range(5, 11):
        for k, size in enumerate(SIZES):
            for other in set(range(size)) - {int(said[frame, k])}:
                changed = said.copy()
                changed[frame, k] = other
                assert nats(changed)[frame, k] > chosen[frame, k]


def test_what_is_drawn_depends_on_the_seed_and_is_in_range():
    trainer = Trainer(dataclasses.replace(TINY, layout="delayed"), Layout("delayed", SIZES))
    params, mesh = jax.jit(trainer.init)(jax.random.key(0)).params, sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    learnt = Learnt(trainer, params, None, mesh)  # type: ignore
    first, again, other = (continuation.draw(learnt, np.zeros((0, 2), int), 200, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert [set(first[:, k].tolist()) for k in (0, 1)] == [set(range(size)) for size in SIZES]


def test_top_k_leaves_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.6, 0.4]]))
    sample = jax.jit(jax.vmap(Sampling(top_k=2), (0, None)))
    drawn = np.asarray(sample(jax.random.split(jax.random.key(0), 2000), logits))
    assert [set(column.tolist()) for column in drawn.T] == [{0, 1}, {2, 3}]
    assert np.mean(drawn[:, 0] == 0) == pytest.approx(5 / 8, abs=0.05)
    hot = jax.jit(jax.vmap(Sampling(temperature=1e6), (0, None)))(jax.random.split(jax.random.key(0), 2000), logits)
    assert np.mean(np.asarray(hot)[:, 1] == 2) == pytest.approx(1 / 2, abs=0.05)


def test_what_cannot_be_continued_is_named():
    trainer = Trainer(TINY, Layout("flat", SIZES))
    learnt = Learnt(trainer, None, None, None)  # type: ignore
    with pytest.raises(DataError, match=r"codes of shape \[5, 1\]: must be \[N, 2\]"):
        continuation.draw(learnt, np.zeros((5, 1), int), 3)
    with pytest.raises(DataError, match="another codec's"):
        continuation.draw(learnt, np.full((5, 2), 3), 3)
    for temperature in (-1.0, float("inf"), float("nan")):  # of infinity, the codes of other codebooks came out
        with pytest.raises(ConfigError, match=f"temperature = {temperature}: must be 0 or more, and finite"):
            Sampling(temperature=temperature)
    with pytest.raises(ConfigError, match=r"top_k = 0: must be 1 or more"):
        Sampling(top_k=0)


# -- Over meshes


def losses_on(mesh_config: MeshConfig, devices: int, steps: int = 4) -> list[float]:
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    trainer = Trainer(TINY, Layout("flat", SIZES))
    step: Any = training.lower_step(TINY, mesh, SIZES).compile()
    held = jax.tree.map(lambda leaf: leaf.sharding, trainer.template(mesh))
    state = jax.device_put(jax.jit(trainer.init)(jax.random.key(0)), held)
    losses = []
    for number in range(steps):
        codes = markov(16, 16, number).astype(np.uint16)
        rows = np.stack([trainer.layout.steps(clip, 16) for clip in codes])
        state, loss = step(state, {"tokens": jax.device_put(rows, sharding.batch_sharding(mesh))})
        losses.append(float(loss))
    return losses


def test_losses_do_not_depend_on_the_mesh(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    one = losses_on(MeshConfig(), 1)
    assert len(set(one)) == 4
    np.testing.assert_allclose(losses_on(MeshConfig(), 8), one, atol=1e-4)
    np.testing.assert_allclose(losses_on(MeshConfig(data=2, fsdp=2, tensor=2), 8), one, atol=1e-4)


def test_layers_are_shared_out_over_fsdp_and_tensor():
    config = dataclasses.replace(TINY, model=LanguageModelConfig(num_layers=2))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = Trainer(config, Layout("flat", (2048,) * 8)).template(mesh).params
    for name, shares in (("gate_linear_1", (1, 2, 2)), ("linear_1", (1, 2, 2)), ("linear_2", (1, 2, 2))):
        leaf = params["layers"][name]["kernel"]
        assert tuple(np.divide(leaf.shape, leaf.sharding.shard_shape(leaf.shape))) == shares
    for name in ("query", "key", "value", "out"):
        leaf = params["layers"]["attention"][name]["kernel"]
        assert tuple(np.divide(leaf.shape, leaf.sharding.shard_shape(leaf.shape))) == (1, 2, 2)


# -- Commands and errors


def test_command_prints_a_table_and_writes_json(tokens, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.py").write_text(f"from omnicodec_jax.config import *\nconfig = {TINY!r}\n")
    arguments = ["--tokens", tokens, "--config", tmp_path / "config.py", "--out", tmp_path / "ppl.json"]
    monkeypatch.setattr(sys, "argv", ["omnicodec", "perplexity", *map(str, arguments), "--optimizer.total-steps", "21"])
    monkeypatch.setattr(multihost, "initialize", lambda: None)  # it is for processes that have not begun
    monkeypatch.setattr(command, "log_progress", lambda: None)
    monkeypatch.setattr(compilation_cache, "use", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "layout flat, 2 codebooks; numbers of different layouts do not compare" in said
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["music", "speech", "all"]
    result = json.loads((tmp_path / "ppl.json").read_text())
    assert (result["layout"], result["note"], result["codec"]) == ("flat", NOTE, "none")
    assert result["ppl0"] == result["ppl"][0]
    assert set(result["domains"]) == {"music", "speech"}
    assert f"{result['ppl0']:.2f}" in said


@pytest.mark.parametrize("out", ["taken", "file/result.json", "hf://owner/name/result.json"])
def test_a_place_where_the_result_cannot_be_is_refused_before_anything_is_learnt(tokens, tmp_path, monkeypatch, out):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(multihost, "initialize", lambda: None)
    monkeypatch.setattr(perplexity, "measure", lambda *_: pytest.fail("has begun"))
    place = as_path(out) if "://" in out else tmp_path / out
    with pytest.raises((OSError, BucketError), match="choose another place|hf:// is only read"):
        PERPLEXITY.function(tokens=tokens, config="language_model", out=place, settings=TINY)
    assert not list((tmp_path / "taken").iterdir())


def test_what_cannot_be_measured_is_named(tokens, tmp_path):
    with pytest.raises(DataError, match=r"of its 500 clips none is held out with held_out = 1e-09"):
        TokenCorpus.open(tokens, dataclasses.replace(TINY, held_out=1e-9))
    with pytest.raises(DataError, match="holds no finished token shards"):
        measure(tmp_path, TINY)
    with pytest.raises(ConfigError, match="accumulation = 2: must be 1"):
        PerplexityConfig(optimizer=OptimizerConfig(accumulation=2))
    with pytest.raises(ConfigError, match="num_key_value_heads = 5"):
        LanguageModelConfig(num_key_value_heads=5)
    with pytest.raises(ConfigError, match="batch_size = 12: must be a multiple of data x fsdp = 8"):
        measure(tokens, dataclasses.replace(TINY, batch_size=12))
    misspelt = dataclasses.replace(TINY.optimizer, weight_decay_modules=("layer",))
    with pytest.raises(ConfigError, match="weight_decay_modules: no module layer; there are embedding, .*layers"):
        measure(tokens, dataclasses.replace(TINY, optimizer=misspelt))
    (tmp_path / "empty.py").touch()
    with pytest.raises(ConfigError, match="defines no `config`"):
        config_files.load_as((PerplexityConfig,), tmp_path / "empty.py")


def test_training_that_diverges_stops(tokens, monkeypatch):
    monkeypatch.setattr(training, "jit_step", lambda trainer, mesh: lambda state, batch: (state, jnp.nan))
    with pytest.raises(TrainingError, match="step 1: the loss is not finite"):
        measured(tokens, TINY)


# -- Runs that go on


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def interrupt(monkeypatch, stops: Callable[[int], bool]) -> None:
    monkeypatch.setattr(multihost.Interruption, "stops_before", lambda _, step: stops(step))


def test_interrupted_perplexity_goes_on_and_ends_where_an_undisturbed_one_does(
    tokens, tmp_path, one_device, monkeypatch
):
    short = dataclasses.replace(TINY.optimizer, total_steps=24)
    config = dataclasses.replace(TINY, optimizer=short, save_every=7)
    undisturbed = measure(tokens, config)
    interrupt(monkeypatch, lambda step: step == 11)
    with pytest.raises(multihost.Interrupted):
        measure(tokens, config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["11", "7"]
    asked: list[int] = []
    interrupt(monkeypatch, lambda step: bool(asked.append(step)))
    assert measure(tokens, config, tmp_path) == undisturbed
    assert asked == list(range(11, 24))
    # What was finished stays finished: no step is done again.
    interrupt(monkeypatch, lambda step: True)
    assert measure(tokens, config, tmp_path) == undisturbed


def test_checkpoints_of_other_tokens_or_another_model_are_refused(tokens, tmp_path, one_device, monkeypatch):
    interrupt(monkeypatch, lambda step: True)
    with pytest.raises(multihost.Interrupted):
        measure(tokens, TINY, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"config.window_frames: 16 in the checkpoint, 8 now"):
        measure(tokens, dataclasses.replace(TINY, window_frames=8), tmp_path / "run")
    others = write(tmp_path / "others", {f"a/{i}": codes for i, codes in enumerate(markov(30, 16))})
    with pytest.raises(CheckpointError, match=r"data: .* in the checkpoint"):
        measure(others, TINY, tmp_path / "run")
    clips = {f"a/{i}": codes for i, codes in enumerate(markov(30, 16))}
    replaced = write(tmp_path / "replaced", clips, source="new")  # other audio of the same names
    with pytest.raises(multihost.Interrupted):
        measure(others, TINY, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"sources: .* in the checkpoint"):
        measure(replaced, TINY, tmp_path / "other")


def test_tokens_with_fewer_codebooks_are_taken_whole(tmp_path):
    clips = {f"a/{i}": codes[:, :1] for i, codes in enumerate(markov(30, 16))}
    corpus = TokenCorpus.open(write(tmp_path, clips, (4,)), dataclasses.replace(TINY, num_codebooks=8))
    assert corpus.layout == Layout("flat", (4,))
    assert len(list(read_tokens(tmp_path))) == 30
