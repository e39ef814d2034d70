"""What the page's figures are drawn from: plain values, small enough to lie within the page.

A *grid* is a row of points with their place on every x axis; a *series* is a row of values on a
grid; a *chart* is a list of series. `page.js` has Bokeh draw them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigbatch.commands.report import timing
from bigbatch.commands.report.figures import metric_limits, styles
from bigbatch.commands.report.runs import LoggedRun
from bigbatch.commands.report.summary import Curve, Summary, loss_curve, metric_curve

_AXES = ("epochs", "updates", "examples", "seconds")
_MAX_POINTS = 400
_DIGITS = 5


def axes(summary: Summary) -> tuple[str, ...]:
    """What the figures may be drawn against: tokens first, where examples have them."""
    known = all(experiment.runs[0].tokens_per_example for experiment in summary.experiments)
    return (*(["tokens"] if known else []), *_AXES)


def page_data(summary: Summary) -> dict[str, Any]:
    """Everything that the page's script needs.

    Args:
      summary: the experiments.

    Returns:
      `axes`; `experiments`, each with name, colour, dash and width; `grids`; `charts`, each with
      id, title, scale ("log" or "linear"), steps, series, and for some bands and limits. A series
      names its grid by number, and its seed if it is one run's. Of a longer row 400 points are
      kept. A value that is not known is null.
    """
    experiments = [
        {"name": name, **dataclasses.asdict(style), "width": round(min(style.width, 4.5), 2)}
        for name, style in styles(summary).items()
    ]
    charts = [
        _loss(summary),
        _gap(summary),
        *_metric(summary),
        *_schedules(summary),
        _gradient_noise(summary),
        _throughput(summary),
    ]
    charts = [chart for chart in charts if chart["series"]]
    grids: list[dict[str, Any]] = []
    for series in (series for chart in charts for series in chart["series"]):
        if series["grid"] not in grids:
            grids.append(series["grid"])
        series["grid"] = grids.index(series["grid"])
    names = list(axes(summary))
    return {"axes": names, "experiments": experiments, "grids": grids, "charts": charts}


def _chart(name: str, title: str, series: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    defaults = {"scale": "linear", "steps": False}
    return {"id": name, "title": title, **defaults, **fields, "series": series}


def _grid(runs: tuple[LoggedRun, ...], examples: np.ndarray, updates: np.ndarray) -> dict[str, Any]:
    """The points' places on every axis that is known."""
    columns = {
        "epochs": examples / runs[0].train_examples,
        "updates": updates,
        "examples": examples,
        "tokens": examples * float(runs[0].tokens_per_example or np.nan),
        "seconds": timing.mean_seconds_at(runs, examples),
    }
    return {name: _plain(v) for name, v in columns.items() if np.isfinite(v).any()}


def _series(
    number: int, grid: dict[str, Any], values: np.ndarray, low: Any = None, high: Any = None
) -> dict[str, Any]:
    series = {"experiment": number, "grid": grid, "y": _plain(values)}
    if low is not None:
        series |= {"low": _plain(low), "high": _plain(high)}
    return series


def _plain(values: np.ndarray) -> list[float | int | None]:
    """Rounded to five digits, whole numbers written as such; None for what is not finite."""
    return [_rounded(value) for value in np.asarray(values, np.float64).tolist()]


