"""The noise in a loop of one's own: equal to the trainer's, and right where the truth is known."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch
from bigbatch import noise
from bigbatch.data import stream
from bigbatch.data.source import Data
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import Sgd
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.schedule.adaptive.controller import Controller, Decisions
from bigbatch.training import loop as train
from bigbatch.training.prepare import prepare
from tests.test_noise_measurement import linear, linear_loss

PAGE = (Path(__file__).parents[1] / "docs" / "noise_in_your_loop.md").read_text(encoding="utf-8")
SETUP, *LOOPS, CONTROLLED = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES, UPDATE, MICROBATCH, DIMENSIONS = 4_000, 200, 25, 6


@pytest.fixture(scope="module")
def of_the_trainer():
    """The examples in the trainer's order, and what it measures of the page's updates."""
    with jax.enable_x64(True):
        page = {}
        exec(SETUP, page)
        arrays = {name: page[name].astype(np.float32) for name in "xy"}
        task = Task(
            init=lambda key: (jnp.zeros(DIMENSIONS, jnp.float64), {}),
            apply=lambda params, statistics, examples, train: (linear(params, examples), {}),
            loss=linear_loss,
        )
        plan = bigbatch.make_plan(
            bigbatch.constant(0.05, UPDATE, 0.0), train_examples=EXAMPLES, epochs=1
        )
        run = prepare(
            task,
            Data(arrays),
            plan,
            Sgd(),
            microbatch_examples_per_device=MICROBATCH,
            noise_small_batch_examples=MICROBATCH,
            mesh=step.data_mesh(jax.devices()[:1]),
        )
        found = train.updates(run, run.init_state(), 0)
        measured = [run.measurement(row, jax.device_get(sums)) for row, _, sums in found]
    order = stream.indices(EXAMPLES, 0, 0, EXAMPLES)
    x, y = (arrays[name][order].astype(float) for name in "xy")
    return (x.reshape(20, 8, 25, 6), y.reshape(20, 8, 25)), measured


@pytest.mark.parametrize("code", LOOPS, ids=["optax", "nnx", "shard_map"])
def test_a_printed_loop_measures_what_the_trainer_does(of_the_trainer, code):
    batches, expected = of_the_trainer
    with jax.enable_x64(True):
        page = {}
        exec(SETUP, page)
        page["batches"] = batches
        exec(code, page)
        each = np.array([jax.device_get(measured[:4]) for measured in page["each"]])
        told = noise.read(page["averages"])
    np.testing.assert_allclose(each, np.array(expected)[:, :4], rtol=1e-6)
    smoothed = gradient_noise.Smoothed()
    for measured in expected:
        apart = measured._replace(share=0.0, small_shares=0.0)
        estimate = gradient_noise.estimate(apart)
        smoothed = gradient_noise.smooth(smoothed, estimate, apart, memory_examples=EXAMPLES)
    assert told["gradient_noise_status"] == "ready"
    assert told["gradient_noise_scale"] == pytest.approx(smoothed.noise_scale, rel=1e-6)
    error = smoothed.standard_error
    assert told["gradient_noise_scale_error"] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("code", LOOPS, ids=["optax", "nnx", "shard_map"])
def test_a_printed_loop_runs_as_printed(code, capsys):
    """In float32, on the page's own numbers."""
    page = {}
    exec(SETUP, page)
    exec(code, page)
    assert "'gradient_noise_status': 'ready'" in capsys.readouterr().out
    assert len(page["each"]) == 20


def test_the_printed_controller_decides_as_printed(capsys):
    """The gradient falls and the noise stays: the batch grows, and no size of it is compiled."""
    page = {}
    exec(SETUP, page)
    exec(CONTROLLED, page)
    plan = page["controller"].plan(page["decisions"])
    assert plan.batch_sizes.max() == 800
    assert page["add"]._cache_size() == 1
    assert str(plan.stages[0].batch_size) in capsys.readouterr().out
    text = json.dumps(page["decisions"].to_json())
    assert Decisions.from_json(json.loads(text)) == page["decisions"]


