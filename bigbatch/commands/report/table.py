"""The summary in words and as a table: plain strings that the page and the Markdown share."""

import math
from collections.abc import Sequence

from bigbatch.commands.report import linear_scaling
from bigbatch.commands.report.curves import CurveGap
from bigbatch.commands.report.summary import Difference, Estimate, Experiment, Summary

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

COLUMNS = (
    "experiment",
    "runs",
    "updates",
    "fewer updates",
    "test accuracy, %",
    "training loss at the end",
    "curve gap",
    "by chance",
    "p",
    "largest gap",
    "examples/s",
    "seconds",
)


def table(summary: Summary) -> list[tuple[str, ...]]:
    """One row an experiment, a text for each of `COLUMNS`."""
    return [_row(experiment) for experiment in summary.experiments]


def _row(experiment: Experiment) -> tuple[str, ...]:
    gap = experiment.gap
    unfinished = f" (+{experiment.num_unfinished} unfinished)" if experiment.num_unfinished else ""
    if experiment.num_unfinished == len(experiment.runs) and not experiment.runs[0].finished:
        unfinished = " (unfinished)"
    return (
        experiment.name,
        f"{len(experiment.runs)}{unfinished}",
        _updates(experiment.updates),
        f"{_significant(experiment.updates_ratio)}x",
        _estimate(experiment.test_accuracy, "{:.2f}"),
        _estimate(experiment.train_loss, _decimals(experiment.train_loss)),
        MISSING if gap is None else f"{gap.rms:.2f}",
        MISSING if gap is None else f"{gap.expected_rms:.2f}",
        MISSING if gap is None else f"{gap.rms_p:.2g}",
        MISSING if gap is None else f"{_signed(gap.max, 1)} (epoch {gap.max_epoch})",
        _estimate(experiment.examples_per_s, "{:,.0f}", spread=False),
        _estimate(experiment.seconds, "{:,.1f}", spread=False),
    )


def claims(summary: Summary) -> list[tuple[str, str]]:
    """For each experiment but the reference its name and what it shows, in one sentence."""
    reference = summary.reference
    return [
        (experiment.name, _claim(experiment, reference)) for experiment in summary.experiments[1:]
    ]


def _claim(experiment: Experiment, reference: Experiment) -> str:
    counts = f"n = {len(experiment.runs)} + {len(reference.runs)}"
    parts = [_updates_claim(experiment, reference)]
    if not experiment.equal_noise:
        parts.append(f"not at {reference.name}'s noise scale")
    if experiment.accuracy_difference is not None:
        parts.append(_accuracy_claim(experiment.accuracy_difference, counts))
    parts.append(_gap_claim(experiment.gap))
    unfinished = any(not run.finished for run in (*experiment.runs, *reference.runs))
    return "; ".join(parts) + (". Not all of these runs are finished." if unfinished else ".")


def _updates_claim(experiment: Experiment, reference: Experiment) -> str:
    ratio = experiment.updates_ratio
    counts = f"{_updates(experiment.updates)} against {_updates(reference.updates)}"
    if ratio == 1:
        return f"as many updates as {reference.name} ({_updates(reference.updates)})"
    if ratio > 1:
        return f"{_significant(ratio)} times fewer updates than {reference.name} ({counts})"
    return f"{_significant(1 / ratio)} times more updates than {reference.name} ({counts})"


def _accuracy_claim(difference: Difference, counts: str) -> str:
    if math.isnan(difference.mean):
        return "test accuracy unknown"
    value = f"test accuracy difference {_signed(difference.mean, 2)}"
    if math.isnan(difference.half_width):
        return f"{value} points (too few runs for an interval, {counts})"
    return f"{value} {_PLUS_MINUS} {difference.half_width:.2f} points ({counts})"


