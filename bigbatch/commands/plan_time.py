"""Time and cost of a config on devices that are not there: text and JSON for `bigbatch plan`.

The original recipe stands beside the growing one, on as many devices as could be of use to either.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from bigbatch.commands.plan import abridged, aligned
from bigbatch.config.config import Config
from bigbatch.config.lengths import facts_of, tokens_per_example
from bigbatch.layout import time_model
from bigbatch.layout.time_model import Scaling, Speeds, StageTime
from bigbatch.schedule.intervals import Intervals
from bigbatch.schedule.plan import Plan

_STAGE_HEAD = (
    "first update",
    "updates",
    "batch size",
    "s an update",
    "computing",
    "all-reduce",
    "update",
    "hours",
)


class Times(NamedTuple):
    """What the time model says of a config.

    Attributes:
      devices: how many the stages are timed on.
      gradient_bytes: what each all-reduce sums.
      stages: of the config's plan.
      original: the policy without transformations, by devices; empty where nothing is known of
        several devices.
      growing: the config's plan, likewise.
      beside: seconds beside the updates, by kind.
    """

    devices: int
    gradient_bytes: int
    stages: list[StageTime]
    original: list[Scaling]
    growing: list[Scaling]
    beside: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages) + sum(self.beside.values())


def times(config: Config, devices: int, speeds: Speeds) -> Times:
    """Applies the time model to a config.

    Args:
      config: a validated config.
      devices: how many to time the stages on.
      speeds: of the hardware.

    Raises:
      UserError: the layout cannot be formed, or there are several devices and no bandwidth.
    """
    plan, source = config.plan, config.source_plan
    sent_bytes = gradient_bytes(config)
    layout = config.layout(plan, devices)
    stages = time_model.stage_times(plan, layout, devices, sent_bytes, speeds)
    original, growing = [], []
    if speeds.allreduce_gbps is not None:
        ghost = config.ghost_batch_examples
        counts = time_model.device_counts(plan, ghost, devices)
        original, growing = (
            time_model.scaling(
                each, config.layout, counts, sent_bytes, speeds, beside(config, each)
            )
            for each in (source, plan)
        )
    spent = beside(config, plan).seconds(devices, speeds)
    return Times(devices, sent_bytes, stages, original, growing, spent)


def beside(config: Config, plan: Plan) -> time_model.Beside:
    """How often a plan of a config is evaluated and saved."""
    due = Intervals.of(config.intervals, tokens_per_example=tokens_per_example(config.data))
    evaluations, checkpoints = (
        each.num_due(plan.batch_sizes, plan.train_examples)
        for each in (due.evaluate_every, due.checkpoint_every)
    )
    examples = getattr(facts_of(config.data), "test_examples", 0)
    return time_model.Beside(evaluations * examples, checkpoints)


def gradient_bytes(config: Config) -> int:
    """What an all-reduce sums; for a bundled network known without JAX."""
    if config.model is not None:
        sizes = getattr(facts_of(config.data), "network_sizes", {})
        parameters = config.model.num_parameters(**sizes)
        return parameters * (8 if config.model.dtype == "float64" else 4)
    import jax

    from bigbatch.config.assemble import network_shapes
    from bigbatch.engine.task import wide

    params = network_shapes(config).params
    sums = jax.eval_shape(lambda params: jax.tree.map(wide, params), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sums))


def text(found: Times, speeds: Speeds) -> str:
    """The stages' times, the totals, and the table over numbers of devices."""
    priced = speeds.cost_per_device_hour is not None
    head = [*_STAGE_HEAD, *["cost"] * priced]
    rows = abridged([_stage_row(stage, found.devices, speeds) for stage in found.stages], len(head))
    hours = found.seconds / 3600
    total = f"{hours:,.4g} hours, {hours * found.devices:,.4g} device-hours"
    if priced:
        total += f", cost {_cost(hours * found.devices, speeds)}"
    network = ""
    if found.devices > 1:
        network = f", all-reduces of {found.gradient_bytes / 1e6:,.4g} MB at "
        network += f"{speeds.allreduce_gbps:g} Gbit/s"
    many = "s" * (found.devices > 1)
    parts = [f"{kind} {s / 3600:.4g}" for kind, s in found.beside.items() if s]
    total += f"; beside the updates: {', '.join(parts)} hours" if parts else ""
    kinds = ["input", *(k for k in ("evaluation", "compilation") if not found.beside[k])]
    without = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    lines = [
        f"time on {found.devices:,} device{many} of {speeds.examples_per_s:,.5g} "
        f"examples/s each{network} (a model; without {without}):",
        "",
        *aligned([head, *rows]),
        "",
        total,
    ]
    if found.growing:
        lines += ["", *_scaling_lines(found, speeds)]
    return "\n".join(lines)


