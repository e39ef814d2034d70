"""The value that a policy is."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bigbatch.checks import Checks
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.noise_scale import LINEAR, Array, Rule


class Settings(NamedTuple):
    """What a policy says at n points in time.

    Attributes:
      batch_size: examples per update, float64[n], before any rounding.
      hyper: float64[n] by name: always `learning_rate` and `momentum`, for Adam also `b1`, `b2` and
        `eps`.
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
      settings_at: epochs float64[n] -> Settings; defined from epoch 0 on.
      turning_epochs: where the learning rate or the stated batch size may have a local maximum.
      zero_epoch: from where the learning rate is 0 for good; infinity if nowhere.
      stated_batch_sizes: the sizes that must be whole multiples when a plan is made. Sizes that
        follow from a formula are not among them: those are rounded down.
      rule: how the hyperparameters follow the batch size in the transformations after it, and
        when a plan rounds.
    """

    settings_at: Callable[[Array], Settings]
    turning_epochs: tuple[float, ...] = (0.0,)
    zero_epoch: float = math.inf
    stated_batch_sizes: tuple[StatedSize, ...] = ()
    rule: Rule = LINEAR

    def at(self, epochs: ArrayLike) -> Settings:
        """The settings at n points in time, in epochs; not finite where they exceed float64."""
        with np.errstate(all="ignore"):
            return self.settings_at(np.atleast_1d(np.asarray(epochs, np.float64)))

    @functools.cached_property
    def peak_epoch(self) -> float:
        """The first epoch at which the learning rate is largest, but for rounding."""
        rates = self.at(self.turning_epochs).hyper["learning_rate"]
        return self.turning_epochs[int(np.argmax(rates >= rates.max() * (1 - 1e-12)))]

    @functools.cached_property
    def peak_learning_rate(self) -> float:
        """The largest learning rate."""
        return float(self.at(self.peak_epoch).hyper["learning_rate"][0])

    @functools.cached_property
    def stated_peak_batch_size(self) -> float:
        """The largest batch size at the turning points: growth is not counted.

        One that a formula gives is whole where it is but for rounding.
        """
        size = float(self.at(self.turning_epochs).batch_size.max())
        if not math.isfinite(size):
            raise UserError(Problem("batch_size", size, "a number of examples that float64 holds"))
        return round(size) if math.isclose(size, round(size), rel_tol=1e-12) else size


def check_base(checks: Checks, learning_rate: object, batch_size: object, momentum: object) -> None:
    """Notes what is wrong with the arguments that all recipes share."""
    checks.number("learning_rate", learning_rate, "a number above 0", above=0)
    checks.whole("batch_size", batch_size, "a whole number of examples, at least 1")
    checks.number("momentum", momentum, "a number from 0 to below 1", at_least=0, below=1)


def with_learning_rate(
    learning_rate: Callable[[Array], Array],
    batch_size: float,
    momentum: float,
    turning_epochs: tuple[float, ...] = (0.0,),
    zero_epoch: float = math.inf,
) -> Policy:
    """A policy with a learning rate that changes and the rest constant."""

    def settings_at(epochs: Array) -> Settings:
        hyper = {
            "learning_rate": learning_rate(epochs),
            "momentum": np.full(epochs.shape, float(momentum)),
        }
        return Settings(np.full(epochs.shape, float(batch_size)), hyper)

    stated = (StatedSize("batch_size", batch_size, float(batch_size)),)
    return Policy(settings_at, turning_epochs, zero_epoch, stated)