def _gap_claim(gap: CurveGap | None) -> str:
    if gap is None:
        return "no curve gap (it needs epochs that both have, and three runs together)"
    numbers = f"gap {gap.rms:.2f}, by chance {gap.expected_rms:.2f}, p = {gap.rms_p:.2g}"
    if gap.rms_p <= 0.05:
        return f"the training-loss curves differ ({numbers})"
    few = gap.smallest_p > 0.05
    if few and gap.rms_p <= gap.smallest_p * (1 + 1e-9):
        return (
            "the training-loss curves are farther apart than in any other deal of these runs, "
            f"which are too few to say more ({numbers})"
        )
    limit = ", as far as so few runs can tell" if few else ""
    return f"the training-loss curves differ by no more than seeds do{limit} ({numbers})"


def explanation(summary: Summary) -> str:
    """What the columns of the curve gap mean, in a few sentences."""
    name = summary.reference.name
    return (
        f"Curve gap: in each epoch, the difference between the mean log training losses of the "
        f"experiment and of {name}, divided by the standard deviation of one run between seeds; "
        f"its root mean square over the epochs. By chance: about what the gap is where there is "
        f"no difference, for then it is only the error of two means: sqrt(1/n + 1/m) for n and m "
        f"runs, and a little more, since the spread is an estimate too. "
        f"p: the share of all ways to deal the same runs into two groups of n and m that "
        f"give a gap at least as large. Largest gap: of one epoch, counted from 0; positive where "
        f"the loss is higher than {name}'s. Epochs in which runs of the same seed are still the "
        f"same run do not count."
    )


def notes(summary: Summary) -> str:
    """What the other columns, and the claims, mean."""
    return (
        f"Means {_PLUS_MINUS} sample standard deviations over the runs, one a seed. Fewer "
        f"updates: {summary.reference.name}'s updates divided by the experiment's. The training "
        f"loss at the end is the mean over the last whole epoch, measured during training. A "
        f"difference of accuracies has Welch's 95 % interval, from the seeds alone: all runs share "
        f"one test set, whose own sampling error is not in it."
    )


def markdown(summary: Summary) -> str:
    """The report as Markdown: claims, table, what it means, and what is missing."""
    lines = ["# Training runs compared", ""]
    lines += [f"- **{_escape(name)}**: {_escape(text)}" for name, text in claims(summary)]
    lines += ["", *_markdown_table(COLUMNS, table(summary)), ""]
    lines += [notes(summary), "", explanation(summary), ""]
    scaling = linear_scaling.rows(summary)
    if scaling:
        lines += ["## Where linear scaling ends", ""]
        lines += [*_markdown_table(linear_scaling.COLUMNS, scaling), ""]
        lines += [_escape(linear_scaling.NOTE), ""]
    if summary.warnings:
        lines += ["## Missing or not comparable", ""]
        lines += [f"- {_escape(warning)}" for warning in summary.warnings] + [""]
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(map(_escape, cells))} |" for cells in (head, align, *rows)]


def _escape(text: str) -> str:
    for mark in "\\|<>`*_":
        text = text.replace(mark, f"\\{mark}")
    return text


def _estimate(estimate: Estimate, form: str, *, spread: bool = True) -> str:
    if estimate.n == 0 or math.isnan(estimate.mean):
        return MISSING
    text = form.format(estimate.mean)
    if spread and not math.isnan(estimate.sd):
        text += f" {_PLUS_MINUS} {form.format(estimate.sd)}"
    return text


def _updates(updates: Estimate) -> str:
    """Their number; with the spread where the runs decided their own."""
    return _estimate(updates, "{:,.0f}", spread=updates.sd > 0)


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation of percentages, one a run."""
    return _estimate(Estimate.of(values), "{:.2f}")


def _decimals(estimate: Estimate) -> str:
    """A format with two digits of the standard deviation, or three of the mean."""
    known = [value for value in (estimate.sd, estimate.mean / 10) if value > 0]
    if not known or math.isinf(known[0]):
        return "{:.4f}"
    return f"{{:.{min(max(1 - math.floor(math.log10(known[0])), 0), 9)}f}}"


def _significant(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def _signed(value: float, decimals: int) -> str:
    rounded = round(value, decimals)
    sign = _MINUS if rounded < 0 else "+"
    return f"{sign}{abs(rounded):.{decimals}f}"
