"""Policies: the learning rate, batch size and momentum of a training recipe, as functions of time.

A policy knows no training set and no device. Time is epochs, a real number; the batch size is real
too, until a plan is made. The constructors here are recipes as people write them down; the
functions in `bigbatch.transform` turn one into another with the same gradient noise.

>>> paper = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> settings = paper.at(np.array([0.0, 60.0]))
>>> settings.hyper["learning_rate"].round(6).tolist()
[0.1, 0.02]
>>> settings.batch_size.tolist()
[128.0, 128.0]
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bigbatch.checks import Checks
from bigbatch.noise_scale import LINEAR, Array, Rule


class Settings(NamedTuple):
    """What a policy says at n points in time.

    Attributes:
      batch_size: examples per update, float64[n], before any rounding.
      hyper: float64[n] by name: always `learning_rate` and `momentum`, for Adam's rule also `b1`,
        `b2` and `eps`.
    """

    batch_size: Array
    hyper: dict[str, Array]


class StatedSize(NamedTuple):
    """A batch size that a user wrote down, which a plan never rounds.

    Attributes:
      field: the argument it came from.
      given: that argument's value.
      size: the batch size in examples that it stands for.
    """

    field: str
    given: float
    size: float


@dataclasses.dataclass(frozen=True)
class Policy:
    """A training recipe over epochs.

    Attributes:
      at: epochs float64[n] -> Settings; defined from epoch 0 on.
      turning_epochs: where the learning rate or the stated batch size may have a local maximum.
      zero_epoch: from where the learning rate is 0 for good; infinity if nowhere.
      stated_batch_sizes: the sizes that must be whole multiples when a plan is made. Sizes that
        follow from a formula are not among them: those are rounded down.
      rule: how the hyperparameters follow the batch size in what comes after.
    """

    at: Callable[[Array], Settings]
    turning_epochs: tuple[float, ...] = (0.0,)
    zero_epoch: float = math.inf
    stated_batch_sizes: tuple[StatedSize, ...] = ()
    rule: Rule = LINEAR

    @functools.cached_property
    def peak_epoch(self) -> float:
        """The first epoch at which the learning rate is largest."""
        rates = self.at(np.array(self.turning_epochs)).hyper["learning_rate"]
        return self.turning_epochs[int(np.argmax(rates))]

    @functools.cached_property
    def peak_learning_rate(self) -> float:
        """The largest learning rate."""
        return float(self.at(np.array([self.peak_epoch])).hyper["learning_rate"][0])


def _check_base(
    checks: Checks, learning_rate: object, batch_size: object, momentum: object
) -> None:
    checks.number("learning_rate", learning_rate, "a number above 0", above=0)
    checks.whole("batch_size", batch_size, "a whole number of examples, at least 1")
    checks.number("momentum", momentum, "a number from 0 to below 1", at_least=0, below=1)


def _with_learning_rate(
    learning_rate: Callable[[Array], Array],
    batch_size: float,
    momentum: float,
    turning_epochs: Sequence[float] = (0.0,),
    zero_epoch: float = math.inf,
) -> Policy:
    """A policy with a learning rate that changes and the rest constant."""

    def at(epochs: ArrayLike) -> Settings:
        e = np.asarray(epochs, np.float64)
        hyper = {"learning_rate": learning_rate(e), "momentum": np.full(e.shape, float(momentum))}
        return Settings(np.full(e.shape, float(batch_size)), hyper)

    stated = (StatedSize("batch_size", batch_size, float(batch_size)),)
    return Policy(at, tuple(turning_epochs), zero_epoch, stated)


def constant(learning_rate: float, batch_size: int, momentum: float = 0.0) -> Policy:
    """The same learning rate, batch size (examples) and momentum throughout.

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    _check_base(checks, learning_rate, batch_size, momentum)
    checks.done()
    return _with_learning_rate(
        lambda e: np.full(e.shape, float(learning_rate)), batch_size, momentum
    )


def step_decay(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    boundaries_epochs: Sequence[float],
    factor: float,
) -> Policy:
    """The learning rate is multiplied by `factor` at every boundary.

    Args:
      learning_rate: before the first boundary.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      boundaries_epochs: strictly increasing, above 0; from a boundary on the new value holds.
      factor: above 0 and below 1; the paper's drops by 5 are 0.2.

    Raises:
      UserError: an argument is out of its range or order.
    """
    checks = Checks()
    _check_base(checks, learning_rate, batch_size, momentum)
    check_boundaries(checks, "boundaries_epochs", boundaries_epochs)
    if checks.number("factor", factor, "a number above 0 (the learning rate times this)", above=0):
        checks.require(factor < 1, "factor", factor, "a number below 1", 1 / factor)
    checks.done()
    boundaries = np.array(boundaries_epochs, np.float64)
    values = learning_rate * np.float64(factor) ** np.arange(len(boundaries) + 1)
    return _with_learning_rate(
        lambda e: values[np.searchsorted(boundaries, e, side="right")], batch_size, momentum
    )


def check_boundaries(checks: Checks, field: str, boundaries: object) -> None:
    """Notes a problem unless `boundaries` is a strictly increasing sequence of numbers above 0."""
    allowed = "numbers above 0, each larger than the one before"
    if not isinstance(boundaries, Sequence | np.ndarray) or isinstance(boundaries, str):
        checks.require(False, field, boundaries, f"a list of {allowed}")
        return
    fine = [checks.number(f"{field}[{i}]", b, allowed, above=0) for i, b in enumerate(boundaries)]
    if all(fine):
        ordered = sorted(set(boundaries))
        checks.require(list(boundaries) == ordered, field, list(boundaries), allowed, ordered)


POLICIES: dict[str, Callable[..., Policy]] = {"constant": constant, "step_decay": step_decay}
"""By the name that a config gives them; their keyword parameters are its fields."""
