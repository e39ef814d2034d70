"""Which of another trainer's curves is nearest to a plan's learning rate.

The curves of all trainers are made of three parts: a line up, a constant, and a decay of some
style. Each part is fitted to the first and the last update that lie within it, so that a plan that
is such a curve gives its parameters back. Whether the fit is a good one is found by reading what
was written, never here.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan

# The share of a decay that is done, by how much of it is left: from 1 to 0.
_DONE: dict[str, Callable[[Array], Array]] = {
    "linear": lambda left: 1 - left,
    "cosine": lambda left: np.arccos(2 * left - 1) / np.pi,
    "exponential": lambda left: 1 - np.log2(1 + left),
    "minus_sqrt": lambda left: (1 - left) ** 2,
}


class Curve(NamedTuple):
    """A learning rate over time, in the trainer's unit of it.

    Attributes:
      style: of the decay; "constant" for none.
      peak: the largest learning rate.
      first: at time 0.
      floor: where the decay ends.
      warmup: the time at which the peak is reached.
      start: of the decay.
      end: of the decay.
    """

    style: str
    peak: float
    first: float
    floor: float
    warmup: float
    start: float
    end: float


def curves(times: NDArray[Any], rates: NDArray[Any], styles: Sequence[str]) -> Iterator[Curve]:
    """Curves that may be near to a learning rate, the simplest first.

    Args:
      times: of the updates, rising.
      rates: of the updates, the largest above 0.
      styles: those that the trainer has.
    """
    peak = float(rates.max())
    at_peak = np.flatnonzero(rates >= peak * (1 - 1e-12))
    rise, last = int(at_peak[0]), int(at_peak[-1])
    first, warmup = 0.0, 0.0
    if rise:
        before = max(rise - 1, 1)
        slope = (rates[before] - rates[0]) / (times[before] - times[0])
        first = max(0.0, float(rates[0] - slope * times[0]))
        warmup = float((peak - first) / slope) if slope > 0 else float(times[rise])
    yield Curve("constant", peak, first, peak, warmup, times[-1], times[-1])
    for style, floor in itertools.product(styles, {0.0: 0, float(rates[-1]): 0}):
        left = (rates[last:] - floor) / (peak - floor) if floor < peak else np.zeros(1)
        inside = np.flatnonzero((left > 0) & (left < 1 - 1e-12))
        if not inside.size:
            continue
        ends = inside[[0, -1]] if inside.size > 1 else np.array([0, inside[0]])
        done, at = _DONE[style](left[ends]), times[last:][ends]
        if done[1] > done[0]:
            length = float((at[1] - at[0]) / (done[1] - done[0]))
            start = float(at[0] - done[0] * length)
            yield Curve(style, peak, first, floor, warmup, start, start + length)


def ramp(plan: Plan, unit: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """Ramps in equal increments and equal times that may be near to a plan's batch sizes.

    Args:
      plan: its batch size rises at least once.
      unit: examples of which the increment is a multiple.

    Yields:
      The first batch size, the increment, the last batch size and the examples of the ramp.
    """
    stages = plan.stages
    first, last = stages[0].batch_size, int(plan.batch_sizes.max())
    rises = np.diff([stage.batch_size for stage in stages])
    for count in {(last - first) // int(np.gcd.reduce(rises)): 0, len(stages) - 1: 0, 1: 0}:
        if (last - first) % (count * unit) == 0:
            step = (last - first) // count
            # A start is the first update at or after a threshold: the latest threshold of each.
            told = [
                s.first_example * step / (s.batch_size - first)
                for s in stages[1:]
                if s.batch_size > first
            ]
            # Or a stage lasts the least of updates that take its share of the examples.
            lasts = [s.num_updates * s.batch_size for s in stages if s.batch_size < last]
            for each in {min(told): 0, min(lasts): 0}:
                yield first, step, last, int(each * count)
