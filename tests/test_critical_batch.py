"""The fit of updates against examples, on data whose answer is known."""

import numpy as np
import pytest
from scipy import optimize

from bigbatch.commands.critical.fit import (
    WINDOW_SHARE,
    fit,
    intervals,
    noise_on_the_way,
    reached_after,
    smoothed,
)
from bigbatch.errors import UserError

SIZES = [16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize(("fewest", "examples"), [(100, 9_600), (37, 50_000), (1_000, 1_000)])
def test_exact_data_gives_back_its_curve(fewest, examples):
    updates = [fewest + examples / size for size in SIZES]
    fitted = fit(SIZES, updates)
    assert fitted.fewest_updates == pytest.approx(fewest)
    assert fitted.fewest_examples == pytest.approx(examples)
    assert fitted.critical_batch_size == pytest.approx(examples / fewest)
    assert fitted.critical_batch_size_error < 1e-5 * fitted.critical_batch_size
    for size, count in zip(SIZES, updates, strict=True):
        share = (count / fewest - 1) * (count * size / examples - 1)
        assert share == pytest.approx(1)
        assert fitted.updates(size) == pytest.approx(count)


def test_the_fit_is_that_of_a_general_optimizer():
    random = np.random.default_rng(0)
    updates = np.array([100 + 9_600 / size for size in SIZES]) * random.lognormal(0, 0.1, 6)
    fitted = fit(SIZES, updates)
    best, covariance = optimize.curve_fit(
        lambda size, fewest, examples: fewest + examples / size, SIZES, updates, sigma=updates
    )
    assert fitted[0:4:2] == pytest.approx(best, rel=1e-5)
    assert fitted[1:4:2] == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-4)


def test_the_truth_lies_within_the_errors():
    random = np.random.default_rng(1)
    truth = np.array([100 + 9_600 / size for size in SIZES])
    fits = [fit(SIZES, truth * random.normal(1, 0.05, 6)) for _ in range(400)]
    z = np.array([(f.critical_batch_size - 96) / f.critical_batch_size_error for f in fits])
    # Student's t with 4 degrees of freedom: 95 % lie within 2.78.
    assert 0.9 < np.mean(np.abs(z) < 2.78) < 0.99
    assert np.median([f.critical_batch_size for f in fits]) == pytest.approx(96, rel=0.05)


def test_perfect_scaling_has_no_critical_batch_size():
    fitted = fit([16, 32, 64], [1_000.0, 490.0, 240.0])
    assert fitted.critical_batch_size == np.inf


def test_an_exponential_decay_is_reached_where_it_is():
    # Its mean over t - h to t + h is that at t times sinh(h / T) / (h / T).
    losses = np.exp(-np.arange(400) / 50)
    for target in (0.5, 0.1, 0.01):
        exact = 50 * np.log(1 / target)
        found = reached_after(losses, 10_000, target)
        half = WINDOW_SHARE * found + 0.5
        assert np.exp(-found / 50) * np.sinh(half / 50) / (half / 50) == pytest.approx(
            target, rel=2e-3
        )
        assert exact < found < 1.06 * exact
    assert reached_after(losses, 10_000, 1e-4) is None
    assert reached_after([*losses[:10], np.nan, *losses], 10_000, 0.1) is None


def test_one_lucky_update_has_not_reached_the_loss():
    # 256 examples to either side: with 16 an update, the first window is over 33 updates.
    losses = np.full(300, 1.0)
    losses[[0, 1, 40]] = 0.0
    assert reached_after(losses, 16, 0.5) is None
    assert smoothed(losses, 16)[0][0] == 16
    losses[150:] = 0.0
    # Half of the window is over the edge when its middle is.
    assert reached_after(losses, 16, 0.5) == pytest.approx(149.5, abs=2.5)


