"""A run that others made against a plan: where it differs, by how much, and what that looks like.

Faults are recognised by what they would have made of the plan: for each that is known there is the
column that it would leave in the log. One that explains a whole column is named.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.trainers.log import PRESETS, Column, Preset


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def findings(plan: Plan, log: Mapping[str, Column], preset: str, first_update: int) -> list[str]:
    """What differs from the plan, in sentences; none where nothing does.

    Args:
      plan: what was to be.
      log: what was, from `read_log`.
      preset: that it was read with.
      first_update: the log's number of the first update.
    """
    meaning, last = PRESETS[preset], plan.num_updates - 1
    updates = log["update"].values.astype(np.int64) - first_update
    inside = (updates >= 0) & (updates <= last)
    at = updates[inside]
    columns = {name: Column(c.values[inside], c.tolerance[inside]) for name, c in log.items()}
    planned = {"batch_size": plan.batch_sizes.astype(np.float64), **plan.hypers}
    own = _own_positions(plan, at, columns)
    differing: dict[str, _Case] = {}
    for name in ("batch_size", "learning_rate", "momentum"):
        if name in columns:
            offset = int(meaning.next_rate and name == "learning_rate")
            # Where the update starts of which this is the setting.
            starts = own + offset * columns["batch_size"].values if "batch_size" in columns else own
            case = _Case(plan, planned[name], at + offset, *columns[name], starts)
            if not case.fits(case.shifted(0)):
                differing[name] = case
    for by, word in ((-1, "before"), (1, "after")):
        if len(differing) > 1 and all(case.fits(case.shifted(by)) for case in differing.values()):
            names = " and ".join(name.replace("_", " ") for name in differing)
            return [
                f"{names} are those of the update {word}: off by one; does the log count its "
                f"updates from {first_update - by} (--first-update)?"
            ]
    said = []
    for name, case in differing.items():
        causes = _CAUSES[name](case)
        cause = next((words for words, column in causes if case.fits(column)), "")
        # What follows from the batch size has been told with that.
        if cause != _FOLLOWS:
            said.append(f"{name.replace('_', ' ')}: {case.first()}{cause and '; '}{cause}")
    said += _of_positions(plan, at, columns, meaning)
    said += _of_epochs(plan, at, columns, own, meaning)
    if not (said or inside.all()):
        said.append(
            f"update {updates[~inside][0]:,} is none of the plan's {plan.num_updates:,}, from 0; "
            f"does the log count from another number than {first_update} (--first-update)?"
        )
    return said


_FOLLOWS = "follows from the batch size"
_LATE, _EARLY = "one update late (off by one)", "one update early (off by one)"
Causes = Iterator[tuple[str, Array]]


class _Case(NamedTuple):
    """A column that is to be explained.

    Attributes:
      plan: what was to be.
      planned: its column, one value an update.
      at: the updates whose settings were logged.
      values: what was logged.
      tolerance: of the values.
      own: where these updates started, as the log itself has it.
    """

    plan: Plan
    planned: Array
    at: NDArray[np.int64]
    values: Array
    tolerance: Array
    own: Array

    def shifted(self, by: int) -> Array:
        return self.planned[np.clip(self.at + by, 0, len(self.planned) - 1)]

    def constant(self, value: float) -> Array:
        return np.full(len(self.at), value)

    def fits(self, column: Array) -> bool:
        return bool((np.abs(self.values - column) <= self.tolerance + 1e-30).all())

    def here(self, planned: Array) -> Array:
        """A column at the log's own positions; between two updates the nearer of theirs."""
        i = np.searchsorted(self.plan.first_examples, self.own, side="right") - 1
        one, other = planned[i], planned[np.minimum(i + 1, len(planned) - 1)]
        return np.where(np.abs(self.values - one) <= np.abs(self.values - other), one, other)

    def near(self, place: Array, grid: Array) -> Array:
        """The plan's curve there, or what was logged where both lie within one update."""
        steps = np.abs(np.diff(self.planned, append=2 * self.planned[-1] - self.planned[-2:-1]))
        i = np.clip(np.searchsorted(grid, place, side="right") - 1, 0, len(grid) - 1)
        slack = 1.01 * np.maximum(steps[i], steps[np.maximum(i - 1, 0)])
        found = np.interp(place, grid, self.planned)
        return np.where(np.abs(self.values - found) <= slack, self.values, found)

    def first(self) -> str:
        """The first difference in words."""
        expected = self.shifted(0)
        bad = int(np.argmax(np.abs(self.values - expected) > self.tolerance + 1e-30))
        update = min(int(self.at[bad]), self.plan.num_updates - 1)
        was, planned = self.values[bad], expected[bad]
        ratio = f", {was / planned - 1:+.3%}" if planned else ""
        place = f"from update {update:,} on, example {self.plan.first_examples[update]:,}"
        return f"{place}: {was:.9g}, planned {planned:.9g}{ratio}"


