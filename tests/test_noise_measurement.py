"""The gradient noise as it is measured in a run: unbiased, and the same on any hardware."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import bigbatch
from bigbatch.data import stream
from bigbatch.data.source import Data
from bigbatch.engine import functions as step
from bigbatch.engine import units
from bigbatch.engine.optimizer import Sgd
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.layout.layout import make_layout
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.training import loop as train
from bigbatch.training.microbatches import Request
from bigbatch.training.prepare import prepare
from bigbatch.training.progress import Progress
from tests import trained
from tests.hlo import collectives

SEEDS, BATCH, SMALL, DIMENSIONS = 100, 200, 20, 6
# (devices, examples per device): the small batch is the whole share, or one of several in it. The
# last microbatch of some is masked in part.
LAYOUTS = [(1, 200), (1, 20), (1, 60), (2, 20), (2, 60), (4, 40), (8, 20)]


def linear(params, examples):
    return examples["x"] @ params


def linear_loss(outputs, examples):
    weight = examples["weight"]
    error = outputs - examples["y"]
    return {"loss": jnp.sum(weight * error**2) / 2, "count": jnp.sum(weight)}


def logistic_loss(outputs, examples):
    weight = examples["weight"]
    losses = jnp.logaddexp(0.0, outputs) - examples["y"] * outputs
    return {"loss": jnp.sum(weight * losses), "count": jnp.sum(weight)}


def prepared(
    arrays,
    loss,
    params,
    *,
    devices=1,
    share=BATCH,
    batch=BATCH,
    small=SMALL,
    ghost=1,
    epochs=1,
    augment=None,
    outputs=linear,
    **options,
):
    task = Task(
        init=lambda key: (jnp.asarray(params), {}),
        apply=lambda params, statistics, examples, train: (outputs(params, examples), {}),
        loss=loss,
        **options,
    )
    # Examples are made in another thread, which knows no float64; parameters and sums are float64.
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    examples = len(arrays["x"])
    recipe = bigbatch.constant(1e-300, batch, 0.0)
    plan = bigbatch.make_plan(
        recipe, train_examples=examples, epochs=epochs, batch_multiple_examples=ghost
    )
    return prepare(
        task,
        Data(arrays, augment=augment),
        plan,
        Sgd(),
        microbatch_examples_per_device=share,
        ghost_batch_examples=ghost,
        noise_small_batch_examples=small,
        mesh=step.data_mesh(jax.devices()[:devices]),
    )


def measurements(run, updates):
    """Those of the run's first updates; its learning rate is next to nothing."""
    found = itertools.islice(train.updates(run, run.init_state(), 0), updates)
    return [run.measurement(row, jax.device_get(sums)) for row, _, sums in found]


TRUTH = np.linspace(-1, 1, DIMENSIONS)
PARAMS = np.full(DIMENSIONS, 0.3)
NOISE = 0.8


def regression_data(rng, examples):
    """Normal x, and y = x TRUTH + noise."""
    x = rng.normal(size=(examples, DIMENSIONS))
    return {"x": x, "y": x @ TRUTH + NOISE * rng.normal(size=examples)}


def logistic_data(rng, examples):
    x = rng.normal(0.5, 1.0, size=(examples, DIMENSIONS))
    return {"x": x, "y": (rng.random(examples) < 1 / (1 + np.exp(-x @ TRUTH))).astype(float)}


def closed_form():
    """With d = PARAMS - TRUTH the gradient of one example is x (x d - noise), of expectation d."""
    square = np.sum((PARAMS - TRUTH) ** 2)
    return square, (DIMENSIONS + 1) * square + DIMENSIONS * NOISE**2


def by_vmap(arrays, loss=logistic_loss, params=PARAMS):
    """|G|^2 and tr(S) of a finite set from its examples' gradients, one by one."""

    def loss_of_one(params, x, y):
        one = {"x": x[None], "y": y[None], "weight": jnp.ones(1)}
        return loss(linear(params, one), one)["loss"]

    by_one = jax.vmap(jax.grad(loss_of_one), (None, 0, 0))
    gradients = np.asarray(by_one(params, arrays["x"], arrays["y"]))
    return np.sum(np.mean(gradients, 0) ** 2), np.sum(np.var(gradients, axis=0, ddof=1))


