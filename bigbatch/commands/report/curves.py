"""Training-loss curves on a common grid of examples, and the gap between two groups of them.

Runs with different batch sizes log at different positions, and one record of a run with a large
batch may cover several epochs. Their losses are compared over whole epochs, in which every run
has seen every training example once.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from bigbatch.commands.report.runs import Columns

# Cross-entropies in float32 are differences of numbers near 10 and are not resolved below this.
MIN_LOSS = 1e-6
# The share of a bin that records must cover for its mean to count.
_MIN_COVERAGE = 0.9
# Standard deviation of a log loss below which runs count as equal; it keeps 0/0 out of d/s.
_MIN_SPREAD = 1e-3
# An epoch in which all runs of one seed differ by less than this share of s is a common past.
_COMMON_SHARE = 0.01
_MAX_DEALS = 2000


def bin_means(training: Columns, field: str, edges_examples: np.ndarray) -> np.ndarray:
    """Means of a recorded quantity over ranges of examples.

    A record stands for the examples [since_examples, examples); where a bin holds only a part of
    that range, the record counts with that part.

    Args:
      training: `LoggedRun.training`, float64[records] a field.
      field: the field to average, e.g. "train_loss".
      edges_examples: float64[bins + 1], rising, in examples.

    Returns:
      float64[bins]: the mean of the field over [edges[i], edges[i + 1]), weighted by examples.
      NaN where records cover less than 90 % of the bin, or where a value in it is not finite.
    """
    values, ends = training[field], training["examples"]
    if ends.size == 0:
        return np.full(len(edges_examples) - 1, np.nan)
    starts = np.append(0.0, ends[:-1])
    sizes = ends - starts
    known = ~np.isnan(training["since_examples"])
    finite = np.isfinite(values)
    total = _integral(np.where(known & finite, values, 0.0) * sizes, ends, edges_examples)
    covered = _integral(known * sizes, ends, edges_examples)
    not_finite = _integral((known & ~finite) * sizes, ends, edges_examples)
    whole = (covered >= _MIN_COVERAGE * np.diff(edges_examples)) & (not_finite == 0)
    return np.divide(total, covered, out=np.full(total.shape, np.nan), where=whole)


def _integral(weights: np.ndarray, ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Weight in each bin, when each record's weight lies evenly on its range."""
    cumulative = np.append(0.0, np.cumsum(weights))
    return np.diff(np.interp(edges, np.append(0.0, ends), cumulative))


def log_loss(loss: np.ndarray) -> np.ndarray:
    """Natural logarithm of a loss, floored at `MIN_LOSS`; NaN stays NaN."""
    return np.log(np.maximum(loss, MIN_LOSS))


@dataclasses.dataclass(frozen=True, eq=False)
class CurveGap:
    """How far an experiment's loss curve is from the reference's, in spreads between seeds.

    Attributes:
      epochs: int64[epochs], the epochs compared; epoch e is examples [e N, (e + 1) N).
      gaps: float64[epochs], d(e) / s(e); positive where the experiment's loss is higher.
      rms: root mean square of `gaps` over the epochs.
      expected_rms: about what `rms` is when the experiments do not differ.
      rms_p: share of all deals of the same runs into two such groups with an rms at least as
        large.
      max_p: the same for the largest |d| / s.
      smallest_p: the smallest value that rms_p can take with so few runs.
      span_epochs: 1; the length of a part where parts of a short run stand in for epochs.
      loss_ratio: exp of the root mean square of d: the typical factor between the two losses.
    """

    epochs: np.ndarray
    gaps: np.ndarray
    rms: float
    expected_rms: float
    rms_p: float
    max_p: float
    smallest_p: float
    loss_ratio: float
    span_epochs: float = 1.0

    @property
    def max(self) -> float:
        """The d / s of largest magnitude, with its sign."""
        return float(self.gaps[np.argmax(np.abs(self.gaps))])

    @property
    def max_epoch(self) -> float:
        """The epoch of `max`, or where its part begins."""
        return float(self.epochs[np.argmax(np.abs(self.gaps))] * self.span_epochs)

    @property
    def centres(self) -> np.ndarray:
        """Where to draw `gaps`, in epochs."""
        return (self.epochs + 0.5) * self.span_epochs