def _stage_row(time: StageTime, devices: int, speeds: Speeds) -> tuple[str, ...]:
    stage, update = time.stage, time.update
    hours = time.seconds / 3600
    cells = [f"{stage.first_update:,}", f"{stage.num_updates:,}", f"{stage.batch_size:,}"]
    cells += [f"{seconds:.4g}" for seconds in (update.total_s, *update)]
    cells.append(f"{hours:.4g}")
    if speeds.cost_per_device_hour is not None:
        cells.append(_cost(hours * devices, speeds))
    return tuple(cells)


def _cost(device_hours: float, speeds: Speeds) -> str:
    return f"{device_hours * (speeds.cost_per_device_hour or 0.0):,.2f}"


def _scaling_lines(found: Times, speeds: Speeds) -> list[str]:
    """The two recipes side by side; device-hours stand for the cost where there is no price."""
    measure = "device-hours" if speeds.cost_per_device_hour is None else "cost"
    head = ["devices", "original: hours", measure, "growing: hours", measure, "times faster"]
    original = {row.devices: row for row in found.original}
    growing = {row.devices: row for row in found.growing}
    rows = []
    for devices in sorted(original.keys() | growing.keys()):
        pair = original.get(devices), growing.get(devices)
        cells = [f"{devices:,}"]
        for row in pair:
            if row is None:
                cells += ["-", "-"]
            else:
                priced = speeds.cost_per_device_hour is not None
                hours = row.device_hours
                cells += [f"{row.seconds / 3600:.4g}"]
                cells += [_cost(hours, speeds) if priced else f"{hours:,.4g}"]
        known = pair[0] is not None and pair[1] is not None
        cells.append(f"{pair[0].seconds / pair[1].seconds:.2f}" if known else "-")  # type: ignore[union-attr]
        rows.append(cells)
    lines = aligned([head, *rows])
    lines.append("")
    for name, scalings in (("original", found.original), ("growing", found.growing)):
        if scalings:
            best = time_model.most_worthwhile(scalings)
            lines.append(
                f"{name}: more than {best:,} device{'s' * (best > 1)} stop helping (twice as many "
                f"are less than {time_model.WORTHWHILE_SPEEDUP:g} times as fast)"
            )
    return lines


def summary(found: Times, speeds: Speeds) -> dict[str, Any]:
    """The same as plain values, for `--json`."""
    return {
        "devices": found.devices,
        "speeds": dataclasses.asdict(speeds),
        "gradient_bytes": found.gradient_bytes,
        "seconds": found.seconds,
        "device_hours": found.seconds * found.devices / 3600,
        "cost": _cost_value(found.seconds * found.devices / 3600, speeds),
        "beside_s": found.beside,
        "stages": [
            {
                "first_update": stage.first_update,
                "num_updates": stage.num_updates,
                "batch_size": stage.batch_size,
                **update._asdict(),
                "seconds": seconds,
                "cost": _cost_value(seconds * found.devices / 3600, speeds),
            }
            for stage, update, seconds in found.stages
        ],
        "original": _scaling_summary(found.original, speeds),
        "growing": _scaling_summary(found.growing, speeds),
    }


def _cost_value(device_hours: float, speeds: Speeds) -> float | None:
    price = speeds.cost_per_device_hour
    return None if price is None else device_hours * price


def _scaling_summary(rows: Sequence[Scaling], speeds: Speeds) -> dict[str, Any] | None:
    if not rows:
        return None
    return {
        "most_worthwhile_devices": time_model.most_worthwhile(rows),
        "by_devices": [
            {
                "devices": row.devices,
                "seconds": row.seconds,
                "device_hours": row.device_hours,
                "cost": _cost_value(row.device_hours, speeds),
            }
            for row in rows
        ],
    }
