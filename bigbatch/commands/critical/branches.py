"""The short runs of `bigbatch critical`: the noise at a checkpoint, and branches from it."""

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.commands.critical.fit import reached_after
from bigbatch.commands.critical.geometries import noise_scales
from bigbatch.commands.critical.table import Noise
from bigbatch.engine.functions import State
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.schedule.durations import first_example_from
from bigbatch.schedule.plan import Plan, Row
from bigbatch.training.run import Run
from bigbatch.training.updates import updates

# The noise at a checkpoint: small batches to an update on each device, epochs at most, examples
# that are enough for the loss, and the relative error that is enough.
_NOISE_SMALL_BATCHES = 16
_NOISE_EPOCHS = 8
_NOISE_EXAMPLES = 4_096
_NOISE_ERROR = 0.1
_NOISE_UPDATES = 10
# A branch is looked at when it has become longer by this share.
_LOOK_SHARE = 0.05
_MAX_WORD = 2**32


class Target(NamedTuple):
    """What branches are to reach.

    Attributes:
      metric: of the task, or "loss": its mean over an update's examples.
      value: of it.
      rises: whether it is above what it is at the checkpoint.
    """

    metric: str
    value: float
    rises: bool = False

    def after(self, values: list[float], batch_size: int) -> float | None:
        """Updates after which it is reached, from the metric of each; see `reached_after`."""
        sign = -1 if self.rises else 1
        return reached_after([sign * value for value in values], batch_size, sign * self.value)


class Branch(NamedTuple):
    """A branch that is done.

    Attributes:
      losses: of each update, before it; or the metric that has a target.
      gradient_squares: estimates of |G|^2 of each update; empty where an update has none.
      variances: likewise, of tr(S).
    """

    losses: list[float]
    gradient_squares: list[float]
    variances: list[float]


def noise_batch_size(small_batch_examples: int, devices: int, train_examples: int) -> int:
    """The batch size at which `noise_at` measures, in examples: at most half of an epoch's."""
    most = train_examples // (2 * small_batch_examples)
    return small_batch_examples * max(2, min(_NOISE_SMALL_BATCHES * devices, most))


def noise_at(run: Run, state: State, row: Row) -> Noise:
    """The training loss and the noise scale at a state, from updates of learning rate 0.

    Args:
      run: measures noise; its layout has `noise_batch_size`.
      state: is copied.
      row: an update of the run's plan, for the other hyperparameters.
    """
    total = run.plan.train_examples
    size = noise_batch_size(run.unit_examples, run.mesh.size, total)
    plan = constant_plan(run.plan, row, size, 0.0, _NOISE_EPOCHS)
    smoothed, examples = gradient_noise.Smoothed(), 0
    totals = dict.fromkeys(run.programs.sum_names, 0.0)
    with contextlib.closing(_updates(run, state, plan, seed=run.seed)) as parts:
        for at, _, sums in parts:
            measured = run.measurement(at, sums)
            assert measured is not None, "the run was prepared to measure"
            smoothed = gradient_noise.smooth(
                smoothed,
                gradient_noise.estimate(measured),
                measured,
                # The parameters stay: nothing grows old.
                memory_examples=1e6 * total,
            )
            totals = {name: before + float(sums[name]) for name, before in totals.items()}
            examples += size
            scale, error = smoothed.noise_scale, smoothed.standard_error
            known = scale is not None and error is not None and error < _NOISE_ERROR * scale
            enough = smoothed.effective_updates > _NOISE_UPDATES
            if known and enough and examples >= min(total, _NOISE_EXAMPLES):
                break
    scale, shown = smoothed.noise_scale, run.task.quotients(totals)
    found = scale, smoothed.standard_error, smoothed.status, run.noise_population
    geometries = {} if scale is None else noise_scales(run, state, scale)
    return Noise(shown["loss"], *found, shown, geometries)


def branch(run: Run, state: State, plan: Plan, seed: int, target: Target) -> Branch:
    """Trains a plan of one batch size until its smoothed loss is at a target, or to its end.

    Args:
      run: its layout has the plan's batch size.
      state: at which the plan begins; is copied.
      plan: from `constant_plan`.
      seed: of the order of the examples.
      target: of training.
    """
    size = int(plan.batch_sizes[0])
    done = Branch([], [], [])
    unread: list[Any] = []
    look = 1
    with contextlib.closing(_updates(run, state, plan, seed)) as parts:
        for row, _, sums in parts:
            # Not read at once: the device need not wait for the host.
            unread.append((row, sums))
            if row.update + 1 < min(look, plan.num_updates):
                continue
            for read in unread:
                _read(done, run, target.metric, *read)
            unread, look = [], row.update + 2 + int(_LOOK_SHARE * row.update)
            finite = math.isfinite(done.losses[-1])
            if not finite or target.after(done.losses, size) is not None:
                break
    return done


def _read(done: Branch, run: Run, metric: str, row: Row, sums: Any) -> None:
    """Adds an update's numbers to a branch."""
    of_the_loss = {name: sums[name] for name in run.programs.sum_names}
    done.losses.append(run.task.quotients(of_the_loss)[metric])
    measured = run.measurement(row, sums)
    estimate = None if measured is None else gradient_noise.estimate(measured)
    if estimate is not None:
        done.gradient_squares.append(estimate.gradient_square)
        done.variances.append(estimate.variance)


def constant_plan(
    plan: Plan, row: Row, batch_size: int, learning_rate: float, epochs: float
) -> Plan:
    """Updates of one batch size and learning rate, all else as in a row of a plan."""
    count = -(-first_example_from(epochs, plan.train_examples) // batch_size)
    hypers = {**row.hyper, "learning_rate": learning_rate}
    return dataclasses.replace(
        plan,
        epochs=epochs,
        batch_sizes=np.full(count, batch_size, np.int64),
        hypers={name: np.full(count, float(value)) for name, value in hypers.items()},
    )


def _updates(run: Run, state: State, plan: Plan, seed: int) -> Any:
    """The updates of a plan from a copy of a state on, on examples in the order of a seed."""
    # The first update is given its state's buffers.
    own = jax.tree.map(jnp.copy, state)
    return updates(run.again(plan=plan, seed=seed % _MAX_WORD), own, 0)
