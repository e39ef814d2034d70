"""Recipes with one batch size and a learning rate that changes: the usual schedules."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.durations import in_any_unit, num_reached
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.policy.base import Policy, Settings, check_base, with_learning_rate


def constant(learning_rate: float, batch_size: int, momentum: float = 0.0) -> Policy:
    """The same learning rate, batch size and momentum throughout.

    Args:
      learning_rate: above 0.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    check_base(checks, learning_rate, batch_size, momentum)
    checks.done()
    return with_learning_rate(
        lambda e: np.full(e.shape, float(learning_rate)), batch_size, momentum
    )


@in_any_unit("boundaries_epochs")
def step_decay(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    boundaries_epochs: Sequence[float],
    factor: float,
) -> Policy:
    """The learning rate is multiplied by `factor` at every boundary.

    Args:
      learning_rate: before the first boundary.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      boundaries_epochs: strictly increasing, above 0; from a boundary on the new value holds.
      factor: above 0 and below 1; the paper's drops by 5 are 0.2.

    Raises:
      UserError: an argument is out of its range or order.
    """
    checks = Checks()
    check_base(checks, learning_rate, batch_size, momentum)
    _check_boundaries(checks, boundaries_epochs)
    _check_factor(checks, factor)
    checks.done()
    values = learning_rate * np.float64(factor) ** np.arange(len(boundaries_epochs) + 1)
    return with_learning_rate(
        lambda e: values[num_reached(boundaries_epochs, e)], batch_size, momentum
    )


def _check_boundaries(checks: Checks, boundaries: object) -> None:
    field, allowed = "boundaries_epochs", "numbers above 0, each larger than the one before"
    if not isinstance(boundaries, Sequence | np.ndarray) or isinstance(boundaries, str):
        checks.require(False, field, boundaries, f"a list of {allowed}")
        return
    fine = [checks.number(f"{field}[{i}]", b, allowed, above=0) for i, b in enumerate(boundaries)]
    if all(fine):
        ordered = sorted(set(boundaries))
        checks.require(list(boundaries) == ordered, field, list(boundaries), allowed, ordered)


def _check_factor(checks: Checks, factor: object) -> None:
    allowed = "a number above 0 and below 1 (the learning rate is multiplied by it)"
    if checks.number("factor", factor, allowed, above=0) and float(factor) >= 1:  # type: ignore
        nearest = None if factor == 1 else 1 / float(factor)  # type: ignore[arg-type]
        checks.require(False, "factor", factor, allowed, nearest)


@in_any_unit("every_epochs")
def exponential(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    factor: float,
    every_epochs: float,
) -> Policy:
    """lr(e) = learning_rate * factor^(e / every_epochs), without jumps.

    Args:
      learning_rate: at epoch 0.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      factor: above 0 and below 1.
      every_epochs: the time over which the learning rate is multiplied by `factor`.

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    check_base(checks, learning_rate, batch_size, momentum)
    _check_factor(checks, factor)
    checks.number("every_epochs", every_epochs, "a time above 0", above=0)
    checks.done()
    return with_learning_rate(
        lambda e: learning_rate * np.float64(factor) ** (e / every_epochs), batch_size, momentum
    )


@in_any_unit("from_epoch", "until_epoch")
def polynomial(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    power: float = 1.0,
    from_epoch: float = 0.0,
    until_epoch: float | None = None,
    final_learning_rate: float = 0.0,
    epochs: float | None = None,
) -> Policy:
    """lr(e) = final + (learning_rate - final) (1 - t)^power; power 1 is linear decay.

    t runs from 0 at `from_epoch` to 1 at `until_epoch`; the learning rate is constant before and
    after.

    Args:
      learning_rate: until `from_epoch`.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      power: above 0.
      from_epoch: where the decay starts.
      until_epoch: where it ends; by default at the end of the run.
      final_learning_rate: from 0 to `learning_rate`.
      epochs: length of the run (context).

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    checks.number("power", power, "a number above 0", above=0)
    base = (learning_rate, batch_size, momentum)
    return _decay(
        lambda t: (1 - t) ** power,
        checks,
        base,
        from_epoch,
        until_epoch,
        final_learning_rate,
        epochs,
    )


