"""Any Optax schedule as a policy, with the batch size it was written for."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigbatch import errors
from bigbatch.checks import Checks
from bigbatch.schedule.durations import first_example_from, num_reached
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.policy.base import Policy, check_base, with_learning_rate


def from_optax(
    schedule: Callable[[Any], Any],
    batch_size: int,
    momentum: float = 0.0,
    *,
    train_examples: int,
    epochs: float,
) -> Policy:
    """An Optax schedule taken as it is: lr(e) = schedule(floor(e N / batch_size)).

    The schedule counts updates of `batch_size` examples, whatever the batch size becomes later. It
    is evaluated here, once for each of its updates, in float64 on the CPU: in float32 the ratio of
    two learning rates would be off by more than a batch size is rounded.

    Args:
      schedule: update count -> learning rate.
      batch_size: examples per update that the schedule was written for.
      momentum: heavy-ball coefficient.
      train_examples: size N of the training set (context).
      epochs: length of the run (context).

    Raises:
      UserError: an argument is out of its range, or the schedule gives a learning rate that is
        negative, not finite, or 0 throughout.
    """
    checks = Checks()
    check_base(checks, 1.0, batch_size, momentum)
    checks.whole("train_examples", train_examples, "a whole number of examples, at least 1")
    checks.number("epochs", epochs, "a number of epochs above 0", above=0)
    checks.done()
    # One more than the run has, so that a schedule that ends at 0 is seen to.
    updates = -(-first_example_from(epochs, int(train_examples)) // int(batch_size))
    rates = _evaluate(schedule, updates + 1)
    good = np.isfinite(rates[:-1]) & (rates[:-1] >= 0)
    if not good.all():
        at = int(np.argmin(good))
        allowed = f"finite learning rates from 0 on (this is its value at update {at})"
        checks.require(False, "schedule", float(rates[at]), allowed)
    checks.require(bool(np.any(rates[:-1] > 0)), "schedule", 0.0, "a learning rate above 0")
    checks.done()

    starts = np.arange(len(rates)) * batch_size / train_examples

    def rate(epochs: Array) -> Array:
        return rates[num_reached(starts[1:], epochs)]

    rises = np.r_[True, rates[1:] > rates[:-1]]
    falls = np.r_[rates[1:] <= rates[:-1], True]
    zero_update = int(np.flatnonzero(rates > 0)[-1]) + 1
    zero = float(starts[zero_update]) if zero_update < len(rates) else math.inf
    turning = tuple(starts[rises & falls].tolist())
    return with_learning_rate(rate, batch_size, momentum, turning, zero)


def _evaluate(schedule: Callable[[Any], Any], updates: int) -> Array:
    """schedule(0), ..., schedule(updates - 1), float64[updates]."""
    import jax

    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        # A schedule with Python control flow cannot be traced, and is called once per update.
        with contextlib.suppress(jax.errors.ConcretizationTypeError):
            return np.asarray(jax.vmap(schedule)(np.arange(updates)), np.float64)
        return np.array([float(schedule(update)) for update in range(updates)])


def from_optax_name(
    schedule: str,
    arguments: dict[str, Any],
    batch_size: int,
    momentum: float = 0.0,
    *,
    train_examples: int,
    epochs: float,
) -> Policy:
    """As `from_optax`, with the schedule named: for configs.

    Args:
      schedule: the name of a function in `optax.schedules`.
      arguments: its keyword arguments, which count updates of `batch_size` examples.
      batch_size: examples per update that the schedule was written for.
      momentum: heavy-ball coefficient.
      train_examples: size N of the training set (context).
      epochs: length of the run (context).

    Raises:
      UserError: there is no such schedule, it refuses its arguments, or as in `from_optax`.
    """
    import optax

    public = [name for name in vars(optax.schedules) if not name.startswith("_")]
    names = [name for name in public if name.endswith(("_schedule", "_decay"))]
    checks = Checks()
    known = errors.among(schedule, names)
    checks.require(schedule in names, "schedule", schedule, *known)
    checks.done()
    try:
        made = getattr(optax.schedules, schedule)(**arguments)
    except (TypeError, ValueError) as error:
        allowed = f"keyword arguments of optax.{schedule} ({error})"
        raise errors.UserError(errors.Problem("arguments", arguments, allowed)) from error
    return from_optax(made, batch_size, momentum, train_examples=train_examples, epochs=epochs)
