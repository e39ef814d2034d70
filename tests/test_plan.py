"""The plan against the paper's totals and against a loop that lays out one update at a time."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import errors
from bigbatch.schedule.from_file import as_policy
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import (
    Policy,
    Settings,
    constant,
    cosine,
    exponential,
    from_optax,
    stages,
    step_decay,
    warmup,
)
from bigbatch.schedule.transform import adam, grow_batch, raise_momentum, scale, with_rule
from tests.recipes import EPOCHS, recipes

PAPER = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
CIFAR10 = {
    "decay": (PAPER, 78_125),
    "hybrid": (grow_batch(PAPER, from_epoch=60, until_epoch=120), 34_376),
    "increase": (grow_batch(PAPER, 5120), 29_142),
    "increase_uncapped": (grow_batch(PAPER), 28_876),
    "increase_lr": (grow_batch(scale(PAPER, 5), 5120), 6_407),
    "increase_momentum": (grow_batch(raise_momentum(scale(PAPER, 5), 0.98), 5120), 2_305),
}


def cifar10_plan(name):
    return make_plan(
        CIFAR10[name][0], train_examples=50_000, epochs=200, batch_multiple_examples=128
    )


@pytest.mark.parametrize("name", CIFAR10)
def test_paper_totals(name):
    plan = cifar10_plan(name)
    assert plan.num_updates == CIFAR10[name][1]
    assert plan.num_examples == sum(plan.batch_sizes.tolist())
    assert plan.num_examples - plan.batch_sizes[-1] < 10_000_000 <= plan.num_examples


def test_paper_phases():
    """The (learning rate, batch size) pairs of the paper's table, read at each drop."""
    phases = {
        "increase": [(0.1, 128), (0.1, 640), (0.1, 3200), (0.032, 5120)],
        "increase_lr": [(0.5, 640), (0.5, 3200), (0.16, 5120), (0.032, 5120)],
        "increase_momentum": [(0.5, 3200), (0.16, 5120), (0.032, 5120), (0.0064, 5120)],
    }
    for name, expected in phases.items():
        plan = cifar10_plan(name)
        rows = [plan.row(plan.at_epoch(e) + 1) for e in (0, 60, 120, 160)]
        assert [row.batch_size for row in rows] == [b for _, b in expected]
        np.testing.assert_allclose(
            [row.hyper["learning_rate"] for row in rows], [lr for lr, _ in expected], rtol=1e-12
        )


@pytest.mark.parametrize("name", CIFAR10)
def test_against_one_update_at_a_time(name):
    """A loop with its own arithmetic for step decay: time in integers, sizes by division."""
    position, sizes, scales = 0, [], []
    while position < 200 * 50_000:
        drops = sum(position >= boundary * 50_000 for boundary in (60, 120, 160))
        if name == "decay":
            grown = 0
        elif name == "hybrid":
            grown = min(drops, 1)
        else:
            grown = drops
        base = {"increase_lr": 640, "increase_momentum": 3200}.get(name, 128)
        limit = 5120 if name not in ("decay", "hybrid", "increase_uncapped") else math.inf
        sizes.append(min(base * 5**grown, limit))
        scales.append(0.1 * 0.2**drops * 50_000 / (128 * 0.1))
        position += sizes[-1]
    plan = cifar10_plan(name)
    assert plan.batch_sizes.tolist() == sizes
    np.testing.assert_allclose(plan.noise_scales, scales, rtol=1e-12)


def test_rounding_leaves_whole_sizes_alone():
    """3200 comes out of 640 * 0.1 / 0.02 as 3199.9999999999964; the learning rate stays 0.5."""
    plan = cifar10_plan("increase_momentum")
    assert CIFAR10["increase_momentum"][0].at(0.0).batch_size[0] != 3200
    assert plan.hyper(0) == {"batch_size": 3200, "learning_rate": 0.5, "momentum": 0.98}


