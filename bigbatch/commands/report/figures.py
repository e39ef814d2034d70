"""The figures: panels drawn on Matplotlib axes, put together as PNG and SVG for a paper.

Matplotlib is imported when the first figure is drawn, and used without its global state.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigbatch.commands.report.runs import Columns
from bigbatch.commands.report.summary import Curve, Experiment, Summary
from bigbatch.places.replacing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with every common colour blindness; the last is a dark red in
# place of their yellow, which is faint on white. The reference is grey.
REFERENCE_COLOUR = "#b4b4b4"
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#7b1e3a",
)
# The paper's experiments and ours have colours of their own, the same in every report.
_KNOWN = (
    "increase",
    "hybrid",
    "large",
    "adaptive",
    "increase_lr",
    "increase_momentum",
    "unscaled",
    "excessive",
)
# Lengths of dashes and gaps: of another noise scale, of a colour's second use, and of both.
_DASHES = {
    (False, False): (),
    (True, False): (7, 4),
    (False, True): (2, 3),
    (True, True): (7, 3, 2, 3),
}
_MAX_POINTS = 2000
_RC: dict[Any, Any] = {
    "font.size": 12.5,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "bigbatch",
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How an experiment looks in every figure and legend."""

    colour: str
    dash: tuple[int, ...]
    width: float


def styles(summary: Summary) -> dict[str, Style]:
    """The style of each experiment, by name.

    The reference is a broad grey line under the others, and each line is narrower than the one
    it is drawn on, so that curves that coincide all show. Experiments with another noise scale
    than the reference's are dashed. A colour goes with a name, whatever else a report shows: only
    two unknown names that would have the same colour depend on their order.
    """
    look = {summary.reference.name: Style(REFERENCE_COLOUR, (), width=6.0)}
    others = summary.experiments[1:]
    widths = [2.4] if len(others) == 1 else np.linspace(3.4, 1.6, len(others))
    slots = _slots([experiment.name for experiment in others])
    for experiment, slot, width in zip(others, slots, widths, strict=True):
        again, number = divmod(slot, len(COLOURS))
        dash = _DASHES[not experiment.equal_noise, again % 2 == 1]
        look[experiment.name] = Style(COLOURS[number], dash, float(width))
    return look


def _slots(names: Sequence[str]) -> list[int]:
    """A number for each name: of its colour, and how often that is taken already."""
    taken: dict[str, int] = {}
    # The known ones first: nobody takes their colours.
    for name in sorted(names, key=lambda name: name not in _KNOWN):
        known = name in _KNOWN
        slot = _KNOWN.index(name) if known else zlib.crc32(name.encode()) % len(COLOURS)
        round_ = len(taken) // len(COLOURS)
        free = [n for n in range(len(COLOURS)) if round_ * len(COLOURS) + n not in taken.values()]
        offset = min(free, key=lambda n: (n - slot) % len(COLOURS))
        taken[name] = round_ * len(COLOURS) + offset
    return [taken[name] for name in names]


Panel = Callable[["Axes", Summary], None]


def _curve_gap(axes: "Axes", summary: Summary) -> None:
    """The curve gap d/s in each epoch, with the band that it keeps to without a difference."""
    gaps = [(e.gap, style) for e, style in _styled(summary) if e.gap is not None]
    for gap, style in gaps:
        axes.plot(gap.centres, gap.gaps, **_line(style))
    for band in {round(gap.expected_rms, 6) for gap, _ in gaps}:
        axes.axhspan(-2 * band, 2 * band, color=REFERENCE_COLOUR, alpha=0.18, linewidth=0)
    axes.axhline(0, color=REFERENCE_COLOUR, linewidth=2, zorder=1)
    axes.set_yscale("symlog", linthresh=4, linscale=2)
    ticks = [1, 2, 4, 10, 20, 50, 100, 200, 500, 1000]
    highest = max(abs(gap.max) for gap, _ in gaps)
    shown = [tick for tick in ticks if tick <= max(4.0, 1.3 * highest)]
    axes.set_yticks([*(-t for t in reversed(shown)), 0, *shown])
    axes.set_yticklabels([f"{t:g}".replace("-", "\N{MINUS SIGN}") for t in axes.get_yticks()])
    axes.minorticks_off()
    title = f"Loss difference from {_plain(summary.reference.name)}, in seed spreads"
    axes.set(title=title, xlabel="epochs")


