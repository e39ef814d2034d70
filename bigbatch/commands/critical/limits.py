"""Where a plan passes the critical batch size that `bigbatch critical` has measured."""

from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import parsed, text_of
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.diagnostics import Diagnostic, diagnostic
from bigbatch.schedule.plan import Plan


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
    # A checkpoint's epoch is that of its next update, but for rounding.
    before = np.searchsorted([limit.epoch for limit in limits], epochs * (1 + 1e-9), "right") - 1
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
    later = [
        allowed.epoch
        for index, allowed in enumerate(limits)
        if all(after.examples >= largest for after in limits[index:])
    ]
    least = max(each.examples for each in limits)
    way_out = f"set max_batch_size to about {least:,.0f}, the largest that was measured"
    if later:
        way_out = f"let the batch grow later, by grow_batch with from_epoch={later[0]:.4g}: from "
        way_out += f"there on at least {largest:,} examples were measured"
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
