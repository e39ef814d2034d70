"""What the flags of `bigbatch plan --fastest` ask for."""

import argparse
import json
from collections.abc import Mapping

import numpy as np

from bigbatch.checks import Checks
from bigbatch.commands import tables
from bigbatch.commands.critical.limits import read
from bigbatch.commands.fastest import words
from bigbatch.commands.fastest.answer import Answer, Objective, answer, calibrated, pilot
from bigbatch.config.config import Config
from bigbatch.errors import Problem, UserError
from bigbatch.layout import time_model
from bigbatch.schedule.diagnostics import MAX_BATCH_SHARE


def show(config: Config, options: argparse.Namespace, typed: Mapping[str, float]) -> Answer:
    """Prints what the options ask for.

    Args:
      config: a validated config.
      options: the flags.
      typed: fields of `time_model.Speeds` among them.

    Raises:
      UserError: an option is out of its range, the noise cannot be read, or no plan keeps a limit.
    """
    checks, plan = Checks(), config.plan
    allowed = "a config whose plan is known beforehand"
    checks.require(config.controller is None, "policy", "adaptive", allowed)
    allowed = "a run that measured its gradient noise, or the metrics.jsonl of one"
    checks.require(options.noise is not None, "noise", "nothing", allowed)
    devices = 1 if options.max_devices is None else options.max_devices
    checks.whole("max_devices", devices, "a whole number of devices, at least 1")
    own = max(int(plan.train_examples * MAX_BATCH_SHARE), int(plan.batch_sizes.max()))
    most = own if options.max_batch_size is None else options.max_batch_size
    allowed = f"from a ghost batch to the {plan.train_examples:,} training examples"
    ends = {"at_least": config.ghost_batch_examples, "at_most": plan.train_examples}
    checks.number("max_batch_size", most, allowed, **ends)
    restart_s = 60.0 if options.restart_s is None else options.restart_s
    checks.number("restart_s", restart_s, "seconds, at least 0", at_least=0)
    goal = _objective(checks, options)
    checks.done()
    speeds = time_model.asked(options.bench, typed, devices)
    if speeds is None:
        allowed = "the file of `bigbatch bench`, or --examples-per-s"
        raise UserError(Problem("bench", "nothing", allowed))
    noise, notes = pilot(options.noise, config)
    if options.critical:
        noise = calibrated(noise, read(options.critical), plan.epochs)
        notes.append(f"in proportion to the critical batch sizes of {options.critical}")
    found = answer(config, noise, notes, speeds, (most, devices, restart_s), goal)
    tables.show(json.dumps(words.summary(found)) if options.json else words.text(found, options))
    return found


def _objective(checks: Checks, options: argparse.Namespace) -> Objective:
    """What the options ask to minimise; notes a problem where they contradict each other."""
    names = ("max_hours", "max_cost", "weight")
    given = {name: v for name in names if (v := getattr(options, name)) is not None}
    allowed = "at most one of --max-hours, --max-cost and --weight"
    checks.require(len(given) <= 1, next(iter(given), ""), given, allowed)
    for name, of, index in (("max_hours", "cost", 0), ("max_cost", "hours", 1)):
        if name in given:
            most, other = given[name], 1 - index
            checks.number(name, most, "a number above 0", above=0)
            return Objective(
                f"{of}, with at most {most:g} {'cost' if index else 'hours'}",
                lambda *pair: (np.maximum(pair[index], most), pair[other]),  # noqa: B023
                limit=(name, most),
            )
    try:
        a, b = (float(part) for part in given.get("weight", "1:0").split(":"))
    except ValueError:
        a = b = 0.0
    allowed = "what an hour and a unit of money weigh, such as 20:1, not both 0"
    checks.require(min(a, b) >= 0 < a + b < np.inf, "weight", options.weight, allowed)
    words = f"{a:g} x hours + {b:g} x cost" if a and b else "hours" if a else "cost"
    return Objective(words, lambda hours, cost: (a * hours + b * cost,), weights=(a, b))