# Populations of gradients by example, whose moments are known.
SMALL, BATCHES, UPDATES, SEEDS = 8, 8, 40, 100


def regression():
    """Gradients x (x d - noise) of normal x, drawn anew: |G|^2 and tr(S) in closed form."""
    distance = np.linspace(-0.5, 0.7, DIMENSIONS)
    square = np.sum(distance**2)

    def draw(random, shape):
        x = random.standard_normal((*shape, DIMENSIONS), np.float32)
        noises = 0.8 * random.standard_normal(shape, np.float32)
        return x * (x @ np.float32(distance) - noises)[..., None]

    return draw, (square, (DIMENSIONS + 1) * square + DIMENSIONS * 0.8**2)


def logistic(params, x, y):
    return jnp.logaddexp(0.0, x @ params) - y * (x @ params)


def softmax(params, x, y):
    return -jax.nn.log_softmax(x @ params)[y]


def finite(loss, params, classes):
    """Draws of a finite set with replacement, whose gradients are all known by vmap."""
    random = np.random.default_rng(0)
    x = random.normal(0.5, 1, size=(2_000, DIMENSIONS))
    y = (x.sum(1) + 2 * random.normal(size=2_000) > 0) + (x[:, 0] > 0) * (classes - 2)
    by_one = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    gradients = np.asarray(by_one(params, jnp.asarray(x), jnp.asarray(y.astype(int))))

    def draw(random, shape):
        return gradients[random.integers(len(gradients), size=shape)]

    return draw, gradients


PARAMS = {
    "logistic": (logistic, np.linspace(-0.3, 0.8, DIMENSIONS), 2),
    "softmax": (softmax, np.linspace(-1, 1, 3 * DIMENSIONS).reshape(DIMENSIONS, 3), 3),
}


def moments_of(gradients):
    gradients = np.asarray(gradients, float)
    return np.sum(gradients.mean(0) ** 2), np.sum(gradients.var(0))


def averages_of_seeds(draw, geometry, seeds, updates=UPDATES, batches=BATCHES):
    """Averages of loops that differ in the seed, in float32."""
    small = draw(np.random.default_rng(0), (seeds, updates, batches, SMALL)).sum(3)
    one = small[0, 0, 0]

    def update(averages, small):
        def add(sums, gradients):
            return noise.add(sums, gradients, examples=SMALL, geometry=geometry), None

        sums, _ = jax.lax.scan(add, noise.empty(one, geometry), small)
        mean = jnp.sum(small, axis=0) / (batches * SMALL)
        measured = noise.measure(sums, mean, geometry=geometry)
        return noise.average(averages, measured, memory_examples=1e9), None

    begin = noise.start(one, geometry)
    run = jax.jit(jax.vmap(lambda seed: jax.lax.scan(update, begin, seed)[0]))
    averages = jax.device_get(run(jnp.asarray(small)))
    return [gradient_noise.Smoothed(*(leaf[i] for leaf in averages)) for i in range(seeds)]


def estimates_of(averages):
    """|G|^2 and tr(S) of each seed, [seeds, 2, ...]."""
    return np.array([[a.gradient / a.weight, a.noise / a.weight] for a in averages])


def assert_unbiased(found, expected):
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert np.all(error < 0.05 * np.asarray(expected))
    assert np.all(np.abs(found.mean(0) - expected) < 3 * error)


def test_linear_regression_in_closed_form():
    draw, expected = regression()
    assert_unbiased(estimates_of(averages_of_seeds(draw, noise.L2, SEEDS)), expected)


@pytest.mark.parametrize("name", PARAMS)
def test_the_euclidean_estimates_against_all_gradients(name):
    draw, gradients = finite(*PARAMS[name])
    found = estimates_of(averages_of_seeds(draw, noise.L2, SEEDS))
    assert_unbiased(found, moments_of(gradients))