def curve_gap(
    losses: np.ndarray, reference: np.ndarray, same_seed: Sequence[tuple[int, int]] = ()
) -> CurveGap | None:
    """The distance between two groups of loss curves against the spread between seeds.

    With L the natural logarithm of a run's mean training loss over epoch e (losses fall over
    orders of magnitude; below 1e-6 they are not resolved and count as 1e-6),

        d(e)   = mean of L over the experiment's n runs - mean of L over the reference's m runs
        v(e)   = (squares about the experiment's mean + squares about the reference's mean)
                 / (n + m - 2)
        s(e)^2 = mean of v over the epochs e - 1, e, e + 1
        rms    = sqrt(mean over e of (d(e) / s(e))^2)

    s is the standard deviation of a *single* run between seeds, so 1 means: the curves are as far
    apart as two runs of one experiment, give or take. Every epoch counts alike, early ones with a
    small spread and late ones with a large. Three epochs share their variances because n + m - 2
    squares alone are few: with n = m = 3 one epoch's d/s is Student's t with 4 degrees of
    freedom, whose square has no variance, and single epochs would decide the sum.

    *Without a difference*, for normal L, d has variance sigma^2 (1/n + 1/m) and is independent of
    s; with k squares behind s^2, E[(d/s)^2] = (1/n + 1/m) k / (k - 2). Three independent epochs
    give k = 3 (n + m - 2), so `expected_rms` = sqrt((1/n + 1/m) k / (k - 2)): 0.66 for
    n = m = 5, 0.89 for 3, close to sqrt(2/n). Epochs are not independent, but in simulated
    curves of 30 and 100 epochs, from independent epochs to one constant error a run, the mean of
    rms stayed within a fifth of it for 3 to 8 runs (for 2 runs it was up to a third above). How
    far rms scatters about its mean depends even more on how much epochs move together. So the
    runs are dealt anew into groups of n and m, in every possible way (2,000 random ones if there
    are more), and `rms_p` is the share of deals with an rms at least as large: for runs that
    differ in nothing but the seed each deal is equally likely.

    Runs of one seed that have the same plan up to some epoch are the same run up to there. Such
    a common past says nothing, and is left out: the epochs before the first in which runs of the
    same seed differ by 1 % of s. Beyond it a shared seed may still make runs alike; then rms
    comes out lower than expected, not higher. Epochs that not all runs have are left out too.

    Args:
      losses: float64[n, epochs], mean training loss of the experiment's runs in each epoch.
      reference: float64[m, epochs], the same of the reference's runs.
      same_seed: pairs (i, j): run i of `losses` has the seed of run j of `reference`.

    Returns:
      The gap, or None if there is no spread to compare with (n + m < 3), or no epoch that all
      runs have.
    """
    num_runs, num_reference = len(losses), len(reference)
    curves = log_loss(np.concatenate([losses, reference]))
    epochs = np.flatnonzero(np.isfinite(curves).all(axis=0))
    if num_runs == 0 or num_reference == 0 or len(curves) < 3 or epochs.size == 0:
        return None
    curves = curves[:, epochs]
    # Differences alone matter; centred values keep the sums of squares below exact.
    curves = curves - curves.mean(axis=0)

    own = np.arange(len(curves))[None, :] < num_runs
    difference, spread = _difference_and_spread(curves, own)
    first = _end_of_common_past(curves, spread[0], num_runs, same_seed)
    difference, spread = difference[0, first:], spread[0, first:]
    gaps = difference / spread

    deals = _deals(num_runs, num_reference)
    dealt = np.divide(*_difference_and_spread(curves, deals))[:, first:]
    # Equal deals may differ in the last bits, and must count as equal.
    bar = 1 - 1e-9
    rms = math.sqrt(np.mean(gaps**2))
    squares = 3 * (num_runs + num_reference - 2)
    return CurveGap(
        epochs=epochs[first:],
        gaps=gaps,
        rms=rms,
        expected_rms=math.sqrt((1 / num_runs + 1 / num_reference) * squares / (squares - 2)),
        rms_p=float(np.mean(np.sqrt(np.mean(dealt**2, axis=1)) >= bar * rms)),
        max_p=float(np.mean(np.abs(dealt).max(axis=1) >= bar * np.abs(gaps).max())),
        smallest_p=(2 if num_runs == num_reference else 1) / len(deals),
        loss_ratio=math.exp(math.sqrt(np.mean(difference**2))),
    )


def _difference_and_spread(curves: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes d and s of `curve_gap` for many ways to deal the runs into two groups.

    Args:
      curves: float64[runs, epochs], log losses.
      own: bool[deals, runs], whether a run is in the first group.

    Returns:
      d and s, each float64[deals, epochs].
    """
    num_own = own.sum(axis=1, keepdims=True)
    num_other = own.shape[1] - num_own
    own_mean = own @ curves / num_own
    other_mean = ~own @ curves / num_other
    squares = (curves**2).sum(axis=0) - num_own * own_mean**2 - num_other * other_mean**2
    variance = np.maximum(squares, 0.0) / (own.shape[1] - 2)
    padded = np.pad(variance, ((0, 0), (1, 1)))
    counts = np.pad(np.ones(variance.shape[1]), 1)
    window = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    shared = window / (counts[:-2] + counts[1:-1] + counts[2:])
    return own_mean - other_mean, np.maximum(np.sqrt(shared), _MIN_SPREAD)


def _end_of_common_past(
    curves: np.ndarray, spread: np.ndarray, num_runs: int, same_seed: Sequence[tuple[int, int]]
) -> int:
    """Index of the first epoch in which runs of one seed differ; 0 if they never do."""
    if not same_seed:
        return 0
    pairs = np.array(same_seed)
    apart = np.abs(curves[pairs[:, 0]] - curves[num_runs + pairs[:, 1]]).max(axis=0)
    return int(np.argmax(apart > _COMMON_SHARE * spread))


def _deals(num_own: int, num_other: int) -> np.ndarray:
    """bool[deals, runs]: ways to deal the runs into two groups of the given sizes.

    All of them, the true one included; past 2,000 the true one and random ones, always the same.
    """
    num_runs = num_own + num_other
    if math.comb(num_runs, num_own) <= _MAX_DEALS:
        groups = list(itertools.combinations(range(num_runs), num_own))
        own = np.zeros((len(groups), num_runs), dtype=bool)
        own[np.arange(len(groups))[:, None], groups] = True
        return own
    own = np.zeros((_MAX_DEALS, num_runs), dtype=bool)
    own[:, :num_own] = True
    own[1:] = np.random.default_rng(0).permuted(own[1:], axis=1)
    return own
