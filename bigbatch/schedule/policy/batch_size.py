"""Recipes that state their batch sizes: explicit stages and ramps.

Stages are written START:VALUE, separated by spaces; the first start is 0, the others have a unit:

>>> train = stages(0.1, "0:768 250k_examples:1536", train_examples=1_000_000)
>>> train.at([0.0, 0.24, 0.25]).batch_size.tolist()
[768.0, 768.0, 1536.0]

Where an example has a known number of tokens, starts and batch sizes may be given in them:

>>> text = "0:768 1B_tokens:3Mi_tokens"
>>> stages(0.1, text, train_examples=10**6, tokens_per_example=2048).at([0, 0.49]).batch_size
array([ 768., 1536.])
"""

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.durations import (
    NO_TOKENS,
    QUANTITY,
    first_example_from,
    in_any_unit,
    num_reached,
    quantity,
    size_in_examples,
)
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.policy.base import (
    Policy,
    Settings,
    StatedSize,
    check_base,
    with_learning_rate,
)

_STAGE = re.compile(rf"{QUANTITY}(?:_(epochs|examples|sequences|updates|tokens))?:(\S+)")
_ALLOWED = (
    "START:VALUE separated by spaces, the first START 0, the others rising and with a unit "
    "(60_epochs, 250k_examples, 1000_updates, 250B_tokens; k, M, B or G, T for thousands)"
)


class _Stage(NamedTuple):
    """A value, 0 where it cannot be read, and where it starts."""

    start: Fraction
    unit: str
    value: float
    text: str


def stages(
    learning_rate: float | str,
    batch_size: str,
    momentum: float = 0.0,
    *,
    train_examples: int | None = None,
    tokens_per_example: int | None = None,
) -> Policy:
    """A recipe in explicit stages.

    Args:
      learning_rate: a number, or its stages, such as "0:0.1 60_epochs:0.02".
      batch_size: its stages in examples, such as "0:768 250k_examples:1536", or in tokens,
        "0:2Mi_tokens 250B_tokens:4Mi_tokens". A stage starts with the first update at or after its
        start; updates are counted through the stages.
      momentum: heavy-ball coefficient.
      train_examples: N (context), which starts in examples, updates or tokens need.
      tokens_per_example: tokens of an example (context), which starts and sizes in tokens need.

    Raises:
      UserError: an argument is out of its range, or stages cannot be read or do not rise.
    """
    checks = Checks()
    stated = isinstance(learning_rate, str)
    check_base(checks, 1.0 if stated else learning_rate, 1, momentum)
    sizes = _read_sizes(checks, batch_size, tokens_per_example)
    text = learning_rate if stated else "0:1"
    rate_stages = _read(checks, "learning_rate", text, _number)
    checks.done()
    clock = _clock(checks, sizes, train_examples, tokens_per_example)
    starts = _starts(checks, "learning_rate", rate_stages, clock)
    values = np.array([stage.value if stated else learning_rate for stage in rate_stages])
    checks.require(bool(values.any()), "learning_rate", learning_rate, "a learning rate above 0")
    checks.done()
    last = int(np.flatnonzero(values)[-1])
    policy = with_learning_rate(
        lambda e: values[num_reached(starts[1:], e)],
        sizes[0].value,
        momentum,
        tuple(starts),
        math.inf if last == len(values) - 1 else starts[last + 1],
    )
    return _with_batch_stages(policy, sizes, clock)


def batch_stages(
    policy: Policy,
    batch_size: str,
    follow_rule: bool = False,
    *,
    train_examples: int | None = None,
    tokens_per_example: int | None = None,
) -> Policy:
    """Gives a policy explicit batch sizes, and leaves the rest of it as it is, or to its rule.

    The practice of large language models (PaLM: 1M, 2M, 4M tokens). It does not keep the noise
    scale: the stages are the recipe. With `follow_rule` each stage has the hyperparameters that the
    policy's rule gives its batch size (Merrill et al. 2025: the learning rate times sqrt(2) with
    each doubling, which every rule but the linear ones does).

    Args:
      policy: its own batch size is replaced.
      batch_size: as in `stages`.
      follow_rule: whether the hyperparameters follow the batch size.
      train_examples: N (context).
      tokens_per_example: tokens of an example (context).

    Raises:
      UserError: the stages cannot be read or do not rise.
    """
    checks = Checks()
    sizes = _read_sizes(checks, batch_size, tokens_per_example)
    checks.done()
    clock = _clock(checks, sizes, train_examples, tokens_per_example)
    checks.done()
    return _with_batch_stages(policy, sizes, clock, follow_rule)


