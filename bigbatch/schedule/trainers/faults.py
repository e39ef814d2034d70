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
    meaning = PRESETS[preset]
    updates = log["update"].values - first_update
    inside = (updates >= 0) & (updates < plan.num_updates)
    at = updates[inside].astype(np.int64)
    columns = {name: Column(c.values[inside], c.tolerance[inside]) for name, c in log.items()}
    own = plan.first_examples[at].astype(np.float64)
    sizes = plan.batch_sizes[at].astype(np.float64)
    if "batch_size" in columns:
        sizes = columns["batch_size"].values
        # By their own sizes where all are there.
        if np.array_equal(at, np.arange(len(at))) and np.isfinite(sizes).all():
            own = np.cumsum(sizes) - sizes
    bounds = np.r_[plan.first_examples, plan.num_examples] * 1.0
    planned = {"batch_size": plan.batch_sizes * 1.0, **plan.hypers, "examples": bounds}
    ahead = {"learning_rate": meaning.next_rate, "examples": meaning.at_end}
    differing: dict[str, _Case] = {}
    for name in ("batch_size", "learning_rate", "momentum", "examples"):
        if name in columns:
            offset = int(ahead.get(name, False))
            # Where the update starts of which this is the setting.
            starts = own + offset * sizes
            case = _Case(plan, name, planned[name], at + offset, *columns[name], starts)
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
        cause = next((words for words, column in _causes(case) if case.fits(column)), "")
        # What follows from the batch size has been told with that.
        if cause != _FOLLOWS:
            told = {"examples": "position"}.get(name, name.replace("_", " "))
            said.append(f"{told}: {case.first()}{cause and '; '}{cause}")
    said += _of_epochs(plan, at, columns, own, meaning)
    if not (said or inside.all()):
        said.append(
            f"update {updates[~inside][0]:,.0f} is none of the plan's {plan.num_updates:,}, from 0;"
            f" does the log count from another number than {first_update} (--first-update)?"
        )
    return said


_FOLLOWS = "follows from the batch size"
Causes = Iterator[tuple[str, Array]]


class _Case(NamedTuple):
    """A column that is to be explained.

    Attributes:
      plan: what was to be.
      name: of the column.
      planned: the plan's, one value an update.
      at: the updates whose settings were logged.
      values: what was logged; NaN fits everything.
      tolerance: of the values.
      own: where these updates started, as the log itself has it.
    """

    plan: Plan
    name: str
    planned: Array
    at: NDArray[np.int64]
    values: Array
    tolerance: Array
    own: Array

    def shifted(self, by: int) -> Array:
        return self.planned[np.clip(self.at + by, 0, len(self.planned) - 1)]

    def fits(self, column: Any) -> bool:
        return not _differ(self.values, column, self.tolerance).any()

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
        bad = int(np.argmax(_differ(self.values, expected, self.tolerance)))
        update = min(int(self.at[bad]), self.plan.num_updates - 1)
        was, planned = self.values[bad], expected[bad]
        ratio = f", {was / planned - 1:+.3%}" if planned else ""
        place = f"from update {update:,} on, example {self.plan.first_examples[update]:,}"
        return f"{place}: {was:.9g}, planned {planned:.9g}{ratio}"


def _differ(values: Array, expected: Any, tolerance: Array) -> NDArray[np.bool_]:
    return np.abs(values - expected) > tolerance + 1e-30


def _causes(case: _Case) -> Causes:
    """What is known of columns, each with what it would have made of this one."""
    planned, is_batch, is_position = (
        case.planned,
        case.name == "batch_size",
        case.name == "examples",
    )
    firsts = case.plan.first_examples.astype(np.float64)
    if is_batch:
        yield "the ramp is ignored: the last batch size throughout", planned[-1]
        yield "the first stage is held for ever", planned[0]
    elif not np.array_equal(case.own, np.r_[firsts, case.plan.num_examples][case.at]):
        yield _FOLLOWS, case.own if is_position else case.near(case.own, firsts)
    late = early = "it changes"
    if is_position:
        late, early = "as if counted before the update,", "as if counted after the update,"
    yield f"{late} one update late (off by one)", case.shifted(-1)
    yield f"{early} one update early (off by one)", case.shifted(1)
    is_one = is_batch or is_position
    unit = "tokens or another unit" if is_one else "another unit, or scaled once for all"
    yield from _in_another_unit(case.values, case.shifted(0), unit)
    if is_batch:
        yield from _rounded(case, firsts)
    elif is_position:
        yield from _resumed(case)
    else:
        yield "it is not moved", planned[0]
    if case.name == "learning_rate":
        yield from _on_other_clocks(case, firsts)