@pytest.fixture(scope="module")
def regression():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Ten updates a seed, all on examples of their own.
        arrays = regression_data(rng, SEEDS * BATCH * 10)
        return arrays, measurements(prepared(arrays, linear_loss, PARAMS), 10 * SEEDS)


def assert_unbiased(measured, expected):
    """Within 3 standard errors over `SEEDS` seeds, and the bias under 2 %.

    A seed is the average of the estimates from several updates, as many as the bias needs.
    """
    found = np.array([gradient_noise.estimate(m) for m in measured])
    seeds = found.reshape(SEEDS, -1, 2).mean(1)
    error = seeds.std(0, ddof=1) / math.sqrt(SEEDS)
    assert np.all(np.abs(seeds.mean(0) - expected) < 3 * error)
    assert np.all(np.abs(seeds.mean(0) / expected - 1) < 0.02)


def test_linear_regression_with_gaussian_noise(regression):
    assert_unbiased(regression[1], closed_form())


@pytest.mark.parametrize(("devices", "share"), LAYOUTS[1:])
def test_the_same_estimates_on_every_layout(regression, devices, share):
    arrays, expected = regression
    with jax.enable_x64(True):
        run = prepared(arrays, linear_loss, PARAMS, devices=devices, share=share)
        found = measurements(run, SEEDS)
    np.testing.assert_allclose(found, expected[:SEEDS], rtol=1e-10)


def test_logistic_regression():
    """Against the gradients of single examples."""
    with jax.enable_x64(True):
        arrays = logistic_data(np.random.default_rng(1), 500 * BATCH)
        expected = by_vmap(arrays)
        run = prepared(arrays, logistic_loss, PARAMS, devices=2, share=60)
        measured = measurements(run, 5 * SEEDS)
    assert_unbiased(measured, expected)


def mean_estimate(measured, in_a_block):
    """The mean of the estimates and its standard error, from blocks of neighbours."""
    found = np.array([gradient_noise.estimate(m) for m in measured])
    blocks = found.reshape(-1, in_a_block, 2).mean(1)
    return blocks.mean(0), blocks.std(0, ddof=1) / math.sqrt(len(blocks))


def test_a_training_set_that_repeats_against_the_gradients_of_its_examples():
    """Batches of 50 of 130, over the edges of epochs, in small batches of 16, 16, 16 and 2."""
    with jax.enable_x64(True):
        arrays, near = logistic_data(np.random.default_rng(3), 130), 0.8 * TRUTH
        expected = by_vmap(arrays, params=near)
        sizes = {"share": 16, "batch": 50, "small": 16}
        run = prepared(arrays, logistic_loss, near, **sizes, epochs=250)
        measured = measurements(run, 13 * 50)
    # Thirteen updates are five epochs.
    found, error = mean_estimate(measured, 13)
    assert np.all(np.abs(found - expected) < 3 * error)
    independent = [m._replace(share=0.0, small_shares=0.0) for m in measured]
    as_independent, _ = mean_estimate(independent, 13)
    assert as_independent[0] < expected[0] - 9 * error[0]


def flipped(example, key):
    return example | {"x": example["x"] if key[0] >> 31 else -example["x"]}


def randomly_flipped(params, examples):
    flips = examples["key"][:, 0] >> 31 if "key" in examples else 0
    return linear(params, examples) * (1 - 2.0 * flips)


@pytest.mark.parametrize(
    "options",
    [{"augment": flipped}, {"takes_keys": True, "outputs": randomly_flipped}],
    ids=["augmentation", "random numbers of the task"],
)
def test_examples_that_change_with_each_visit_against_all_their_gradients(options):
    """Each example comes as x or as -x: the gradient is x (x w) - or + x y, nearly all of it y."""
    with jax.enable_x64(True):
        rng, params = np.random.default_rng(4), np.linspace(-0.2, 0.2, DIMENSIONS)
        arrays = {"x": rng.normal(size=(100, DIMENSIONS)), "y": 3 * rng.normal(size=100)}
        both = {"x": np.concatenate([arrays["x"], -arrays["x"]]), "y": np.tile(arrays["y"], 2)}
        expected = by_vmap(both, linear_loss, params)
        sizes = {"share": 50, "batch": 50, "small": 10}
        run = prepared(arrays, linear_loss, params, **sizes, epochs=500, **options)
        measured = measurements(run, 1000)
    found, error = mean_estimate(measured, 10)
    assert np.all(np.abs(found - expected) < 3 * error)
    # Where the noise is new on each visit, the correction for draws of an epoch would be wrong.
    corrected = [m._replace(share=0.5, small_shares=0.5) for m in measured]
    assert mean_estimate(corrected, 10)[0][0] > expected[0] + 10 * error[0]


