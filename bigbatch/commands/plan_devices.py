"""How many devices pay in each stage of a plan, and where to change them: `plan --devices=auto`."""

import argparse
import json
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.commands.fastest.answer import hardware
from bigbatch.commands.plan import abridged, aligned
from bigbatch.config.config import Config
from bigbatch.errors import Problem, UserError
from bigbatch.layout import time_model
from bigbatch.layout.fastest import choice, paying
from bigbatch.schedule.run_lengths import run_starts


def show(config: Config, options: argparse.Namespace, typed: Mapping[str, float]) -> None:
    """Prints the devices of every stage, hours and cost beside fixed sizes, and the commands.

    Args:
      config: a validated config.
      options: the verb's flags.
      typed: fields of `time_model.Speeds` among them.

    Raises:
      UserError: an option is out of its range, or the speeds are not known.
    """
    checks = Checks()
    allowed = "a config whose plan is known beforehand"
    checks.require(config.controller is None, "policy", "adaptive", allowed)
    most, allowed = options.max_devices, "a whole number of devices, at least 1"
    checks.whole("max_devices", "nothing" if most is None else most, allowed)
    efficiency = 0.7 if options.efficiency is None else options.efficiency
    allowed = "a share above 0, at most 1"
    checks.number("efficiency", efficiency, allowed, above=0, at_most=1)
    restart_s = 60.0 if options.restart_s is None else options.restart_s
    checks.number("restart_s", restart_s, "seconds, at least 0", at_least=0)
    checks.done()
    speeds = time_model.asked(options.bench, typed, most)
    if speeds is None:
        allowed = "the file of `bigbatch bench`, or --examples-per-s"
        raise UserError(Problem("bench", "nothing", allowed))
    found = found_for(config, speeds, most, efficiency, restart_s)
    print(json.dumps(found) if options.json else text(found, options))


def found_for(
    config: Config, speeds: time_model.Speeds, most: int, efficiency: float, restart_s: float
) -> dict[str, Any]:
    """The devices of every stage, as plain values.

    Args:
      config: a validated config, not an adaptive one.
      speeds: of the hardware.
      most: devices that there are.
      efficiency: see `paying`.
      restart_s: what a change of the number of devices takes.
    """
    stages, sizes = config.plan.stages, np.unique(config.plan.batch_sizes)
    there = hardware(config, speeds, sizes, most, restart_s, config.plan)
    size = np.searchsorted(sizes, [stage.batch_size for stage in stages])
    counts = np.array([stage.num_updates for stage in stages], np.float64)
    device = paying(counts, size, there, efficiency)
    seconds = counts[:, None] * there.seconds[size]
    work = seconds * there.devices

    def taken(device: Any) -> dict[str, float]:
        """Of the whole run, with the devices of each stage by index."""
        of_any_size = np.broadcast_to(counts[:, None], (len(stages), len(sizes)))
        _, _, hours, cost = choice(of_any_size, there, size, device)
        return {"hours": hours, "device_hours": cost / there.price, "cost": cost}

    rows = [
        {
            "stage": number + 1,
            "first_update": stage.first_update,
            "num_updates": stage.num_updates,
            "batch_size": stage.batch_size,
            "devices": int(there.devices[chosen]),
            "efficiency": float(work[number, 0] / work[number, chosen]),
            "hours": float(seconds[number, chosen]) / 3600,
        }
        for number, (stage, chosen) in enumerate(zip(stages, device, strict=True))
    ]
    starts = run_starts(device)
    used = np.unique(device)
    return {
        "fewest_devices": int(there.devices[0]),
        "restart_s": restart_s,
        "priced": speeds.cost_per_device_hour is not None,
        "stages": rows,
        "parts": [
            {"devices": int(there.devices[device[first]]), "until": until}
            for first, until in zip(starts, [*starts[1:].tolist(), None], strict=True)
        ],
        "growing": taken(device),
        "fixed": {int(there.devices[one]): taken(np.full(len(stages), one)) for one in used},
    }


def text(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """The same in words, with the commands that change the devices where they should change."""
    columns = {"stage": ",", "first_update": ",", "num_updates": ",", "batch_size": ","}
    columns |= {"devices": ",", "efficiency": ".2f", "hours": ".4g"}
    head = [name.replace("num_", "").replace("_", " ") for name in columns]
    rows = [
        [format(row[name], shown) for name, shown in columns.items()] for row in found["stages"]
    ]
    measure = "cost" if found["priced"] else "device_hours"
    changes = len(found["parts"]) - 1
    table = [("devices", "hours", measure.replace("_", "-"))]
    for name, taken in {"by stages": found["growing"], **found["fixed"]}.items():
        label = name if isinstance(name, str) else f"{name:,} throughout"
        table.append((label, f"{taken['hours']:.4g}", f"{taken[measure]:,.4g}"))
    fields = {"": options.config, **{f".{name}": value for name, value in options.overrides}}
    own = " ".join(shlex.quote(f"--config{name}={value}") for name, value in fields.items())
    commands = []
    for part in found["parts"]:
        until = f" --until={part['until']}" if part["until"] else ""
        many = "s" * (part["devices"] > 1)
        command = f"bigbatch train {own} --workdir=DIR{until}"
        commands.append(f"{command}  # {part['devices']:,} device{many}")
    return "\n".join(
        [
            f"devices that pay (efficiency: against {found['fewest_devices']:,}; a model, without "
            "input, evaluation and compilation):",
            "",
            *aligned([head, *abridged(rows, len(head))]),
            "",
            *aligned(table),
            f"by stages: {changes} change{'s' * (changes != 1)} of the devices, "
            f"{found['restart_s']:g} s each",
            "",
            *commands,
        ]
    )
