"""The verb `bigbatch plan`: every stage of a run before it is made."""

import argparse
import dataclasses
import json
from typing import Any

from bigbatch.errors import Problem, UserError

_MOST_DEVICES = 2**20


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Adds the verb's flags, save --config, to its parser."""
    plan.add_argument("--devices", type=int, default=1, help="plan for so many (default 1)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--plot", metavar="FILE", help="draw the plan, before and after (.png, .svg)")
    plan.add_argument(
        "--emit", metavar="FORMAT", help="print it for another trainer (megatron, ...)"
    )
    plan.add_argument("--against", metavar="FORMAT:FILE", help="compare it with another's schedule")
    plan.add_argument(
        "--sequence-length", type=int, help="tokens of an example (default: the data's, or 1)"
    )
    plan.add_argument(
        "--critical", metavar="FILE", help="critical.json: warns where its batch sizes are passed"
    )
    timing = plan.add_argument_group("time and cost on devices that are not there")
    timing.add_argument("--bench", metavar="FILE", help="measured speeds, from `bigbatch bench`")
    timing.add_argument("--examples-per-s", type=float, help="of one device")
    timing.add_argument("--allreduce-gbps", type=float, help="1e9 bits a second, of one device")
    timing.add_argument("--update-s", type=float, help="fixed seconds of one update (default 0)")
    timing.add_argument("--cost-per-device-hour", type=float, help="in your money")


def run(options: argparse.Namespace) -> None:
    """Prints the plan that the options ask for."""
    from bigbatch.commands import plan as plan_table
    from bigbatch.commands import plan_adaptive as ladder_table
    from bigbatch.config.file import load_config
    from bigbatch.layout import time_model

    config = load_config(options.config, options.overrides)
    nearest = min(max(options.devices, 1), _MOST_DEVICES)
    if options.devices != nearest:
        allowed = f"a whole number from 1 to {_MOST_DEVICES:,}"
        raise UserError(Problem("devices", options.devices, allowed, nearest))
    if options.emit or options.against:
        from bigbatch.commands import plan_others

        plan_others.show(config, options)
        return
    names = ("examples_per_s", "update_s", "allreduce_gbps", "cost_per_device_hour")
    typed = {name: v for name in names if (v := getattr(options, name)) is not None}
    speeds = time_model.asked(options.bench, typed, options.devices)
    summary = config.plan.summary() if options.json else {}
    if config.controller is None:
        text = plan_table.text
    else:
        text = ladder_table.text
        summary["adaptive"] = ladder_table.summary(config.controller)
    lines = [] if options.json else [text(config, devices=options.devices)]
    if options.critical:
        from bigbatch.commands.critical import limits

        controller = config.controller
        asked = config.plan if controller is None else controller.fewest_updates()
        found = limits.against(limits.read(options.critical), asked)
        summary["critical"] = dataclasses.asdict(found)
        lines += [found.text, *([f"warning: {found.warning}"] if found.warning else [])]
    if speeds is not None:
        from bigbatch.commands import plan_time as time_table

        times = time_table.times(config, options.devices, speeds)
        summary["time"] = time_table.summary(times, speeds)
        lines += ["", time_table.text(times, speeds)]
    print(json.dumps(summary) if options.json else "\n".join(lines))
    if options.plot:
        _plot(config, options.plot)


def _plot(config: Any, path: str) -> None:
    from bigbatch.commands.plan_figure import draw_plan

    try:
        draw_plan(path, config.plan, config.source_plan)
    except (OSError, ValueError) as error:
        allowed = f"a picture's file that can be written, .png, .svg or .pdf ({error})"
        raise UserError(Problem("plot", path, allowed)) from error
