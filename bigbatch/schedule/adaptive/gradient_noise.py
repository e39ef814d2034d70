r"""How noisy the gradients are, measured while training: the simple noise scale.

McCandlish et al. 2018 ("An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A)
compare gradients of two batch sizes. Let G be the expected gradient and S the covariance of one
example's. With an update of B examples cut into K small batches, b_i examples and summed gradient
s_i each,

    E sum_i |s_i|^2 / b_i = B |G|^2 + (K - sum_i f_i) tr(S),
    E |sum_i s_i / B|^2   =   |G|^2 + (1 - f) tr(S) / B,

two linear equations whose solution is unbiased for |G|^2 and tr(S), the small batches equal or not.
Which G and S these are is decided by the shares f and f_i, the update's own and those of its small
batches.

*The data distribution*: f = f_i = 0. Examples that are drawn independently have independent
gradients, and n of them sum to E |s|^2 = n^2 |G|^2 + n tr(S) (their appendix A).

*The training set*: its N examples are drawn without replacement, all of them in an epoch. With G
their mean gradient and S their covariance with divisor N - 1, one draw has the variance
(1 - 1/N) tr(S), and two of an epoch the covariance -tr(S) / N, since the sum of a whole epoch does
not vary. So n draws of one epoch sum to E |s|^2 = n^2 |G|^2 + n (1 - n/N) tr(S): the
finite-population correction of sampling theory (Cochran 1977, theorem 2.2). Epochs are permuted
independently, so variances of draws from several add up, and n = sum_e n_e draws, n_e of them in
epoch e, have n/N replaced by the share f = sum_e n_e^2 / (n N). This holds for the first epoch too,
and for batches larger than N. Without it tr(S) comes out the same (but for updates over the end of
an epoch), |G|^2 too low by tr(S) / N, and where B_noise nears N the noise scale is far too high.

The shares hold for what is the same whenever an example comes: the variance between examples. Where
augmentation or dropout makes each visit another, that part of the variance is drawn anew and has no
share. The two parts cannot be told apart here. A run with either is measured with shares of 0: then
|G|^2 is too low by the part between examples / N, where full shares would make it too high by the
other part / N. Ghost batches stand between: their statistics come with other neighbours on each
visit. Full shares are the nearer ones while that part is under a half of tr(S), and bound the noise
scale by about N beyond it (`tests/benchmarks/results/adaptive_digits.md` has what it is on digits).
In both populations the parameters count as fixed: that they have followed the examples of their own
epoch is left out.

The noise scale B_noise = tr(S) / |G|^2 is the batch size at which noise and signal are alike. A
ratio of unbiased estimates is not unbiased, and one of a single update may be anything, so both are
averaged over updates first and divided then.

>>> measured = Measurement(small_squares=96.0, big_square=2.0, small_batches=4.0, examples=32.0)
>>> estimate(measured)
Estimate(gradient_square=1.6666666666666667, variance=10.666666666666666)
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import Checks

# An average remembers at least about ten updates, however large they are: from fewer there is no
# error to tell.
MOST_FRESH = 1 / 10
# As many equally weighted updates must stand behind an average before it is used.
_MIN_UPDATES = 5
_FEW = "fewer than two small batches that differ"
# Small batches of whole epochs are all alike, but for rounding.
_NOTHING = 1e-9

TRAINING_SET, DATA_DISTRIBUTION = "training set", "data distribution"
"""The populations of which an estimate may speak."""


class Measurement(NamedTuple):
    """What one update says of the noise, each summed over its devices and microbatches.

    Attributes:
      small_squares: sum over the small batches of |summed gradient|^2 / their examples.
      big_square: |mean gradient of the update|^2.
      small_batches: how many held examples, K.
      examples: B, without the masked ones.
      share: f, of the training set that the update draws; 0 for draws from a distribution.
      small_shares: the sum of f_i. Both are B/N where update and small batches lie in one epoch.
    """

    small_squares: float
    big_square: float
    small_batches: float
    examples: float
    share: float = 0.0
    small_shares: float = 0.0


SUMMED = SMALL_SQUARES, BIG_SQUARE, SMALL_BATCHES, EXAMPLES = Measurement._fields[:4]
"""The names of a measurement's numbers among the sums of an update, beside the loss's own."""


def shares(first_example: int, num_examples: int, size: int, train_examples: int) -> float:
    """The sum of f over batches cut from a part of the stream: sum_e n_e^2 / (n N) of each.

    Args:
      first_example: position of the part's first.
      num_examples: how many there are.
      size: of each batch; the last may have fewer.
      train_examples: N.

    >>> shares(1_000, 32, 8, 4_000) == shares(1_000, 32, 32, 4_000) == 32 / 4_000
    True
    """
    end = first_example + num_examples
    epochs = np.arange(first_example // train_examples + 1, -(-end // train_examples))
    cuts = np.union1d(np.arange(first_example, end, size), epochs * train_examples)
    batch_sizes = np.minimum(size, num_examples - (cuts - first_example) // size * size)
    return float(np.sum(np.diff(cuts, append=end) ** 2 / batch_sizes)) / train_examples


def measurement_of(sums: Mapping[str, Any]) -> Measurement | None:
    """The measurement among the sums of an update, as floats; None where none was made.

    The noise is that of examples. Where a loss is divided by something else (tokens), their
    gradients are first brought to the unit of the mean gradient: by the mean count of an example.
    An update without weight held no small batches.
    """
    if SMALL_SQUARES not in sums:
        return None
    measured = Measurement(*(float(sums[name]) for name in SUMMED))
    if not float(sums["count"]):
        return measured._replace(small_batches=0.0)
    return of_examples(measured, float(sums["count"]))


def of_examples(measured: Measurement, count: Any) -> Measurement:
    """A measurement whose small batches' gradients are of summed losses, in the mean's unit.

    Args:
      measured: numbers, or arrays that are traced.
      count: what the mean gradient's sum was divided by.
    """
    count_per_example = count / measured.examples
    return measured._replace(small_squares=measured.small_squares / count_per_example**2)


class Estimate(NamedTuple):
    """Unbiased estimates from one update; either may be negative.

    Attributes:
      gradient_square: |G|^2.
      variance: tr(S), of one example's gradient.
    """

    gradient_square: float
    variance: float


def estimate(measurement: Measurement) -> Estimate | None:
    """Solves the two equations for |G|^2 and tr(S).

    Args:
      measurement: of one update.

    Returns:
      The estimates; None where the update held fewer than two small batches, or of whole epochs
      only, or a number in it is not finite.
    """
    if not all(map(math.isfinite, measurement)) or is_few(measurement):
        return None
    return solved(measurement)


def is_few(measurement: Measurement) -> Any:
    """Whether there are fewer than two small batches, or all are of whole epochs."""
    return (measurement.small_batches < 2) | (freedom(measurement) < _NOTHING)


def freedom(measurement: Measurement) -> Any:
    """What divides the spread between small batches to give the variance: K - 1 + f - sum f_i."""
    return measurement.small_batches - 1 + (measurement.share - measurement.small_shares)


def solved(measurement: Measurement) -> Estimate:
    """The solution, of numbers that have one, or of arrays that are traced."""
    small_squares, big_square, _, examples, share, _ = measurement
    variance = (small_squares - examples * big_square) / freedom(measurement)
    return Estimate(big_square - (1 - share) * variance / examples, variance)


def measurement_from(estimate: Estimate, small_batches: Any, examples: Any) -> Measurement:
    """The measurement of which an estimate is the solution, of draws from a distribution.

    >>> estimate(measurement_from(Estimate(2.0, 6.0), small_batches=4.0, examples=32.0))
    Estimate(gradient_square=2.0, variance=6.0)
    """
    big_square = estimate.gradient_square + estimate.variance / examples
    small_squares = (small_batches - 1) * estimate.variance + examples * big_square
    return Measurement(small_squares, big_square, small_batches, examples)


class Smoothed(NamedTuple):
    """Averages over updates with weights w that fade with age; `Smoothed()` holds none.

    Sums of plain floats, so that a checkpoint keeps them exactly.

    Attributes:
      weight: sum of w.
      weight_square: sum of w^2.
      gradient: sum of w |G|^2.
      noise: sum of w tr(S).
      gradient_gradient: sum of w^2 |G|^4.
      gradient_noise: sum of w^2 |G|^2 tr(S).
      noise_noise: sum of w^2 tr(S)^2.
    """

    weight: float = 0.0
    weight_square: float = 0.0
    gradient: float = 0.0
    noise: float = 0.0
    gradient_gradient: float = 0.0
    gradient_noise: float = 0.0
    noise_noise: float = 0.0

    @property
    def effective_updates(self) -> float:
        """How many equally weighted updates would be worth as much: (sum w)^2 / sum w^2."""
        return self.weight**2 / self.weight_square if self.weight_square > 0 else 0.0

    @property
    def gradient_square(self) -> float | None:
        """The average of |G|^2, negative or not; None before the first estimate."""
        return self.gradient / self.weight if self.weight > 0 else None

    @property
    def variance(self) -> float | None:
        """The average of tr(S), negative or not; None before the first estimate."""
        return self.noise / self.weight if self.weight > 0 else None

    @property
    def status(self) -> str:
        """Whether the noise scale may be used, in words: "ready" or why not."""
        if self.effective_updates < _MIN_UPDATES:
            return "not yet warm"
        if self.gradient <= 0 or self.noise <= 0:
            return "not positive"
        return "ready"

    @property
    def noise_scale(self) -> float | None:
        """tr(S) / |G|^2 in examples; None unless `status` is "ready"."""
        return self.noise / self.gradient if self.status == "ready" else None

    @property
    def standard_error(self) -> float | None:
        """Of the noise scale, in examples, from the spread between updates; None with it.

        The delta method for a ratio R of weighted means: the residuals r = tr(S) - R |G|^2 of the
        updates have the weighted mean 0, so var(R) = sum w^2 r^2 / (sum w |G|^2)^2. That holds
        where batch sizes, and with them the spread, differ between updates. Divided by
        1 - 1/effective_updates, as R was fitted to the same updates. Good while |G|^2 is itself
        known to better than about a third; what changes slowly in training counts as spread.
        """
        ratio = self.noise_scale
        if ratio is None:
            return None
        squares = self.noise_noise - 2 * ratio * self.gradient_noise
        squares += ratio**2 * self.gradient_gradient
        freedom = 1 - 1 / self.effective_updates
        return math.sqrt(max(squares, 0.0) / freedom) / self.gradient


def smooth(
    smoothed: Smoothed,
    estimate: Estimate | None,
    measurement: Measurement,
    *,
    memory_examples: float,
) -> Smoothed:
    """Adds one update to the averages.

    Forgetting is counted in examples: an update of n multiplies what was there by exp(-n / memory).
    A larger update is a better estimate (its spread falls with its small batches) and weighs more
    accordingly, and the average spans the same part of an epoch before and after the batch grows.
    Only where few updates fill the memory are they counted instead, at 1/10 each.

    Args:
      smoothed: the averages before.
      estimate: of this update; None where it has none: what is known grows older, no more.
      measurement: that it was made from; its examples are counted.
      memory_examples: the time constant.

    Returns:
      The averages after it.

    Raises:
      UserError: the memory is not above 0.
    """
    checks = Checks()
    checks.number("memory_examples", memory_examples, "a number of examples above 0", above=0)
    checks.done()
    fresh = -math.expm1(-measurement.examples / memory_examples)
    fresh = min(fresh, MOST_FRESH)
    old = faded(smoothed, 1 - fresh)
    if estimate is None:
        return old
    return Smoothed(*(a + b for a, b in zip(old, weighted(estimate, fresh), strict=True)))


def faded(smoothed: Smoothed, kept: Any) -> Smoothed:
    """The averages with what they hold multiplied by `kept`; numbers, or traced arrays."""
    return Smoothed(
        kept * smoothed.weight,
        kept**2 * smoothed.weight_square,
        kept * smoothed.gradient,
        kept * smoothed.noise,
        kept**2 * smoothed.gradient_gradient,
        kept**2 * smoothed.gradient_noise,
        kept**2 * smoothed.noise_noise,
    )


def weighted(estimate: Estimate, weight: Any) -> Smoothed:
    """What an estimate adds to the averages; numbers, or traced arrays."""
    gradient, noise = weight * estimate.gradient_square, weight * estimate.variance
    return Smoothed(weight, weight**2, gradient, noise, gradient**2, gradient * noise, noise**2)


def log_fields(
    smoothed: Smoothed, estimate: Estimate | None, population: str
) -> dict[str, float | str | None]:
    """What a record of the log says after an update; None for what is not known.

    An update without an estimate of its own shows no noise scale either.
    """
    told = Smoothed() if estimate is None else smoothed
    return {
        "gradient_noise_population": population,
        **noise_fields(told, estimate is not None),
        "gradient_square": None if estimate is None else estimate.gradient_square,
        "gradient_variance": None if estimate is None else estimate.variance,
    }


def noise_fields(smoothed: Smoothed, is_known: bool) -> dict[str, float | str | None]:
    """The averages' noise scale in examples and its standard error; or None, and why."""
    return {
        "gradient_noise_scale": smoothed.noise_scale,
        "gradient_noise_scale_error": smoothed.standard_error,
        "gradient_noise_status": smoothed.status if is_known else _FEW,
    }


def best_learning_rate(batch_size: float, noise_scale: float, largest: float) -> float:
    """The learning rate of most progress per update, largest / (1 + B_noise / B).

    McCandlish et al. 2018, equation 2.7, for plain SGD. It is linear in B while B << B_noise, half
    of the largest at B = B_noise, and no longer grows beyond.

    Args:
      batch_size: B, in examples.
      noise_scale: B_noise, in examples.
      largest: what it tends to as B grows, the best without noise.

    >>> best_learning_rate(100, 300, largest=2.0)
    0.5
    """
    return largest / (1 + noise_scale / batch_size)
