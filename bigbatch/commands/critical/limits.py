"""Where a plan passes the critical batch size that `bigbatch critical` has measured."""

import math
from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import parsed, text_of
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.diagnostics import Diagnostic, diagnostic
from bigbatch.schedule.plan import Plan

# A checkpoint's epoch is that of its next update, but for rounding.
_NOTHING = 1e-9


class Limit(NamedTuple):
    """What was measured at one checkpoint.

    Attributes:
      epoch: of the checkpoint.
      examples: the critical batch size; infinite where every larger batch still paid.
      low: end of its 95 % interval.
      high: likewise.
    """

    epoch: float
    examples: float
    low: float
    high: float


def read(path: str) -> list[Limit]:
    """The critical batch sizes of a file, by rising epochs.

    Args:
      path: of the critical.json that `bigbatch critical` has written.

    Raises:
      UserError: it cannot be read, or holds no critical batch size.
    """
    try:
        points = parsed(text_of(path), [{"epoch": float}])
        limits = sorted(_limit(point) for point in points if point.get("fit"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        allowed = f"the critical.json that `bigbatch critical` has written ({error})"
        raise UserError(Problem("critical", path, allowed)) from error
    if not limits:
        allowed = "a critical.json with a critical batch size; in this one no checkpoint has a fit"
        raise UserError(Problem("critical", path, allowed))
    return limits


def _careful(limits: list[Limit]) -> Any:
    """What no later checkpoint undercuts, float64."""
    sizes = np.array([limit.examples for limit in limits])
    return np.minimum.accumulate(sizes[::-1])[::-1]


def later(limits: list[Limit], plan: Plan) -> list[tuple[int, int]]:
    """The stages of a plan, each as late as the critical batch size has been measured to allow it.

    Args:
      limits: from `read`.
      plan: whose batch sizes they are.

    Returns:
      First example and batch size of each stage; the plan's smallest where no other is allowed.
    """
    sizes, stages = np.unique(plan.batch_sizes), list[tuple[int, int]]()
    for limit, most in zip(limits, _careful(limits), strict=True):
        size = int(sizes[max(0, np.searchsorted(sizes, most, "right") - 1)])
        if not stages or size > stages[-1][1]:
            first = math.ceil(limit.epoch * plan.train_examples * (1 - _NOTHING))
            stages.append((first if stages else 0, size))
    return stages


def _limit(point: Any) -> Limit:
    numbers = [
        point["epoch"],
        point["fit"]["critical_batch_size"],
        *point["intervals"]["critical_batch_size"],
    ]
    # JSON has no infinity.
    return Limit(*(np.inf if number is None else float(number) for number in numbers))


def against(limits: list[Limit], plan: Plan) -> Diagnostic:
    """The plan's batch sizes against the critical ones, each of the checkpoint before it.

    Critical batch sizes mostly rise while the loss falls, so the one before is the careful one.
    Before the first checkpoint its own holds.

    Args:
      limits: from `read`.
      plan: of an adaptive run, the one in which every decision is to grow.
    """
    epochs = plan.first_examples / plan.train_examples
    starts = [limit.epoch for limit in limits]
    before = np.searchsorted(starts, epochs * (1 + _NOTHING), "right") - 1
    before = np.maximum(before, 0)
    ratios = plan.batch_sizes / np.array([limit.examples for limit in limits])[before]
    most = int(np.argmax(ratios))
    limit, size, largest = limits[before[most]], plan.batch_sizes[most], plan.batch_sizes.max()
    past = np.flatnonzero(ratios > 1)
    span = (
        f"from epoch {epochs[past[0]]:.4g} to {epochs[past[-1]]:.4g}, in {len(past):,} updates, "
        if len(past)
        else ""
    )
    stages = later(limits, plan)
    way_out = f"set max_batch_size to about {_careful(limits).max():,.0f}"
    if len(stages) > 1:
        text = " ".join(
            f"{first}_examples:{size}" if first else f"0:{size}" for first, size in stages
        )
        grown = f", or grow_batch with from_epoch={stages[-1][0] / plan.train_examples:.4g}"
        is_whole = stages[-1][1] == largest
        way_out = (
            f'let it grow later (batch_stages "{text}"{grown if is_whole else ""}), or {way_out}'
        )
    measured = (
        f"{limit.examples:,.0f} examples (95 % interval {limit.low:,.0f} to {limit.high:,.0f})"
    )
    return diagnostic(
        "critical_batch_size",
        ratios[most],
        1.0,
        f"critical batch size: at most {ratios[most]:.3g} times the measured one, at epoch "
        f"{epochs[most]:.4g}: {size:,} of {measured}",
        f"{span}the batch size is above the critical one that was measured at epoch "
        f"{limit.epoch:.4g}, {measured}, at most {ratios[most]:.3g} times: there more examples "
        f"are spent than updates saved; {way_out}",
    )
