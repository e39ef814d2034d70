"""A plan beside other trainers' schedules: `bigbatch plan --emit` and `--against`."""

import argparse
import itertools
import sys
from typing import Any

import numpy as np

from bigbatch.checks import Checks, text_of
from bigbatch.commands.plan import abridged, aligned
from bigbatch.config.file import load_config
from bigbatch.errors import Problem, UserError, nearest_name
from bigbatch.schedule.plan import Plan, Stage
from bigbatch.schedule.trainers.emit import FORMATS, stray

# Those that are data; the others are programs, which are not run.
_READ = [name for name in FORMATS if name not in ("optax", "pytorch", "megatron_rampup")]
_STAGE = ("first example", "batch size", "learning rate")


def show(config: Any, options: argparse.Namespace) -> None:
    """Prints what the options ask for.

    Raises:
      UserError: an option is out of its range or another's schedule cannot be read.
    """
    checks = Checks()
    allowed = "a config whose plan is known beforehand"
    checks.require(config.controller is None, "policy", "adaptive", allowed)
    alone = {"emit": options.emit, "against": options.against, "json": options.json or None}
    given = {name: value for name, value in alone.items() if value is not None}
    checks.require(len(given) == 1, next(iter(given)), given, "one of them alone")
    checks.done()
    plan: Plan = config.plan
    ranks = options.devices or 1
    told = plan.tokens_per_example or 1
    sequence_length = told if options.sequence_length is None else options.sequence_length
    if options.against:
        other = read(options.against, plan, ranks, sequence_length)
        print(beside(plan, other))
        return
    done = plan.emit(options.emit, ranks=ranks, sequence_length=sequence_length)
    print(done.text, end="")
    for limit in done.limits:
        is_sentence = limit in FORMATS[options.emit].warnings
        lacks = ": " if is_sentence else " cannot express "
        print(f"bigbatch: {options.emit}{lacks}{limit}", file=sys.stderr)
    print(f"bigbatch: {strays(plan, done.plan)}", file=sys.stderr)


def strays(plan: Plan, other: Plan) -> str:
    """How far another plan goes from a plan, in words."""
    far = stray(plan, other)
    return (
        f"largest relative error of the batch size {far.batch_size:.3g}, of the learning rate "
        f"{far.learning_rate:.3g}, of the noise scale {far.noise_scale:.3g}; {far.num_updates:,} "
        f"updates (the plan: {plan.num_updates:,}), {far.num_examples:,} examples (the plan: "
        f"{plan.num_examples:,})"
    )


def read(reference: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """Another schedule, laid out on the training set of a plan.

    Args:
      reference: "FORMAT:FILE" of another trainer, or a config of ours.
      plan: the one to compare with.
      ranks: devices, for MaxText.
      sequence_length: tokens of an example, for OLMo-core.

    Raises:
      UserError: there is no such format, file or config, or it holds no such schedule.
    """
    name, _, path = reference.partition(":")
    if name in _READ:
        try:
            text = text_of(path)
        except (OSError, ValueError) as error:
            raise UserError(Problem("against", path, f"a file of text ({error})")) from error
        other = FORMATS[name].run(text, plan, ranks, sequence_length)
    else:
        try:
            config = load_config(reference)
        except UserError as error:
            allowed = f"a config, or FORMAT:FILE with a format of {', '.join(_READ)}"
            problem = Problem("against", reference, allowed, nearest_name(name, _READ))
            raise UserError([problem, *error.problems]) from error
        if config.controller is not None:
            allowed = "a config whose plan is known beforehand"
            raise UserError(Problem("against", reference, allowed))
        other = config.plan
    if other.train_examples != plan.train_examples:
        allowed = f"a plan for the {plan.train_examples:,} training examples of the config"
        raise UserError(Problem("against", other.train_examples, allowed))
    return other


def beside(plan: Plan, other: Plan) -> str:
    """Both tables of stages side by side, the first difference, and how large they get."""
    sides = [[_stage(stage) for stage in each.stages] for each in (plan, other)]
    rows = [
        (*ours, "|", *theirs)
        for ours, theirs in itertools.zip_longest(*sides, fillvalue=("",) * len(_STAGE))
    ]
    header = (*_STAGE, "|", *_STAGE)
    lines = aligned([header, *abridged(rows, len(header))])
    return "\n".join([*lines, "", _first_difference(plan, other), strays(plan, other)])


def _stage(stage: Stage) -> tuple[str, ...]:
    rates = [f"{rate:.4g}" for rate in (stage.learning_rate, stage.last_learning_rate)]
    return f"{stage.first_example:,}", f"{stage.batch_size:,}", " .. ".join(dict.fromkeys(rates))


def _first_difference(plan: Plan, other: Plan) -> str:
    count = min(plan.num_updates, other.num_updates)
    columns: list[tuple[str, Any, Any]] = [("batch size", plan.batch_sizes, other.batch_sizes)]
    columns += [
        (name.replace("_", " "), plan.hypers[name], other.hypers[name])
        for name in plan.hypers
        if name in other.hypers
    ]
    first: list[tuple[int, str]] = []
    for name, ours, theirs in columns:
        ours, theirs = ours[:count], theirs[:count]
        differs = np.abs(ours - theirs) > 1e-9 * np.maximum(np.abs(ours), np.abs(theirs))
        if differs.any():
            update = int(np.argmax(differs))
            first.append((update, f"{name} {ours[update]:.9g} | {theirs[update]:.9g}"))
    if first:
        update, words = min(first)
        at = plan.first_examples[update]
        return f"first difference: update {update:,}, example {at:,}: {words}"
    if plan.num_updates != other.num_updates:
        return f"first difference: update {count:,}, where one of them has ended"
    return "no difference"
