"""What runs show, as numbers: one `Experiment` for each name, compared with a reference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bigbatch.commands.report import comparable
from bigbatch.commands.report.curves import CurveGap, bin_means, curve_gap, log_loss
from bigbatch.commands.report.metric import Metric, common_metrics
from bigbatch.commands.report.runs import LoggedRun

REFERENCE_NAME = "decay"
# Curves are drawn with one point an epoch, and shorter runs with about this many in all.
_MIN_POINTS = 40
# A run that is shorter than an epoch is looked at in so many parts instead.
_PARTS = 20
# Noise scales closer than this are one: batch sizes are rounded, and bins straddle stages.
_EQUAL_NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class MeanSd:
    """Mean and sample standard deviation of n runs; sd is NaN for n = 1, both for n = 0."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanSd":
        """Of one value a run; a value that is NaN counts, and shows."""
        mean = float(np.mean(values)) if len(values) else math.nan
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(mean, sd, len(values))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two means, and half the width of its 95 % interval (NaN if unknown)."""

    mean: float
    half_width: float


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A quantity of an experiment's runs at common points, for drawing.

    Attributes:
      epochs: float64[points].
      updates: float64[points], updates done by then, mean over the runs.
      mean: float64[points], mean over the runs; the geometric mean of a training loss.
      low: float64[points], one standard deviation below (of the log loss); the mean for one run.
      high: float64[points], the same above.
    """

    epochs: np.ndarray
    updates: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The runs of one experiment, put together.

    Attributes:
      name: the experiment's name.
      runs: the runs that the numbers come from: the finished ones, or all if none is finished.
      num_unfinished: runs that are not finished, whether they are among `runs` or not.
      updates: updates done by the end; runs of an adaptive experiment differ in them.
      metrics: at the end, one for each of `Summary.metrics`.
      train_loss: mean over the last of `epoch_losses`.
      examples_per_s: training examples per second of training.
      seconds: of a whole run.
      epoch_losses: float64[runs, epochs], mean training loss in each epoch, or in each twentieth
        of a run that is shorter than one; NaN where unknown.
      span_epochs: what a column of it spans.
      loss_curve: the same on a finer grid of bins; its points are their centres.
      noise_scale: float64[bins], mean over each bin of `loss_curve`, of the first run.
      metric_curve: the main metric at each evaluation.
      equal_noise: whether the noise scale follows the reference's.
      gap: distance of the loss curve from the reference's; None where it has no meaning.
      metric_difference: of the main metric, from the reference; None for the reference, and if
        nothing was evaluated.
      updates_ratio: the reference's updates divided by this experiment's.
    """

    name: str
    runs: tuple[LoggedRun, ...]
    num_unfinished: int
    updates: MeanSd
    metrics: tuple[MeanSd, ...]
    train_loss: MeanSd
    examples_per_s: MeanSd
    seconds: MeanSd
    epoch_losses: np.ndarray
    span_epochs: float
    loss_curve: Curve
    noise_scale: np.ndarray
    metric_curve: Curve
    equal_noise: bool = True
    gap: CurveGap | None = None
    metric_difference: Difference | None = None
    updates_ratio: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """All experiments of a report.

    Attributes:
      experiments: the reference first, then as they came.
      metrics: what was evaluated, the main one first; see `common_metrics`.
      config_differences: for each dotted config field in which experiments differ, the value in
        each experiment as JSON text ("-" where it lacks the field), in the order of experiments.
      warnings: what is missing, damaged or not comparable, one sentence each.
    """

    experiments: tuple[Experiment, ...]
    metrics: tuple[Metric, ...]
    config_differences: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]

    @property
    def metric(self) -> Metric | None:
        """The main one; None if nothing was evaluated."""
        return next(iter(self.metrics), None)

    @property
    def reference(self) -> Experiment:
        """The experiment that the others are compared with."""
        return self.experiments[0]


# Numbers of a damaged log may be of any size; what they give is shown as it is.
@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def summarise(runs: Sequence[LoggedRun]) -> Summary:
    """Puts runs together by experiment and compares each experiment with the reference.

    The reference is the experiment named "decay", or the first if there is none.

    Args:
      runs: runs, at least one of them `usable`; the others are left out.

    Returns:
      The summary, with the runs' own warnings in it.
    """
    warnings = [f"{run.path}: {text}." for run in runs for text in run.warnings]
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        if run.usable:
            groups.setdefault(run.experiment, []).append(run)
    metrics, differing = common_metrics([run for run in runs if run.usable])
    warnings.extend(differing)
    names = sorted(groups, key=lambda name: name != REFERENCE_NAME)
    for name in names:
        warnings.extend(comparable.within(name, groups[name]))
        warnings.extend(comparable.between(name, groups[name][0], names[0], groups[names[0]][0]))
    reference, *others = (_experiment(name, groups[name], metrics) for name in names)
    return Summary(
        experiments=(reference, *(_compared(other, reference) for other in others)),
        metrics=metrics,
        config_differences=comparable.config_differences([groups[name][0] for name in names]),
        warnings=tuple(warnings),
    )


def _experiment(name: str, runs: Sequence[LoggedRun], metrics: Sequence[Metric]) -> Experiment:
    used = [run for run in runs if run.finished] or list(runs)
    # Numbers are of the epochs that all runs have; finished runs of one plan have the same.
    epochs = min(run.epochs for run in used)
    edges = np.arange(math.floor(epochs + 1e-9) + 1.0)
    if is_short := all(run.plan and run.plan["epochs"] < 1 - 1e-9 for run in used):
        edges = np.linspace(0.0, epochs, _PARTS + 1)
    losses = np.array(
        [bin_means(run.training, "train_loss", edges * run.train_examples) for run in used]
    )
    curve, noise_scale = loss_curve(used)
    return Experiment(
        name=name,
        runs=tuple(used),
        num_unfinished=sum(not run.finished for run in runs),
        updates=MeanSd.of([run.final("updates", run.training["update"][-1]) for run in used]),
        metrics=tuple(MeanSd.of([metric.at_end(run) for run in used]) for metric in metrics),
        train_loss=MeanSd.of([np.append(math.nan, curve)[-1] for curve in losses]),
        examples_per_s=MeanSd.of([_examples_per_s(run) for run in used]),
        seconds=MeanSd.of([run.final("seconds", math.nan) for run in used]),
        epoch_losses=losses,
        span_epochs=edges[1] if is_short else 1.0,
        loss_curve=curve,
        noise_scale=noise_scale,
        metric_curve=metric_curve(used, metrics),
    )


def _examples_per_s(run: LoggedRun) -> float:
    rates = run.training["examples_per_s"]
    sizes = np.diff(run.training["examples"], prepend=0.0)
    timed = rates > 0
    return float(sizes[timed].sum() / (sizes[timed] / rates[timed]).sum()) if any(timed) else np.nan


def loss_curve(runs: Sequence[LoggedRun]) -> tuple[Curve, np.ndarray]:
    """The curve of the training loss, and the noise scale of its bins."""
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
    updates = [
        np.interp(
            centres * run.train_examples,
            np.append(0.0, run.training["examples"]),
            np.append(0.0, run.training["update"]),
        )
        for run in runs
    ]
    noise_scale = bin_means(runs[0].training, "noise_scale", edges * runs[0].train_examples)
    bands = np.exp(mean), np.exp(mean - sd), np.exp(mean + sd)
    return Curve(centres, np.mean(updates, axis=0), *bands), noise_scale


def metric_curve(runs: Sequence[LoggedRun], metrics: Sequence[Metric]) -> Curve:
    """The main metric at the evaluations that most runs share, by the update.

    Runs of one plan evaluate at the same updates. Runs that decide their plans evaluate at
    updates of their own: theirs are taken in order.
    """
    updates = np.concatenate([run.evaluations["update"] for run in runs])
    orders = np.concatenate([np.arange(run.evaluations["update"].size) for run in runs])
    sizes = np.array([run.train_examples for run in runs])
    positions = np.concatenate(
        [run.evaluations["examples"] / size for run, size in zip(runs, sizes, strict=True)]
    )
    if updates.size == 0:
        return Curve(*[np.empty(0)] * 5)
    values = np.concatenate([metrics[0].of(run) for run in runs])
    _, group = np.unique(orders if runs[0].decides else updates, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, values) / count
    squares = np.bincount(group, (values - mean[group]) ** 2)
    sd = np.sqrt(squares / np.maximum(count - 1, 1))
    places = [np.bincount(group, where) / count for where in (positions, updates)]
    keep = count == count.max()
    return Curve(*(values[keep] for values in (*places, mean, mean - sd, mean + sd)))


def _compared(experiment: Experiment, reference: Experiment) -> Experiment:
    same_seed = [
        (i, j)
        for i, run in enumerate(experiment.runs)
        for j, other in enumerate(reference.runs)
        if run.seed == other.seed
    ]
    gap, span = None, experiment.span_epochs
    sizes = [each.runs[0].train_examples for each in (experiment, reference)]
    # Parts of runs are the same ones where the runs are of one length.
    if sizes[0] == sizes[1] and math.isclose(span, reference.span_epochs):
        epochs = min(experiment.epoch_losses.shape[1], reference.epoch_losses.shape[1])
        gap = curve_gap(
            experiment.epoch_losses[:, :epochs], reference.epoch_losses[:, :epochs], same_seed
        )
        gap = gap and dataclasses.replace(gap, span_epochs=span)
    return dataclasses.replace(
        experiment,
        gap=gap,
        equal_noise=_equal_noise(experiment, reference),
        metric_difference=next(map(difference, experiment.metrics, reference.metrics), None),
        updates_ratio=reference.updates.mean / max(experiment.updates.mean, 1.0),
    )


def _equal_noise(experiment: Experiment, reference: Experiment) -> bool:
    """Whether the noise scales agree in most of the run; True where they are not recorded."""
    epochs = experiment.loss_curve.epochs, reference.loss_curve.epochs
    expected = np.interp(*epochs, reference.noise_scale)
    known = (experiment.noise_scale > 0) & (expected > 0)
    if not known.any():
        return True
    return bool(np.median(np.abs(np.log(experiment.noise_scale / expected)[known])) < _EQUAL_NOISE)


def difference(values: MeanSd, reference: MeanSd) -> Difference:
    """Welch's 95 % interval of the difference of two means.

    Half its width is t(0.975, k) sqrt(sd^2 / n + sd_ref^2 / n_ref), with the degrees of freedom k
    of Welch (1947). It is the uncertainty from the seeds alone: the test set is the same.

    Args:
      values: those of the experiment.
      reference: those of the reference.

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
