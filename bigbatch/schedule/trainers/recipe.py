"""What another trainer does with the schedule it is given, as a policy and as a plan.

All of those read here take their batch size from a table of stages. The learning rate they take
from a curve over the examples seen, or over the updates done.
"""

import ast
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks, is_number, text_of
from bigbatch.errors import Problem, UserError, among
from bigbatch.schedule.durations import MOST_UPDATES
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy, Settings, StatedSize


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A schedule as its trainer carries it out.

    Attributes:
      starts_examples: from which position on a batch size holds, rising from 0.
      batch_sizes: examples of an update, one a start.
      rate: learning rates of float64[n] positions, updates and batch sizes. Updates are those of
        the stages as they are written.
      end_examples: the run ends with the first update that reaches it.
      turning_examples: where the learning rate may have a local maximum, beside the starts.
      momentum: heavy-ball coefficient.
      leaves_last_out: whether an update that would go past the end is not made.
    """

    starts_examples: list[int]
    batch_sizes: list[int]
    rate: Callable[[Array, Array, Array], Array]
    end_examples: int
    turning_examples: float = 0.0
    momentum: float = 0.0
    leaves_last_out: bool = False

    def at(self, positions: Array) -> Settings:
        """The settings of updates that start at whole positions, float64[n]."""
        starts, sizes = np.array(self.starts_examples), np.array(self.batch_sizes, np.float64)
        first_updates = np.r_[0.0, np.cumsum(np.ceil(np.diff(starts) / sizes[:-1]))]
        stage = np.searchsorted(starts, positions, side="right") - 1
        updates = first_updates[stage] + (positions - starts[stage]) // sizes[stage]
        rates = np.asarray(self.rate(positions, updates, sizes[stage]), np.float64)
        momentum = np.full(positions.shape, self.momentum)
        return Settings(sizes[stage], {"learning_rate": rates, "momentum": momentum})

    def policy(self, train_examples: int) -> Policy:
        """As a policy over epochs of a training set."""
        turning = sorted({*self.starts_examples, self.turning_examples})
        end = self.at(np.array([float(self.end_examples)])).hyper["learning_rate"][0]
        return Policy(
            # A position's epoch is p / N, rounded; p is whole.
            lambda epochs: self.at(np.rint(epochs * train_examples)),
            tuple(time / train_examples for time in turning if time < self.end_examples),
            math.inf if end else self.end_examples / train_examples,
            tuple(StatedSize("batch_size", size, size) for size in dict.fromkeys(self.batch_sizes)),
        )

    def plan(self, train_examples: int) -> Plan:
        """The whole run, as long as its trainer makes it."""
        counts, position, end = [], 0, self.end_examples
        for size, stop in zip(self.batch_sizes, [*self.starts_examples[1:], end], strict=True):
            counts.append(max(0, -(-(min(stop, end) - position) // size)))
            position += counts[-1] * size
        checks, most = Checks(), f"a run of at most {MOST_UPDATES:,} updates"
        checks.require(sum(counts) <= MOST_UPDATES, "updates", sum(counts), most, MOST_UPDATES)
        checks.done()
        sizes = np.repeat(np.array(self.batch_sizes, np.int64), counts)
        if self.leaves_last_out and position > end and len(sizes) > 1:
            sizes = sizes[:-1]
        hypers = self.at(np.cumsum(sizes) - sizes * 1.0).hyper
        return Plan(train_examples, end / train_examples, "linear", sizes, hypers)


# How much of a decay is left, by the share of it that is done.
_LEFT: dict[str, Callable[[Array], Array]] = {
    "constant": np.ones_like,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (np.cos(np.pi * done) + 1.0),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "minus_sqrt": lambda done: 1.0 - np.sqrt(done),
}


def course(
    times: Array,
    style: str,
    peak: Any,
    first: float,
    floor: Any,
    at: tuple[float, float, float],
    most: float = 1.0,
) -> Array:
    """A learning rate that rises on a line, holds, and decays.

    Args:
      times: in the trainer's unit.
      style: of the decay.
      peak: the largest, float64[n] or one for all.
      first: that of time 0.
      floor: that of the decay's end, likewise.
      at: the times at which the rise ends, the decay starts, and the decay ends.
      most: the share of the decay at which it stops.
    """
    warmup, start, end = at
    done = np.minimum(np.maximum(times - start, 0) / (end - start or 1), most)
    rising = first + (peak - first) * times / (warmup or 1)
    # A decay may begin before the rise has ended, which then holds to its last update.
    is_rising = (times <= warmup) & (warmup > 0)
    return np.where(is_rising, rising, floor + (peak - floor) * _LEFT[style](done))


def in_updates(
    starts: list[int], sizes: list[int], num_updates: int, warmup: int, rate: Any
) -> Recipe:
    """The recipe whose stages, length and warm-up are counted in updates."""

    def examples(updates: int) -> int:
        bounds = zip(starts, [*starts[1:], updates], sizes, strict=True)
        return sum(size * max(0, min(end, updates) - start) for start, end, size in bounds)

    made = [start for start in starts if start < num_updates]
    at, end = [examples(start) for start in made], examples(num_updates)
    return Recipe(at, sizes[: len(made)], rate, end, examples(max(warmup, 1)))


def tree_of(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A config's values: a mapping, a Python literal, YAML or JSON as a text, or the path of such.

    Raises:
      UserError: it is none of them.
    """
    import yaml

    value: Any = config
    try:
        if isinstance(value, str):
            with contextlib.suppress(SyntaxError, ValueError):
                value = ast.literal_eval(value)
        if isinstance(value, str):
            value = yaml.safe_load(value)
        # A text that is no group of fields is a path.
        if isinstance(value, str):
            value = yaml.safe_load(text_of(value))
    except (OSError, ValueError, RecursionError, MemoryError, yaml.YAMLError) as error:
        value = f"{config} ({error})"
    if not isinstance(value, Mapping):
        allowed = "a group of fields: a mapping, its YAML or JSON, or the path of such a file"
        raise UserError(Problem("config", value, allowed))
    return dict(value)