INCEPTION = step_decay(3.0, 8192, 0.9, boundaries_epochs=[30, 60, 80], factor=0.1)
GOYAL = warmup(
    step_decay(3.2, 8192, 0.9, boundaries_epochs=[30, 60, 80], factor=0.1),
    warmup_epochs=5,
    initial_learning_rate=0.1,
)
IMAGENET = {
    "fig 6, decay": (INCEPTION, 14_076),
    "fig 6, first drop by batch size": (
        grow_batch(INCEPTION, from_epoch=30, until_epoch=60),
        5_631,
    ),
    "fig 7, m 0.9": (grow_batch(INCEPTION, 65_536), 5_865),
    "fig 7, m 0.95": (grow_batch(raise_momentum(INCEPTION, 0.95), 65_536), 3_519),
    "fig 7, m 0.975": (grow_batch(raise_momentum(INCEPTION, 0.975), 65_536), 2_346),
    "ResNet-50, decay": (GOYAL, 14_076),
    "ResNet-50, 8,192 to 16,384": (grow_batch(GOYAL, 16_384), 9_384),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_totals(name):
    policy, num_updates = IMAGENET[name]
    plan = make_plan(policy, train_examples=1_281_167, epochs=90, batch_multiple_examples=64)
    assert plan.num_updates == num_updates


def test_resnet50_grows_from_8192_to_16384():
    plan = make_plan(
        grow_batch(GOYAL, 16_384), train_examples=1_281_167, epochs=90, batch_multiple_examples=32
    )
    assert [(s.batch_size, round(s.epoch)) for s in plan.stages] == [(8192, 0), (16_384, 30)]
    assert plan.stages[1].learning_rate == pytest.approx(0.64)
    assert plan.row(0).hyper["learning_rate"] == pytest.approx(0.1)


def one_at_a_time(policy, train_examples, epochs):
    """Rows by a plain loop: floor of the real batch size, position after position."""
    position, sizes, rates = 0, [], []
    while position < epochs * train_examples:
        batch_size, hyper = policy.at(position / train_examples)
        size = math.floor(batch_size[0] * (1 + 9e-13))
        sizes.append(size)
        rates.append(hyper["learning_rate"][0])
        position += size
    return sizes, rates


@given(recipe=recipes())
def test_random_plans_against_one_update_at_a_time(recipe):
    plan = make_plan(recipe.policy, train_examples=recipe.train_examples, epochs=EPOCHS)
    sizes, rates = one_at_a_time(recipe.policy, recipe.train_examples, EPOCHS)
    assert plan.batch_sizes.tolist() == sizes
    real = recipe.policy.at(plan.first_examples / recipe.train_examples).batch_size
    np.testing.assert_allclose(
        plan.hypers["learning_rate"], rates * (plan.batch_sizes / real), rtol=2e-12
    )


@given(seed=st.integers(0, 1000), largest=st.integers(1, 60), train_examples=st.integers(1, 3000))
def test_erratic_batch_sizes_against_one_update_at_a_time(seed, largest, train_examples):
    """A batch size that changes with every position, which no guess foresees."""
    table = np.random.default_rng(seed).integers(1, largest + 1, 4 * train_examples).astype(float)

    def settings_at(epochs):
        sizes = table[np.rint(epochs * train_examples).astype(int)]
        return Settings(sizes, {"learning_rate": 1 / sizes, "momentum": np.zeros(len(sizes))})

    plan = make_plan(Policy(settings_at), train_examples=train_examples, epochs=1.5)
    sizes, rates = one_at_a_time(Policy(settings_at), train_examples, 1.5)
    assert plan.batch_sizes.tolist() == sizes
    assert plan.hypers["learning_rate"].tolist() == rates


@given(recipe=recipes(), data=st.data())
def test_positions(recipe, data):
    plan = make_plan(recipe.policy, train_examples=recipe.train_examples, epochs=EPOCHS)
    assert plan.first_examples[0] == 0
    assert np.diff(plan.first_examples).tolist() == plan.batch_sizes[:-1].tolist()
    assert plan.num_examples == sum(plan.batch_sizes.tolist())
    # The last update is the first that completes the run.
    end = EPOCHS * recipe.train_examples
    assert plan.num_examples - plan.batch_sizes[-1] < end <= plan.num_examples
    update = data.draw(st.integers(0, plan.num_updates - 1))
    row = plan.row(update)
    assert plan.at_example(row.first_example) == update
    assert type(plan.at_example(row.first_example)) is int
    assert plan.at_example(row.first_example + row.batch_size - 1) == update
    position = data.draw(st.integers(0, plan.num_examples - 1))
    row = plan.row(plan.at_example(position))
    assert row.first_example <= position < row.first_example + row.batch_size
    assert sum(stage.num_updates for stage in plan.stages) == plan.num_updates
    assert [s.first_update for s in plan.stages[1:]] == [
        u for u in range(1, plan.num_updates) if plan.batch_sizes[u] != plan.batch_sizes[u - 1]
    ]


@given(recipe=recipes())
def test_json_round_trip(recipe):
    plan = make_plan(recipe.policy, train_examples=recipe.train_examples, epochs=EPOCHS)
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert plan.diff(again) is None
    assert again.batch_sizes.tolist() == plan.batch_sizes.tolist()
    for name, column in plan.hypers.items():
        assert again.hypers[name].tolist() == column.tolist()
    written = json.loads(plan.to_json())
    assert {key: written[key] for key in plan.summary()} == plan.summary()


def test_summary_of_the_paper():
    """The object that `bigbatch plan --json` prints, written out."""
    summary = cifar10_plan("increase_momentum").summary()
    stages = summary.pop("stages")
    assert len(summary.pop("fingerprint")) == 64
    assert summary == {
        "train_examples": 50_000,
        "epochs": 200.0,
        "num_updates": 2305,
        "num_examples": 10_000_640,
    }
    keys = "first_update num_updates first_example epoch batch_size learning_rate "
    keys += "last_learning_rate momentum noise_scale"
    expected = [
        (0, 938, 0, 0.0, 3200, 0.5, 0.5, 0.98, 390.625),
        (938, 1367, 3_001_600, 60.032, 5120, 0.16, 0.0064, 0.98, 78.125),
    ]
    for stage, values in zip(stages, expected, strict=True):
        assert stage == pytest.approx(dict(zip(keys.split(), values, strict=True)), rel=1e-12)


def test_at_epoch():
    plan = make_plan(constant(0.1, 7), train_examples=10, epochs=3)
    # Updates start at 0, 7, 14, 21 and 28.
    assert [plan.at_epoch(e) for e in (0, 0.7, 0.71, 1, 2, 2.1)] == [0, 1, 1, 1, 2, 3]
    assert plan.at_example(np.array([[6, 7], [13, 34]])).tolist() == [[0, 1], [1, 4]]
    with pytest.raises(errors.UserError, match=r"position: given 35; nearest: 34; .* 0 to 34"):
        plan.at_example(35)
    with pytest.raises(IndexError):
        plan.row(5)


@pytest.mark.parametrize("epochs", [0.1, 0.3, 1.1, 2.7])
def test_a_run_of_a_fraction_of_an_epoch(epochs):
    """In tenths of an epoch, where the product with N is not a whole float."""
    plan = make_plan(constant(0.1, 1), train_examples=1000, epochs=epochs)
    assert plan.num_updates == round(epochs * 1000)


def test_a_batch_larger_than_the_training_set():
    plan = make_plan(constant(0.1, 25), train_examples=10, epochs=6)
    assert plan.first_examples.tolist() == [0, 25, 50]
    assert plan.num_examples == 75


def test_a_million_updates_with_continuous_growth():
    """B(e) = 20 * 2^e, rounded down: the time at each whole size, over that size."""
    policy = grow_batch(exponential(0.1, 20, 0.9, factor=0.5, every_epochs=1))
    plan = make_plan(policy, train_examples=14_000_000, epochs=8)
    sizes = np.arange(20, 20 * 2**8)
    epochs_at_size = np.log2((sizes + 1) / sizes)
    assert plan.num_updates > 1_000_000
    assert plan.num_updates == pytest.approx(14_000_000 * np.sum(epochs_at_size / sizes), rel=1e-3)
    assert len(plan.stages) > 4000


@pytest.mark.parametrize("enable_x64", [False, True])
def test_optax_schedules(enable_x64):
    """Equal to the host's values rounded to float32: called, compiled, mapped."""
    source = with_rule(adam(cosine(0.1, 32, until_epoch=4)), "square_root")
    plan = make_plan(grow_batch(source, 200), train_examples=3000, epochs=4)
    counts = np.arange(plan.num_updates)
    with jax.enable_x64(enable_x64):
        for name, column in {**plan.hypers, "batch_size": plan.batch_sizes}.items():
            schedule = plan.schedule(name)
            dtype = np.int32 if name == "batch_size" else np.float32
            for values in (schedule(counts), jax.jit(jax.vmap(schedule))(counts)):
                assert values.dtype == dtype
                assert values.tolist() == column.astype(dtype).tolist()
            assert schedule(3).shape == ()
            assert schedule(10**6) == column.astype(dtype)[-1]
        assert plan.learning_rate(5) == np.float32(plan.hyper(5)["learning_rate"])
        assert plan.momentum(5) == 0
        assert plan.batch_size(5) == plan.hyper(5)["batch_size"]


def test_a_batch_size_of_more_than_31_bits_is_no_schedule():
    """On the host it is exact; JAX's int32 would give -1,073,741,824."""
    policy = step_decay(0.1, 3 * 2**30, 0.9, boundaries_epochs=[1], factor=0.5)
    plan = make_plan(policy, train_examples=2**32, epochs=2)
    assert plan.hyper(0)["batch_size"] == 3_221_225_472
    with pytest.raises(errors.UserError, match=r"batch_size: given 3221225472; .* below 2\^31"):
        plan.batch_size(0)
    just_below = make_plan(constant(0.1, 2**31 - 1), train_examples=2**32, epochs=1)
    assert just_below.batch_size(0) == 2**31 - 1


def test_more_examples_than_can_be_told_apart_are_refused():
    plan = make_plan(constant(0.1, 2**40), train_examples=2**32, epochs=2**16)
    assert plan.num_examples == 2**48
    with pytest.raises(errors.UserError, match=r"epochs: given 65537; nearest: 65536"):
        make_plan(constant(0.1, 2**40), train_examples=2**32, epochs=2**16 + 1)


def test_inject_hyperparams():
    """Optax's own state shows the plan's values, and the parameters follow by hand."""
    plan = make_plan(
        grow_batch(step_decay(0.1, 4, 0.9, boundaries_epochs=[1, 2], factor=0.5), 8),
        train_examples=12,
        epochs=3,
    )
    optimizer = optax.inject_hyperparams(optax.sgd)(plan.learning_rate, plan.momentum)
    params = jnp.ones(())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    weight, velocity = 1.0, 0.0
    for k in range(plan.num_updates):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        hyper = plan.hyper(k)
        velocity = hyper["momentum"] * velocity + weight
        weight -= hyper["learning_rate"] * velocity
        assert state.hyperparams["learning_rate"] == np.float32(hyper["learning_rate"])
        assert float(params) == pytest.approx(weight, rel=1e-5)


def test_optax_source_through_growth_keeps_its_own_clock():
    """A schedule of 600 updates of 10 becomes growth; the noise scale stays its own everywhere."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.2, 60, 600, 0.002)
    source = from_optax(schedule, 10, 0.9, train_examples=1000, epochs=6)
    plan = make_plan(grow_batch(source, 400), train_examples=1000, epochs=6)
    with jax.enable_x64(True):
        rates = np.array([float(schedule(p // 10)) for p in plan.first_examples.tolist()])
    np.testing.assert_allclose(plan.noise_scales, rates * 1000 / (10 * (1 - 0.9)), rtol=1e-12)
    assert plan.batch_sizes[:60].tolist() == [10] * 60
    assert plan.batch_sizes.max() == 400


def test_diff_names_the_first_update():
    assert cifar10_plan("decay").diff(cifar10_plan("increase")) == math.ceil(60 * 50_000 / 128)
    assert cifar10_plan("decay").diff(cifar10_plan("decay")) is None
    short = make_plan(PAPER, train_examples=50_000, epochs=1, batch_multiple_examples=128)
    assert short.diff(cifar10_plan("decay")) == short.num_updates


def test_stated_batch_size_is_never_rounded():
    policy = step_decay(0.1, 100, 0.9, boundaries_epochs=[1], factor=0.2)
    with pytest.raises(errors.UserError) as caught:
        make_plan(
            grow_batch(policy, 1000), train_examples=1000, epochs=2, batch_multiple_examples=32
        )
    assert [(p.field, p.given, p.nearest) for p in caught.value.problems] == [
        ("batch_size", 100, 96),
        ("max_batch_size", 1000, 992),
    ]


def test_diff_of_hyperparameters():
    plan = make_plan(constant(0.1, 7), train_examples=100, epochs=3)
    other = np.full(plan.num_updates, 0.1)
    other[20:] *= 1 + 1e-8
    hypers = {**plan.hypers, "learning_rate": other}
    assert plan.diff(Plan(100, 3.0, "linear", plan.batch_sizes.copy(), hypers)) == 20
    near = {**plan.hypers, "learning_rate": 0.1 * (1 + 1e-11) * np.ones(plan.num_updates)}
    changed = Plan(100, 3.0, "linear", plan.batch_sizes.copy(), near)
    assert plan.diff(changed) is None
    assert changed.fingerprint == plan.fingerprint
    assert plan.diff(make_plan(constant(0.1, 7), train_examples=99, epochs=3)) == 0


def test_fingerprint_sees_every_column():
    prints = {
        make_plan(policy, train_examples=n, epochs=e).fingerprint
        for policy in (
            constant(0.1, 7),
            constant(0.1001, 7),
            constant(0.1, 8),
            constant(0.1, 7, 0.5),
        )
        for n, e in ((100, 3), (101, 3), (100, 3.01))
    }
    assert len(prints) == 12


def test_the_recipe_of_a_plan_turns_where_the_plan_does():
    """At its sizes and where its rate jumps up: a constant rate is one piece."""
    plan = make_plan(constant(0.1, 10), train_examples=100, epochs=3)
    assert as_policy(plan).turning_epochs == (0.0,)
    rising = dataclasses.replace(
        plan, hypers=plan.hypers | {"learning_rate": np.repeat([0.1, 0.2], 15)}
    )
    assert as_policy(rising).turning_epochs == (0.0, 1.5)


def test_a_plan_cannot_be_changed():
    plan = make_plan(constant(0.1, 7), train_examples=100, epochs=3)
    for column in (plan.batch_sizes, plan.first_examples, plan.noise_scales, *plan.hypers.values()):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


GROWN = step_decay(0.1, 64, 0.9, boundaries_epochs=[1], factor=0.1)
MISTAKES = {
    "arguments": (
        lambda: make_plan(GROWN, train_examples=0, epochs=-1, batch_multiple_examples=1.5),
        [("train_examples", 1), ("epochs", None), ("batch_multiple_examples", 2)],
    ),
    "scaled size": (
        lambda: make_plan(
            scale(GROWN, 1.25), train_examples=1000, epochs=2, batch_multiple_examples=32
        ),
        [("factor", 1.0)],
    ),
    "below the multiple": (
        lambda: make_plan(
            raise_momentum(scale(GROWN, 0.25), 0.92),
            train_examples=1000,
            epochs=2,
            batch_multiple_examples=32,
        ),
        [("batch_size", 32)],
    ),
    "a pause, without bound": (
        lambda: make_plan(
            grow_batch(stages("0:0.1 1_epochs:0 2_epochs:0.1", "0:64")),
            train_examples=1000,
            epochs=3,
        ),
        [("max_batch_size", None)],
    ),
    "exact for another N": (
        lambda: make_plan(
            with_rule(GROWN, "linear_exact", train_examples=999), train_examples=1000, epochs=2
        ),
        [("train_examples", 999)],
    ),
    "exact and full batch": (
        lambda: make_plan(
            scale(with_rule(GROWN, "linear_exact", train_examples=100), 4),
            train_examples=100,
            epochs=2,
        ),
        [("max_batch_size", 99)],
    ),
    "no JSON": (lambda: Plan.from_json("[]"), [("plan", None)]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, expected = MISTAKES[name]
    with pytest.raises(errors.UserError) as caught:
        make()
    assert [(p.field, p.nearest) for p in caught.value.problems] == expected
