"""A plan beside other trainers' schedules: `bigbatch plan --emit` and `--against`."""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

from bigbatch.checks import Checks, text_of
from bigbatch.commands import tables
from bigbatch.commands.plan import abridged, aligned
from bigbatch.config.file import load_config
from bigbatch.errors import Problem, UserError, among
from bigbatch.schedule.plan import Plan, Stage
from bigbatch.schedule.trainers.emit import FORMATS, stray

# Those that are data; the others are programs, which are not run.
_READ = [name for name in FORMATS if name not in ("optax", "pytorch", "megatron_rampup")]
_IGNORED = ("plot", "critical", "compile_for", "bench")
_STAGE = ("first example", "batch size", "learning rate")


def show(config: Any, options: argparse.Namespace, typed: Mapping[str, Any]) -> None:
    """Prints what the options ask for.

    Args:
      config: whose plan it is.
      options: of the verb.
      typed: speeds, by name; a schedule for others has no use for them.

    Raises:
      UserError: an option is out of its range or another's schedule cannot be read.
    """
    checks = Checks()
    alone = {"emit": options.emit, "against": options.against, "json": options.json or None}
    given = {name: value for name, value in alone.items() if value is not None}
    checks.require(len(given) == 1, next(iter(given)), given, "one of them alone")
    others = {name: getattr(options, name) for name in _IGNORED} | dict(typed)
    for name, value in others.items():
        checks.require(value is None, name, value, f"none with --{next(iter(given))}")
    checks.done()
    plan, ranks = _known(config, "policy"), options.devices or 1
    told = plan.tokens_per_example or 1
    sequence_length = told if options.sequence_length is None else options.sequence_length
    if options.against:
        tables.show(beside(plan, read(options.against, plan, ranks, sequence_length)))
        return
    done = plan.emit(options.emit, ranks=ranks, sequence_length=sequence_length)
    print(done.text, end="")
    for limit in done.limits:
        is_sentence = limit in FORMATS[options.emit].warnings
        lacks = ": " if is_sentence else " cannot express "
        print(f"bigbatch: {options.emit}{lacks}{limit}", file=sys.stderr)
    print(f"bigbatch: {strays(plan, done.plan)}", file=sys.stderr)


def _known(config: Any, field: str) -> Plan:
    if config.controller is not None:
        raise UserError(Problem(field, "adaptive", "a config whose plan is known beforehand"))
    plan: Plan = config.plan
    return plan


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
    try:
        if name in _READ:
            other = FORMATS[name].run(text_of(path), plan, ranks, sequence_length)
        else:
            other = _known(load_config(reference), "against")
    except UserError as error:
        known = among(name, _READ, "a config, or FORMAT:FILE with a format of ")
        problem = Problem("against", reference, *known)
        is_neither = name not in _READ and error.problems[0].field == "config"
        raise UserError([*[problem] * is_neither, *error.problems]) from error
    except (OSError, ValueError) as error:
        raise UserError(Problem("against", path, f"a file of text ({error})")) from error
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
    names = [name for name in plan.hypers if name in other.hypers]
    ours, theirs = (
        dataclasses.replace(each, hypers={name: each.hypers[name] for name in names})
        for each in (plan, other)
    )
    update = ours.diff(theirs)
    if update is None:
        return "no difference"
    if update == min(plan.num_updates, other.num_updates):
        return f"first difference: update {update:,}, where one of them has ended"
    one, two = ours.hyper(update), theirs.hyper(update)
    name = next(n for n in ("batch_size", *names) if not math.isclose(one[n], two[n]))
    words = f"{name.replace('_', ' ')} {one[name]:.9g} | {two[name]:.9g}"
    return f"first difference: update {update:,}, example {plan.first_examples[update]:,}: {words}"