def panels(summary: Summary) -> dict[str, tuple[Panel, ...]]:
    """Names of the PNG and SVG files and their panels, for all that there is to draw."""
    found: dict[str, tuple[Panel, ...]] = {"growing_batch": _by_epochs_and_updates(_loss)}
    if any(experiment.gap is not None for experiment in summary.experiments):
        found["curve_gap"] = (_curve_gap,)
    titles = {"batch_size": "Batch size (examples)", "learning_rate": "Learning rate"}
    found["schedules"] = tuple(
        functools.partial(_schedule, field=field, title=title) for field, title in titles.items()
    )
    if metric := summary.metric:
        # Whatever a metric is called, its file lies beside the others.
        found[re.sub(r"\W", "_", f"test_{metric.name}")] = _by_epochs_and_updates(_metric)
    return found


def _by_epochs_and_updates(panel: Callable[..., None]) -> tuple[Panel, ...]:
    return tuple(functools.partial(panel, against=against) for against in ("epochs", "updates"))


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def save(panels: Sequence[Panel], summary: Summary, path: Path) -> None:
    """Writes panels side by side with a legend below them, sharp at 800 pixels and at twice that.

    Args:
      panels: what to draw, left to right.
      summary: the experiments.
      path: the PNG file to write, 1,600 pixels wide; the SVG file beside it has the same name.
    """
    import matplotlib

    with matplotlib.rc_context(_RC):
        # A bare Figure needs no pyplot, hence no display and no choice of backend.
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        names = [_legend_text(experiment) for experiment in summary.experiments]
        columns = _legend_columns(names)
        height = 4.3 + 0.3 * math.ceil(len(names) / columns)
        figure = Figure(figsize=(10.0, height), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            panel(axes, summary)
        handles = [Line2D([], [], **_line(style)) for _, style in _styled(summary)]
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=12)
        with replacing(path) as file:
            figure.savefig(file, dpi=160, metadata={"Software": "bigbatch"})
        with replacing(path.with_suffix(".svg")) as file:
            written = {"Date": None, "Creator": "bigbatch"}
            figure.savefig(file, format="svg", metadata=written)


def _tick(updates: float, _: object = None) -> str:
    """A number of updates beside an axis, which has no room for all digits of a damaged log's.

    >>> _tick(12345.0), _tick(-4e307)
    ('12,345', '-4e+307')
    """
    return f"{updates:,.0f}" if abs(updates) < 1e12 else f"{updates:.2g}"


def _legend_text(experiment: Experiment) -> str:
    return f"{_plain(experiment.name)} ({experiment.updates.mean:,.0f} updates)"


def _plain(name: str) -> str:
    """A name in which matplotlib finds no formula."""
    return name.replace("$", r"\$")


