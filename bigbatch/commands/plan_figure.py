"""A plan as a picture: its four quantities against epochs and against updates."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigbatch.replacing import replacing
from bigbatch.schedule.plan import Plan

# Okabe and Ito (2008). The source is a broad grey line, so that both show where they coincide.
_COLOUR = "#0072b2"
_SOURCE_COLOUR = "#8a8a8a"
_MAX_POINTS = 4000
_SMALLEST_SHOWN = 1e-4


def draw_plan(path: Path | str, plan: Plan, source: Plan | None = None) -> None:
    """Draws learning rate, batch size, momentum and noise scale, before and after.

    Rows are the quantities, columns epochs (tokens, if examples have any) and updates. Where the
    noise scale's two lines coincide in the left column, the transformation kept it.

    Args:
      path: the picture to write; its suffix (.png, .svg, .pdf) is its format.
      plan: the plan.
      source: the plan of the same policy without transformations.
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
    for drawn, label, colour, width in lines:
        columns = _columns(drawn)
        for row, (name, values) in zip(axes, columns.items(), strict=True):
            for axis, x in zip(row, _clocks(drawn), strict=True):
                shown = _shown(values)
                axis.step(
                    x[shown], values[shown], where="post", color=colour, lw=width, label=label
                )
            row[0].set_ylabel(name)
    for row in (axes[0], axes[1], axes[3]):
        row[0].set_yscale("log")
        # A learning rate on its way to 0 would squeeze all else into one line.
        bottom, top = row[0].get_ylim()
        row[0].set_ylim(max(bottom, top * _SMALLEST_SHOWN), top)
    axes[1, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    clock = "tokens" if plan.tokens_per_example else "epochs"
    for axis, name in zip(axes[-1], (clock, "updates"), strict=True):
        axis.set_xlabel(name)
    axes[1, 0].yaxis.set_major_formatter("{x:,.0f}")
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    axes[-1, 1].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1, 1].xaxis.set_major_locator(MaxNLocator(5))
    for axis in axes.flat:
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
    counts = f"{plan.num_updates:,} updates"
    if source is not None:
        counts += f" instead of {source.num_updates:,}"
        axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{counts}, {plan.epochs:g} epochs of {plan.train_examples:,} examples")
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or None, dpi=120)


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
