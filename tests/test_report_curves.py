"""The curves on common epochs, and the statistic that compares them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.commands.report.curves import bin_means, curve_gap


def training(sizes, losses, lost=()):
    ends = np.cumsum(np.asarray(sizes, dtype=np.float64))
    since = np.append(0.0, ends[:-1])
    since[list(lost)] = np.nan
    return {
        "examples": ends,
        "since_examples": since,
        "train_loss": np.asarray(losses, dtype=np.float64),
    }


def gaps_by_hand(own, other):
    """d(e)/s(e) by the formulas of the docstring, one number at a time."""
    epochs = range(len(own[0]))
    logs = [[[math.log(max(x, 1e-6)) for x in run] for run in group] for group in (own, other)]
    means = [[sum(run[e] for run in group) / len(group) for e in epochs] for group in logs]
    freedom = len(own) + len(other) - 2
    variances = [
        sum((run[e] - means[g][e]) ** 2 for g in (0, 1) for run in logs[g]) / freedom
        for e in epochs
    ]
    gaps = []
    for e in epochs:
        near = [variances[i] for i in (e - 1, e, e + 1) if i in epochs]
        gaps.append((means[0][e] - means[1][e]) / math.sqrt(sum(near) / len(near)))
    return gaps


def rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


def wandering_losses(rng, num_runs, *, epochs=30, memory=0.0, offset=0.0, spread=0.1):
    """Losses that fall over four orders of magnitude, with a log error of its own for each run."""
    errors = rng.standard_normal((num_runs, epochs))
    for e in range(1, epochs):
        errors[:, e] = memory * errors[:, e - 1] + math.sqrt(1 - memory**2) * errors[:, e]
    return np.exp(0.8 - 0.3 * np.arange(epochs) + offset + spread * errors)


@given(
    records=st.lists(st.tuples(st.integers(1, 70), st.floats(1e-4, 10)), min_size=1, max_size=30),
    epoch_examples=st.integers(1, 50),
)
def test_bin_means_count_each_example_with_its_records_loss(records, epoch_examples):
    sizes, losses = zip(*records, strict=True)
    each = np.repeat(losses, sizes)
    epochs = -(-len(each) // epoch_examples)
    edges = np.arange(epochs + 1.0) * epoch_examples
    got = bin_means(training(sizes, losses), "train_loss", edges)
    for e in range(epochs):
        part = each[e * epoch_examples : (e + 1) * epoch_examples]
        if len(part) >= 0.9 * epoch_examples:
            # A small mean is the difference of two sums that may be 1e5 times as large.
            np.testing.assert_allclose(got[e], np.mean(part), rtol=1e-9, atol=1e-11)
        else:
            assert np.isnan(got[e])


def test_a_record_longer_than_an_epoch_counts_in_each_of_its_epochs():
    got = bin_means(training([25, 5], [2.0, 8.0]), "train_loss", np.array([0.0, 10, 20, 30]))
    np.testing.assert_allclose(got, [2.0, 2.0, 5.0])


def test_a_range_with_an_unknown_start_costs_its_epochs_and_no_others():
    columns = training([10, 10, 5, 5, 10], [1.0, 2.0, 3.0, 4.0, 5.0], lost=[2])
    got = bin_means(columns, "train_loss", np.arange(0.0, 41, 10))
    np.testing.assert_array_equal(got, [1.0, 2.0, np.nan, 5.0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_costs_its_epochs_and_no_others(value):
    columns = training([10, 4, 6, 10], [1.0, 2.0, value, 3.0])
    got = bin_means(columns, "train_loss", np.arange(0.0, 31, 10))
    np.testing.assert_array_equal(got, [1.0, np.nan, 3.0])


def test_no_records_give_no_means():
    got = bin_means(training([], []), "train_loss", np.array([0.0, 10, 20]))
    np.testing.assert_array_equal(got, [np.nan, np.nan])


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 4), (1, 3), (2, 2)])
def test_the_gap_follows_its_formula(n, m):
    rng = np.random.default_rng(n)
    own = wandering_losses(rng, n, epochs=7, offset=0.2)
    other = wandering_losses(rng, m, epochs=7)
    gap = curve_gap(own, other)
    expected = gaps_by_hand(own.tolist(), other.tolist())
    np.testing.assert_allclose(gap.gaps, expected, rtol=1e-9)
    assert gap.rms == pytest.approx(rms(expected))
    assert gap.max == pytest.approx(max(expected, key=abs))
    assert gap.max_epoch == expected.index(max(expected, key=abs))
    distance = np.log(own).mean(axis=0) - np.log(other).mean(axis=0)
    assert gap.loss_ratio == pytest.approx(math.exp(rms(distance)))


@pytest.mark.parametrize("offset", [0.0, 0.08])
def test_p_is_the_share_of_deals_with_a_gap_at_least_as_large(offset):
    rng = np.random.default_rng(1)
    own = wandering_losses(rng, 3, epochs=6, offset=offset)
    other = wandering_losses(rng, 4, epochs=6)
    runs = [*own.tolist(), *other.tolist()]
    dealt = []
    for group in itertools.combinations(range(7), 3):
        rest = [runs[i] for i in range(7) if i not in group]
        dealt.append(gaps_by_hand([runs[i] for i in group], rest))
    gap = curve_gap(own, other)
    true = dealt[0]
    assert len(dealt) == 35
    share = sum(rms(g) >= rms(true) * (1 - 1e-9) for g in dealt) / 35
    assert gap.rms_p == pytest.approx(share)
    largest = [max(map(abs, g)) for g in dealt]
    assert gap.max_p == pytest.approx(sum(v >= largest[0] * (1 - 1e-9) for v in largest) / 35)


@pytest.mark.parametrize("num_runs", [3, 5])
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_without_a_difference_the_gap_is_what_chance_gives(num_runs, memory):
    rng = np.random.default_rng(num_runs)
    found = [
        curve_gap(
            wandering_losses(rng, num_runs, memory=memory),
            wandering_losses(rng, num_runs, memory=memory),
        )
        for _ in range(300)
    ]
    # Exact for the mean square of independent epochs; for others within what the docstring says.
    expected = math.sqrt(2 / num_runs * (6 * num_runs - 6) / (6 * num_runs - 8))
    assert found[0].expected_rms == pytest.approx(expected)
    mean = np.mean([gap.rms for gap in found])
    assert mean == pytest.approx(expected, rel=0.05 if memory == 0 else 0.2)
    # p is uniform over the deals: it is at most 0.1 in a tenth of all draws (3 sigma: 0.052).
    assert np.mean([gap.rms_p <= 0.1 + 1e-9 for gap in found]) == pytest.approx(0.1, abs=0.055)


def test_a_known_difference_is_found_in_spreads_of_a_run():
    rng = np.random.default_rng(0)
    found = [
        curve_gap(wandering_losses(rng, 5, offset=0.3, spread=0.1), wandering_losses(rng, 5))
        for _ in range(100)
    ]
    # E[(d/s)^2] = (3^2 + 2/5) k/(k - 2) with k = 24 for independent epochs.
    mean_square = np.mean([gap.rms**2 for gap in found])
    assert mean_square == pytest.approx((9 + 2 / 5) * 24 / 22, rel=0.03)
    assert all(gap.rms_p == pytest.approx(gap.smallest_p) == 2 / 252 for gap in found)
    assert min(gap.max for gap in found) > 3
    lower = curve_gap(wandering_losses(rng, 5, offset=-0.3), wandering_losses(rng, 5))
    assert lower.max < -3


def test_many_runs_are_dealt_at_random_but_always_alike():
    rng = np.random.default_rng(0)
    own, other = wandering_losses(rng, 9), wandering_losses(rng, 9)
    first, second = curve_gap(own, other), curve_gap(own, other)
    assert first.rms_p == second.rms_p
    assert 0.01 < first.rms_p < 1
    assert curve_gap(own * 1.5, other).rms_p == 1 / 2000


def test_a_common_past_of_the_same_seeds_does_not_count():
    rng = np.random.default_rng(3)
    other = wandering_losses(rng, 4, epochs=12)
    own = wandering_losses(rng, 4, epochs=12)
    own[:, :5] = other[:, :5]
    pairs = [(i, i) for i in range(4)]
    gap = curve_gap(own, other, pairs)
    np.testing.assert_array_equal(gap.epochs, np.arange(5, 12))
    np.testing.assert_allclose(gap.gaps, curve_gap(own, other).gaps[5:])
    assert gap.rms > curve_gap(own, other).rms
    # It is over for all with the first pair that parts.
    own[1, 3:] = wandering_losses(rng, 1, epochs=12)[0, 3:]
    np.testing.assert_array_equal(curve_gap(own, other, pairs).epochs, np.arange(3, 12))
    # Equal seeds without a common past change nothing.
    own = wandering_losses(rng, 4, epochs=12)
    assert curve_gap(own, other, pairs).rms == curve_gap(own, other).rms


def test_equal_runs_have_no_gap():
    losses = wandering_losses(np.random.default_rng(0), 3)
    gap = curve_gap(losses, losses, [(0, 0), (1, 1), (2, 2)])
    assert gap.rms == 0
    assert gap.rms_p == 1


def test_losses_that_end_at_zero_give_finite_gaps():
    rng = np.random.default_rng(0)
    own, other = wandering_losses(rng, 3), wandering_losses(rng, 3)
    own[:, 20:] = 0.0
    other[:, 20:] = 3e-8
    gap = curve_gap(own, other)
    np.testing.assert_array_equal(gap.gaps[21:], 0.0)
    assert np.isfinite(gap.rms)


def test_epochs_that_a_run_lacks_are_left_out():
    rng = np.random.default_rng(0)
    own, other = wandering_losses(rng, 3, epochs=10), wandering_losses(rng, 3, epochs=10)
    own[1, 7:] = np.nan
    other[0, 2] = np.inf
    gap = curve_gap(own, other)
    np.testing.assert_array_equal(gap.epochs, [0, 1, 3, 4, 5, 6])


@pytest.mark.parametrize(("n", "m", "epochs"), [(1, 1, 5), (0, 4, 5), (4, 0, 5), (3, 3, 0)])
def test_nothing_to_compare_gives_no_gap(n, m, epochs):
    assert curve_gap(np.ones((n, epochs)), np.ones((m, epochs))) is None
