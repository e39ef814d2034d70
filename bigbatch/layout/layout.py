"""The layout: how each update's examples are cut into microbatches over the devices.

The only part of the arithmetic that knows the hardware. It works in whole ghost batches, or in
small batches of several of them: an update of n of these units over D devices puts q = ceil(n / D)
on the fullest device, and q is covered by microbatches of a few fixed shapes, so that a batch size
is never compiled.

>>> layout = make_layout([128, 640, 3200, 5120], ghost_batch_examples=128, devices=1,
...                      microbatch_examples_per_device=1024)
>>> layout.microbatches(3200)[-1]
Microbatch(offset_examples=3072, num_examples=128, examples_per_device=128)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.schedule.diagnostics import Diagnostic, diagnostic

MAX_SHAPES = 3
# Costs in examples computed on one device: what a call costs beside its examples, and what the
# device could compute while a shape is compiled. Orders of magnitude are enough.
CALL_EXAMPLES = 8
COMPILATION_EXAMPLES = 100_000
_MAX_CANDIDATES = 16
MAX_MASKED_SHARE = 0.05
# Loads up to this many largest microbatches are covered optimally; beyond, full ones come first.
_EXACT_MICROBATCHES = 4


class Microbatch(NamedTuple):
    """One call of accumulate: a run of consecutive examples of the update.

    Attributes:
      offset_examples: of its first example within the update.
      num_examples: how many of the update's examples it holds.
      examples_per_device: its shape. Over all devices it computes devices * examples_per_device
        examples; those past `num_examples` are masked, in whole ghost batches.
    """

    offset_examples: int
    num_examples: int
    examples_per_device: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Microbatches for any batch size that is a multiple of the ghost batch.

    Attributes:
      ghost_batch_examples: the examples that share batch-norm statistics, all on one device.
      devices: how many share every microbatch.
      shapes: examples per device of each microbatch shape, largest first, at most three.
      small_batch_examples: examples of a small batch of the noise measurement, all on one device; a
        multiple of the ghost batch. None where nothing is larger than a ghost batch.
    """

    ghost_batch_examples: int
    devices: int
    shapes: tuple[int, ...]
    small_batch_examples: int | None = None

    @property
    def unit_examples(self) -> int:
        """What a device's share is a multiple of."""
        return self.small_batch_examples or self.ghost_batch_examples

    def microbatches(self, batch_size: int) -> tuple[Microbatch, ...]:
        """Cuts one update into microbatches, largest first.

        Consecutive ghost batches lie in consecutive microbatches and, within one, on consecutive
        devices. Only the last microbatch can hold masked ghost batches, at its end.

        Args:
          batch_size: examples of the update, a multiple of `ghost_batch_examples`.

        Raises:
          UserError: it is no multiple.
        """
        return _cut(self, batch_size)

    def computed_examples(self, batch_size: int) -> int:
        """Examples that the devices compute for one update, the masked ones included."""
        full, rest = self._cover(batch_size)
        return (full * self.shapes[0] + sum(rest)) * self.devices

    def num_microbatches(self, batch_size: int) -> int:
        """How many calls of accumulate one update takes."""
        full, rest = self._cover(batch_size)
        return full + len(rest)

    def masked_share(self, plan_or_batch_sizes: Any) -> float:
        """Masked examples / computed examples over a whole run, from 0 to below 1."""
        sizes, counts = _sizes(plan_or_batch_sizes)
        computed = sum(
            self.computed_examples(size) * count
            for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)
        )
        return 1 - int(sizes @ counts) / computed

    def _cover(self, batch_size: int) -> tuple[int, tuple[int, ...]]:
        """How many full microbatches come first, and the examples per device of the others."""
        unit = self.unit_examples
        load = -(-batch_size // (unit * self.devices))
        full, rest = cover(load, tuple(s // unit for s in self.shapes), CALL_EXAMPLES / unit)
        return full, tuple(shape * unit for shape in rest)


def idle_share(plan: Any, layout: Layout) -> Diagnostic:
    """Masked examples of a plan as a share of the computed ones, to show beside its diagnostics."""
    share = layout.masked_share(plan)
    sizes = " or ".join(f"{shape:,}" for shape in layout.shapes)
    return diagnostic(
        "masked_share",
        share,
        MAX_MASKED_SHARE,
        f"masked: {share:.1%} of the computed examples",
        f"{share:.1%} of the computed examples are masked, because {layout.devices} devices "
        f"compute microbatches of {sizes} examples each: use fewer devices, a smaller ghost batch, "
        "or batch sizes that are multiples of devices times ghost batch",
    )


# Asked for twice an update, and few batch sizes differ.
@functools.lru_cache(maxsize=64)
def _cut(layout: Layout, batch_size: int) -> tuple[Microbatch, ...]:
    _check_multiples([batch_size], layout.ghost_batch_examples)
    microbatches, offset = [], 0
    full, rest = layout._cover(batch_size)
    for examples in (layout.shapes[0],) * full + rest:
        held = min(batch_size - offset, examples * layout.devices)
        microbatches.append(Microbatch(offset, held, examples))
        offset += held
    return tuple(microbatches)


def make_layout(
    plan_or_batch_sizes: Any,
    *,
    ghost_batch_examples: int,
    devices: int,
    microbatch_examples_per_device: int,
    small_batch_examples: int | None = None,
) -> Layout:
    """Chooses the microbatch shapes for a whole run.

    The chosen set of at most three shapes has the lowest cost, in examples per device,

        sum over updates of (computed + CALL_EXAMPLES * calls) + COMPILATION_EXAMPLES * shapes

    among sets from a few candidates: the limit and its halves, and the even splits and remainders
    of the commonest loads.

    Args:
      plan_or_batch_sizes: a plan, or the batch size in examples of each update.
      ghost_batch_examples: examples that share batch-norm statistics.
      devices: how many devices share the work.
      microbatch_examples_per_device: the most that a device can compute in one call.
      small_batch_examples: examples that must lie on one device where that is more than a ghost
        batch, a multiple of it. Batch sizes need not be multiples; the last one of an update may
        be masked in part.

    Raises:
      UserError: the limit is no multiple of the ghost batch or the small batch, or a batch size
        none of the ghost batch.
    """
    checks = Checks()
    allowed = "a whole number, at least 1"
    good = checks.whole("ghost_batch_examples", ghost_batch_examples, allowed)
    checks.whole("devices", devices, allowed)
    field = "microbatch_examples_per_device"
    unit, kind = int(small_batch_examples or ghost_batch_examples), "ghost batch"
    if small_batch_examples is not None:
        if small_batch_examples != ghost_batch_examples:
            kind = "small batch (noise_small_batch_examples)"
        good &= check_small_batch(checks, small_batch_examples, ghost_batch_examples)
    if checks.whole(field, microbatch_examples_per_device, allowed) and good:
        multiple = max(1, microbatch_examples_per_device // unit)
        checks.require(
            microbatch_examples_per_device % unit == 0,
            field,
            microbatch_examples_per_device,
            f"a multiple of the {unit} examples of a {kind}",
            multiple * unit,
        )
    checks.done()
    sizes, counts = _sizes(plan_or_batch_sizes)
    _check_multiples(sizes.tolist(), ghost_batch_examples)
    loads, inverse = np.unique(-(-sizes // (unit * devices)), return_inverse=True)
    weights = np.bincount(inverse, counts)
    limit = min(microbatch_examples_per_device // unit, int(loads[-1]))
    shapes = _choose_shapes(loads, weights, limit, unit)
    small = None if small_batch_examples is None else unit
    shapes = tuple(shape * unit for shape in shapes)
    return Layout(int(ghost_batch_examples), int(devices), shapes, small)


def check_small_batch(
    checks: Checks, noise_small_batch_examples: object, ghost_batch_examples: int
) -> bool:
    """Notes a problem unless the small batch holds whole ghost batches."""
    ghost = max(1, ghost_batch_examples)
    field = "noise_small_batch_examples"
    allowed = f"a multiple of ghost_batch_examples = {ghost}, or None"
    if not checks.whole(field, noise_small_batch_examples, allowed):
        return False
    given = int(noise_small_batch_examples)  # type: ignore[call-overload]
    nearest = max(1, round(given / ghost)) * ghost
    return checks.require(given == nearest, field, given, allowed, nearest)


def _sizes(plan_or_batch_sizes: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct batch sizes and how many updates have each."""
    sizes = getattr(plan_or_batch_sizes, "batch_sizes", plan_or_batch_sizes)
    return np.unique(np.asarray(sizes, np.int64), return_counts=True)


def _check_multiples(sizes: Sequence[int], ghost_batch_examples: int) -> None:
    checks = Checks()
    for size in sizes:
        nearest = max(1, round(size / ghost_batch_examples)) * ghost_batch_examples
        checks.require(
            size == nearest,
            "batch_size",
            size,
            f"a multiple of the {ghost_batch_examples} examples of a ghost batch",
            nearest,
        )
    checks.done()


def _candidates(loads: NDArray[np.int64], weights: NDArray[Any], limit: int) -> list[int]:
    """Shapes, in units, that may be worth compiling."""
    halves = [math.ceil(limit / 2**i) for i in range(limit.bit_length())]
    work: dict[int, float] = {}
    for load, weight in zip(loads.tolist(), weights.tolist(), strict=True):
        calls = math.ceil(load / limit)
        for shape in {math.ceil(load / calls), load % limit} - {0}:
            work[shape] = work.get(shape, 0.0) + weight * load
    common = sorted(work, key=lambda shape: -work[shape])
    return sorted(list(dict.fromkeys(halves + common))[:_MAX_CANDIDATES], reverse=True)


def _choose_shapes(
    loads: NDArray[np.int64], weights: NDArray[Any], limit: int, unit_examples: int
) -> tuple[int, ...]:
    """The cheapest set of shapes; loads, shapes and costs are in units per device."""
    candidates = _candidates(loads, weights, limit)
    sets = [
        shapes
        for count in range(1, MAX_SHAPES + 1)
        for shapes in itertools.combinations(candidates, count)
    ]
    call_cost = CALL_EXAMPLES / unit_examples
    largest = np.array([shapes[0] for shapes in sets])
    costs = _cover_costs(min(int(loads[-1]), _EXACT_MICROBATCHES * limit), sets, call_cost)
    total = COMPILATION_EXAMPLES / unit_examples * np.array([len(s) for s in sets])
    for load, weight in zip(loads.tolist(), weights.tolist(), strict=True):
        full = _full(load, len(costs) - 1, largest)
        rest = costs[load - full * largest, np.arange(len(sets))]
        total += weight * (rest + full * (largest + call_cost))
    return sets[int(np.argmin(total))]


def _full(load: int, largest_exact: int, largest_shape: Any) -> Any:
    """How many full microbatches bring the load down to what is covered exactly."""
    return np.maximum(0, -(-(load - largest_exact) // largest_shape))


def _cover_costs(
    largest_load: int, sets: Sequence[tuple[int, ...]], call_cost: float
) -> NDArray[np.float64]:
    """The least cost of covering each load with microbatches of each set of shapes.

    Dynamic programme over the load: its last microbatch is one of the shapes.

    Returns:
      float64[largest_load + 1, len(sets)].
    """
    # Sets with fewer shapes repeat their last one, so that all fit one array.
    shapes = np.array([(*s, *[s[-1]] * (MAX_SHAPES - len(s))) for s in sets]).T
    column = np.arange(len(sets))
    costs = np.zeros((largest_load + 1, len(sets)))
    for load in range(1, largest_load + 1):
        costs[load] = np.min(costs[np.maximum(load - shapes, 0), column] + shapes, axis=0)
        costs[load] += call_cost
    return costs


def cover(load: int, shapes: tuple[int, ...], call_cost: float) -> tuple[int, tuple[int, ...]]:
    """The cheapest microbatches that hold `load`: what they compute plus `call_cost` for each.

    Args:
      load: units (ghost batches or small batches) on one device.
      shapes: units per device of each shape, largest first.
      call_cost: in units.

    Returns:
      How many of the largest shape come first, and the shapes that follow, largest first.
    """
    full = int(_full(load, _EXACT_MICROBATCHES * shapes[0], shapes[0]))
    return full, _cover_exactly(load - full * shapes[0], shapes, call_cost)


@functools.lru_cache(maxsize=4096)
def _cover_exactly(load: int, shapes: tuple[int, ...], call_cost: float) -> tuple[int, ...]:
    costs = _cover_table(_EXACT_MICROBATCHES * shapes[0], shapes, call_cost)
    chosen = []
    while load > 0:
        best = min(shapes, key=lambda shape: costs[max(load - shape, 0)] + shape)
        chosen.append(best)
        load -= best
    return tuple(sorted(chosen, reverse=True))


@functools.lru_cache(maxsize=16)
def _cover_table(largest_load: int, shapes: tuple[int, ...], call_cost: float) -> list[float]:
    return _cover_costs(largest_load, [shapes], call_cost)[:, 0].tolist()
