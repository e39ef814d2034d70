r"""Equal progress with other batch sizes: what a plan may change where the noise is known.

*Progress.* Near a point with gradient G, curvature H and per-example covariance S, an update of B
examples with learning rate y lr_best(B) lowers the expected loss by

    (2 y - y^2) dL_max / (1 + B_noise / B),    lr_best(B) = lr_max / (1 + B_noise / B)

(McCandlish et al. 2018, section 2.2). So an update makes 1 / (1 + B_noise / B) of the
progress of one without noise, at the same share y of the best learning rate. Here it is counted
along a *reference*: the plan of a recipe that is believed to train well. At every point of its way
y is kept, whatever the recipe has made it by warm-up and decay, and the first factor cancels. Where
the reference takes one update of B_0, updates of B are then

    (1 + B_noise / B) / (1 + B_noise / B_0) = 1 / k    in number,

each with the learning rate multiplied by k. Far below the noise scale k = B / B_0: equal progress
is an equal number of examples, and lr ~ B, the linear rule. Far above it k ends at 1 + B_noise/B_0:
this is where linear scaling ends, as measured. Two plans make *equal progress* where each stretch
of the reference's way is done by as many updates as this asks for. The noise of the updates, lr/B
in proportion to 1 / (B + B_noise), is that of the reference where B is small beside B_noise, and
below it where B has grown.

*What may change* is the batch size at each point, and what follows it by the reference's rule
(`noise_scale.Rule`) with k in place of the ratio of the batch sizes: the learning rate times k, or
times sqrt(k) for adaptive optimizers, whose progress is believed to follow the same law; b1, b2 and
eps where the rule moves them, with its floors. Devices, hours and money are of
`bigbatch.layout.fastest`.

*The noise of a pilot.* |G|^2 and tr(S) of its records are averaged, by examples, over parts of its
way: 1/32 each, and halves of halves within the first, where training changes fastest. Their ratio
is the part's noise scale, its standard error is by the delta method. Parts with too few records, or
known to no better than half, are interpolated in log B_noise. A point of the pilot's way stands for
the same share of the reference's examples. Within a part the noise scale counts as constant.

`docs/fastest_plan.md` says what this rests on and where it is known to fail.

>>> from bigbatch.schedule.plan import make_plan
>>> from bigbatch.schedule.policy import constant
>>> recipe = make_plan(constant(0.1, 10), train_examples=1_000, epochs=1)
>>> way = Way(recipe, np.repeat([0, 1], 50), np.array([10.0, 1e9]))
>>> way.updates(np.array([10, 40])).round(6).tolist()
[[50.0, 31.25], [50.0, 12.5]]
>>> fastest = way.plan_of(np.array([10, 40]), LINEAR)
>>> [(stage.num_updates, round(stage.learning_rate, 6)) for stage in fastest.stages]
[(50, 0.1), (13, 0.4)]
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.noise_scale import LINEAR, Array, Rule
from bigbatch.schedule.plan import Plan

# Of a way, as shares.
EDGES = np.r_[0.0, 2.0 ** np.arange(-10, -5), np.arange(1, 33) / 32]
_MIN_RECORDS = 5
# A noise scale that is known to no better is not used.
_MAX_ERROR = 0.5
_STEPS_PER_DOUBLING = 4


class Noise(NamedTuple):
    """B_noise along a way, one of each for every part between two `EDGES`.

    Attributes:
      scales: B_noise in examples, float64[parts].
      errors: relative standard errors; of a part without a measurement that of its neighbours.
      measured: whether a part has a measurement of its own, bool[parts].
    """

    scales: Array
    errors: Array
    measured: NDArray[np.bool_]


def noise_along(
    shares: Array, weights: Array, gradient_squares: Array, variances: Array, field: str = "noise"
) -> Noise:
    """The noise scale of the parts of a way from single updates' estimates.

    Args:
      shares: where each update lies, from 0 to 1, float64[records].
      weights: its examples.
      gradient_squares: its estimate of |G|^2; NaN where there is none.
      variances: its estimate of tr(S), likewise.
      field: what to call it in an error.

    Raises:
      UserError: no part has a noise scale.
    """
    usable = np.isfinite(shares * weights * gradient_squares * variances)
    part = np.clip(np.searchsorted(EDGES, shares, "right") - 1, 0, len(EDGES) - 2)

    def total(values: Array) -> Array:
        return np.bincount(part[usable], values[usable], len(EDGES) - 1).astype(np.float64)

    count = total(np.ones_like(weights))
    with np.errstate(all="ignore"):
        signal = total(weights * gradient_squares)
        scales = total(weights * variances) / signal
        residuals = weights * (variances - scales[part] * gradient_squares)
        errors = np.sqrt(total(residuals**2) * count / (count - 1)) / signal / scales
        known = (count >= _MIN_RECORDS) & (signal > 0) & (scales > 0) & (errors <= _MAX_ERROR)
    if not known.any():
        allowed = (
            "a run that measured its gradient noise (--config.noise_small_batch_examples), in some "
            f"part of it {_MIN_RECORDS} records or more with gradient_square and gradient_variance "
            f"that tell the noise scale to {_MAX_ERROR:.0%}; this one has {usable.sum():,} with any"
        )
        raise UserError(Problem(field, f"{usable.sum():,} records", allowed))
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    scales = np.exp(np.interp(middles, middles[known], np.log(scales[known])))
    return Noise(scales, np.interp(middles, middles[known], errors[known]), known)


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """The way of a reference, in parts of one noise scale each.

    Attributes:
      reference: the plan of K updates whose progress is to be made.
      part: of each of its updates, rising int64[K].
      scales: B_noise of each part in examples, float64[M].
    """

    reference: Plan
    part: NDArray[np.int64]
    scales: Array

    @classmethod
    def of(cls, reference: Plan, noise: Noise) -> "Way":
        """The way of a plan whose noise is known along `EDGES`."""
        shares = reference.first_examples / reference.num_examples
        return cls(reference, np.searchsorted(EDGES, shares, "right") - 1, noise.scales)

    @functools.cached_property
    def progress(self) -> Array:
        """Of each update of the reference, in updates without noise: 1 / (1 + B_noise / B)."""
        return 1 / (1 + self.scales[self.part] / self.reference.batch_sizes)

    def updates(self, batch_sizes: NDArray[np.int64]) -> Array:
        """How many updates do the work of each part, float64[M, sizes], not whole."""
        progress = np.bincount(self.part, self.progress, len(self.scales))
        return progress[:, None] * (1 + self.scales[:, None] / batch_sizes)

    def updates_of_each(self, batch_sizes: Array) -> Array:
        """How many updates of other sizes do the work of each of the reference's, float64[K]."""
        return self.progress * (1 + self.scales[self.part] / batch_sizes)

    def plan_of(self, batch_sizes: NDArray[np.int64], rule: Rule = LINEAR) -> Plan:
        """The plan that goes this way with one batch size in each part.

        Args:
          batch_sizes: B of each part, int64[M].
          rule: by which the reference's hyperparameters follow k.

        Returns:
          A plan of another number of examples than the reference's. Each update has the settings
          of the point at which it starts.
        """
        done = np.cumsum(np.bincount(self.part, self.progress, len(self.scales)))
        counts = np.diff(done, prepend=0) * (1 + self.scales / batch_sizes)
        edges = np.r_[0.0, np.cumsum(counts)]
        # What is left for the last update is done, but for rounding.
        update = np.arange(max(1, int(np.ceil(edges[-1] * (1 - 1e-9)))))
        part = np.minimum(np.searchsorted(edges, update, "right"), len(counts)) - 1
        start = np.interp(update, edges, np.r_[0.0, done])
        # A start that is an update's own, but for rounding, is its start and not the end before.
        ends = np.cumsum(self.progress) * (1 - 1e-12)
        at = np.minimum(np.searchsorted(ends, start, "right"), self.reference.num_updates - 1)
        sizes = batch_sizes[part].astype(np.int64)
        ratio = self.scales[part] / self.reference.batch_sizes[at]
        k = (1 + ratio) / (1 + self.scales[part] / sizes)
        # k is a ratio already; the exact rule's would be one of batch sizes.
        power = dataclasses.replace(rule, train_examples=None)
        hyper = {name: column[at] for name, column in self.reference.hypers.items()}
        hyper = power.capped(power.move(hyper, np.ones(len(at)), k))
        return dataclasses.replace(
            self.reference,
            epochs=float(sizes.sum() / self.reference.train_examples),
            rule=rule.name,
            batch_sizes=sizes,
            hypers=hyper,
        )


def ladder(multiple: int, most: float, also: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rising batch sizes, four a doubling: the best of them costs 0.2 % more than the best of all.

    Args:
      multiple: that all are multiples of, usually the ghost batch.
      most: none is larger.
      also: sizes that are to be among them.

    Raises:
      UserError: there is none.

    >>> ladder(16, 100, np.array([40])).tolist()
    [16, 32, 40, 48, 64, 80, 96]
    """
    checks = Checks()
    allowed = f"at least {multiple:,} examples, the smallest batch"
    checks.number("most", float(most), allowed, at_least=multiple)
    checks.done()
    steps = np.arange(np.log2(most / multiple) * _STEPS_PER_DOUBLING + 1) / _STEPS_PER_DOUBLING
    sizes = np.union1d(multiple * np.rint(2.0**steps).astype(np.int64), also)
    sizes = np.union1d(sizes, int(most) // multiple * multiple)
    return sizes[sizes <= most]
