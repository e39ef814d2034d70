"""What runs show, as numbers: one `Experiment` for each name, compared with a reference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bigbatch.commands.report import comparable
from bigbatch.commands.report.curves import CurveGap, bin_means, curve_gap, log_loss
from bigbatch.commands.report.runs import Run

REFERENCE_NAME = "decay"
# Curves are drawn with one point an epoch, and shorter runs with about this many in all.
_MIN_POINTS = 40
# Noise scales closer than this are one: batch sizes are rounded, and bins straddle stages.
_EQUAL_NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of n runs; sd is NaN for n = 1, both for n = 0."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The estimate from one value a run; a value that is NaN counts, and shows."""
        mean = float(np.mean(values)) if len(values) else math.nan
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(mean, sd, len(values))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two means, and half the width of its 95 % interval (NaN if unknown)."""

    mean: float
    half_width: float


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """The training loss of an experiment's runs on one grid of examples.

    Attributes:
      epochs: float64[bins], the bins' centres.
      updates: float64[bins], updates done at the centres, mean over the runs.
      loss: float64[bins], geometric mean over the runs.
      low: float64[bins], one standard deviation of the log loss below; equal to loss for one run.
      high: float64[bins], the same above.
      noise_scale: float64[bins], mean over the bin, of the first run.
    """

    epochs: np.ndarray
    updates: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    noise_scale: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Accuracies:
    """Test accuracy at each evaluation: mean and standard deviation over the runs, in percent."""

    epochs: np.ndarray
    updates: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The runs of one experiment, put together.

    Attributes:
      name: the experiment's name.
      runs: the runs that the numbers come from: the finished ones, or all if none is finished.
      num_unfinished: runs that are not finished, whether they are among `runs` or not.
      updates: updates done by the end; runs of an adaptive experiment differ in them.
      test_accuracy: at the end, in percent.
      train_loss: mean over the last whole epoch.
      examples_per_s: training examples per second of training.
      seconds: of a whole run.
      epoch_losses: float64[runs, epochs], mean training loss in each epoch; NaN where unknown.
      curves: the same for drawing.
      accuracies: for drawing.
      equal_noise: whether the noise scale follows the reference's.
      gap: distance of the loss curve from the reference's; None where it has no meaning.
      accuracy_difference: from the reference, in points of a percent; None for the reference.
      updates_ratio: the reference's updates divided by this experiment's.
    """

    name: str
    runs: tuple[Run, ...]
    num_unfinished: int
    updates: Estimate
    test_accuracy: Estimate
    train_loss: Estimate
    examples_per_s: Estimate
    seconds: Estimate
    epoch_losses: np.ndarray
    curves: Curves
    accuracies: Accuracies
    equal_noise: bool = True
    gap: CurveGap | None = None
    accuracy_difference: Difference | None = None
    updates_ratio: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """All experiments of a report.

    Attributes:
      experiments: the reference first, then as they came.
      config_differences: for each dotted config field in which experiments differ, the value in
        each experiment as JSON text ("-" where it lacks the field), in the order of experiments.
      warnings: what is missing, damaged or not comparable, one sentence each.
    """

    experiments: tuple[Experiment, ...]
    config_differences: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]

    @property
    def reference(self) -> Experiment:
        """The experiment that the others are compared with."""
        return self.experiments[0]


def summarise(runs: Sequence[Run]) -> Summary:
    """Puts runs together by experiment and compares each experiment with the reference.

    The reference is the experiment named "decay", or the first if there is none.

    Args:
      runs: runs, at least one of them `usable`; the others are left out.

    Returns:
      The summary, with the runs' own warnings in it.
    """
    warnings = [f"{run.path}: {text}." for run in runs for text in run.warnings]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.usable:
            groups.setdefault(run.experiment, []).append(run)
    names = sorted(groups, key=lambda name: name != REFERENCE_NAME)
    for name in names:
        warnings.extend(comparable.within(name, groups[name]))
        warnings.extend(comparable.between(name, groups[name][0], names[0], groups[names[0]][0]))
    reference, *others = (_experiment(name, groups[name]) for name in names)
    return Summary(
        experiments=(reference, *(_compared(other, reference) for other in others)),
        config_differences=comparable.config_differences([groups[name][0] for name in names]),
        warnings=tuple(warnings),
    )


def _experiment(name: str, runs: Sequence[Run]) -> Experiment:
    used = [run for run in runs if run.finished] or list(runs)
    # Numbers are of the epochs that all runs have; finished runs of one plan have the same.
    edges = np.arange(math.floor(min(run.epochs for run in used) + 1e-9) + 1.0)
    losses = np.array(
        [bin_means(run.training, "train_loss", edges * run.train_examples) for run in used]
    )
    return Experiment(
        name=name,
        runs=tuple(used),
        num_unfinished=sum(not run.finished for run in runs),
        updates=Estimate.of([_final(run, "updates", run.training["update"][-1]) for run in used]),
        test_accuracy=Estimate.of([100 * _final_accuracy(run) for run in used]),
        train_loss=Estimate.of([_last(curve) for curve in losses]),
        examples_per_s=Estimate.of([_examples_per_s(run) for run in used]),
        seconds=Estimate.of([_final(run, "seconds", math.nan) for run in used]),
        epoch_losses=losses,
        curves=_curves(used),
        accuracies=_accuracies(used),
    )


def _final(run: Run, field: str, otherwise: float) -> float:
    value = (run.result or {}).get(field)
    return float(value) if isinstance(value, int | float) else otherwise


