"""When things happened: seconds of a run at any example, of each stage, of waiting for input."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bigbatch.commands.report.metric import Metric
from bigbatch.commands.report.runs import Columns, LoggedRun
from bigbatch.workdir import starts
from bigbatch.workdir.starts import goodput


def seconds_at(run: LoggedRun, examples: np.ndarray) -> np.ndarray:
    """Seconds since the start at which a run had seen so many examples.

    A record's examples per second are those of the time since the record before it, evaluations
    and checkpoints included, so their times add up. Where a record lacks them, the run's own mean
    stands in.

    Args:
      run: a run with training records.
      examples: float64[n], positions.

    Returns:
      float64[n]; NaN past the last record, and everywhere if no record has a speed.
    """
    ends = run.training["examples"]
    durations = _durations_s(run.training)
    if durations is None:
        return np.full(len(examples), np.nan)
    cumulative = np.append(0.0, np.cumsum(durations))
    return np.interp(examples, np.append(0.0, ends), cumulative, right=np.nan)


def _durations_s(training: Columns) -> np.ndarray | None:
    """Seconds of each training record's range."""
    rates = training["examples_per_s"]
    sizes = np.diff(training["examples"], prepend=0.0)
    timed = rates > 0
    if not timed.any():
        return None
    durations = np.divide(sizes, rates, out=np.full(len(sizes), np.nan), where=timed)
    mean = sizes[timed].sum() / durations[timed].sum()
    return np.where(timed, durations, sizes / mean)


def mean_seconds_at(runs: Sequence[LoggedRun], examples: np.ndarray) -> np.ndarray:
    """`seconds_at`, averaged over the runs that know it; NaN where none does."""
    values = np.array([seconds_at(run, examples) for run in runs])
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(examples), np.nan), where=count > 0)


class StageSpeed(NamedTuple):
    """What the runs took for one stage, on average; NaN where it is not known."""

    seconds: float
    examples_per_s: float


def stage_speeds(runs: Sequence[LoggedRun]) -> list[StageSpeed]:
    """The time of each stage of the runs' common plan, as far as the runs have come."""
    plan = next((run.plan for run in runs if run.plan is not None), None)
    if plan is None:
        return []
    starts = [float(stage["first_example"]) for stage in plan["stages"]]
    last = plan["stages"][-1]
    edges = np.array([*starts, starts[-1] + last["num_updates"] * last["batch_size"]])
    seconds = np.diff(mean_seconds_at(runs, edges))
    return [
        StageSpeed(float(s), float(n / s) if s > 0 else np.nan)
        for s, n in zip(seconds, np.diff(edges), strict=True)
    ]


def input_wait_s(run: LoggedRun) -> float:
    """Seconds that the loop waited for its examples; NaN if the log does not say."""
    waited = run.training["input_wait_s"]
    known = np.isfinite(waited)
    return float(waited[known].sum()) if known.any() else np.nan


WALL_TIME = ("experiment", "starts", "wall seconds", "goodput %", *starts.KINDS, starts.LOST)
WALL_NOTE = (
    "Means over the runs of the wall seconds of all starts of a run together. Goodput: the share "
    "of the device, which is all of the loop that waited for nothing else. Lost: updates that a "
    "kill took back, and starts that came to no checkpoint."
)


def wall_times(groups: Mapping[str, Sequence[LoggedRun]]) -> list[tuple[str, ...]]:
    """A row of `WALL_TIME` for each experiment whose runs say where their wall time went."""
    rows = []
    for name, runs in groups.items():
        known = [(len(run.starts), seconds) for run in runs if (seconds := goodput(run.starts))]
        total = sum(sum(seconds.values()) for _, seconds in known)
        if total > 0:
            count = sum(count for count, _ in known) / len(known)
            means = {k: sum(s.get(k, 0.0) for _, s in known) / len(known) for k in WALL_TIME[4:]}
            share = 100 * means["device"] * len(known) / total
            cells = f"{count:.3g}", f"{total / len(known):,.1f}", f"{share:.0f}"
            rows.append((name, *cells, *(f"{value:,.1f}" for value in means.values())))
    return rows


class Budget(NamedTuple):
    """As much of something as every experiment has spent.

    Attributes:
      unit: "updates", "examples" or "seconds".
      amount: the smallest of the experiments' totals.
      values: for each experiment, the metric of each of its runs at the last evaluation within the
        budget; NaN for a run without one.
    """

    unit: str
    amount: float
    values: tuple[list[float], ...]


def equal_budgets(groups: Sequence[Sequence[LoggedRun]], metric: Metric) -> list[Budget]:
    """A metric at equal updates, equal examples and equal seconds.

    Args:
      groups: the runs of each experiment.
      metric: what to compare them by.
    """
    units: dict[str, Callable[[LoggedRun, Columns], np.ndarray]] = {
        "updates": lambda run, at: at["update"],
        "examples": lambda run, at: at["examples"],
        "seconds": lambda run, at: seconds_at(run, at["examples"]),
    }
    budgets = []
    for unit, spent in units.items():
        totals = [np.mean([spent(run, run.training)[-1] for run in runs]) for runs in groups]
        if not np.isfinite(totals).all():
            continue
        amount = float(min(totals))
        values = tuple(
            [_value_within(metric.of(run), spent(run, run.evaluations), amount) for run in runs]
            for runs in groups
        )
        budgets.append(Budget(unit, amount, values))
    return budgets


def _value_within(values: np.ndarray, spent: np.ndarray, amount: float) -> float:
    # Runs of one experiment take different seconds; half a percent more is the same budget.
    within = np.flatnonzero(spent <= 1.005 * amount)
    return float(values[within[-1]]) if within.size else np.nan