@pytest.mark.parametrize("name", PARAMS)
def test_the_preconditioned_estimates_against_all_gradients(name):
    draw, gradients = finite(*PARAMS[name])
    divisor = 0.1 + jnp.sqrt(jnp.mean(gradients**2, axis=0))
    geometry = noise.preconditioned(divisor)
    found = estimates_of(averages_of_seeds(draw, geometry, SEEDS))
    assert_unbiased(found, moments_of(gradients / divisor))


def signs(gradients):
    """||G||_1^2 and (sum of deviations)^2."""
    gradients = np.asarray(gradients, float)
    return np.abs(gradients.mean(0)).sum() ** 2, gradients.std(0).sum() ** 2


def spectra(gradients):
    """The squared nuclear norm of G, and of the root of E N N^T on the smaller side."""
    gradients = np.asarray(gradients, float)
    mean, noises = gradients.mean(0), gradients - gradients.mean(0)
    second = np.einsum("nij,nik->jk", noises, noises) / len(noises)
    roots = np.sqrt(np.linalg.eigvalsh(second)).sum()
    return np.linalg.norm(mean, "nuc") ** 2, roots**2


@pytest.mark.parametrize(
    ("name", "geometry", "truth"),
    [
        ("logistic", noise.SIGN, signs),
        ("softmax", noise.SIGN, signs),
        ("softmax", noise.SPECTRAL, spectra),
    ],
)
def test_the_bias_of_a_root_is_as_stated(name, geometry, truth):
    draw, gradients = finite(*PARAMS[name])
    found = estimates_of(averages_of_seeds(draw, geometry, SEEDS))
    signal, noises = truth(gradients)
    error = found.std(0, ddof=1) / math.sqrt(SEEDS)
    assert np.all(error < 0.05 * np.array([signal, noises]))
    mean_signal, mean_noise = found.mean(0)
    # Three deviations, and what is not normal of eight gradients.
    assert abs(mean_noise / noises - 1) < 3 * error[1] / noises + 0.02
    ratio = math.sqrt(noises / signal / (SMALL * BATCHES))
    least, most = (signal * (1 + share * ratio) ** 2 for share in (-0.33, 0.37))
    assert least - 3 * error[0] < mean_signal < most + 3 * error[0]


@pytest.mark.parametrize("batches", [2, 4])
def test_few_small_batches_bias_no_deviation(batches):
    """The factor c4 is 0.80 of two normal small batches."""
    deviations = np.linspace(0.5, 2, 50)

    def draw(random, shape):
        return np.float32(deviations * random.normal(size=(*shape, 50)))

    found = estimates_of(averages_of_seeds(draw, noise.SIGN, SEEDS, batches=batches))[:, 1]
    c4_squared = {2: 2 / math.pi, 4: 8 / (3 * math.pi)}[batches]
    # A mean square is the squared mean and the variance.
    expected = deviations.sum() ** 2 + (1 / c4_squared - 1) * np.sum(deviations**2)
    assert abs(found.mean() - expected) < 3 * found.std(ddof=1) / math.sqrt(SEEDS)


