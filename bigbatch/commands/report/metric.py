"""What runs are judged by: a metric of their task, or else the test loss."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bigbatch.commands.report.runs import LoggedRun


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that every evaluation gives.

    Attributes:
      name: `test_NAME` is its field in the log. An accuracy, by the end of its name, is logged as a
        share and shown in percent; anything else is shown as it is.
    """

    name: str

    @property
    def percent(self) -> bool:
        """Whether it is shown in percent, and its differences in points."""
        return self.name.endswith("accuracy")

    @property
    def unit(self) -> str:
        """What follows its name in a heading."""
        return ", %" if self.percent else ""

    @property
    def heading(self) -> str:
        """Of a column."""
        return f"test {self.name}{self.unit}"

    def of(self, run: LoggedRun) -> np.ndarray:
        """Of each evaluation as it is shown, float64[evaluations]; NaN where the log lacks it."""
        unknown = np.full(run.evaluations["update"].size, math.nan)
        return (100 if self.percent else 1) * run.evaluations.get(f"test_{self.name}", unknown)

    def at_end(self, run: LoggedRun) -> float:
        """From the result or else the last evaluation, as it is shown; NaN if neither has it."""
        final = (100 if self.percent else 1) * run.final(f"test_{self.name}", math.nan)
        return float(np.append(math.nan, self.of(run))[-1]) if math.isnan(final) else final


def common_metrics(runs: Sequence[LoggedRun]) -> tuple[tuple[Metric, ...], list[str]]:
    """What runs can be compared by.

    Args:
      runs: the runs of a report. Those that ended without an evaluation have no say.

    Returns:
      The metrics: first the main one, which is the first that all runs have or else the test loss,
      then all others that some run has; none if no run was or will be evaluated. And warnings, a
      sentence each.
    """
    judged = [run for run in runs if run.evaluated or not run.finished]
    if not judged:
        return (), []
    names = list(dict.fromkeys(name for run in judged for name in run.metrics))
    main = next((name for name in names if all(name in run.metrics for run in judged)), "loss")
    own = list(dict.fromkeys(run.metrics[0] for run in judged))
    warning = f"the runs' main metrics are {', '.join(own)}: they are compared by the test {main}."
    return tuple(map(Metric, dict.fromkeys([main, *names]))), [warning] * (len(own) > 1)
