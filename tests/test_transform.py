"""The algebra: what every rule keeps, for random recipes, and where composition commutes."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import errors
from bigbatch.schedule.noise_scale import noise_scale
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import (
    Policy,
    constant,
    cosine,
    polynomial,
    stages,
    step_decay,
    warmup,
)
from bigbatch.schedule.transform import (
    TRANSFORMATIONS,
    adam,
    doubling_only,
    grow_batch,
    raise_momentum,
    scale,
    with_rule,
)
from tests.recipes import EPOCHS, Recipe, recipes, sources

GRID = np.linspace(0, EPOCHS, 97)


def planned(recipe: Recipe, multiple=1):
    """The plan, and what the source says where each of its updates starts."""
    plan = make_plan(
        recipe.policy,
        train_examples=recipe.train_examples,
        epochs=EPOCHS,
        batch_multiple_examples=multiple,
    )
    return plan, recipe.source.at(plan.first_examples / recipe.train_examples)


@given(recipe=recipes())
def test_linear_rule_keeps_the_noise_scale(recipe):
    plan, (batch_size, hyper) = planned(recipe)
    before = noise_scale(hyper["learning_rate"], batch_size, hyper["momentum"], plan.train_examples)
    after = noise_scale(
        plan.hypers["learning_rate"], plan.batch_sizes, plan.hypers["momentum"], plan.train_examples
    )
    np.testing.assert_allclose(after, before, rtol=1e-12)
    np.testing.assert_allclose(plan.noise_scales, before, rtol=1e-12)
    assert plan.batch_sizes.min() >= 1
    assert plan.batch_sizes.max() <= recipe.max_batch_size * (1 + 1e-12)
    assert plan.hypers["learning_rate"].max() <= recipe.peak * (1 + 1e-12)


def exact_noise_scale(learning_rate, batch_size, momentum, train_examples):
    """The paper's, before it is approximated: lr / (1 - m) * (N/B - 1)."""
    return learning_rate / (1 - momentum) * (train_examples / batch_size - 1)


@given(recipe=recipes(rule="linear_exact"))
def test_exact_rule_keeps_the_exact_noise_scale(recipe):
    plan, (batch_size, hyper) = planned(recipe)
    rates, momenta = plan.hypers["learning_rate"], plan.hypers["momentum"]
    before = exact_noise_scale(
        hyper["learning_rate"], batch_size, hyper["momentum"], plan.train_examples
    )
    after = exact_noise_scale(rates, plan.batch_sizes, momenta, plan.train_examples)
    # N/B - 1, which both sides of this test compute, loses digits as B comes near N.
    tolerance = 1e-12 * plan.train_examples / (plan.train_examples - plan.batch_sizes)
    assert np.all(np.abs(after - before) <= tolerance * before)
    assert plan.batch_sizes.min() >= 1
    assert plan.batch_sizes.max() <= recipe.max_batch_size


@given(recipe=recipes(rule="seesaw"))
def test_seesaw_keeps_lr_over_the_root_of_the_batch_size(recipe):
    plan, (batch_size, hyper) = planned(recipe)
    np.testing.assert_allclose(
        plan.hypers["learning_rate"] / np.sqrt(plan.batch_sizes),
        hyper["learning_rate"] / np.sqrt(batch_size),
        rtol=1e-12,
    )
    assert plan.batch_sizes.max() <= recipe.max_batch_size * (1 + 1e-12)


@given(source=sources(momentum=0.0), limit=st.floats(1, 9.9), factor=st.floats(0.5, 1))
def test_square_root_rule_keeps_its_four(source, limit, factor):
    """lr/sqrt(B), (1-b1)/B, (1-b2)/B and eps sqrt(B); b1 = 0.9 allows ten times the batch size."""
    base = source.stated_peak_batch_size
    exact = {"b1_floor": 0.0, "b2_floor": 0.0}
    ready = with_rule(adam(source, 0.9, 0.99, 1e-6), "square_root", **exact)
    grown = scale(grow_batch(ready, math.floor(base * limit)), factor)
    grown = dataclasses.replace(grown, stated_batch_sizes=())
    plan = make_plan(grown, train_examples=30 * int(base), epochs=EPOCHS) if factor == 1 else None
    if plan is None:
        sizes, hypers = grown.at(GRID)
        hyper = source.at(GRID).hyper
    else:
        sizes, hypers = plan.batch_sizes, plan.hypers
        hyper = source.at(plan.first_examples / plan.train_examples).hyper
    np.testing.assert_allclose(
        hypers["learning_rate"] / np.sqrt(sizes), hyper["learning_rate"] / base**0.5, rtol=1e-12
    )
    np.testing.assert_allclose((1 - hypers["b1"]) / sizes, 0.1 / base, rtol=1e-12)
    np.testing.assert_allclose((1 - hypers["b2"]) / sizes, 0.01 / base, rtol=1e-12)
    np.testing.assert_allclose(hypers["eps"] * np.sqrt(sizes), 1e-6 * base**0.5, rtol=1e-12)


