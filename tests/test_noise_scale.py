"""The noise scale and its rules, in rational arithmetic or against the paper's numbers."""

import dataclasses
import fractions
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.schedule.noise_scale import (
    LINEAR,
    RULES,
    SEESAW,
    SQUARE_ROOT,
    make_rule,
    noise_scale,
)

SIZES = st.integers(1, 9_999)
MOMENTA = st.sampled_from([0.0, 0.5, 0.9, 0.98])


@given(rate=st.floats(1e-6, 10), size=SIZES, momentum=MOMENTA)
def test_against_rational_arithmetic(rate, size, momentum):
    effective = fractions.Fraction(rate) / (1 - fractions.Fraction(momentum))
    ratio = fractions.Fraction(10_000, size)
    approximate = noise_scale(rate, size, momentum, 10_000)
    assert float(approximate) == pytest.approx(float(effective * ratio), rel=1e-14)


def test_exact_growth_of_the_paper():
    """By 5 from 128 of 50,000: the B that solves N/B - 1 = (N/128 - 1)/5, not 640."""
    rule = make_rule("linear_exact", 50_000)
    grown = rule.grow(np.array([128.0]), np.array([5.0]))
    solution = 50_000 / (1 + (50_000 / 128 - 1) / 5)
    np.testing.assert_allclose(grown, [solution], rtol=1e-14)
    assert 633 < solution < 634
    assert LINEAR.grow(np.array([128.0]), np.array([5.0])) == [640.0]


def test_exact_growth_without_bound_stays_below_the_training_set():
    rule = make_rule("linear_exact", 1000)
    assert rule.grow(np.array([10.0]), np.array([math.inf])) == [1000.0]


@given(name=st.sampled_from(list(RULES)), size=SIZES, new_size=SIZES, momentum=MOMENTA)
def test_moving_there_and_back_and_what_is_kept(name, size, new_size, momentum):
    rule = make_rule(name, 10_000)
    columns = {"learning_rate": 0.3, "momentum": momentum, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
    hyper = {name: np.array([value]) for name, value in columns.items()}
    before, after = np.array([float(size)]), np.array([float(new_size)])
    moved = rule.move(hyper, before, after)
    back = rule.move(moved, after, before)
    for column in columns:
        np.testing.assert_allclose(back[column], hyper[column], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        rule.kept(moved, after, 10_000), rule.kept(hyper, before, 10_000), rtol=1e-12
    )


def test_adam_rule_of_malladi():
    """B times 4: lr times 2, 1-b1 and 1-b2 times 4, eps halved."""
    rule = dataclasses.replace(SQUARE_ROOT, floors={"b1": 0.0, "b2": 0.0})
    hyper = {"learning_rate": 1e-3, "momentum": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    columns = {name: np.array([value]) for name, value in hyper.items()}
    moved = rule.move(columns, np.array([256.0]), np.array([1024.0]))
    expected = {"learning_rate": 2e-3, "momentum": 0.0, "b1": 0.6, "b2": 0.996, "eps": 5e-9}
    for name, value in expected.items():
        np.testing.assert_allclose(moved[name], [value], rtol=1e-12)


def test_seesaw():
    """A cut of the learning rate by 4 becomes a cut by 2 and a batch size times 4."""
    cut = {"learning_rate": np.array([0.1 / 4]), "momentum": np.array([0.0])}
    size = np.array([256.0])
    grown = SEESAW.grow(size, np.array([4.0]))
    assert grown == [1024.0]
    np.testing.assert_allclose(SEESAW.move(cut, size, grown)["learning_rate"], [0.05], rtol=1e-15)