def test_the_population_is_that_of_the_data_and_the_task():
    arrays = logistic_data(np.random.default_rng(5), 40)
    for options, population in (
        ({}, "training set"),
        ({"augment": flipped}, "data distribution"),
        ({"takes_keys": True, "outputs": randomly_flipped}, "data distribution"),
    ):
        run = prepared(arrays, logistic_loss, PARAMS.astype(np.float32), **options)
        assert run.noise_population == population


def test_a_small_batch_masked_in_part_is_one_of_fewer_examples():
    """A batch of 40 with small batches of 16, of four ghost batches: 16, 16 and 8."""
    with jax.enable_x64(True):
        arrays = regression_data(np.random.default_rng(2), 80)
        for devices, share in ((1, 16), (2, 32), (4, 16)):
            run = prepared(
                arrays,
                linear_loss,
                PARAMS,
                devices=devices,
                share=share,
                batch=40,
                small=16,
                ghost=4,
            )
            (found,) = measurements(run, 1)
            order = stream.indices(80, 0, 0, 40)
            x, y = (arrays[name][order].astype(np.float32).astype(float) for name in "xy")
            gradients = x * (x @ PARAMS - y)[:, None]
            sums = [gradients[a:b].sum(0) for a, b in ((0, 16), (16, 32), (32, 40))]
            squares = sum(s @ s / n for s, n in zip(sums, (16, 16, 8), strict=True))
            big = np.sum(gradients.mean(0) ** 2)
            np.testing.assert_allclose(found, (squares, big, 3, 40, 0.5, 0.5), rtol=1e-12)


MEASURED = {"noise_small_batch_examples": 32, "microbatch_examples_per_device": 64}


def test_the_measurement_needs_no_collective():
    programs = trained.prepared(trained.quick(**MEASURED), 8).programs
    for accumulate in programs.accumulate.values():
        assert collectives(accumulate) == {}
    assert collectives(programs.apply_update) == {"all-reduce": 1}


def network_measurements(devices, **changes):
    with jax.enable_x64(True):
        settings = {"epochs": 0.4, **MEASURED, **changes}
        run = trained.prepared(trained.quick("float64", **settings), devices)
        state = jax.device_put(
            jax.device_get(run.init_state()), NamedSharding(run.mesh, step.REPLICATED)
        )
        found = train.updates(run, state, 0)
        return [run.measurement(row, jax.device_get(sums)) for row, _, sums in found]


def test_a_network_with_ghost_norm_measures_the_same_on_every_layout():
    expected = network_measurements(1)
    assert {m.small_batches for m in expected} == {1, 5}
    found = network_measurements(2, microbatch_examples_per_device=96)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_small_batches_are_the_gradients_of_their_examples():
    """The sum over small batches of |gradient|^2 / examples, each gradient computed alone."""
    run = trained.prepared(trained.quick(**MEASURED, log_every_updates=1))
    alone = trained.prepared(trained.quick())
    state, update = run.init_state(), int(np.argmax(run.plan.batch_sizes))
    row, part = run.plan.row(update), run.layout.microbatches(160)
    accumulator = run.programs.empty_accumulator()
    for request in (Request(row.first_example + p.offset_examples, p) for p in part):
        size, examples = run.microbatch(request)
        accumulator = run.programs.accumulate[size](state, accumulator, examples, run.frozen)
    squares = 0.0
    for p in alone.layout.microbatches(160):
        size, examples = alone.microbatch(Request(row.first_example + p.offset_examples, p))
        empty = alone.programs.empty_accumulator()
        one = alone.programs.accumulate[size](state, empty, examples, alone.frozen)
        leaves = jax.tree.leaves(jax.device_get(one.gradients))
        squares += sum(np.sum(np.float64(leaf) ** 2) for leaf in leaves) / 32
    sums = jax.device_get(accumulator.sums)
    assert float(sums["small_batches"][0]) == 5
    np.testing.assert_allclose(sums["small_squares"][0], squares, rtol=1e-4)