Known = Mapping[str, tuple[Any, Any]]
"""The fields that a format has: kind and default by name. A kind is `int`, `float`, a tuple of
the values allowed, or any type; a default of ... says that the field is required."""


def fields(checks: Checks, given: Any, known: Known, where: str = "") -> dict[str, Any]:
    """The fields of one group, by name, the defaults filled in.

    Args:
      checks: gets a problem for each field that is unknown, missing, or of the wrong kind.
      given: values as they stand in the file; None counts as not given.
      known: the fields that there are.
      where: what stands before the name of a field.
    """
    values = {name: None if default is ... else default for name, (_, default) in known.items()}
    group = where.strip(".-")
    if not checks.require(isinstance(given, Mapping), group, given, "a group of fields"):
        return values
    required = {name: None for name, (_, default) in known.items() if default is ...}
    for name, value in (required | dict(given)).items():
        fields = among(name, known, "the fields of a schedule alone: ")
        is_known = checks.require(name in known, f"{where}{name}", value, *fields)
        if is_known and not (value is None and name not in required):
            values[name], *words = _as_kind(value, known[name][0])
            told = "nothing" if value is None else value
            checks.require(values[name] is not None, f"{where}{name}", told, *words)
    return values


def _as_kind(value: Any, kind: Any) -> tuple[Any, ...]:
    """The value, None if it is of another kind; what is allowed, and perhaps the nearest of it."""
    if isinstance(kind, tuple):
        return value if value in kind else None, *among(value, map(str, kind))
    if kind not in (int, float):
        words = f"a value of type {getattr(kind, '__name__', kind)}"
        return value if isinstance(value, kind) else None, words
    words = "a whole number from 0 on" if kind is int else "a number from 0 on"
    try:
        # YAML takes 1e-3 for a text; a flag is always one.
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None, words
    if not is_number(number) or number < 0 or math.isinf(number):
        return None, words
    if kind is float:
        return float(number), words
    whole = int(str(value)) if str(value).isdecimal() else round(number)
    return whole if whole == number else None, words, whole


def check_stages(checks: Checks, field: str, starts: list[Any], sizes: list[Any]) -> None:
    """Ends the checks, with a problem unless the starts rise from 0 and the sizes are sizes."""
    rising = starts[:1] == [0] and all(a < b for a, b in itertools.pairwise([*starts, 2**53]))
    nearest = sorted({0, *(start for start in starts if 0 < start < 2**53)})
    checks.require(rising, field, starts, "starts that rise from 0 to below 2^53", nearest)
    sized = all(1 <= size <= 2**53 for size in sizes)
    checks.require(sized, field, sizes, "batch sizes of at least 1 example")
    checks.done()
