"""The summary in words and as a table: plain strings that the page and the Markdown share."""

import dataclasses
import math
from collections.abc import Sequence

from bigbatch.commands.report import linear_scaling
from bigbatch.commands.report.curves import CurveGap
from bigbatch.commands.report.metric import Metric
from bigbatch.commands.report.runs import LoggedRun
from bigbatch.commands.report.summary import Difference, Experiment, MeanSd, Summary
from bigbatch.commands.report.timing import WALL_NOTE, WALL_TIME, wall_times

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def columns(summary: Summary) -> tuple[str, ...]:
    """The heads of the columns; a metric that nothing was evaluated by has none."""
    first = ("experiment", "runs", "updates", "fewer updates")
    metrics = (metric.heading for metric in summary.metrics)
    gap = ("curve gap", "by chance", "p", "largest gap")
    speed = "tokens/s" if _in_tokens(summary) else "examples/s"
    return (*first, *metrics, "training loss at the end", *gap, speed, "seconds")


def _in_tokens(summary: Summary) -> bool:
    """Whether the examples of all runs have tokens."""
    return all(experiment.runs[0].tokens_per_example for experiment in summary.experiments)


def table(summary: Summary) -> list[tuple[str, ...]]:
    """One row an experiment, a text for each of `columns`."""
    tokens = _in_tokens(summary)
    return [_row(experiment, summary.metrics, tokens) for experiment in summary.experiments]


def _row(experiment: Experiment, metrics: Sequence[Metric], tokens: bool) -> tuple[str, ...]:
    speed = experiment.examples_per_s
    if tokens:
        speed = dataclasses.replace(
            speed, mean=speed.mean * (experiment.runs[0].tokens_per_example or 1)
        )
    gap, loss = experiment.gap, experiment.train_loss
    unfinished = f" (+{experiment.num_unfinished} unfinished)" if experiment.num_unfinished else ""
    if experiment.num_unfinished == len(experiment.runs) and not experiment.runs[0].finished:
        unfinished = " (unfinished)"
    return (
        experiment.name,
        f"{len(experiment.runs)}{unfinished}",
        _updates(experiment.updates),
        f"{_significant(experiment.updates_ratio)}x",
        *map(metric_text, experiment.metrics, metrics),
        _mean_sd(loss, _decimals(loss.mean, loss.sd)),
        MISSING if gap is None else f"{gap.rms:.2f}",
        MISSING if gap is None else f"{gap.expected_rms:.2f}",
        MISSING if gap is None else f"{gap.rms_p:.2g}",
        MISSING if gap is None else f"{_signed(gap.max, 1)} (epoch {round(gap.max_epoch, 3):g})",
        _mean_sd(speed, 0, spread=False),
        _mean_sd(experiment.seconds, 1, spread=False),
    )


def claims(summary: Summary) -> list[tuple[str, str]]:
    """For each experiment but the reference its name and what it shows, in one sentence."""
    return [(other.name, _claim(other, summary)) for other in summary.experiments[1:]]


def _claim(experiment: Experiment, summary: Summary) -> str:
    reference = summary.reference
    counts = f"n = {len(experiment.runs)} + {len(reference.runs)}"
    parts = [_updates_claim(experiment, reference)]
    if not experiment.equal_noise:
        parts.append(f"not at {reference.name}'s noise scale")
    if experiment.metric_difference is not None:
        parts.append(_metric_claim(experiment.metric_difference, summary.metrics[0], counts))
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


def _metric_claim(difference: Difference, metric: Metric, counts: str) -> str:
    mean, half_width = difference.mean, difference.half_width
    if math.isnan(mean):
        return f"test {metric.name} unknown"
    decimals = _decimals(mean, half_width, metric.percent)
    points = " points" if metric.percent else ""
    value = f"test {metric.name} difference {_signed(mean, decimals)}"
    if math.isnan(half_width):
        return f"{value}{points} (too few runs for an interval, {counts})"
    return f"{value} {_PLUS_MINUS} {half_width:,.{decimals}f}{points} ({counts})"


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
    name, (span, spans) = summary.reference.name, _span(summary)
    return (
        f"Curve gap: in each {span}, the difference between the mean log training losses of the "
        f"experiment and of {name}, divided by the standard deviation of one run between seeds; "
        f"its root mean square over the {spans}. By chance: about what the gap is where there is "
        f"no difference, for then it is only the error of two means: sqrt(1/n + 1/m) for n and m "
        f"runs, and a little more, since the spread is an estimate too. "
        f"p: the share of all ways to deal the same runs into two groups of n and m that "
        f"give a gap at least as large. Largest gap: of one {span}, counted from 0; positive where "
        f"the loss is higher than {name}'s. {spans.capitalize()} in which runs of the same seed "
        f"are still the same run do not count.{_tests(summary)}"
    )


