"""The fit of updates against examples, on data whose answer is known."""

import numpy as np
import pytest
from scipy import optimize

from bigbatch.critical_batch import fit, reached_after
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


def test_a_loss_counts_as_reached_when_it_stays_below():
    assert reached_after([2.0, 1.0, 2.0, 1.0, 1.0], 10, target=1.5) == pytest.approx(30)
    assert reached_after([1.0, 1.0], 10, target=1.5) == 5
    assert reached_after([2.0, 1.0, 2.0], 10, target=1.5) is None
    assert reached_after([2.0, np.nan], 10, target=1.5) is None


def test_bad_arguments():
    with pytest.raises(UserError, match="at least three different ones"):
        fit([16, 16, 32], [1, 2, 3])
    with pytest.raises(UserError, match=r"updates: given 0; allowed: numbers above 0"):
        fit([16, 32, 64], [1, 0, 3])
