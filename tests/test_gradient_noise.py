"""Estimates of the gradient noise: closed forms, AdaptDL's formulas, and errors that are true."""

import fractions
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.errors import UserError
from bigbatch.schedule.adaptive.gradient_noise import (
    Estimate,
    Measurement,
    Smoothed,
    best_learning_rate,
    estimate,
    measurement_of,
    shares,
    smooth,
)

DIMENSIONS = 20
MEAN = np.linspace(0.1, 0.4, DIMENSIONS)
DEVIATION = np.linspace(0.5, 3.0, DIMENSIONS)
GRADIENT_SQUARE = float(MEAN @ MEAN)
VARIANCE = float(DEVIATION @ DEVIATION)
EQUAL, UNEQUAL = (8, 8, 8, 8), (8, 8, 8, 3)


def measure(rng, small_batches) -> Measurement:
    """An update whose examples' gradients are normal, its squares taken directly."""
    gradients = rng.normal(MEAN, DEVIATION, (sum(small_batches), DIMENSIONS))
    parts = np.split(gradients, np.cumsum(small_batches)[:-1])
    squares = sum(np.sum(part.sum(0) ** 2) / len(part) for part in parts)
    big = np.sum(gradients.mean(0) ** 2)
    return Measurement(float(squares), float(big), len(parts), len(gradients))


@pytest.mark.parametrize("small_batches", [EQUAL, UNEQUAL, (9, 4, 1)])
def test_estimates_are_unbiased_for_equal_and_unequal_small_batches(small_batches):
    rng = np.random.default_rng(0)
    found = np.array([estimate(measure(rng, small_batches)) for _ in range(20_000)])
    error = found.std(0) / math.sqrt(len(found))
    expected = np.array([GRADIENT_SQUARE, VARIANCE])
    assert np.all(np.abs(found.mean(0) - expected) < 3 * error)
    assert np.all(error < 0.05 * expected)


EPOCH = np.array([[2.0, 0.0], [1.0, -1.0], [-3.0, 1.0], [5.0, 2.0]])
"""The gradients of a training set of four examples."""
SET_SQUARE = float(np.sum(EPOCH.mean(0) ** 2))
SET_VARIANCE = float(EPOCH.var(0, ddof=1).sum())