@pytest.mark.parametrize(
    ("rows", "columns", "batches"), [(1, 1, 8), (2, 2, 8), (4, 16, 8), (16, 16, 8), (16, 16, 2)]
)
def test_the_bias_of_a_spectral_length_is_as_stated(rows, columns, batches):
    """Normal noise, and no signal, one strong direction, or all at the worst strength."""
    updates = min(2_000, 80_000 // (rows * columns * batches))
    noises = np.random.default_rng(8).normal(size=(updates, batches, rows, columns))
    examples = batches * SMALL
    # The noise's length in the unit of an update's mean gradient.
    length, unit = rows * math.sqrt(columns), rows * math.sqrt(columns / examples)

    @jax.jit
    @jax.vmap
    def lengths(small):
        sums = noise.empty(small[0], noise.SPECTRAL)
        for each in small:
            sums = noise.add(sums, each, SMALL, geometry=noise.SPECTRAL)
        mean = jnp.sum(small, axis=0) / examples
        solved = gradient_noise.solved(noise.measure(sums, mean, geometry=noise.SPECTRAL))
        return jnp.sqrt(jnp.maximum(jnp.array(solved), 0))

    highest = 0.41 if batches > 2 else 0.50
    for directions, strength in ((0, 0.0), (1, 4.0), (rows, 1.5)):
        signal = np.zeros((rows, columns))
        np.fill_diagonal(signal[:directions], strength * math.sqrt(columns / examples))
        small = np.float32(SMALL * signal + math.sqrt(SMALL) * noises)
        signals, spreads = np.float64(lengths(small)).T
        error = signals.std() / math.sqrt(updates) / unit
        bias = (signals.mean() - np.trace(signal)) / unit
        assert -0.34 - 3 * error < bias < highest + 3 * error
        if not directions and rows == columns > 1:
            assert bias > 0.3
        stated = (rows + 1) / (8 * (batches - 1) * columns) * (1 if batches > 2 else 1.25)
        error = spreads.std() / math.sqrt(updates) / length
        assert spreads.mean() / length == pytest.approx(1 - stated, abs=0.002 + 3 * error)


def test_the_standard_error_covers_the_truth():
    draw, (square, variance) = regression()
    averages = averages_of_seeds(draw, noise.L2, 300, updates=60)
    told = [noise.read(each) for each in averages]
    scales = np.array([each["gradient_noise_scale"] for each in told])
    errors = np.array([each["gradient_noise_scale_error"] for each in told])
    for deviations, share, margin in ((1, 0.683, 0.06), (1.96, 0.95, 0.03)):
        covered = np.mean(np.abs(scales - variance / square) < deviations * errors)
        assert abs(covered - share) <= margin


def small_batches(random, examples=(5, 5, 5, 5)):
    """Summed gradients of a tree's small batches."""
    shapes = {"embed": (4, 3), "head": (3,), "norm": {"scale": (3,)}}
    return [
        jax.tree.map(
            lambda shape: random.normal(0.7 * n, math.sqrt(n), shape).astype(np.float32),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )
        for n in examples
    ]


def measured_of(trees, examples, geometry=noise.L2, counts=None, mean=False):
    """A loop's measurement of small batches, compiled."""
    counts = examples if counts is None else counts
    total = jax.tree.map(lambda *leaves: sum(leaves) / sum(counts), *trees)

    @jax.jit
    def run(trees, total):
        sums = noise.empty(total, geometry)
        for tree, n, count in zip(trees, examples, counts, strict=True):
            given = jax.tree.map(lambda leaf: leaf / max(count, 1), tree) if mean else tree
            sums = noise.add(sums, given, n, count, mean=mean, geometry=geometry)
        return noise.measure(sums, total, geometry=geometry)

    return jax.device_get(run(trees, total))


def flat(tree):
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def published(gradients, examples):
    """|G|^2 and tr(S) by McCandlish et al. 2018, appendix A.1, of means of n of B examples."""
    small = np.mean([np.sum((g / examples) ** 2) for g in gradients])
    batch = examples * len(gradients)
    big = np.sum((sum(gradients) / batch) ** 2)
    square = (batch * big - examples * small) / (batch - examples)
    return square, (small - big) / (1 / examples - 1 / batch)


def test_groups_are_measured_apart_and_all_together():
    """Among them that of the norms alone (Gray et al. 2024: of single examples)."""
    geometry = noise.by_group(embedding="embed", norms=r"norm.*scale")
    for examples in (5, 1):
        trees = small_batches(np.random.default_rng(1), (examples,) * 6)
        found = gradient_noise.solved(measured_of(trees, (examples,) * 6, geometry))
        groups = [["embed"], ["norm"], ["embed", "norm", "head"]]
        for index, names in enumerate(groups):
            parts = [flat([tree[name] for name in names]) for tree in trees]
            expected = published(parts, examples)
            np.testing.assert_allclose([f[index] for f in found], expected, rtol=1e-4)
    assert geometry.names == ("embedding", "norms", "all")


def test_a_group_told_by_its_name():
    geometry = noise.by_group(embedding="embed", rest="")
    trees = small_batches(np.random.default_rng(2), (8,) * 4)
    averages = noise.start(trees[0], geometry)
    assert noise.read(averages, geometry)["rest"] == {
        "gradient_noise_scale": None,
        "gradient_noise_scale_error": None,
        "gradient_noise_status": "fewer than two small batches that differ",
    }
    measured = measured_of(trees, (8,) * 4, geometry)
    add = jax.jit(lambda averages: noise.average(averages, measured, memory_examples=1e9))
    for _ in range(7):
        averages = add(averages)
    told = noise.read(averages, geometry)
    for index, name in enumerate(("embedding", "rest", "all")):
        square, variance = (f[index] for f in gradient_noise.solved(measured))
        assert told[name]["gradient_noise_scale"] == pytest.approx(variance / square, rel=1e-4)


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(UserError) as caught:
        noise.empty({"kernel": jnp.zeros(3)}, noise.by_group(norms="scale", all_else="."))
    (problem,) = caught.value.problems
    assert problem.field == "norms"
    assert "['kernel']" in problem.allowed


def test_adams_geometry_is_that_of_adaptdl():
    """Squares of g / (sqrt(v / (1 - b2^t)) + eps), v from the updates before; its own formulas."""
    random, b2, eps = np.random.default_rng(3), 0.99, 1e-8
    optimizer, params = optax.adam(1e-3, b2=b2, eps=eps), small_batches(random, (1,))[0]
    state, second, update = optimizer.init(params), 0.0, jax.jit(optimizer.update)
    for count in range(1, 8):
        trees = small_batches(random, (6,) * 4)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / 24, *trees)
        if count > 5:
            nu, correction = state[0].nu, 1 - b2 ** float(state[0].count)
            divisor = jax.tree.map(lambda v: jnp.sqrt(v / correction) + eps, nu)
            found = measured_of(trees, (6,) * 4, noise.preconditioned(divisor))
            pinv = np.sqrt(second / (1 - b2 ** (count - 1))) + eps
            local = np.mean([np.sum((flat(tree) / 6 / pinv) ** 2) for tree in trees])
            total = np.sum((flat(mean) / pinv) ** 2)
            expected = (4 * total - local) / 3, (local - total) * 24 / 3
            np.testing.assert_allclose(gradient_noise.solved(found), expected, rtol=1e-4)
        _, state = update(mean, state, params)
        second = b2 * second + (1 - b2) * flat(mean) ** 2