def _final_accuracy(run: Run) -> float:
    evaluated = run.evaluations["test_accuracy"]
    return _final(run, "test_accuracy", evaluated[-1] if evaluated.size else math.nan)


def _last(curve: np.ndarray) -> float:
    """The last whole epoch's value; NaN if there is no whole epoch."""
    return float(curve[-1]) if curve.size else math.nan


def _examples_per_s(run: Run) -> float:
    rates = run.training["examples_per_s"]
    sizes = np.diff(run.training["examples"], prepend=0.0)
    timed = rates > 0
    return float(sizes[timed].sum() / (sizes[timed] / rates[timed]).sum()) if any(timed) else np.nan


def _curves(runs: Sequence[Run]) -> Curves:
    epochs = max(run.epochs for run in runs)
    # Over a whole epoch each run has seen each example once, so the curve has the least scatter.
    bins = max(math.floor(epochs + 1e-9), 1)
    bins *= math.ceil(_MIN_POINTS / 2 / bins)
    edges = np.linspace(0.0, epochs, bins + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    logs = np.array(
        [
            log_loss(bin_means(run.training, "train_loss", edges * run.train_examples))
            for run in runs
        ]
    )
    there = np.isfinite(logs)
    count = there.sum(axis=0)
    filled = np.where(there, logs, 0.0)
    mean = np.divide(filled.sum(axis=0), count, out=np.full(bins, np.nan), where=count > 0)
    squares = (np.where(there, logs - mean, 0.0) ** 2).sum(axis=0)
    sd = np.sqrt(squares / np.maximum(count - 1, 1))
    first = runs[0]
    updates = [
        np.interp(
            centres * run.train_examples,
            np.append(0.0, run.training["examples"]),
            np.append(0.0, run.training["update"]),
        )
        for run in runs
    ]
    return Curves(
        epochs=centres,
        updates=np.mean(updates, axis=0),
        loss=np.exp(mean),
        low=np.exp(mean - sd),
        high=np.exp(mean + sd),
        noise_scale=bin_means(first.training, "noise_scale", edges * first.train_examples),
    )


def _accuracies(runs: Sequence[Run]) -> Accuracies:
    """Evaluations that most runs share, by the update; runs of one plan evaluate at the same.

    Runs that decide their plans evaluate at updates of their own: theirs are taken in order.
    """
    updates = np.concatenate([run.evaluations["update"] for run in runs])
    orders = np.concatenate([np.arange(run.evaluations["update"].size) for run in runs])
    values = 100 * np.concatenate([run.evaluations["test_accuracy"] for run in runs])
    sizes = np.array([run.train_examples for run in runs])
    positions = np.concatenate(
        [run.evaluations["examples"] / size for run, size in zip(runs, sizes, strict=True)]
    )
    if updates.size == 0:
        return Accuracies(*(np.empty(0) for _ in range(4)))
    _, group = np.unique(orders if runs[0].decides else updates, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, values) / count
    squares = np.bincount(group, (values - mean[group]) ** 2)
    keep = count == count.max()
    return Accuracies(
        epochs=(np.bincount(group, positions) / count)[keep],
        updates=(np.bincount(group, updates) / count)[keep],
        mean=mean[keep],
        sd=np.sqrt(squares / np.maximum(count - 1, 1))[keep],
    )


def _compared(experiment: Experiment, reference: Experiment) -> Experiment:
    same_seed = [
        (i, j)
        for i, run in enumerate(experiment.runs)
        for j, other in enumerate(reference.runs)
        if run.seed == other.seed
    ]
    gap = None
    if experiment.runs[0].train_examples == reference.runs[0].train_examples:
        epochs = min(experiment.epoch_losses.shape[1], reference.epoch_losses.shape[1])
        gap = curve_gap(
            experiment.epoch_losses[:, :epochs], reference.epoch_losses[:, :epochs], same_seed
        )
    return dataclasses.replace(
        experiment,
        gap=gap,
        equal_noise=_equal_noise(experiment.curves, reference.curves),
        accuracy_difference=difference(experiment.test_accuracy, reference.test_accuracy),
        updates_ratio=reference.updates.mean / max(experiment.updates.mean, 1.0),
    )


def _equal_noise(curves: Curves, reference: Curves) -> bool:
    """Whether the noise scales agree in most of the run; True where they are not recorded."""
    expected = np.interp(curves.epochs, reference.epochs, reference.noise_scale)
    known = (curves.noise_scale > 0) & (expected > 0)
    if not known.any():
        return True
    return bool(np.median(np.abs(np.log(curves.noise_scale / expected)[known])) < _EQUAL_NOISE)


def difference(values: Estimate, reference: Estimate) -> Difference:
    """Welch's 95 % interval of the difference of two means.

    Half its width is t(0.975, k) sqrt(sd^2 / n + sd_ref^2 / n_ref), with the degrees of freedom k
    of Welch (1947). It is the uncertainty from the seeds alone: the test set is the same.

    Args:
      values: estimate of the experiment.
      reference: estimate of the reference.

    Returns:
      The difference; half_width is NaN if either has fewer than two runs.
    """
    # Of all of SciPy one function, and only where a report needs it.
    from scipy.special import stdtrit

    own, other = values.sd**2 / max(values.n, 1), reference.sd**2 / max(reference.n, 1)
    half_width = math.sqrt(own + other)
    if half_width > 0:
        freedom = (own + other) ** 2 / (own**2 / (values.n - 1) + other**2 / (reference.n - 1))
        half_width *= float(stdtrit(freedom, 0.975))
    return Difference(values.mean - reference.mean, half_width)
