"""The verb `bigbatch plan`: every stage of a run before it is made."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from bigbatch.commands import fastest, tables
from bigbatch.commands.compile.chips import MOST_DEVICES
from bigbatch.errors import Problem, UserError


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Adds the verb's flags, save --config, to its parser."""
    plan.add_argument(
        "--devices",
        type=_devices,
        metavar="N|auto",
        help="plan for so many (default 1); auto: as many as pay in each stage, of --max-devices",
    )
    plan.add_argument(
        "--compile-for",
        metavar="CHIP:SHAPE",
        help="compile the run's programs for devices that are not here: v5e:16x16, 2*v5e:16x16 for "
        "two slices, h100:8, FILE.txtpb:8",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--plot", metavar="FILE", help="draw the plan, before and after (.png, .svg)")
    plan.add_argument(
        "--emit", metavar="FORMAT", help="print it for another trainer (megatron, ...)"
    )
    text = "compare it with another trainer's schedule, or with another config"
    plan.add_argument("--against", metavar="FORMAT:FILE", help=text)
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
    timing.add_argument("--hop-s", type=float, help="latency from a device to the next (default 0)")
    text = "of one device (default: evaluations are not counted)"
    timing.add_argument("--evaluation-examples-per-s", type=float, help=text)
    timing.add_argument("--checkpoint-s", type=float, help="that updates wait for one (default 0)")
    timing.add_argument("--compile-s", type=float, help="before the first update (default 0)")
    timing.add_argument("--cost-per-device-hour", type=float, help="in your money")
    fastest.add_arguments(plan)


def _devices(text: str) -> int | str:
    """A number, or "auto"."""
    if text == "auto" or text.removeprefix("-").isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a whole number, or auto")


def run(options: argparse.Namespace) -> None:
    """Prints the plan that the options ask for."""
    from bigbatch.commands import plan as plan_table
    from bigbatch.commands import plan_adaptive as ladder_table
    from bigbatch.config.file import load_config
    from bigbatch.layout import time_model

    mode = fastest.asked(options)
    config = load_config(options.config, options.overrides)
    devices = 1 if options.devices in (None, "auto") else options.devices
    nearest = min(max(devices, 1), MOST_DEVICES)
    if devices != nearest:
        allowed = f"a whole number from 1 to {MOST_DEVICES:,}"
        raise UserError(Problem("devices", devices, allowed, nearest))
    names = [f.name for f in dataclasses.fields(time_model.Speeds) if f.name != "call_s"]
    typed = {name: v for name in names if (v := getattr(options, name)) is not None}
    if options.emit or options.against:
        from bigbatch.commands import plan_others

        plan_others.show(config, options, typed)
        return
    if mode == fastest.BY_STAGES:
        from bigbatch.commands import plan_devices

        plan_devices.show(config, options, typed)
        return
    if mode == fastest.FASTEST:
        from bigbatch.commands.fastest import verb, words

        found = verb.show(config, options, typed)
        if options.plot:
            _plot(options.plot, words.draw, found)
        return
    compiled: dict[str, Any] = {}
    if options.compile_for:
        from bigbatch.commands.compile import chips
        from bigbatch.commands.compile import table as programs_table

        target = chips.target(options.compile_for)
        if options.devices not in (None, target.devices):
            allowed = f"the {target.devices:,} that --compile-for={target.asked} describes"
            raise UserError(Problem("devices", devices, allowed, target.devices))
        compiled = programs_table.compiled(options.config, options.overrides, target)
        devices, found = target.devices, compiled["microbatch_examples_per_device"]
        config = dataclasses.replace(config, microbatch_examples_per_device=found)
        if options.bench is None:
            typed = programs_table.bounds(compiled, target) | typed
    speeds = time_model.asked(options.bench, typed, devices)
    summary = config.plan.summary() if options.json else {}
    if config.controller is None:
        text = plan_table.text
    else:
        text = ladder_table.text
        summary["adaptive"] = ladder_table.summary(config.controller)
    lines = [] if options.json else [text(config, devices=devices)]
    if options.critical:
        from bigbatch.commands.critical import limits

        controller = config.controller
        asked = config.plan if controller is None else controller.fewest_updates()
        passed = limits.against(limits.read(options.critical), asked)
        summary["critical"] = dataclasses.asdict(passed)
        lines += [passed.text, *([f"warning: {passed.warning}"] if passed.warning else [])]
    if compiled:
        summary["compiled"] = compiled
        lines += ["", programs_table.text(compiled, target)]
    if speeds is not None:
        from bigbatch.commands import plan_time as time_table

        if compiled and options.bench is None:
            lines += ["", "at these bounds, which no run reaches:"]
        times = time_table.times(config, devices, speeds)
        summary["time"] = time_table.summary(times, speeds)
        lines += ["", time_table.text(times, speeds)]
    tables.show(json.dumps(summary) if options.json else "\n".join(lines))
    if options.plot:
        from bigbatch.commands.plan_figure import draw_plan

        drawn: tuple[Any, ...] = (config.plan, config.source_plan)
        if config.controller is not None:
            drawn = (config.controller.most_updates(), None, config.controller.fewest_updates())
        _plot(options.plot, draw_plan, *drawn)
    problems = programs_table.misfits(compiled) if compiled else []
    if problems:
        raise UserError(problems)


def _plot(path: str, draw: Callable[..., None], *drawn: Any) -> None:
    try:
        draw(path, *drawn)
    except (OSError, ValueError) as error:
        allowed = f"a picture's file that can be written, .png, .svg or .pdf ({error})"
        raise UserError(Problem("plot", path, allowed)) from error