@pytest.mark.parametrize("mean", [False, True])
def test_tokens_and_masks_are_counted_as_the_trainer_counts_them(mean):
    """Sequences with different numbers of tokens, one microbatch masked in part and one whole."""
    examples, tokens = (4, 4, 2, 0), (90, 70, 33, 0)
    trees = small_batches(np.random.default_rng(4), tokens)
    trees[3] = jax.tree.map(np.zeros_like, trees[3])
    found = measured_of(trees, examples, counts=tokens, mean=mean)
    squares = sum(np.sum(flat(t) ** 2) / n for t, n in zip(trees, examples, strict=True) if n)
    total = sum(flat(tree) for tree in trees) / sum(tokens)
    sums = {"small_squares": squares, "big_square": np.sum(total**2), "small_batches": 3}
    sums |= {"examples": 10, "count": sum(tokens)}
    np.testing.assert_allclose(found, gradient_noise.measurement_of(sums), rtol=1e-5)


@pytest.mark.parametrize("constant", [1e-6, 1 / 1024, 3.7, 1e5])
def test_a_loss_divided_by_a_constant_decides_the_same(constant):
    """Whether its sum or its count is, in the trainer's sums as in a loop's."""
    controller = Controller(
        0.1,
        32,
        0.0,
        max_batch_size=256,
        train_examples=500,
        epochs=4,
        batch_multiple_examples=8,
        small_batch_examples=8,
    )
    random, decisions = np.random.default_rng(5), [Decisions()] * 3
    while decisions[0].updates < controller.plan(decisions[0]).num_updates:
        update = decisions[0].updates
        batches = int(controller.plan(decisions[0]).batch_sizes[update]) // 8
        # 512 tokens a small batch, of 8 sequences.
        small = random.normal(0.05, 1, (batches, 40)) * 0.1 + 0.01
        tokens, total = 512.0 * batches, small.sum(0) * 64
        sums = {"small_squares": np.sum((64 * small) ** 2) / 8, "small_batches": batches}
        sums |= {"examples": 8 * batches, "count": tokens}
        sums |= {"big_square": np.sum((total / tokens) ** 2)}
        divided = {**sums, "small_squares": sums["small_squares"] / constant**2}
        divided |= {"big_square": sums["big_square"] / constant**2}
        counted = {**sums, "count": tokens * constant}
        counted |= {"big_square": sums["big_square"] / constant**2}
        measured = [gradient_noise.measurement_of(each) for each in (sums, divided, counted)]
        decisions = [controller.observe(*pair) for pair in zip(decisions, measured, strict=True)]
        assert decisions[1].growths == decisions[2].growths == decisions[0].growths
    assert decisions[0].growths