@in_any_unit("ramp_epochs", updates=False)
def batch_ramp(
    policy: Policy, *, initial_batch_size: int, increment_examples: int, ramp_epochs: float
) -> Policy:
    """Raises the batch size in equal increments at the start, as GPT-3 did, over equal times.

    B(e) = initial + increment floor(e n / ramp) with n = (B - initial) / increment, then the
    policy's own B. The learning rate stays as it is: the ramp does not keep the noise scale.

    Args:
      policy: where the ramp ends; its batch size must not change before that.
      initial_batch_size: examples per update at the start.
      increment_examples: a whole share of the way up to the policy's batch size.
      ramp_epochs: when the policy's own batch size is reached.

    Raises:
      UserError: an argument is out of its range.
    """
    final = float(policy.at(0.0).batch_size[0])
    checks = Checks()
    checks.number("ramp_epochs", ramp_epochs, "a time above 0", above=0)
    allowed = f"a whole number of examples below the policy's batch size, {final:g}"
    good = checks.whole("initial_batch_size", initial_batch_size, allowed)
    good = good and checks.number("initial_batch_size", initial_batch_size, allowed, below=final)
    if checks.whole("increment_examples", increment_examples, "at least 1 example") and good:
        way = final - initial_batch_size
        nearest = way / max(1, round(way / increment_examples))
        checks.require(
            way % increment_examples == 0,
            "increment_examples",
            increment_examples,
            f"a whole share of the {way:g} examples from the first to the last batch size",
            int(nearest) if nearest == int(nearest) else None,
        )
    checks.done()
    steps = round((final - initial_batch_size) / increment_examples)
    starts = ramp_epochs * np.arange(1, steps + 1) / steps

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        reached = num_reached(starts, epochs)
        ramp = initial_batch_size + increment_examples * reached
        return Settings(np.where(reached < steps, ramp, batch_size), hyper)

    return dataclasses.replace(
        policy,
        settings_at=settings_at,
        turning_epochs=tuple(sorted({*policy.turning_epochs, float(ramp_epochs)})),
        stated_batch_sizes=(
            StatedSize("initial_batch_size", initial_batch_size, initial_batch_size),
            StatedSize("increment_examples", increment_examples, increment_examples),
            *policy.stated_batch_sizes,
        ),
    )


def _number(text: str) -> float | None:
    """A number without a sign; None if the text is none."""
    match = re.fullmatch(QUANTITY, text)
    return float(quantity(*match.groups())) if match else None


def _read(
    checks: Checks, field: str, text: object, value_of: Callable[[str], float | None]
) -> list[_Stage]:
    """The stages in the text, none if it cannot be read."""
    found = []
    for part in text.split() if isinstance(text, str) else []:
        match, value = _STAGE.fullmatch(part), None
        if match is not None:
            start, multiple, unit, text_of_value = match.groups()
            value = value_of(text_of_value)
        if match is None or value is None:
            checks.require(False, field, part, _ALLOWED)
            return []
        unit = (unit or "").replace("sequences", "examples")
        found.append(_Stage(quantity(start, multiple), unit, value, part))
    good = bool(found) and found[0].start == 0 and all(stage.unit for stage in found[1:])
    return found if checks.require(good, field, text, _ALLOWED) else []


def _read_sizes(checks: Checks, text: object, tokens_per_example: int | None) -> list[_Stage]:
    def size_of(text: str) -> float | None:
        found = Checks()
        size = size_in_examples(found, "batch_size", text, tokens_per_example)
        checks.problems += found.problems
        return 1.0 if size is None else float(size)

    return _read(checks, "batch_size", text, size_of)


class _Clock:
    """Converts starts to epochs; counts updates through the stages of batch size.

    Attributes:
      train_examples: N, or None where all starts are in epochs.
      tokens_per_example: or None where none is in tokens.
      stages: first update, first example and batch size of each stage.
    """

    def __init__(
        self, batch_size: float, train_examples: int | None, tokens_per_example: int | None
    ):
        self.train_examples, self.tokens_per_example = train_examples, tokens_per_example
        self.stages = [(0, 0, int(batch_size))]

    def epoch(self, stage: _Stage) -> Fraction:
        """Where the stage starts."""
        if stage.unit in ("", "epochs") or self.train_examples is None:
            return stage.start
        example = stage.start
        if stage.unit == "updates":
            first_update, first_example, size = [s for s in self.stages if s[0] <= stage.start][-1]
            example = first_example + (stage.start - first_update) * size
        elif stage.unit == "tokens":
            example /= self.tokens_per_example or 1
        return example / self.train_examples

    def add(self, stage: _Stage) -> None:
        """Adds the next stage of batch size."""
        if self.train_examples is None:
            return
        update, example, size = self.stages[-1]
        start = first_example_from(float(self.epoch(stage)), self.train_examples)
        updates = -(-(start - example) // size)
        self.stages.append((update + updates, example + updates * size, int(stage.value)))


def _clock(
    checks: Checks, sizes: list[_Stage], train_examples: int | None, tokens_per_example: int | None
) -> _Clock:
    clock = _Clock(sizes[0].value, train_examples, tokens_per_example)
    _starts(checks, "batch_size", sizes, clock, add=True)
    return clock


def _starts(
    checks: Checks, field: str, stages: list[_Stage], clock: _Clock, add: bool = False
) -> list[float]:
    """Where the stages start, in epochs."""
    starts = [Fraction(0)]
    for stage in stages[1:]:
        if stage.unit != "epochs" and clock.train_examples is None:
            allowed = f"the number of training examples, which {field} needs for {stage.text!r}"
            checks.require(False, "train_examples", "nothing", allowed)
            break
        if stage.unit == "tokens" and not clock.tokens_per_example:
            checks.require(False, field, stage.text, NO_TOKENS)
            break
        starts.append(clock.epoch(stage))
        if not checks.require(starts[-1] > starts[-2], field, stage.text, _ALLOWED):
            break
        if add:
            clock.add(stage)
    return [float(start) for start in starts]


def _with_batch_stages(
    policy: Policy, sizes: list[_Stage], clock: _Clock, follow_rule: bool = False
) -> Policy:
    starts = [float(clock.epoch(stage)) for stage in sizes]
    values = np.array([stage.value for stage in sizes])

    def settings_at(epochs: Array) -> Settings:
        before, hyper = policy.at(epochs)
        stated = values[num_reached(starts[1:], epochs)]
        return Settings(stated, policy.rule.move(hyper, before, stated) if follow_rule else hyper)

    return dataclasses.replace(
        policy,
        settings_at=settings_at,
        turning_epochs=tuple(sorted({*policy.turning_epochs, *starts})),
        stated_batch_sizes=tuple(
            StatedSize("batch_size", int(size), size) for size in values.tolist()
        ),
    )