def _resumed(case: _Case) -> Causes:
    """Examples that are repeated or passed over at one update."""
    jumps = np.diff(case.values) - np.diff(case.own)
    bad = np.flatnonzero(np.abs(jumps) > case.tolerance[1:] + case.tolerance[:-1])
    if bad.size:
        what = "are repeated" if jumps[bad[0]] < 0 else "are passed over"
        yield f"{abs(jumps[bad[0]]):,.0f} examples {what} there, as after a resume", case.values


def _in_another_unit(values: Array, expected: Array, words: str) -> Causes:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values / expected
    ratio = float(np.median(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else 1.0
    yield f"it is {ratio:.6g} times the plan's throughout: {words}", expected * ratio


def _rounded(case: _Case, firsts: Array) -> Causes:
    """Batch sizes rounded for ranks; between two updates the nearer of theirs."""
    known = case.values[np.abs(case.values) < 2**53].astype(np.int64)
    unit = int(np.gcd.reduce(known)) if known.size else 0
    i = np.searchsorted(firsts, case.own, side="right") - 1
    for ranks in (ranks for ranks in range(min(unit, 2**16), 1, -1) if unit % ranks == 0):
        for word, rounded in (("down", case.planned // ranks), ("up", -(-case.planned // ranks))):
            one, other = (ranks * rounded[np.minimum(i + k, len(firsts) - 1)] for k in (0, 1))
            nearer = np.abs(case.values - one) <= np.abs(case.values - other)
            yield f"rounded {word} to what {ranks} ranks divide", np.where(nearer, one, other)


def _on_other_clocks(case: _Case, firsts: Array) -> Causes:
    """Learning rates over updates, microsteps, or at another speed."""
    plan, values, rates, at = case.plan, case.values, case.planned, case.at
    peak, most, least = int(np.nanargmax(values)), rates.max(), rates.min()
    last = int(np.flatnonzero(rates >= most * (1 - 1e-9))[-1])
    if peak > 1 and values[peak] > values[0]:
        # One line over the updates, and then the plan's.
        line = values[0] + (values[peak - 1] - values[0]) * (at - at[0]) / (at[peak - 1] - at[0])
        top = max(at[peak], int(np.argmax(rates >= most * (1 - 1e-9))))
        past = np.where(at <= top, values, case.shifted(0))
        warm = np.where((at <= at[peak]) & (line <= most), line, past)
        yield "the warm-up is counted in updates, not in examples", warm
    size, every = float(plan.batch_sizes[0]), np.arange(len(rates) * 1.0)
    # Each clock of the log beside the plan's, and how much of the latter an end at 1 would be.
    for grid, clock, end in (
        (every, at * 1.0, 1.0),
        (every, case.own / size, plan.num_examples / size / len(rates)),
        (firsts, at * size, len(rates) * size / plan.num_examples),
    ):
        inside = np.flatnonzero((values < most * (1 - 1e-6)) & (values > least) & (clock > 0))
        inside = inside[inside > peak]
        if inside.size:
            # The speed is told by an update in the midst of the decay.
            one = inside[int(np.argmin(np.abs(values[inside] - (most + least) / 2)))]
            speed = float(np.interp(-values[one], -rates[last:], grid[last:])) / clock[one]
            if grid is every and round(speed) > 1:
                words = f"it is counted in microsteps, {round(speed)} an update"
                yield words, case.near(round(speed) * clock, grid)
            share = speed * end
            words = f"stretched {1 / share:.3g}" if share < 1 else f"run through {share:.3g}"
            words = f"it is {words} times {'as long' if share < 1 else 'as fast'}"
            near = case.near(speed * clock, grid)
            yield f"{words}: counted in updates, or with another total", near


def _of_epochs(
    plan: Plan, at: Any, columns: Mapping[str, Column], own: Array, meaning: Preset
) -> Iterator[str]:
    epochs = np.floor(columns["epoch"].values + 1e-9) if "epoch" in columns else np.zeros(1)
    turned = np.flatnonzero(np.diff(epochs) > 0)
    if meaning.at_end or not turned.size or (np.diff(at) != 1).any():
        return
    first = turned[0] + 1
    seen, size = own[first], own[first] - own[first - 1]
    total, update = plan.train_examples, at[first]
    short = total * epochs[first] - seen
    if short >= size:
        yield f"epoch: it is cut short: {seen:,.0f} of {total:,} examples, at update {update:,}"
    elif short > 0:
        yield (
            f"epoch: its last partial batch, {short:,.0f} of {total:,} examples, is dropped before "
            f"update {update:,}"
        )