class Quadratic:
    """SGD on h |w|^2 / 2 from a loss of 1, per-example gradients h w + noise: known throughout.

    tr(S) / |G|^2 is 64 at the start. With lr = lr_max / (1 + 64 / B) the mean loss after k updates
    of B is r^k + floor (1 - r^k), r = (1 - lr h)^2, floor = h lr^2 tr(S) / (2 B (1 - r)).
    """

    h, largest, dimensions, noise_scale, target = 1.0, 0.02, 64, 64, 0.2
    variance = noise_scale * 2 * h

    def constants(self, size):
        rate = self.largest / (1 + self.noise_scale / size)
        r = (1 - rate * self.h) ** 2
        return rate, r, self.h * rate**2 * self.variance / (2 * size * (1 - r))

    def updates(self, size):
        """S, from the closed form."""
        _, r, floor = self.constants(size)
        return np.log((self.target - floor) / (1 - floor)) / np.log(r)

    def mean_losses(self, size):
        _, r, floor = self.constants(size)
        powers = r ** np.arange(int(1.6 * self.updates(size)))
        return powers + floor * (1 - powers)

    def losses(self, size, runs, random):
        """What runs see: each example's loss has a standard deviation as large as its mean."""
        rate, _, _ = self.constants(size)
        w = np.full((runs, self.dimensions), np.sqrt(2 / self.h / self.dimensions))
        noise = np.sqrt(self.variance / self.dimensions / size)
        seen = []
        for _ in range(int(1.6 * self.updates(size))):
            loss = self.h * (w * w).sum(axis=1) / 2
            seen.append(loss * (1 + random.normal(size=runs) / np.sqrt(size)))
            w = w - rate * (self.h * w + noise * random.normal(size=w.shape))
        return np.array(seen).T


def test_smoothing_changes_every_time_by_the_same_share():
    problem = Quadratic()
    exact = np.array([problem.updates(size) for size in SIZES])
    found = np.array([reached_after(problem.mean_losses(s), s, problem.target) for s in SIZES])
    assert np.ptp(found / exact) < 0.01
    critical = fit(SIZES, exact).critical_batch_size
    # The floor takes a little more from the small batches.
    assert critical == pytest.approx(problem.noise_scale, rel=0.2)
    assert fit(SIZES, found).critical_batch_size == pytest.approx(critical, rel=0.02)


def test_the_interval_holds_the_known_critical_batch_size():
    problem, random, repeats, branches = Quadratic(), np.random.default_rng(0), 60, 4
    known = fit(SIZES, [problem.updates(size) for size in SIZES]).critical_batch_size
    counts = {
        size: np.array(
            [
                reached_after(losses, size, problem.target)
                for losses in problem.losses(size, repeats * branches, random)
            ]
        ).reshape(repeats, branches)
        for size in SIZES
    }
    held, found = 0, []
    for repeat in range(repeats):
        mine = {size: counts[size][repeat].tolist() for size in SIZES}
        low, high = intervals(mine).critical_batch_size
        held += low <= known <= high
        found.append(fit(SIZES, [np.mean(c) for c in mine.values()]).critical_batch_size)
    # 95 of 100 where the runs were many; of four, the bootstrap sees a little too little.
    assert held / repeats > 0.8
    assert np.mean(found) == pytest.approx(known, rel=0.03)


def test_intervals_are_those_of_the_normal_distribution_for_many_runs():
    random = np.random.default_rng(2)
    truth = {size: 100 + 9_600 / size for size in SIZES}
    runs = {size: (s * random.normal(1, 0.1, 400)).tolist() for size, s in truth.items()}
    means = [float(np.mean(counts)) for counts in runs.values()]
    many = np.array(means) * random.normal(1, 0.1 / 20, (4_000, len(SIZES)))
    criticals = [fit(SIZES, counts).critical_batch_size for counts in many]
    expected = np.percentile(criticals, (2.5, 97.5))
    assert intervals(runs).critical_batch_size == pytest.approx(expected, rel=0.02)


def test_the_noise_scale_on_the_way_is_the_mean_over_its_updates():
    # tr(S) / |G|^2 is 1, 2, 3 and 4 in the quarters.
    squares, variances = np.repeat([8.0, 4.0, 2.0, 1.0], 5), np.repeat([8.0, 8.0, 6.0, 4.0], 5)
    # What comes after the arrival does not count.
    branch = ([*squares, 100.0], [*variances, 1.0], 20.3)
    assert noise_on_the_way([branch, branch]) == pytest.approx(2.5)
    assert noise_on_the_way([([], [], 20.0)]) is None
    assert noise_on_the_way([([1.0, -2.0, 1.0, 1.0], [1.0] * 4, 4.0)]) is None
    assert noise_on_the_way([]) is None


def test_bad_arguments():
    with pytest.raises(UserError, match="at least three different ones"):
        fit([16, 16, 32], [1, 2, 3])
    with pytest.raises(UserError, match=r"updates: given 0; allowed: numbers above 0"):
        fit([16, 32, 64], [1, 0, 3])
    with pytest.raises(UserError, match=r"updates.32: .* two runs or more"):
        intervals({16: [1.0, 2.0], 32: [1.0], 64: [1.0, 2.0]})
