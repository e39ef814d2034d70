"""Intervals of a run: when it logs, evaluates and saves, in the units of `durations` or minutes."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.schedule.durations import NO_TOKENS, TIME_UNITS, earliest

MINUTES, BY_THE_CLOCK, FAILURES = "minutes", "checkpoint_every_minutes", "failure_every_hours"


@dataclasses.dataclass(frozen=True)
class Every:
    """An interval in epochs, examples or updates; or in minutes, of which no position is one.

    Attributes:
      value: how many of the unit; of minutes also "auto".
      unit: "epochs", "examples", "updates" or "minutes"; tokens are given as the examples that have
        them.
    """

    value: Any
    unit: str

    def due(self, first_example: int, batch_size: int, update: int, train_examples: int) -> bool:
        """Whether an interval ends within an update.

        Args:
          first_example: position at which the update starts.
          batch_size: its examples.
          update: its number, from 0.
          train_examples: of an epoch.
        """
        if self.unit == MINUTES:
            return False
        start = self.passed(first_example, update, train_examples)
        return self.passed(first_example + batch_size, update + 1, train_examples) > start

    def num_due(self, batch_sizes: NDArray[np.int64], train_examples: int) -> int:
        """How many of a run's updates are `due`, the last of all among them.

        Args:
          batch_sizes: of the updates, int64[updates].
          train_examples: of an epoch.
        """
        if self.unit == MINUTES:
            return 1
        ends = np.arange(1, len(batch_sizes) + 1)
        if self.unit != "updates":
            ends = np.cumsum(batch_sizes)
        interval = float(earliest(self.value, train_examples if self.unit == "epochs" else 1))
        passed = np.diff(ends // interval, prepend=0) > 0
        return int(np.count_nonzero(passed[:-1])) + 1

    def passed(self, examples: int, updates: int, train_examples: int) -> int:
        """How many whole intervals there are in so many examples and updates from the start."""
        done = updates if self.unit == "updates" else examples
        return done // earliest(self.value, train_examples if self.unit == "epochs" else 1)


class Intervals(NamedTuple):
    """When a run logs, evaluates and saves.

    Attributes:
      log_every: interval of the training records.
      evaluate_every: of the evaluations.
      checkpoint_every: of the checkpoints.
      keep_every: of the checkpoints that are kept for good; None for none.
      failure_every_hours: in which the run is expected to be lost once, for checkpoints every
        "auto" minutes.
    """

    log_every: Every
    evaluate_every: Every
    checkpoint_every: Every
    keep_every: Every | None = None
    failure_every_hours: float | None = None

    @classmethod
    def names(cls) -> dict[str, str]:
        """The fields that intervals are given in, and the stem of each."""
        stems = [name for name in cls._fields if name != FAILURES]
        names = {f"{stem}_{unit}": stem for stem in stems for unit in TIME_UNITS}
        return names | {BY_THE_CLOCK: "checkpoint_every", FAILURES: FAILURES}

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        otherwise: Mapping[str, Every] | None = None,
        tokens_per_example: int | None = None,
    ) -> "Intervals":
        """The intervals of fields such as `log_every_epochs`, each in one of its units.

        Args:
          given: values by the fields' names; None counts as not given, other names are left alone.
          otherwise: where nothing is given, by the attributes' names.
          tokens_per_example: which intervals in tokens need.

        Raises:
          UserError: with each interval that is given not at all, twice, or not above 0; or in
            tokens, where nobody knows how many an example has.
        """
        checks, found = Checks(), dict[str, Any](otherwise or {})
        spelled, is_auto = cls.names(), given.get(BY_THE_CLOCK) == "auto"
        failures, allowed = given.get(FAILURES), "nothing without checkpoint_every_minutes = 'auto'"
        if is_auto:
            allowed = (
                "hours in which the whole run is expected to be lost once, above 0, for 'auto'"
            )
            failures = "nothing" if failures is None else failures
            checks.number(FAILURES, failures, allowed, above=0)
            found[FAILURES] = failures
        else:
            checks.require(failures is None, FAILURES, failures, allowed)
        for stem in cls._fields[:-1]:
            names = {n: n.rpartition("_")[2] for n, own in spelled.items() if own == stem}
            values = {name: given[name] for name in names if given.get(name) is not None}
            fits = len(values) == 1 or (not values and (stem in found or stem == "keep_every"))
            allowed = "exactly one of " + ", ".join(names)
            checks.require(fits, stem, values or "nothing", allowed)
            for name, value in values.items():
                if name == BY_THE_CLOCK and is_auto:
                    found[stem] = Every("auto", MINUTES)
                    continue
                good = checks.number(name, value, "a number above 0", above=0)
                if names[name] != "tokens":
                    found[stem] = Every(value, names[name])
                elif good and checks.require(bool(tokens_per_example), name, value, NO_TOKENS):
                    found[stem] = Every(Fraction(float(value)) / tokens_per_example, "examples")  # type: ignore
        checks.done()
        return cls(**found)