def _of_batch(case: _Case) -> Causes:
    sizes, known = case.planned, case.values[np.abs(case.values) < 2**53]
    yield "the ramp is ignored: the last batch size throughout", case.constant(sizes[-1])
    yield "the first stage is held for ever", case.constant(sizes[0])
    yield f"it changes {_LATE}", case.shifted(-1)
    yield f"it changes {_EARLY}", case.shifted(1)
    yield from _in_another_unit(case.values, case.shifted(0), "tokens or another unit")
    unit = int(np.gcd.reduce(known.astype(np.int64))) if known.size else 0
    for ranks in (ranks for ranks in range(unit, 1, -1) if unit % ranks == 0):
        for word, rounded in (("down", sizes // ranks), ("up", -(-sizes // ranks))):
            yield f"rounded {word} to what {ranks} ranks divide", case.here(rounded * ranks)


def _of_rate(case: _Case) -> Causes:
    plan, values, rates, at = case.plan, case.values, case.planned, case.at
    firsts = plan.first_examples.astype(np.float64)
    yield _LATE, case.shifted(-1)
    yield _EARLY, case.shifted(1)
    if not np.array_equal(case.own, np.r_[firsts, plan.num_examples][at]):
        yield _FOLLOWS, case.near(case.own, firsts)
    yield "it is not moved", case.constant(rates[0])
    yield from _in_another_unit(values, case.shifted(0), "another unit, or scaled once for all")
    peak, most = int(np.argmax(values)), rates.max()
    if peak > 1 and values[peak] > values[0]:
        # One line over the updates, and then the plan's.
        line = values[0] + (values[peak - 1] - values[0]) * (at - at[0]) / (at[peak - 1] - at[0])
        top = max(at[peak], int(np.argmax(rates >= most * (1 - 1e-9))))
        past = np.where(at <= top, values, case.shifted(0))
        warm = np.where((at <= at[peak]) & (line <= most), line, past)
        yield "the warm-up is counted in updates, not in examples", warm
    size, every = float(plan.batch_sizes[0]), np.arange(len(rates) * 1.0)
    for grid, clock, end in (
        (every, at * 1.0, 1.0),
        (every, case.own / size, plan.num_examples / size / len(rates)),
        (firsts, at * size, len(rates) * size / plan.num_examples),
    ):
        yield from _on_another_clock(case, grid, clock, end)


def _on_another_clock(case: _Case, grid: Any, clock: Any, end: float) -> Causes:
    """The plan's curve at another speed of a clock that has that share of it at the plan's end."""
    values, rates = case.values, case.planned
    most, least = rates.max(), rates.min()
    top = int(np.flatnonzero(rates >= most * (1 - 1e-9))[-1])
    inside = np.flatnonzero((values < most * (1 - 1e-6)) & (values > least) & (clock > 0))
    inside = inside[inside > np.argmax(values)]
    if inside.size:
        # The speed is told by an update in the midst of the decay.
        one = inside[int(np.argmin(np.abs(values[inside] - (most + least) / 2)))]
        speed = float(np.interp(-values[one], -rates[top:], grid[top:])) / clock[one]
        if grid[-1] == len(rates) - 1 and round(speed) > 1:
            words = f"it is counted in microsteps, {round(speed)} an update"
            yield words, case.near(round(speed) * clock, grid)
        share = speed * end
        words = f"stretched {1 / share:.3g}" if share < 1 else f"run through {share:.3g}"
        words = f"it is {words} times {'as long' if share < 1 else 'as fast'}: counted in updates"
        yield f"{words}, or with another total", case.near(speed * clock, grid)


def _of_momentum(case: _Case) -> Causes:
    yield _FOLLOWS, case.here(case.planned)
    yield "it is not moved", case.constant(case.planned[0])
    yield f"it moves {_LATE}", case.shifted(-1)
    yield f"it moves {_EARLY}", case.shifted(1)


_CAUSES = {"batch_size": _of_batch, "learning_rate": _of_rate, "momentum": _of_momentum}


def _in_another_unit(values: Array, expected: Array, words: str) -> Causes:
    ratios = values / expected
    ratio = float(np.median(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else 1.0
    yield f"it is {ratio:.6g} times the plan's throughout: {words}", expected * ratio


def _own_positions(plan: Plan, at: Any, columns: Mapping[str, Column]) -> Array:
    """Where the logged updates started, by their own batch sizes where all are there."""
    if "batch_size" in columns and np.array_equal(at, np.arange(len(at))):
        return np.cumsum(columns["batch_size"].values) - columns["batch_size"].values
    return plan.first_examples[at] * 1.0


def _of_positions(
    plan: Plan, at: Any, columns: Mapping[str, Column], meaning: Preset
) -> Iterator[str]:
    if "examples" not in columns:
        return
    column, after = columns["examples"], int(meaning.at_end)
    bounds = np.r_[plan.first_examples, plan.num_examples] * 1.0
    expected = bounds[at + after]
    if (np.abs(column.values - expected) <= column.tolerance).all():
        return
    for words, then in (
        (f"{_EARLY}, as if counted after the update", bounds[np.minimum(at + 1, plan.num_updates)]),
        (f"{_LATE}, as if counted before the update", bounds[np.maximum(at + after - 1, 0)]),
        *_in_another_unit(column.values, expected, "tokens or another unit"),
    ):
        if (np.abs(column.values - then) <= column.tolerance).all():
            yield f"position: {words}"
            return
    taken = np.diff(expected)
    sizes = columns.get("batch_size")
    if sizes is not None and (np.diff(at) == 1).all():
        taken = sizes.values[after:][: len(taken)] if after else sizes.values[:-1]
    jumps = np.diff(column.values) - taken
    bad = np.flatnonzero(np.abs(jumps) > column.tolerance[1:] + column.tolerance[:-1])
    if bad.size:
        jump, update = jumps[bad[0]], at[bad[0] + 1]
        what = "are repeated" if jump < 0 else "are passed over"
        yield f"position: {abs(jump):,.0f} examples {what} at update {update:,}, as after a resume"
    elif abs(column.values[0] - expected[0]) > column.tolerance[0]:
        yield f"position: {column.values[0]:,.0f} at update {at[0]:,}, planned {expected[0]:,.0f}"


def _of_epochs(
    plan: Plan, at: Any, columns: Mapping[str, Column], own: Array, meaning: Preset
) -> Iterator[str]:
    if "epoch" not in columns:
        return
    epochs = np.floor(columns["epoch"].values + 1e-9)
    turned = np.flatnonzero(np.diff(epochs) > 0)
    if meaning.at_end or not turned.size or (np.diff(at) != 1).any():
        return
    first = turned[0] + 1
    seen, size = own[first], own[first] - own[first - 1]
    short = plan.train_examples * epochs[first] - seen
    if short >= size:
        yield (
            f"epoch: it is cut short: {seen:,.0f} of {plan.train_examples:,} examples, at update "
            f"{at[first]:,}"
        )
    elif short > 0:
        yield (
            f"epoch: its last partial batch, {short:,.0f} of {plan.train_examples:,} examples, is "
            f"dropped before update {at[first]:,}"
        )