def test_what_multi_steps_skips_is_not_measured():
    steps = optax.MultiSteps(optax.sgd(0.1), 3, should_skip_update_fn=optax.skip_not_finite)
    watched = noise.watching(steps, microbatch_examples=4, memory_examples=100)
    params = np.zeros(5, np.float32)
    gradients = np.random.default_rng(6).normal(1, 1, (7, 5)).astype(np.float32)
    gradients[[1, 4]] = np.nan
    state, update = watched.init(params), jax.jit(watched.update)
    for index, gradient in enumerate(gradients):
        assert (float(state.measured.examples) == 12) == (index > 3)
        changes, state = update(gradient, state, params)
        assert np.all(np.isfinite(changes))
    whole = gradients[[0, 2, 3]]
    expected = 4 * np.sum(whole**2), np.sum(whole.mean(0) ** 2), 3, 12, 0, 0
    np.testing.assert_allclose(state.measured, expected, rtol=1e-5)
    # The next update has begun with two of three.
    assert float(state.sums["small_batches"]) == 2


def test_multi_steps_that_sum_are_refused():
    steps = optax.MultiSteps(optax.sgd(0.1), 3, use_grad_mean=False)
    with pytest.raises(UserError, match="use_grad_mean"):
        noise.watching(steps, 4, memory_examples=100)


def test_updates_of_one_small_batch_say_so():
    measured = measured_of(small_batches(np.random.default_rng(7), (4,)), (4,))
    averages = noise.average(noise.start(jnp.zeros(3)), measured, memory_examples=100)
    told = noise.read(averages)
    assert told["gradient_noise_status"] == "fewer than two small batches that differ"


def test_updates_of_whole_epochs_add_nothing_to_the_averages():
    """All small batches are the same then, but for rounding."""
    like = jnp.zeros(3)
    with jax.enable_x64(True):
        whole = gradient_noise.Measurement(10.0, 1.0, 4.0, 8.0, 1.0, 4.0 - 1e-13)
        assert noise.average(noise.start(like), whole, memory_examples=100).weight == 0
        drawn = whole._replace(small_shares=1.0)
        assert noise.average(noise.start(like), drawn, memory_examples=100).weight > 0