def test_square_root_rule_trades_a_decay_by_d_for_growth_by_d_squared():
    source = adam(step_decay(1e-3, 100, boundaries_epochs=[1], factor=0.5))
    batch_size, hyper = grow_batch(with_rule(source, "square_root")).at([0, 1])
    assert batch_size.tolist() == [100, 400]
    assert hyper["learning_rate"].tolist() == [1e-3, 1e-3]


@pytest.mark.parametrize("multiple", [8, 32])
@given(recipe=recipes())
def test_rounding_down_to_a_multiple(multiple, recipe):
    """Against the real batch sizes: less than a multiple below, and the noise scale still holds."""
    first = 40 / recipe.source.stated_peak_batch_size
    policy = scale(recipe.policy, first)
    recipe = dataclasses.replace(recipe, policy=dataclasses.replace(policy, stated_batch_sizes=()))
    plan, (batch_size, hyper) = planned(recipe, multiple)
    real = recipe.policy.at(plan.first_examples / plan.train_examples).batch_size
    assert not np.any(plan.batch_sizes % multiple)
    assert np.all(plan.batch_sizes <= real * (1 + 1e-12))
    assert np.all(plan.batch_sizes > real - multiple)
    np.testing.assert_allclose(
        plan.noise_scales,
        noise_scale(hyper["learning_rate"], batch_size, hyper["momentum"], plan.train_examples),
        rtol=1e-12,
    )


def assert_same(one: Policy, other: Policy):
    (size, hyper), (other_size, other_hyper) = one.at(GRID), other.at(GRID)
    np.testing.assert_allclose(size, other_size, rtol=1e-12)
    assert hyper.keys() == other_hyper.keys()
    for name, column in hyper.items():
        np.testing.assert_allclose(column, other_hyper[name], rtol=1e-12, atol=1e-15)


@given(
    source=sources(momentum=0.9), c=st.floats(0.5, 8), d=st.floats(0.5, 8), room=st.floats(1, 99)
)
def test_composition_in_either_order(source, c, d, room):
    most = math.ceil(room * source.stated_peak_batch_size)
    assert_same(scale(scale(source, c), d), scale(source, c * d))
    assert_same(scale(grow_batch(source, most), c), grow_batch(scale(source, c), c * most))
    assert_same(raise_momentum(scale(source, c), 0.95), scale(raise_momentum(source, 0.95), c))
    assert_same(
        raise_momentum(grow_batch(source, most), 0.95),
        grow_batch(raise_momentum(source, 0.95), 2.0000000000000018 * most),
    )
    assert_same(
        raise_momentum(grow_batch(source, most), 0.95, by="learning_rate"),
        grow_batch(raise_momentum(source, 0.95, by="learning_rate"), most),
    )
    assert_same(raise_momentum(raise_momentum(source, 0.95), 0.98), raise_momentum(source, 0.98))
    assert_same(grow_batch(grow_batch(source, most), 2 * most), grow_batch(source, 2 * most))
    assert_same(doubling_only(doubling_only(source)), doubling_only(source))


def test_a_limit_a_rounding_below_the_base_batch_is_that_batch():
    c = 1.9999999999999991
    source = constant(0.1, 1, 0.9)
    assert_same(grow_batch(scale(source, c), c), scale(source, c))
    with pytest.raises(errors.UserError, match=r"max_batch_size: given 1\.99; nearest: 2; "):
        grow_batch(scale(source, c), 1.99)


def test_growth_and_warmup_commute_where_the_decay_comes_after():
    decay = step_decay(0.1, 10, 0.9, boundaries_epochs=[3, 5], factor=0.2)
    one = warmup(grow_batch(decay, 100), warmup_epochs=2, initial_learning_rate=0.01)
    other = grow_batch(warmup(decay, warmup_epochs=2, initial_learning_rate=0.01), 100)
    assert_same(one, other)
    assert other.at([0, 1.9]).batch_size.tolist() == [10, 10]


def test_growth_in_two_parts_is_growth():
    decay = cosine(0.1, 10, 0.9, until_epoch=EPOCHS, final_learning_rate=0.001)
    parts = grow_batch(grow_batch(decay, until_epoch=2.5), from_epoch=2.5)
    assert_same(parts, grow_batch(decay))
    assert_same(grow_batch(doubling_only(grow_batch(decay))), grow_batch(decay))


def test_hybrid():
    """Only the middle drop becomes growth; what it reached stays."""
    decay = step_decay(0.8, 10, 0.9, boundaries_epochs=[1, 2, 3], factor=0.5)
    batch_size, hyper = grow_batch(decay, from_epoch=2, until_epoch=3).at([0, 1, 2, 3, 5])
    assert batch_size.tolist() == [10, 10, 20, 20, 20]
    assert hyper["learning_rate"].tolist() == [0.8, 0.4, 0.4, 0.2, 0.2]


