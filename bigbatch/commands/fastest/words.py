"""The fastest plan in words, as plain values and as a picture."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.commands.fastest.answer import FASTEST, ONE_SIZE, THIS, Answer, Recipe
from bigbatch.commands.plan import abridged, aligned
from bigbatch.places.replacing import replacing
from bigbatch.schedule.diagnostics import diagnose
from bigbatch.schedule.durations import in_epochs

_STAGES = (
    "first update",
    "updates",
    "epoch of the recipe",
    "batch size",
    "learning rate",
    "devices",
    "s an update",
    "hours",
)
# A gain below it is none.
_WORTHWHILE = 1.05
# Okabe and Ito (2008); what lies at one point shows as one shape around the other.
_MARKS = (
    ("s", 6, "#0072b2"),
    ("o", 7, "#000000"),
    ("^", 9, "#e69f00"),
    ("v", 11, "#009e73"),
    ("D", 13, "#cc79a7"),
    ("p", 15, "#d55e00"),
)


def text(found: Answer, options: argparse.Namespace) -> str:
    """All that is found, in words.

    Args:
      found: by `answer`.
      options: the flags that were given.
    """
    reference, plan, rule = found.config.plan, found.plan, found.rule
    measure = "device-hours" if options.cost_per_device_hour is None else "cost"
    low, high = sorted(end.hours for end in found.ends)
    table = [("recipe", "batch sizes", "devices", "updates", "hours", measure)]
    for name, (ends, devices, updates, hours, cost) in found.recipes.items():
        told = " .. ".join(f"{size:,}" for size in dict.fromkeys(ends))
        numbers = f"{updates:,.0f}", f"{hours:.4g}", f"{cost:.4g}"
        table.append((name, told, f"{devices:,}", *numbers))
    misled = (f"{100 * (n - 1):.1f} % more ({f:g} times)" for f, n in found.misled.items())
    first, last = found.frontier[0], found.frontier[-1]
    frontier = f"frontier: from {first.hours:.4g} hours and {first.cost:.4g} {measure} to "
    frontier += f"{last.hours:.4g} and {last.cost:.4g}, {len(found.frontier)} corners (--plot=FILE)"
    fields = {f".{name}": value for name, value in options.overrides if "policy" not in name}
    fields = {"": options.config, **fields, ".transformations": "[]"}
    own = " ".join(shlex.quote(f"--config{name}={value}") for name, value in fields.items())
    return "\n".join(
        [
            f"the fastest plan at equal progress with {found.config.experiment or 'this recipe'}: "
            f"{plan.train_examples:,} training examples, {in_epochs(reference.epochs)} of the "
            "recipe",
            f"least: {found.goal.words}",
            *found.notes,
            f"rule {rule.name}: lr times k^{rule.learning_rate_power:g}, with "
            "k = (1 + B_noise/B_0) / (1 + B_noise/B) and B_0 the recipe's batch",
            "",
            *aligned([_STAGES, *abridged(_stages(found), len(_STAGES))]),
            "",
            f"{plan.num_updates:,} updates, {plan.num_examples:,} examples "
            f"({in_epochs(plan.epochs, 4)}) instead of {reference.num_updates:,} and "
            f"{reference.num_examples:,}",
            f"95 % interval by the noise's standard errors: {low:.4g} to {high:.4g} hours",
            "",
            *aligned(table),
            "",
            verdict(found),
            "decided by a wrong noise it takes, by the model, " + " and ".join(misled),
            *([] if first is last else [frontier]),
            *(f"warning: {each.warning}" for each in diagnose(plan, reference) if each.warning),
            f"to train it: this command with --json > fastest.json, then bigbatch train {own}"
            """ --config.policy='{"name": "fastest", "path": "fastest.json"}' --workdir=DIR""",
        ]
    )


def verdict(found: Answer) -> str:
    """Whether to run it, and what it saves."""
    value, what = found.goal.value, found.goal.words.split(",")[0]

    def times(recipe: Recipe, ours: Any = found.chosen) -> float:
        return value(recipe) / value(ours)

    this, constant, (first, last) = (
        found.recipes[THIS],
        found.recipes[ONE_SIZE],
        found.recipes[FASTEST].sizes,
    )
    low, high = (times(this, end) for end in reversed(found.ends))
    saved = f"{times(this):.3g} times less {what} ({low:.3g} to {high:.3g}) than this recipe"
    if times(this) < _WORTHWHILE:
        return f"keep this recipe: the fastest plan takes {saved}"
    if times(constant) < _WORTHWHILE and first < last:
        return (
            f"do not grow: one batch size of {constant.sizes[0]:,} throughout, devices: "
            f"{constant.devices:,}, is within {100 * (times(constant) - 1):.2g} % of the fastest "
            f"plan, which takes {saved}"
        )
    return f"run the fastest plan: it takes {saved}"


def stretches(found: Answer) -> list[dict[str, Any]]:
    """The runs of parts with one batch size and number of devices, as plain values."""
    there, (size, device, *_) = found.hardware, found.chosen
    counts = found.way.updates(there.sizes)[np.arange(len(size)), size]
    starts = np.flatnonzero(np.r_[True, (np.diff(size) != 0) | (np.diff(device) != 0)])
    edges = np.r_[0.0, np.cumsum(counts)][[*starts, -1]]
    firsts = np.ceil(edges * (1 - 1e-9)).astype(int)
    reference = found.way.reference
    # Parts after the last of the reference's updates have none.
    at = np.minimum(np.searchsorted(found.way.part, starts), reference.num_updates - 1)
    columns = {
        "first_update": firsts[:-1],
        "num_updates": np.diff(firsts),
        "recipe_epoch": reference.first_examples[at] / reference.train_examples,
        "batch_size": there.sizes[size[starts]],
        "devices": there.devices[device[starts]],
        "update_s": there.seconds[size[starts], device[starts]],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows if row[1]]


def _stages(found: Answer) -> list[tuple[str, ...]]:
    rates = found.plan.hypers["learning_rate"]
    rows: list[tuple[str, ...]] = []
    for begin, count, epoch, size, devices, seconds in map(dict.values, stretches(found)):
        own = dict.fromkeys(f"{rate:.4g}" for rate in rates[[begin, begin + count - 1]])
        cells = f"{begin:,}", f"{count:,}", f"{epoch:.4g}", f"{size:,}", " .. ".join(own)
        rows.append((*cells, f"{devices:,}", f"{seconds:.4g}", f"{count * seconds / 3600:.4g}"))
    return rows


def summary(found: Answer) -> dict[str, Any]:
    """The plan's JSON, which the policy `fastest` trains, with what else was found."""
    return json.loads(found.plan.to_json()) | {
        "recipe_epochs": found.way.reference.epochs,
        "least": found.goal.words,
        "notes": found.notes,
        "stretches": stretches(found),
        "hours_interval": sorted(end.hours for end in found.ends),
        "noise_scales": found.way.scales.tolist(),
        "wrong_noise": found.misled,
        "recipes": {name: recipe._asdict() for name, recipe in found.recipes.items()},
        "frontier": [{"hours": each.hours, "cost": each.cost} for each in found.frontier],
        "verdict": verdict(found),
    }


def draw(path: str, found: Answer) -> None:
    """Hours against money: the frontier, the fastest plan and known recipes.

    Args:
      path: the picture to write; its suffix is its format.
      found: by `answer`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    corners = np.array([(each.hours, each.cost) for each in found.frontier])
    axis.plot(*corners.T, ".-", color="#8a8a8a", label="frontier")
    axis.plot(*zip(*((e.hours, e.cost) for e in found.ends), strict=True), "-", color=_MARKS[0][2])
    for (mark, size, colour), (name, recipe) in zip(_MARKS, found.recipes.items(), strict=True):
        label = f"{name}, at most {recipe.devices:,} devices" if name == FASTEST else name
        style: dict[str, Any] = {
            "ms": size,
            "color": colour,
            "mfc": "none",
            "ls": "",
            "label": label,
        }
        axis.plot(recipe.hours, recipe.cost, mark, **style)
    axis.set(xscale="log", yscale="log", xlabel="hours", ylabel="cost, or device-hours")
    axis.grid(color="#e6e6e6")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(f"equal progress with {found.config.experiment or 'this recipe'}")
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or None, dpi=120)