def _legend_columns(names: Sequence[str]) -> int:
    """As many columns as fit side by side in a figure of some 112 characters."""
    longest = max(map(len, names)) + 6
    fitting = max(min(len(names), 112 // longest), 1)
    return math.ceil(len(names) / math.ceil(len(names) / fitting))


def _styled(summary: Summary) -> list[tuple[Experiment, Style]]:
    look = styles(summary)
    return [(experiment, look[experiment.name]) for experiment in summary.experiments]


def _line(style: Style) -> dict[str, Any]:
    dashes = (0, [length / 2 for length in style.dash]) if style.dash else "solid"
    return {"color": style.colour, "linewidth": style.width, "linestyle": dashes}


def _loss(axes: "Axes", summary: Summary, against: str) -> None:
    _curves(axes, summary, [e.loss_curve for e in summary.experiments], against, alpha=0.2)
    axes.set(title=f"Training loss, by {against}", yscale="log")


def _metric(axes: "Axes", summary: Summary, against: str) -> None:
    _curves(axes, summary, [e.metric_curve for e in summary.experiments], against, alpha=0.12)
    metric = summary.metrics[0]
    unit = " (%)" if metric.percent else ""
    axes.set(title=f"Test {_plain(metric.name)}{unit}, by {against}", ylim=metric_limits(summary))


def _curves(
    axes: "Axes", summary: Summary, curves: Sequence[Curve], against: str, alpha: float
) -> None:
    """A line and a band for each experiment."""
    for (experiment, style), curve in zip(_styled(summary), curves, strict=True):
        x = getattr(curve, against)
        if len(experiment.runs) > 1:
            axes.fill_between(
                x, curve.low, curve.high, color=style.colour, alpha=alpha, linewidth=0
            )
        axes.plot(x, curve.mean, **_line(style))
        if against == "updates" and x.size:
            # By epochs all end alike.
            axes.plot(x[-1:], curve.mean[-1:], "o", color=style.colour, markersize=style.width + 4)
    axes.set_xlabel(against)
    if against == "updates":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(_tick)
        axes.set_xlim(left=0)


def metric_limits(summary: Summary) -> tuple[float, float] | None:
    """The ends of the y axis for the main metric; None if it has no value.

    The first evaluations lie far below the others, or above where the metric falls. They would
    flatten what the figure is for.
    """
    means = [experiment.metric_curve.mean for experiment in summary.experiments]
    shown = [values[np.isfinite(values)] for values in means if np.isfinite(values).any()]
    if not shown:
        return None
    percent = summary.metrics[0].percent
    sign = -1 if not percent and sum(values[-1] - values[0] for values in shown) < 0 else 1
    values = sign * np.concatenate(shown)
    low = min(np.quantile(values, 0.2), *(sign * own[-1] for own in shown))
    high = values.max()
    margin = 0.15 * (max(high - low, 0.5) if percent else high - low or abs(high) or 1.0)
    ends = sorted((sign * (low - margin), sign * (high + margin)))
    return ends[0], min(ends[1], 100.0 + margin / 3) if percent else ends[1]


def _schedule(axes: "Axes", summary: Summary, field: str, title: str) -> None:
    """As logged by the first run of each experiment."""
    for experiment, style in _styled(summary):
        run = experiment.runs[0]
        positions, values = _thinned(run.training, field)
        # A record's value held since the record before.
        x = np.append(0.0, positions / run.train_examples)
        axes.plot(x, np.append(values[:1], values), drawstyle="steps-pre", **_line(style))
    axes.set(title=title, xlabel="epochs", yscale="log")
    if field == "batch_size":
        axes.minorticks_off()
        ticks = _apart([run.training[field] for run in (e.runs[0] for e in summary.experiments)])
        axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])


def _apart(values: Sequence[np.ndarray]) -> list[float]:
    """The values that occur, without those too close to be labelled on a log axis."""
    present = np.unique(np.concatenate(values))
    present = present[present > 0]
    ticks: list[float] = []
    for value in present:
        if not ticks or value >= ticks[-1] * (present[-1] / present[0]) ** 0.07:
            ticks.append(float(value))
    return ticks


def _thinned(training: Columns, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of a quantity, at most a few thousand, with both ends of each change."""
    positions, values = training["examples"], training[field]
    changes = np.flatnonzero(np.diff(values) != 0)
    if changes.size > _MAX_POINTS:
        changes = changes[:: math.ceil(changes.size / _MAX_POINTS)]
    keep = np.unique(np.concatenate([[0], changes, changes + 1, [values.size - 1]]))
    return positions[keep], values[keep]