def _span(summary: Summary) -> tuple[str, str]:
    """Of what training losses are means: one, and many."""
    if summary.reference.span_epochs == 1:
        return "epoch", "epochs"
    return "twentieth of the run", "twentieths of the run"


def _tests(summary: Summary) -> str:
    """How many tests there are, and how small a p so few runs can give."""
    gaps = [experiment.gap for experiment in summary.experiments if experiment.gap is not None]
    if not gaps:
        return ""
    least = max(gap.smallest_p for gap in gaps)
    count = "One test" if len(gaps) == 1 else f"{len(gaps)} tests, not corrected for their number"
    return f" {count}; with so few runs no p can be below {least:.2g}."


def notes(summary: Summary) -> str:
    """What the other columns, and the claims, mean."""
    text = (
        f"Means {_PLUS_MINUS} sample standard deviations over the runs, one a seed. Fewer "
        f"updates: {summary.reference.name}'s updates divided by the experiment's. The training "
        f"loss at the end is the mean over the last whole {_span(summary)[0]}, measured during "
        "training."
    )
    if metric := summary.metric:
        what = "accuracies" if metric.name == "accuracy" else f"test {metric.name}"
        text += (
            f" A difference of {what} has Welch's 95 % interval, from the seeds alone: all runs "
            "share one test set, whose own sampling error is not in it."
        )
    return text


def markdown(summary: Summary) -> str:
    """The report as Markdown: claims, table, what it means, and what is missing."""
    lines = ["# Training runs compared", ""]
    lines += [f"- **{_escape(name)}**: {_escape(text)}" for name, text in claims(summary)]
    lines += ["", *_markdown_table(columns(summary), table(summary)), ""]
    lines += [notes(summary), "", explanation(summary), ""]
    scaling = linear_scaling.rows(summary)
    if scaling:
        lines += ["## Where linear scaling ends", ""]
        lines += [*_markdown_table(linear_scaling.COLUMNS, scaling), ""]
        lines += [_escape(linear_scaling.NOTE), ""]
    if walls := wall_times({e.name: e.runs for e in summary.experiments}):
        lines += ["## Where the wall time went", "", *_markdown_table(WALL_TIME, walls), ""]
        lines += [_escape(WALL_NOTE), ""]
    if summary.warnings:
        lines += ["## Missing or not comparable", ""]
        lines += [f"- {_escape(warning)}" for warning in summary.warnings] + [""]
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(map(_escape, cells))} |" for cells in (head, align, *rows)]


def _escape(text: str) -> str:
    for mark in "\\|<>`*_[]~$&":
        text = text.replace(mark, f"\\{mark}")
    return text


def metric_text(values: MeanSd, metric: Metric) -> str:
    """Mean and standard deviation of a metric, without its unit."""
    return _mean_sd(values, _decimals(values.mean, values.sd, metric.percent))


def final(run: LoggedRun, metric: Metric) -> str:
    """A metric at the end of one run, without its unit."""
    return metric_text(MeanSd.of([metric.at_end(run)]), metric)


def _mean_sd(values: MeanSd, decimals: int, *, spread: bool = True) -> str:
    if values.n == 0 or math.isnan(values.mean):
        return MISSING
    text = f"{values.mean:,.{decimals}f}"
    if spread and not math.isnan(values.sd):
        text += f" {_PLUS_MINUS} {values.sd:,.{decimals}f}"
    return text


def _updates(updates: MeanSd) -> str:
    """Their number; with the spread where the runs decided their own."""
    return _mean_sd(updates, 0, spread=updates.sd > 0)


def _decimals(mean: float, spread: float, percent: bool = False) -> int:
    """Two digits of the spread, or else three of the mean; two decimals of a percentage."""
    known = [value for value in (spread, abs(mean) / 10) if value > 0]
    if percent:
        return 2
    if not known or math.isinf(known[0]):
        return 4
    return min(max(1 - math.floor(math.log10(known[0])), 0), 9)


def _significant(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def _signed(value: float, decimals: int) -> str:
    rounded = round(value, decimals)
    sign = _MINUS if rounded < 0 else "+"
    return f"{sign}{abs(rounded):,.{decimals}f}"