def log_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_log_tells_the_noise_or_why_there_is_none(tmp_path):
    run = trained.prepared(trained.quick(**MEASURED))
    trained.train(run, tmp_path)
    records = [r for r in log_of(tmp_path) if "train_loss" in r]
    smoothed = gradient_noise.Smoothed()
    for record in records:
        assert record["gradient_noise_population"] == "training set"
        if record["batch_size"] == 32:
            assert record["gradient_noise_status"] == "fewer than two small batches that differ"
            assert record["gradient_square"] is record["gradient_noise_scale"] is None
            continue
        estimate = gradient_noise.Estimate(record["gradient_square"], record["gradient_variance"])
        measured = gradient_noise.Measurement(0.0, 0.0, 5.0, 160.0)
        smoothed = gradient_noise.smooth(smoothed, estimate, measured, memory_examples=1437)
        assert record["gradient_noise_status"] == smoothed.status
        assert record["gradient_noise_scale"] == pytest.approx(smoothed.noise_scale)
        assert record["gradient_noise_scale_error"] == pytest.approx(smoothed.standard_error)
    assert {r["gradient_noise_status"] for r in records} >= {"not yet warm"}


def test_the_averages_go_on_after_a_checkpoint():
    noise = gradient_noise.Smoothed(0.1, 0.2, 1 / 3, 0.4, 5.0)
    test = {"test_loss": 2.0, "test_accuracy": 0.5}
    progress = Progress(updates=3, train_loss=1.0, test=test, noise=noise)
    assert Progress.read(json.loads(json.dumps(progress._asdict()))) == progress
    assert Progress.read({"updates": 3}).noise == gradient_noise.Smoothed()


@pytest.mark.parametrize(
    ("changes", "field", "nearest"),
    [
        ({"noise_small_batch_examples": 50}, "noise_small_batch_examples", 64),
        ({"noise_small_batch_examples": 0}, "noise_small_batch_examples", 1),
        (
            {"noise_small_batch_examples": 64, "microbatch_examples_per_device": 96},
            "microbatch_examples_per_device",
            128,
        ),
        # Where neighbours would share a ghost batch.
        (
            {"noise_small_batch_examples": 32, "microbatch_examples_per_device": 8},
            "microbatch_examples_per_device",
            32,
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_nearest(changes, field, nearest):
    with pytest.raises(UserError) as error:
        trained.quick(**changes)
    assert [(p.field, p.nearest) for p in error.value.problems] == [(field, nearest)]


def test_a_layout_of_small_batches_is_that_of_their_number():
    settings = {"devices": 4, "ghost_batch_examples": 32}
    cut = make_layout(
        [96, 3200], microbatch_examples_per_device=320, small_batch_examples=160, **settings
    )
    assert all(shape % 160 == 0 for shape in cut.shapes)
    assert sum(m.num_examples for m in cut.microbatches(3200)) == 3200
    for wrong in ({"small_batch_examples": 48}, {"small_batch_examples": 64}):
        with pytest.raises(UserError):
            make_layout([96], microbatch_examples_per_device=96, **wrong, **settings)


@pytest.mark.parametrize(("unit_examples", "masked"), [(None, 0), (8, 0), (2, 0), (2, 6)])
def test_the_units_of_a_share_are_added_in_their_order(unit_examples, masked):
    """Twelve are a loop; each doubles what was there before, but for what is masked."""
    x = np.arange(24.0)
    weight = np.where(np.arange(24) < 24 - masked, 1.0, 0.0)
    examples = {"x": jnp.asarray(x), "weight": jnp.asarray(weight)}
    examples["ghost_mask"] = jnp.asarray(weight.reshape(12, 2).max(axis=1))
    found = units.add_units(
        lambda unit: jnp.sum(unit["weight"] * unit["x"] ** 2),
        lambda total, addend: 2 * total + addend,
        jnp.zeros(()),
        examples,
        unit_examples,
        platform="cpu",
    )
    expected = 0.0
    for part in (weight * x**2)[: 24 - masked].reshape(-1, unit_examples or 24):
        expected = 2 * expected + part.sum()
    assert found == expected