def test_growth_never_passes_the_peak_where_the_learning_rate_rises_again():
    cycles = stages("0:0.8 1_epochs:0.1 2_epochs:0.8 3_epochs:0.2", "0:10")
    batch_size, hyper = grow_batch(cycles, until_epoch=2).at([0, 1, 2, 3])
    assert batch_size.tolist() == [10, 80, 10, 40]
    assert hyper["learning_rate"].tolist() == [0.8, 0.8, 0.8, 0.8]


def test_growth_waits_for_the_peak():
    rising = stages("0:0.2 1_epochs:0.1 2_epochs:0.4 3_epochs:0.2", "0:10")
    batch_size, hyper = grow_batch(rising).at([0, 1, 2, 3])
    assert batch_size.tolist() == [10, 10, 10, 20]
    assert hyper["learning_rate"].tolist() == [0.2, 0.1, 0.4, 0.4]


def test_growth_of_a_grown_policy_starts_at_the_same_peak():
    """The first growth may bring the last rate to 10.000000000000002, which is no new peak."""
    for rate in np.linspace(5, 10, 200):
        source = stages(f"0:10 1_epochs:2.5 2_epochs:{rate}", "0:1")
        assert_same(grow_batch(grow_batch(source, 2), 4), grow_batch(source, 4))


def test_a_learning_rate_of_zero_takes_the_largest_batch_size():
    gone = polynomial(0.4, 10, until_epoch=2)
    batch_size, hyper = grow_batch(gone, 50).at([1, 2, 3])
    assert batch_size.tolist() == [20, 50, 50]
    assert hyper["learning_rate"].tolist() == [0.4, 0, 0]


@given(source=sources(), most=st.integers(40, 900))
def test_doubling_only(source, most):
    """Against a loop that doubles while there is room."""
    grown = grow_batch(source, most)
    sizes = doubling_only(grown).at(GRID).batch_size.tolist()
    first = grown.at(0.0).batch_size[0]
    for size, real in zip(sizes, grown.at(GRID).batch_size.tolist(), strict=True):
        doubled = first
        while 2 * doubled <= real * (1 + 1e-12):
            doubled *= 2
        assert size == doubled


BASE = step_decay(0.1, 64, 0.9, boundaries_epochs=[2], factor=0.1)
MISTAKES = {
    "scale": (lambda: scale(BASE, 0), [("factor", None)]),
    "momentum": (
        lambda: raise_momentum(BASE, 0.5, by="lr"),
        [("momentum", 0.9), ("by", "batch_size")],
    ),
    "momentum 1": (lambda: raise_momentum(BASE, 1.0), [("momentum", 0.999)]),
    "momentum under Seesaw": (
        lambda: raise_momentum(with_rule(BASE, "seesaw"), 0.95),
        [("rule", "linear")],
    ),
    "B_max below B": (lambda: grow_batch(BASE, 32), [("max_batch_size", 64)]),
    # 64 * (1 - 0.9) / (1 - 0.98) is 319.9999999999997, and / (1 - 0.97) is 213.33.
    "B_max below a size that is whole but for rounding": (
        lambda: grow_batch(raise_momentum(BASE, 0.98), 310),
        [("max_batch_size", 320)],
    ),
    "B_max below a size that is not whole": (
        lambda: grow_batch(raise_momentum(BASE, 0.97), 213),
        [("max_batch_size", 214)],
    ),
    "B_max is text": (lambda: grow_batch(BASE, "5120"), [("max_batch_size", None)]),
    "order": (
        lambda: grow_batch(BASE, from_epoch=3, until_epoch=2),
        [("until_epoch", None)],
    ),
    "before the start": (lambda: grow_batch(BASE, from_epoch=-1), [("from_epoch", 0)]),
    "no B_max and lr 0": (
        lambda: grow_batch(cosine(0.1, 64, until_epoch=3)),
        [("max_batch_size", None)],
    ),
    "exact beyond N": (
        lambda: grow_batch(with_rule(BASE, "linear_exact", train_examples=1000), 1024),
        [("max_batch_size", 999)],
    ),
    "exact without N": (lambda: with_rule(BASE, "linear_exact"), [("train_examples", None)]),
    "rule": (lambda: with_rule(BASE, "square_rot"), [("rule", "square_root")]),
    "no Adam": (lambda: with_rule(BASE, "square_root"), [("rule", "linear")]),
    "Adam with momentum": (
        lambda: adam(BASE, b1=1.0, b2=-0.1, eps=-1),
        [("b1", 0.999), ("b2", 0), ("eps", 0), ("momentum", 0.0)],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, expected = MISTAKES[name]
    with pytest.raises(errors.UserError) as caught:
        make()
    assert [(p.field, p.nearest) for p in caught.value.problems] == expected
    assert all(p.allowed for p in caught.value.problems)


def test_growth_may_end_before_the_learning_rate_is_zero():
    ends_early = grow_batch(polynomial(0.1, 64, until_epoch=4), until_epoch=3)
    assert ends_early.at([3.5]).batch_size[0] == pytest.approx(256)


def test_registry_applies_to_a_policy():
    made = TRANSFORMATIONS["scale"](policy=constant(0.1, 8), factor=2)
    assert made.at(0.0).batch_size.tolist() == [16]