@in_any_unit("from_epoch", "until_epoch")
def cosine(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    from_epoch: float = 0.0,
    until_epoch: float | None = None,
    final_learning_rate: float = 0.0,
    power: float = 2.0,
    epochs: float | None = None,
) -> Policy:
    """lr(e) = final + (learning_rate - final) (1 + cos(pi t)) / 2 (Loshchilov and Hutter 2017).

    t is as in `polynomial`. That is cos(pi t / 2)^2; another `power` gives cos(pi t / 2)^power, of
    which 1 is the cosine of Seesaw's paper.

    Args:
      learning_rate: until `from_epoch`.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      from_epoch: where the decay starts.
      until_epoch: where it ends; by default at the end of the run.
      final_learning_rate: from 0 to `learning_rate`.
      power: above 0.
      epochs: length of the run (context).

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    checks.number("power", power, "a number above 0", above=0)
    base = (learning_rate, batch_size, momentum)
    # (1 + cos x)/2 as cos^2(x/2), which keeps its precision where it is small.
    return _decay(
        lambda t: np.cos(np.pi / 2 * t) ** power,
        checks,
        base,
        from_epoch,
        until_epoch,
        final_learning_rate,
        epochs,
    )


def _decay(
    remaining: Callable[[Array], Array],
    checks: Checks,
    base: tuple[float, int, float],
    from_epoch: float,
    until_epoch: float | None,
    final_learning_rate: float,
    epochs: float | None,
) -> Policy:
    """A decay from `learning_rate` to `final_learning_rate` along a curve from 1 to 0."""
    learning_rate, batch_size, momentum = base
    check_base(checks, learning_rate, batch_size, momentum)
    until = epochs if until_epoch is None else until_epoch
    if checks.number("from_epoch", from_epoch, "a point in time from 0 on", at_least=0):
        allowed = "a point in time after the decay starts"
        checks.number(
            "until_epoch", "nothing" if until is None else until, allowed, above=from_epoch
        )
    checks.number("final_learning_rate", final_learning_rate, "from 0 on", at_least=0)
    checks.done()
    assert until is not None
    allowed = "at most learning_rate"
    checks.number("final_learning_rate", final_learning_rate, allowed, at_most=float(learning_rate))
    checks.done()

    def rate(epochs: Array) -> Array:
        t = np.clip((epochs - from_epoch) / (until - from_epoch), 0, 1)
        curve = np.where(t < 1, remaining(t), 0.0)
        return final_learning_rate + (learning_rate - final_learning_rate) * curve

    zero_epoch = until if final_learning_rate == 0 else math.inf
    return with_learning_rate(rate, batch_size, momentum, zero_epoch=zero_epoch)


@in_any_unit("warmup_epochs", "decay_epochs")
def warmup_stable_decay(
    learning_rate: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    warmup_epochs: float,
    decay_epochs: float,
    initial_learning_rate: float = 0.0,
    final_learning_rate: float = 0.0,
    epochs: float,
) -> Policy:
    """Linear warm-up, a constant learning rate, and linear decay at the end of the run.

    Args:
      learning_rate: of the constant part.
      batch_size: examples per update.
      momentum: heavy-ball coefficient.
      warmup_epochs: length of the warm-up.
      decay_epochs: length of the decay, above 0.
      initial_learning_rate: at epoch 0.
      final_learning_rate: at the end.
      epochs: length of the run (context).

    Raises:
      UserError: an argument is out of its range, or the run is too short for both.
    """
    checks = Checks()
    times = checks.number("epochs", epochs, "a number of epochs above 0", above=0)
    times &= checks.number("warmup_epochs", warmup_epochs, "a time from 0 on", at_least=0)
    times &= checks.number("decay_epochs", decay_epochs, "a time above 0", above=0)
    if times:
        longest = epochs - warmup_epochs
        allowed = "a time that leaves room for the warm-up within the run"
        checks.number("decay_epochs", decay_epochs, allowed, at_most=longest)
    checks.done()
    decaying = polynomial(
        learning_rate,
        batch_size,
        momentum,
        from_epoch=epochs - decay_epochs,
        until_epoch=epochs,
        final_learning_rate=final_learning_rate,
    )
    return warmup(
        decaying, warmup_epochs=warmup_epochs, initial_learning_rate=initial_learning_rate
    )


@in_any_unit("warmup_epochs")
def warmup(policy: Policy, *, warmup_epochs: float, initial_learning_rate: float = 0.0) -> Policy:
    """Gradual warm-up (Goyal et al. 2017) in front of any policy.

    The learning rate rises linearly from `initial_learning_rate` to the policy's own at
    `warmup_epochs` and follows the policy from there, whose clock runs on meanwhile.

    Args:
      policy: what to warm up to.
      warmup_epochs: from 0 on.
      initial_learning_rate: at epoch 0; from 0 to the policy's at `warmup_epochs`.

    Raises:
      UserError: an argument is out of its range.
    """
    checks = Checks()
    checks.number("warmup_epochs", warmup_epochs, "a time from 0 on", at_least=0)
    checks.done()
    target = float(policy.at(warmup_epochs).hyper["learning_rate"][0])
    allowed = "a time at whose end the policy's learning rate is above 0"
    checks.require(target > 0, "warmup_epochs", warmup_epochs, allowed)
    checks.number(
        "initial_learning_rate",
        initial_learning_rate,
        f"from 0 to the policy's learning rate after the warm-up, {target:g}",
        at_least=0,
        at_most=target,
    )
    checks.done()

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        done = np.minimum(epochs, warmup_epochs) / (warmup_epochs or 1.0)
        rising = initial_learning_rate + (target - initial_learning_rate) * done
        rate = np.where(epochs < warmup_epochs, rising, hyper["learning_rate"])
        return Settings(batch_size, hyper | {"learning_rate": rate})

    turning = (float(warmup_epochs), *(e for e in policy.turning_epochs if e > warmup_epochs))
    return dataclasses.replace(policy, settings_at=settings_at, turning_epochs=turning)
