"""The critical batch size from runs at several batch sizes: the trade of updates for examples.

McCandlish et al. 2018 (section 2.3): to reach one loss with updates of B examples takes S updates
and E = S B examples with (S / S_min - 1) (E / E_min - 1) = 1. That is the straight line

    S = S_min + E_min / B,

in 1/B, and the critical batch size E_min / S_min is where both are twice their least.

S comes from a run's losses by `reached_after`. A loss of one update is noisy, the more the smaller
its batch, so losses are averaged first, over a window that is a fixed share of the time since the
run began. Runs that differ only in how long everything takes are then smoothed alike, and what the
window adds to S is the same share of it at every batch size: it changes neither the form of the
line nor E_min / S_min.

>>> fitted = fit([16, 32, 64, 128], [700.0, 400.0, 250.0, 175.0])
>>> round(fitted.fewest_updates), round(fitted.fewest_examples), round(fitted.critical_batch_size)
(100, 9600, 96)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.errors import Problem

# Losses are averaged from this share of the time before to this share after.
WINDOW_SHARE = 0.25
# But over so many examples at least: one update of a small batch may lie below any target.
_WINDOW_EXAMPLES = 512
_RESAMPLES = 2_000
_QUARTERS = 4
# Percentiles: a 95 % interval.
_INTERVAL = (2.5, 97.5)


class Fit(NamedTuple):
    """The hyperbola through (updates, examples), with standard errors.

    Attributes:
      fewest_updates: S_min, reached with any larger batch.
      fewest_updates_error: its standard error.
      fewest_examples: E_min, reached with any smaller batch.
      fewest_examples_error: its standard error.
      critical_batch_size: E_min / S_min in examples; infinite where S_min is not above 0, and 0
        where E_min is not.
      critical_batch_size_error: its standard error by the delta method.
    """

    fewest_updates: float
    fewest_updates_error: float
    fewest_examples: float
    fewest_examples_error: float
    critical_batch_size: float
    critical_batch_size_error: float

    def updates(self, batch_size: float) -> float:
        """S at a batch size."""
        return self.fewest_updates + self.fewest_examples / batch_size


class Intervals(NamedTuple):
    """95 % intervals, each (low, high), in the units of `Fit`."""

    fewest_updates: tuple[float, float]
    fewest_examples: tuple[float, float]
    critical_batch_size: tuple[float, float]


def fit(batch_sizes: Sequence[float], updates: Sequence[float]) -> Fit:
    """Fits S_min and E_min by least squares of the relative residuals.

    The updates to reach a loss scatter in proportion to themselves, so each residual is divided by
    its S.

    Args:
      batch_sizes: B of each run, at least three different ones.
      updates: S of each run, above 0; need not be whole.

    Returns:
      The fit; its errors come from the residuals, with two degrees of freedom taken by the fit.

    Raises:
      UserError: there are fewer than three batch sizes, or a number is not above 0.
    """
    checks = Checks()
    checks.require(
        len(batch_sizes) == len(updates) and len(set(batch_sizes)) >= 3,
        "batch_sizes",
        list(batch_sizes),
        f"at least three different ones, one for each of the {len(updates)} numbers of updates",
    )
    for name, values in (("batch_sizes", batch_sizes), ("updates", updates)):
        bad = [value for value in values if not value > 0]
        if bad:
            checks.problems.append(Problem(name, bad[0], "numbers above 0"))
    checks.done()
    sizes, counts = np.asarray(batch_sizes, np.float64), np.asarray(updates, np.float64)
    matrix = np.stack([1 / counts, 1 / (sizes * counts)], axis=1)
    fewest, examples, critical = (float(number) for number in _solve(sizes, counts))
    residuals = matrix @ [fewest, examples] - 1
    covariance = np.linalg.inv(matrix.T @ matrix) * float(residuals @ residuals)
    covariance /= len(counts) - 2
    errors = np.sqrt(np.diag(covariance))
    critical_error = np.inf
    if fewest > 0:
        slope = np.array([-critical, 1.0]) / fewest
        critical_error = np.sqrt(max(float(slope @ covariance @ slope), 0.0))
    return Fit(*map(float, (fewest, errors[0], examples, errors[1], critical, critical_error)))


def _solve(sizes: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """S_min, E_min and the critical batch size, [3, ...], of counts [..., sizes]."""
    x, y = 1 / counts, 1 / (sizes * counts)
    xx, xy, yy = ((a * b).sum(axis=-1) for a, b in ((x, x), (x, y), (y, y)))
    x, y = x.sum(axis=-1), y.sum(axis=-1)
    fewest, examples = (np.array([yy * x - xy * y, xx * y - xy * x])) / (xx * yy - xy * xy)
    above = np.where(fewest > 0, fewest, 1.0)
    critical = np.where(fewest > 0, np.maximum(examples, 0.0) / above, np.inf)
    return np.array([fewest, examples, critical])


def intervals(updates: Mapping[int, Sequence[float]]) -> Intervals:
    """Intervals of the fit to the mean updates of each batch size, by the bootstrap over its runs.

    Of n runs at a batch size n - 1 are drawn with replacement: the variance of their mean is then
    the unbiased estimate of that of the mean of all n, which drawing n makes too small by 1/n.

    Args:
      updates: S of the runs at each batch size, two runs or more.

    Returns:
      The intervals; equal arguments give equal ones.

    Raises:
      UserError: as `fit`, or a batch size has a single run.
    """
    checks = Checks()
    for size, counts in updates.items():
        allowed = "two runs or more at each batch size"
        checks.require(len(counts) >= 2, f"updates.{size}", list(counts), allowed)
    checks.done()
    fit(list(updates), [float(np.mean(counts)) for counts in updates.values()])
    random = np.random.default_rng(0)
    means = [
        random.choice(np.asarray(counts, np.float64), (_RESAMPLES, len(counts) - 1)).mean(axis=1)
        for counts in updates.values()
    ]
    numbers = _solve(np.array(list(updates), np.float64), np.stack(means, axis=1))
    # No interpolation: a critical batch size may be infinite.
    low, high = np.percentile(numbers, _INTERVAL, axis=1, method="nearest").tolist()
    return Intervals(*zip(low, high, strict=True))


def smoothed(losses: Sequence[float], batch_size: int) -> tuple[NDArray[np.float64], ...]:
    """The losses of a run's updates, averaged over windows about each moment.

    The window about the moment at which t updates are done reaches from t - h to t + h, with h
    the larger of `WINDOW_SHARE` t and 256 examples. It is symmetric, so a straight line stays one.

    Args:
      losses: mean loss of each update's examples before it changes the parameters, in order: the
        one at index k belongs to the moment at which k updates are done.
      batch_size: B, the same for all.

    Returns:
      float64[moments] updates done, whole numbers, as far as the windows lie in the run; and the
      means, float64[moments].

    >>> times, means = smoothed([float(10 - k) for k in range(10)], 512)
    >>> times.tolist(), means.tolist()
    ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    """
    values = np.asarray(losses, np.float64)
    times = np.arange(len(values), dtype=np.float64)
    half = np.maximum(WINDOW_SHARE * times, _WINDOW_EXAMPLES / 2 / batch_size)
    inside = (times >= half) & (times + half <= len(values) - 1)
    times, half = times[inside], half[inside] + 0.5
    # Each loss stands for the time from half an update before to half an update after.
    edges, sums = np.arange(len(values) + 1) - 0.5, np.append(0.0, np.cumsum(values))
    totals = np.interp(times + half, edges, sums) - np.interp(times - half, edges, sums)
    return times, totals / (2 * half)


def reached_after(losses: Sequence[float], batch_size: int, target: float) -> float | None:
    """Updates after which the smoothed loss first is at a target, interpolated.

    Args:
      losses: as in `smoothed`.
      batch_size: B.
      target: the loss.

    Returns:
      Updates, not whole; None where the smoothed loss does not come down to the target, or some
      loss before that is not finite.

    >>> reached_after([float(10 - k) for k in range(10)], 512, target=5.5)
    4.5
    """
    times, means = smoothed(losses, batch_size)
    below = np.flatnonzero(~(means > target))
    if not len(below) or not np.isfinite(means[below[0]]):
        return None
    last = int(below[0])
    if last == 0:
        return float(times[0])
    share = (means[last - 1] - target) / (means[last - 1] - means[last])
    return float(times[last - 1] + share)


def noise_on_the_way(
    branches: Sequence[tuple[Sequence[float], Sequence[float], float]],
) -> float | None:
    """The noise scale that says how many updates a way takes, where it changes along the way.

    An update of B examples gets 1 / (1 + B_noise / B) as far as one of infinitely many, so S is
    S_min times the mean of 1 + B_noise / B over the way (McCandlish et al. 2018, section 2.3).
    B_noise is taken for each quarter of the way from the means of |G|^2 and tr(S), and averaged
    then.

    Args:
      branches: of one batch size, each its estimates of |G|^2 and of tr(S), one an update, and the
        updates after which it had arrived.

    Returns:
      The mean in examples; None where a quarter has no estimate, or none that is positive.
    """
    sums = np.zeros((_QUARTERS, 2))
    for gradient_squares, variances, arrived in branches:
        count = min(round(arrived), len(gradient_squares))
        estimates = np.stack([gradient_squares[:count], variances[:count]], axis=-1)
        for quarter, part in enumerate(np.array_split(estimates, _QUARTERS)):
            # Each branch counts alike.
            sums[quarter] += part.mean(axis=0) if len(part) else np.nan
    if not branches or not (sums > 0).all():
        return None
    return float(np.mean(sums[:, 1] / sums[:, 0]))


def spread_sizes(noise_scale: float, multiple: int, most: int) -> list[int]:
    """Six batch sizes about a noise scale, each about twice the one before, from a 6th of it on.

    Args:
      noise_scale: B_noise, in examples.
      multiple: batch sizes are multiples of it; where it is more than a 6th of the noise scale, the
        first is the multiple itself.
      most: no batch size is larger.

    Returns:
      Rising batch sizes, 32 times apart; fewer than six where `most` leaves no room.

    >>> spread_sizes(200, 16, 1_437)
    [32, 64, 128, 272, 528, 1072]
    >>> spread_sizes(20, 32, 500)
    [32, 64, 128, 256]
    """
    first = max(noise_scale / 6, multiple)
    sizes = [round(first * 2**power / multiple) * multiple for power in range(6)]
    return [size for size in sizes if size <= most]