def _rounded(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short == int(short) else short


def _loss(summary: Summary) -> dict[str, Any]:
    curves = [experiment.loss_curve for experiment in summary.experiments]
    series = _curves(summary, curves, lambda run: loss_curve([run])[0])
    return _chart("loss", "Training loss", series, scale="log")


def _curves(
    summary: Summary, curves: Sequence[Curve], of_run: Callable[[LoggedRun], Curve]
) -> list[dict[str, Any]]:
    """A series for each experiment whose curve has points, and one for each run of several."""
    found = []
    for number, (experiment, curve) in enumerate(zip(summary.experiments, curves, strict=True)):
        runs = experiment.runs
        found.append(_curve(number, runs, curve, band=len(runs) > 1))
        for run in runs if len(runs) > 1 else ():
            seed = {"seed": f"seed {run.seed}"}
            found.append(_curve(number, (run,), of_run(run), band=False) | seed)
    return [series for series in found if series["y"]]


def _curve(number: int, runs: tuple[LoggedRun, ...], curve: Curve, *, band: bool) -> dict[str, Any]:
    kept = np.unique(np.linspace(0, max(curve.mean.size - 1, 0), _MAX_POINTS).astype(int))
    curve = Curve(*(values[kept[: values.size]] for values in dataclasses.astuple(curve)))
    grid = _grid(runs, curve.epochs * runs[0].train_examples, curve.updates)
    return _series(number, grid, curve.mean, *((curve.low, curve.high) if band else ()))


def _gap(summary: Summary) -> dict[str, Any]:
    compared = [(i, e.gap) for i, e in enumerate(summary.experiments) if e.gap is not None]
    series = [_series(i, {"epochs": _plain(gap.centres)}, gap.gaps) for i, gap in compared]
    bands = sorted({round(2 * gap.expected_rms, 4) for _, gap in compared})
    name = summary.reference.name
    title = f"Loss difference from {name}, in standard deviations between seeds"
    return _chart("gap", title, series, bands=[[-b, b] for b in bands])


def _metric(summary: Summary) -> Iterator[dict[str, Any]]:
    """The main metric, if anything was evaluated."""
    curves = [experiment.metric_curve for experiment in summary.experiments]
    series = _curves(summary, curves, lambda run: metric_curve([run], summary.metrics))
    limits = metric_limits(summary)
    fields = {} if limits is None else {"limits": _plain(np.array(limits))}
    if metric := summary.metric:
        # An accuracy has a caption of its own.
        name = "accuracy" if metric.percent else "metric"
        yield _chart(name, f"Test {metric.name}{metric.unit}", series, **fields)


def _schedules(summary: Summary) -> list[dict[str, Any]]:
    """What was set, of each experiment's first run."""
    charts = {
        "batch_size": _chart("batch_size", "Batch size, examples", [], scale="log", steps=True),
        "learning_rate": _chart("learning_rate", "Learning rate", [], scale="log", steps=True),
        "noise_scale": _chart("noise_scale", "Noise scale, planned", [], scale="log", steps=True),
    }
    for number, experiment in enumerate(summary.experiments):
        run = experiment.runs[0]
        kept = _schedule_points(run)
        examples, updates = run.training["examples"][kept], run.training["update"][kept]
        # A record's value held since the record before.
        grid = _grid((run,), np.append(0.0, examples), np.append(0.0, updates))
        for field, chart in charts.items():
            values = run.training[field][kept]
            if np.isfinite(values).any():
                series = _series(number, grid, np.append(values[:1], values))
                chart["series"].append(series)
    return list(charts.values())


def _schedule_points(run: LoggedRun) -> np.ndarray:
    """Indices of some hundreds of records, with both ends of each change of the batch size."""
    sizes = run.training["batch_size"]
    changes = np.flatnonzero(np.diff(sizes) != 0)
    changes = changes[:: math.ceil(changes.size / _MAX_POINTS) or 1]
    even = np.linspace(0, sizes.size - 1, min(_MAX_POINTS, sizes.size)).astype(int)
    ends = np.concatenate([even, changes, changes + 1])
    return np.unique(ends)


def _gradient_noise(summary: Summary) -> dict[str, Any]:
    """The measured noise scale with its standard error, beside the batch size."""
    series = []
    for number, experiment in enumerate(summary.experiments):
        run = experiment.runs[0]
        known = np.flatnonzero(run.training["gradient_noise_scale"] > 0)
        if not known.size:
            continue
        kept = known[np.linspace(0, known.size - 1, min(_MAX_POINTS, known.size)).astype(int)]
        at = {name: column[kept] for name, column in run.training.items()}
        grid = _grid((run,), at["examples"], at["update"])
        measured, error = at["gradient_noise_scale"], at["gradient_noise_scale_error"]
        series.append(_series(number, grid, measured, measured - error, measured + error))
        beside = _series(number, grid, at["batch_size"])
        series.append(beside | {"thin": True, "label": "batch size"})
    title = "Gradient noise scale, measured (thin: the batch size), examples"
    return _chart("gradient_noise", title, series, scale="log")


def _throughput(summary: Summary) -> dict[str, Any]:
    series = []
    for number, experiment in enumerate(summary.experiments):
        centres = experiment.loss_curve.epochs * experiment.runs[0].train_examples
        half = centres[0]
        edges = np.append(centres - half, centres[-1] + half)
        seconds = np.diff(timing.mean_seconds_at(experiment.runs, edges))
        known = seconds > 0
        rates = np.divide(np.diff(edges), seconds, out=np.full(len(seconds), np.nan), where=known)
        if known.any():
            curve = dataclasses.replace(experiment.loss_curve, mean=rates)
            series.append(_curve(number, experiment.runs, curve, band=False))
    return _chart("throughput", "Examples a second", series)
