"""A plan in other trainers' words, and how far each of them strays from it.

What a target does with a text is found by reading the text as the target does: by its reader in
the module of its format, which shares nothing with the writer, or by running it where it is a
program. Of all texts that a writer offers the one that strays least is taken.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import Checks
from bigbatch.errors import UserError, among
from bigbatch.schedule.from_file import as_policy
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.trainers import levanter, maxtext, megatron, olmo_core, tables
from bigbatch.schedule.trainers.recipe import Recipe

# Below it a number is the same but for its last digits: float32 has 6e-8.
_SAME = 1e-7


class Format(NamedTuple):
    """A way to write a plan.

    Attributes:
      write: texts for a plan, ranks and a sequence length, of which one is to be taken.
      run: what the target does with a text, on the training set of a plan.
      is_table: it says all that a plan says, whatever the ranks.
      warnings: sentences on what the target refuses or ignores, by the condition of a plan.
    """

    write: Callable[[Plan, int, int], Iterator[str]]
    run: Callable[[str, Plan, int, int], Plan]
    is_table: bool = False
    warnings: Mapping[str, Callable[[Plan], bool]] = {}


class Stray(NamedTuple):
    """How far a trainer goes from a plan; errors are relative, the largest of the plan's updates.

    Attributes:
      batch_size: of the batch size.
      learning_rate: of the learning rate; relative to the peak where the plan has 0.
      noise_scale: likewise.
      num_updates: that the trainer makes.
      num_examples: that the trainer takes.
    """

    batch_size: float
    learning_rate: float
    noise_scale: float
    num_updates: int
    num_examples: int


class Emitted(NamedTuple):
    """A plan in another trainer's words.

    Attributes:
      text: what its file or command line holds.
      limits: what it cannot express of this plan, in sentences.
      stray: how far it strays from the plan.
      plan: what the trainer does with the text.
    """

    text: str
    limits: tuple[str, ...]
    stray: Stray
    plan: Plan


def emit(plan: Plan, name: str, *, ranks: int = 1, sequence_length: int = 1) -> Emitted:
    """Writes a plan in the words of another trainer.

    Args:
      plan: any plan.
      name: one of `FORMATS`.
      ranks: how many data-parallel ranks must share every batch size. Sizes that they cannot are
        rounded down, and the hyperparameters absorb that by the plan's rule.
      sequence_length: tokens of an example, for trainers that count tokens.

    Raises:
      UserError: there is no such format, an argument is out of its range, or a batch size is
        smaller than the ranks.
    """
    checks = Checks()
    checks.require(name in FORMATS, "emit", name, *among(name, FORMATS))
    checks.whole("ranks", ranks, "a whole number, at least 1")
    checks.whole("sequence_length", sequence_length, "a whole number of tokens, at least 1")
    checks.done()
    made, written, limits = FORMATS[name], plan, []
    odd = np.flatnonzero(plan.batch_sizes % ranks)
    if odd.size and not made.is_table:
        limits.append(
            f"batch sizes that {ranks} ranks cannot share, such as {plan.batch_sizes[odd[0]]:,} in "
            f"update {odd[0]:,}: they are rounded down, by the rule {plan.rule}"
        )
        written = make_plan(
            as_policy(plan),
            train_examples=plan.train_examples,
            epochs=plan.epochs,
            batch_multiple_examples=ranks,
        )
    best = math.inf, "", plan
    for text in made.write(written, ranks, sequence_length):
        # What the target refuses is none of its words.
        with contextlib.suppress(UserError):
            done = made.run(text, plan, ranks, sequence_length)
            # Over all examples: the largest is mostly that of a last update, next to 0.
            mean = sum(float(np.average(e, weights=plan.batch_sizes)) for e in _errors(plan, done))
            if mean < best[0]:
                best = mean, text, done
        if best[0] <= _SAME:
            break
    _, text, done = best
    checks.require(bool(text), "emit", name, "a format that has a schedule near to this plan")
    checks.done()
    ours, theirs = (float(each.hypers["momentum"][0]) for each in (plan, done))
    if abs(ours - theirs) > _SAME:
        limits.append(f"a momentum of {ours:g}: it is {theirs:g}, as of Adam")
    for column, values in plan.hypers.items():
        if not made.is_table and column != "learning_rate" and np.ptp(values):
            limits.append(f"a {column} that moves, here from {values.min():g} to {values.max():g}")
    strayed = stray(written, done)
    for words, error in (
        ("these batch sizes", strayed.batch_size),
        ("this course of the learning rate", strayed.learning_rate),
    ):
        if error > _SAME:
            limits.append(f"{words}: the nearest that it has is written")
    limits += [words for words, holds in made.warnings.items() if holds(plan)]
    return Emitted(text, tuple(limits), stray(plan, done), done)


def stray(plan: Plan, other: Plan) -> Stray:
    """How far another plan goes from a plan, at the first example of each of its updates."""
    size, rate, noise = (float(errors.max()) for errors in _errors(plan, other))
    return Stray(size, rate, noise, other.num_updates, other.num_examples)


def _errors(plan: Plan, other: Plan) -> Iterator[Array]:
    """Of the batch size, the learning rate and the noise scale, at each of the plan's updates."""
    at = np.searchsorted(other.first_examples, plan.first_examples, side="right") - 1
    for ours, theirs in (
        (plan.batch_sizes, other.batch_sizes),
        (plan.hypers["learning_rate"], other.hypers["learning_rate"]),
        (plan.noise_scales, dataclasses.replace(other, rule=plan.rule).noise_scales),
    ):
        yield np.abs(theirs[at] - ours) / np.where(ours == 0, ours.max(), ours)


def _trainer(module: Any, write: Any, warnings: Mapping[str, Any] = {}) -> Format:
    """A format whose texts are read as the trainer reads them."""

    def run(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
        recipe: Recipe = module.read(text, ranks, sequence_length)
        return recipe.plan(plan.train_examples)

    return Format(write, run, warnings=warnings)


_FALLING: dict[str, Callable[[Plan], bool]] = {
    "it stops with an assertion where the batch size falls": lambda plan: bool(
        (np.diff(plan.batch_sizes) < 0).any()
    )
}
_IGNORED: dict[str, Callable[[Plan], bool]] = {
    "versions after core 0.16 take --rampup-batch-size and ignore it: the batch size is then the "
    "last one throughout": lambda plan: len(plan.stages) > 1
}
FORMATS = {
    "optax": Format(tables.write_optax, tables.run_optax, is_table=True),
    "pytorch": Format(tables.write_pytorch, tables.run_pytorch, is_table=True),
    "csv": Format(tables.write_csv, tables.run_csv, is_table=True),
    "json": Format(
        lambda plan, *_: iter([plan.to_json()]),
        lambda text, *_: Plan.from_json(text),
        is_table=True,
    ),
    "megatron": _trainer(megatron, megatron.write, _FALLING),
    "megatron_rampup": _trainer(megatron, megatron.write_ramp, _FALLING | _IGNORED),
    "levanter": _trainer(levanter, levanter.write),
    "maxtext": _trainer(maxtext, maxtext.write),
    "olmo_core": _trainer(olmo_core, olmo_core.write),
}
"""By the names that `bigbatch plan --emit` takes."""
