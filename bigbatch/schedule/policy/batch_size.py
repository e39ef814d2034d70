"""Recipes that state their batch sizes: explicit stages and ramps.

Stages are written START:VALUE, separated by spaces; the first start is 0, the others have a unit:

>>> train = stages(0.1, "0:768 250k_examples:1536", train_examples=1_000_000)
>>> train.at([0.0, 0.24, 0.25]).batch_size.tolist()
[768.0, 768.0, 1536.0]
"""

import dataclasses
import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.durations import first_example_from, in_any_unit, num_reached
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.policy.base import (
    Policy,
    Settings,
    StatedSize,
    check_base,
    with_learning_rate,
)

_NUMBER = r"(\d*\.?\d+(?:e[-+]?\d\d?)?)"
_STAGE = re.compile(rf"{_NUMBER}([kMGT]?)(?:_(epochs|examples|updates))?:{_NUMBER}")
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ALLOWED = (
    "START:VALUE separated by spaces, the first START 0, the others rising and with a unit "
    "(60_epochs, 250k_examples, 1000_updates; k, M, G, T for thousands)"
)


class _Stage(NamedTuple):
    """A value and where it starts."""

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
) -> Policy:
    """A recipe in explicit stages.

    Args:
      learning_rate: a number, or its stages, such as "0:0.1 60_epochs:0.02".
      batch_size: its stages in examples, such as "0:768 250k_examples:1536". A stage starts with
        the first update at or after its start; updates are counted through the stages.
      momentum: heavy-ball coefficient.
      train_examples: N (context), which starts in examples or updates need.

    Raises:
      UserError: an argument is out of its range, or stages cannot be read or do not rise.
    """
    checks = Checks()
    stated = isinstance(learning_rate, str)
    check_base(checks, 1.0 if stated else learning_rate, 1, momentum)
    sizes = _read_sizes(checks, batch_size)
    text = learning_rate if stated else "0:1"
    rate_stages = _read(checks, "learning_rate", text)
    checks.done()
    clock = _clock(checks, sizes, train_examples)
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


def batch_stages(policy: Policy, batch_size: str, *, train_examples: int | None = None) -> Policy:
    """Gives a policy explicit batch sizes and leaves its learning rate as it is.

    The practice of large language models (PaLM: 1M, 2M, 4M tokens). It does not keep the noise
    scale: the stages are the recipe.

    Args:
      policy: its own batch size is replaced.
      batch_size: as in `stages`.
      train_examples: N (context).

    Raises:
      UserError: the stages cannot be read or do not rise.
    """
    checks = Checks()
    sizes = _read_sizes(checks, batch_size)
    checks.done()
    clock = _clock(checks, sizes, train_examples)
    checks.done()
    return _with_batch_stages(policy, sizes, clock)


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


def _read(checks: Checks, field: str, text: object) -> list[_Stage]:
    """The stages in the text, none if it cannot be read."""
    found = []
    for part in text.split() if isinstance(text, str) else []:
        match = _STAGE.fullmatch(part)
        if match is None:
            checks.require(False, field, part, _ALLOWED)
            return []
        start, thousands, unit, value = match.groups()
        exact = Fraction(start) * _THOUSANDS[thousands]
        found.append(_Stage(exact, unit or "", float(value), part))
    good = bool(found) and found[0].start == 0 and all(stage.unit for stage in found[1:])
    return found if checks.require(good, field, text, _ALLOWED) else []


def _read_sizes(checks: Checks, text: object) -> list[_Stage]:
    sizes = _read(checks, "batch_size", text)
    for stage in sizes:
        whole = stage.value >= 1 and stage.value.is_integer()
        allowed = "a whole number of examples, at least 1, after the colon"
        checks.require(whole, "batch_size", stage.text, allowed)
    return sizes


class _Clock:
    """Converts starts to epochs; counts updates through the stages of batch size.

    Attributes:
      train_examples: N, or None where all starts are in epochs.
      stages: first update, first example and batch size of each stage.
    """

    def __init__(self, batch_size: float, train_examples: int | None):
        self.train_examples = train_examples
        self.stages = [(0, 0, int(batch_size))]

    def epoch(self, stage: _Stage) -> Fraction:
        """Where the stage starts."""
        if stage.unit in ("", "epochs") or self.train_examples is None:
            return stage.start
        example = stage.start
        if stage.unit == "updates":
            first_update, first_example, size = [s for s in self.stages if s[0] <= stage.start][-1]
            example = first_example + (stage.start - first_update) * size
        return example / self.train_examples

    def add(self, stage: _Stage) -> None:
        """Adds the next stage of batch size."""
        if self.train_examples is None:
            return
        update, example, size = self.stages[-1]
        start = first_example_from(float(self.epoch(stage)), self.train_examples)
        updates = -(-(start - example) // size)
        self.stages.append((update + updates, example + updates * size, int(stage.value)))


def _clock(checks: Checks, sizes: list[_Stage], train_examples: int | None) -> _Clock:
    clock = _Clock(sizes[0].value, train_examples)
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
        starts.append(clock.epoch(stage))
        if not checks.require(starts[-1] > starts[-2], field, stage.text, _ALLOWED):
            break
        if add:
            clock.add(stage)
    return [float(start) for start in starts]


def _with_batch_stages(policy: Policy, sizes: list[_Stage], clock: _Clock) -> Policy:
    starts = [float(clock.epoch(stage)) for stage in sizes]
    values = np.array([stage.value for stage in sizes])

    def settings_at(epochs: Array) -> Settings:
        return Settings(values[num_reached(starts[1:], epochs)], policy.at(epochs).hyper)

    return dataclasses.replace(
        policy,
        settings_at=settings_at,
        turning_epochs=tuple(sorted({*policy.turning_epochs, *starts})),
        stated_batch_sizes=tuple(
            StatedSize("batch_size", int(size), size) for size in values.tolist()
        ),
    )