def over_all_orders(first, size, small, **drawn):
    """The mean estimate over all orders of the epochs that an update of a run meets."""
    num_epochs = -(-(first + size) // len(EPOCH))
    found = []
    for orders in itertools.product(itertools.permutations(range(4)), repeat=num_epochs):
        gradients = EPOCH[np.concatenate(orders)[first : first + size]]
        parts = np.split(gradients, range(small, size, small))
        squares = sum(np.sum(part.sum(0) ** 2) / len(part) for part in parts)
        big = np.sum(gradients.mean(0) ** 2)
        found.append(estimate(Measurement(squares, big, len(parts), size, **drawn)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    ("first", "size", "small"),
    # Within an epoch; a whole one; over an edge, between small batches and in one; more than one.
    [(0, 2, 1), (0, 3, 2), (0, 4, 2), (2, 4, 2), (3, 3, 2), (1, 4, 2), (1, 7, 2), (0, 8, 3)],
)
def test_draws_without_replacement_are_unbiased_for_the_training_set(first, size, small):
    drawn = {
        "share": shares(first, size, size, 4),
        "small_shares": shares(first, size, small, 4),
    }
    found = over_all_orders(first, size, small, **drawn)
    np.testing.assert_allclose(found, (SET_SQUARE, SET_VARIANCE), rtol=1e-12)


def test_taken_for_independent_draws_their_gradient_square_is_low_by_the_variance_over_n():
    for size, small in ((2, 1), (3, 2), (4, 2)):
        found = over_all_orders(0, size, small)
        expected = SET_SQUARE - SET_VARIANCE / 4, SET_VARIANCE
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(st.integers(0, 100), st.integers(1, 60), st.integers(1, 60), st.integers(1, 30))
def test_shares_are_those_of_a_count_of_the_positions(first, count, size, train_examples):
    total = fractions.Fraction(0)
    for begin in range(first, first + count, size):
        positions = range(begin, min(begin + size, first + count))
        epochs = [position // train_examples for position in positions]
        pairs = sum(epochs.count(epoch) ** 2 for epoch in set(epochs))
        total += fractions.Fraction(pairs, len(positions) * train_examples)
    assert shares(first, count, size, train_examples) == pytest.approx(float(total), rel=1e-13)


def test_shares_far_into_a_run_are_exact():
    far = 2**45 // 1437 * 1437
    assert shares(far + 7, 640, 16, 1437) == shares(7, 640, 16, 1437) == 640 / 1437


def test_small_batches_of_whole_epochs_tell_nothing():
    drawn = shares(0, 12, 12, 4), shares(0, 12, 4, 4)
    assert estimate(Measurement(3 * 4 * SET_SQUARE, SET_SQUARE, 3.0, 12.0, *drawn)) is None


def test_estimates_and_averages_are_those_of_adaptdl():
    """AdaptDL takes the mean over small batches of their mean gradients' squares."""
    rng = np.random.default_rng(1)
    smoothed, memory = Smoothed(), 1_000.0
    sqr_avg = var_avg = unbias = 0.0
    for _ in range(30):
        measured = measure(rng, EQUAL)
        count, scale = len(EQUAL), sum(EQUAL)
        local_sqr = measured.small_squares / scale
        total_sqr = measured.big_square
        grad_sqr = (count * total_sqr - local_sqr) / (count - 1)
        grad_var = (local_sqr - total_sqr) * scale / (count - 1)
        found = estimate(measured)
        np.testing.assert_allclose(found, (grad_sqr, grad_var), rtol=1e-12)
        theta = math.exp(-scale / memory)
        sqr_avg = theta * sqr_avg + (1 - theta) * grad_sqr
        var_avg = theta * var_avg + (1 - theta) * grad_var
        unbias = theta * unbias + (1 - theta)
        smoothed = smooth(smoothed, found, measured, memory_examples=memory)
    np.testing.assert_allclose(smoothed.gradient_square, sqr_avg / unbias, rtol=1e-12)
    np.testing.assert_allclose(smoothed.variance, var_avg / unbias, rtol=1e-12)
    assert smoothed.noise_scale == pytest.approx(var_avg / sqr_avg)


def test_an_update_of_one_small_batch_or_of_infinities_has_no_estimate():
    assert estimate(Measurement(5.0, 1.0, 1.0, 8.0)) is None
    assert estimate(Measurement(math.inf, 1.0, 2.0, 8.0)) is None
    assert estimate(Measurement(5.0, math.nan, 2.0, 8.0)) is None


def test_an_update_without_weight_has_measured_nothing():
    sums = dict.fromkeys(("small_squares", "big_square", "small_batches", "examples", "count"), 0.0)
    measured = measurement_of(sums)
    assert estimate(measured) is None
    # Sequences that are all padding: examples, and no tokens.
    assert estimate(measurement_of(sums | {"examples": 32.0, "small_batches": 4.0})) is None
    two = Measurement(0.0, 0.0, 2.0, 32.0)
    before = smooth(Smoothed(), Estimate(2.0, 6.0), two, memory_examples=1e4)
    assert smooth(before, None, measured, memory_examples=1e4) == before


def run(rng, updates, memory_examples):
    """Averages over the updates, whose batches grow from 16 to 64 examples on the way."""
    smoothed = Smoothed()
    for update in range(updates):
        measured = measure(rng, (8,) * (2 if update < updates / 2 else 8))
        found = estimate(measured)
        smoothed = smooth(smoothed, found, measured, memory_examples=memory_examples)
    return smoothed


def test_the_standard_error_is_the_spread_between_runs():
    """Over a growth of the batch: each error against the distance from the truth."""
    rng = np.random.default_rng(2)
    runs = [run(rng, 100, memory_examples=2_500) for _ in range(250)]
    assert all(r.status == "ready" for r in runs)
    truth = VARIANCE / GRADIENT_SQUARE
    scales = np.array([r.noise_scale for r in runs])
    errors = np.array([r.standard_error for r in runs])
    np.testing.assert_allclose(errors.mean(), scales.std(), rtol=0.1)
    for deviations, share in ((1, 0.683), (2, 0.954)):
        covered = np.mean(np.abs(scales - truth) < deviations * errors)
        # Three standard deviations of a share of 250, and a little for the skew of a ratio.
        assert abs(covered - share) < 3 * math.sqrt(share * (1 - share) / 250) + 0.02


def test_averages_equal_a_loop_over_all_weights():
    rng = np.random.default_rng(3)
    memory, sizes = 300.0, [2, 2, 4, 16, 1, 3, 3, 8]
    smoothed, weights, found = Smoothed(), [], []
    for size in sizes:
        measured = measure(rng, (8,) * size)
        fresh = min(1 - math.exp(-8 * size / memory), 0.1)
        weights = [weight * (1 - fresh) for weight in weights]
        if size > 1:
            weights.append(fresh)
            found.append(estimate(measured))
        smoothed = smooth(smoothed, estimate(measured), measured, memory_examples=memory)
    w, (g, v) = np.array(weights), np.array(found).T
    ratio = (w @ v) / (w @ g)
    error = math.sqrt(np.sum((w * (v - ratio * g)) ** 2) / (1 - w @ w / w.sum() ** 2)) / (w @ g)
    assert smoothed.effective_updates == pytest.approx(w.sum() ** 2 / (w @ w))
    assert smoothed.noise_scale == pytest.approx(ratio)
    assert smoothed.standard_error == pytest.approx(error)


def test_what_is_not_warm_or_not_positive_is_said_and_never_given():
    smoothed = Smoothed()
    assert (smoothed.status, smoothed.gradient_square) == ("not yet warm", None)
    measured = Measurement(0.0, 0.0, 4.0, 32.0)
    for update in range(20):
        smoothed = smooth(smoothed, Estimate(2.0, 6.0), measured, memory_examples=1e4)
        assert (smoothed.noise_scale is not None) == (update >= 5), update
    assert smoothed.noise_scale == pytest.approx(3.0)
    assert smoothed.standard_error == pytest.approx(0.0, abs=1e-6)
    for wrong in (Estimate(-2.0, 6.0), Estimate(2.0, -6.0)):
        averaged = smoothed
        for _ in range(100):
            averaged = smooth(averaged, wrong, measured, memory_examples=1e4)
        assert averaged.status == "not positive"
        assert averaged.noise_scale is averaged.standard_error is None


def test_updates_larger_than_the_memory_still_leave_a_spread():
    measured = Measurement(0.0, 0.0, 4.0, 65_536.0)
    smoothed = Smoothed()
    for _ in range(100):
        smoothed = smooth(smoothed, Estimate(1.0, 1.0), measured, memory_examples=1_000)
    # (2 - f) / f with f = 1/10.
    assert smoothed.effective_updates == pytest.approx(19, rel=1e-3)


def test_averages_survive_json_bit_for_bit():
    smoothed = run(np.random.default_rng(4), 10, memory_examples=777.7)
    assert Smoothed(**json.loads(json.dumps(smoothed._asdict()))) == smoothed


def test_a_memory_of_nothing_is_refused():
    with pytest.raises(UserError) as error:
        smooth(Smoothed(), None, Measurement(0.0, 0.0, 0.0, 1.0), memory_examples=0)
    assert error.value.problems[0].field == "memory_examples"


def test_the_best_learning_rate_is_that_of_a_noisy_quadratic():
    """Loss |w|^2 / 2 in one dimension: a move by lr times G + noise/sqrt(B), best lr by search."""
    gradient, variance = 0.7, 5.0
    rates = np.linspace(0, 1, 100_001)
    for batch_size in (1, 10, 1_000):
        second_moment = gradient**2 + variance / batch_size
        loss = -rates * gradient**2 + rates**2 / 2 * second_moment
        best = rates[np.argmin(loss)]
        expected = best_learning_rate(batch_size, variance / gradient**2, largest=1.0)
        assert best == pytest.approx(expected, abs=1e-5)
