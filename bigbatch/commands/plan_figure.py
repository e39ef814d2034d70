"""A plan as a picture: its four quantities against epochs and against updates."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.places.replacing import replacing
from bigbatch.schedule.durations import in_epochs, short
from bigbatch.schedule.plan import Plan

# Okabe and Ito (2008). The source is a broad grey line, so that both show where they coincide.
_COLOUR = "#0072b2"
_SOURCE_COLOUR, _GROWN_COLOUR = "#8a8a8a", "#d55e00"
_MAX_POINTS = 4000
_SMALLEST_SHOWN = 1e-4
# The updates have a logarithmic axis where the shortest line would end before this share of a
# linear one: there its stages could not be told apart.
_SHORT_SHARE = 0.2


def draw_plan(
    path: Path | str, plan: Plan, source: Plan | None = None, grown: Plan | None = None
) -> None:
    """Draws learning rate, batch size, momentum and noise scale, before and after.

    Rows are the quantities, columns epochs (tokens, if examples have any) and updates. Where the
    noise scale's two lines coincide in the left column, the transformation kept it.

    Args:
      path: the picture to write; its suffix (.png, .svg, .pdf) is its format.
      plan: the plan.
      source: the plan of the same policy without transformations.
      grown: of an adaptive run the plan in which every decision is to grow, where `plan` is that in
        which none is. Between them lies what may come.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 2, sharex="col", sharey="row")
    lines = [(plan, "plan", _COLOUR, 1.8)]
    if source is not None:
        lines.insert(0, (source, "without transformations", _SOURCE_COLOUR, 5.0))
    if grown is not None:
        lines = [
            (plan, "no measurement asks for growth", _COLOUR, 1.8),
            (grown, "every decision is to grow", _GROWN_COLOUR, 1.8),
        ]
    for drawn, label, colour, width in lines:
        columns = _columns(drawn)
        for row, (name, values) in zip(axes, columns.items(), strict=True):
            for axis, x in zip(row, _clocks(drawn), strict=True):
                shown = _shown(values)
                axis.step(
                    x[shown], values[shown], where="post", color=colour, lw=width, label=label
                )
            row[0].set_ylabel(name)
    if grown is not None:
        _draw_band(axes, plan, grown)
    ends = [drawn.num_updates for drawn, *_ in lines]
    is_log = min(ends) < _SHORT_SHARE * max(ends)
    if is_log:
        firsts = [_shown(c)[1] for drawn, *_ in lines for c in _columns(drawn).values()]
        axes[-1, 1].set_xscale("log")
        axes[-1, 1].set_xlim(left=max(min(firsts) / 2, 1))
    for row in (axes[0], axes[1], axes[3]):
        row[0].set_yscale("log")
        # A learning rate on its way to 0 would squeeze all else into one line.
        bottom, top = row[0].get_ylim()
        row[0].set_ylim(max(bottom, top * _SMALLEST_SHOWN), top)
    axes[1, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    clock = "tokens" if plan.tokens_per_example else "epochs"
    if plan.tokens_per_example:
        axes[-1, 0].xaxis.set_major_formatter(lambda x, _: short(x))
    for axis, name in zip(axes[-1], (clock, "updates"), strict=True):
        axis.set_xlabel(name)
    axes[1, 0].yaxis.set_major_formatter("{x:,.0f}")
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    axes[-1, 1].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1, 1].xaxis.set_minor_formatter(NullFormatter())
    axes[-1, 1].xaxis.set_major_locator(LogLocator(subs=(1, 3)) if is_log else MaxNLocator(5))
    for axis in axes.flat:
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
    counts = f"{plan.num_updates:,} updates"
    if grown is not None:
        counts = f"{grown.num_updates:,} to {counts}"
    elif source is not None:
        counts += f" instead of {source.num_updates:,}"
    if len(lines) > 1:
        # The momentum of an adaptive run is constant, and leaves room.
        axes[0 if grown is None else 2, 0].legend(frameon=False)
    figure.suptitle(f"{counts}, {in_epochs(plan.epochs)} of {plan.train_examples:,} examples")
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or None, dpi=120)


def _draw_band(axes: Any, plan: Plan, grown: Plan) -> None:
    """Shades what lies between two plans; past the end of one it has the value of its end."""
    pairs = zip(_columns(plan).values(), _columns(grown).values(), strict=True)
    for row, columns in zip(axes, pairs, strict=True):
        for axis, *clocks in zip(row, _clocks(plan), _clocks(grown), strict=True):
            x = np.union1d(*clocks)
            ends = [
                column[np.searchsorted(clock, x, side="right") - 1]
                for clock, column in zip(clocks, columns, strict=True)
            ]
            shown = np.union1d(*map(_shown, ends))
            low, high = (end[shown] for end in ends)
            axis.fill_between(
                x[shown], low, high, step="post", color=_SOURCE_COLOUR, alpha=0.3, lw=0,
                label="what may come",
            )  # fmt: skip


def _columns(plan: Plan) -> dict[str, NDArray[np.float64]]:
    """The quantities by the name on their axis, one more entry than updates."""
    columns = {
        "learning rate": plan.hypers["learning_rate"],
        "batch size (examples)": plan.batch_sizes,
        "momentum": plan.hypers["momentum"],
        "noise scale": plan.noise_scales,
    }
    # A line ends where the last update does.
    return {name: np.r_[column, column[-1]] for name, column in columns.items()}


def _clocks(plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When each update starts, and the last one ends, in epochs or tokens, and in updates."""
    starts = np.r_[plan.first_examples, plan.num_examples]
    tokens = plan.tokens_per_example
    time = starts * float(tokens) if tokens else starts / plan.train_examples
    return time, np.arange(plan.num_updates + 1)


def _shown(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The points that a line needs: where the value changes, thinned out if that is often."""
    changes = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    thinned = changes[:: max(1, len(changes) // _MAX_POINTS)]
    return np.union1d(thinned, len(values) - 1)
