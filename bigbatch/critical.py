"""`bigbatch critical`: the critical batch size of a run, measured by branching from it.

At some epochs of a run, short runs at several batch sizes go on from the same parameters with the
learning rate of the linear rule, until their training loss is what the smallest batch reaches. The
updates and examples that it takes give the critical batch size (see `critical_batch`), beside the
noise scale measured in the same place.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch import gradient_noise
from bigbatch.checks import Checks
from bigbatch.config import Config
from bigbatch.critical_batch import Fit, fit, reached_after
from bigbatch.plan import Plan
from bigbatch.plan_table import aligned
from bigbatch.run import Run, prepare
from bigbatch.step import State
from bigbatch.train import updates

# A branch goes on for at most so many times the examples that the smallest batch was given.
_MOST_TIMES = 4
# The loss is averaged over this share of those examples, or over two of the largest updates.
_WINDOW_SHARE = 1 / 8


@dataclasses.dataclass(frozen=True)
class Critical:
    """What branching from one point of a run gave.

    Attributes:
      epoch: of the run, where the branches begin.
      target_loss: which all of them were to reach.
      updates: by batch size; None where the branch did not reach it.
      examples: likewise.
      fitted: None where fewer than three branches reached the loss.
      noise_scale: measured in the branch of the smallest batch that has an estimate, and its
        standard error; None where none has.
    """

    epoch: float
    target_loss: float
    updates: Mapping[int, float | None]
    examples: Mapping[int, float | None]
    fitted: Fit | None
    noise_scale: tuple[float, float] | None


def measure(
    config: Config, *, at_epochs: Sequence[float], sizes: int, branch_epochs: float
) -> Iterator[Critical]:
    """Branches from a run at some epochs.

    Args:
      config: its plan is trained up to the last of the epochs.
      at_epochs: where to branch, rising.
      sizes: how many batch sizes, each twice the one before, from the plan's own on.
      branch_epochs: how long the smallest batch is trained; its loss is the target.

    Yields:
      One result an epoch.

    Raises:
      UserError: an epoch lies outside the run, or an argument is out of its range.
    """
    checks = Checks()
    for epoch in at_epochs:
        allowed = f"epochs from 0 to below the run's {config.epochs:g}"
        checks.number("at_epochs", epoch, allowed, at_least=0, below=config.epochs)
    checks.whole("sizes", sizes, "a whole number of batch sizes, at least 3", at_least=3)
    checks.number("branch_epochs", branch_epochs, "a number of epochs above 0", above=0)
    checks.done()
    plan = config.plan
    points = {plan.at_epoch(epoch): None for epoch in sorted(at_epochs)}
    branches = {
        update: [
            _branch(plan, update, 2**power, branch_epochs * (_MOST_TIMES if power else 1))
            for power in range(sizes)
        ]
        for update in points
    }
    everything = [plan, *(branch for group in branches.values() for branch in group)]
    # Of an adaptive run the branches begin where nothing has grown.
    run = prepare(dataclasses.replace(config, controller=None), _joined(everything))
    state, done = run.init_state(), 0
    trunk = updates(dataclasses.replace(run, plan=plan), run.init_state(), 0)
    with contextlib.closing(trunk):
        for update, group in branches.items():
            while done < update:
                row, state, _ = next(trunk)
                done = row.update + 1
            yield _compare(run, state, update, group)


def text(found: Critical) -> str:
    """A result as a table and three sentences."""
    rows = [("batch size", "updates", "examples")]
    for size, count in found.updates.items():
        reached = (
            ("not reached", "") if count is None else (f"{count:,.0f}", f"{count * size:,.0f}")
        )
        rows.append((f"{size:,}", *reached))
    lines = [f"epoch {found.epoch:.4g}, to a training loss of {found.target_loss:.4g}:"]
    lines += ["", *aligned(rows), ""]
    fitted = found.fitted
    if fitted is None:
        lines.append("no fit: fewer than three batch sizes reached the loss")
    else:
        lines.append(
            f"(S/S_min - 1)(E/E_min - 1) = 1 with S_min {fitted.fewest_updates:,.1f} +- "
            f"{fitted.fewest_updates_error:,.1f} updates, E_min {fitted.fewest_examples:,.0f} +- "
            f"{fitted.fewest_examples_error:,.0f} examples"
        )
        lines.append(
            f"critical batch size {fitted.critical_batch_size:,.0f} +- "
            f"{fitted.critical_batch_size_error:,.0f} examples"
        )
    if found.noise_scale is None:
        lines.append(
            "gradient noise scale: no estimate (noise_small_batch_examples, and two small batches "
            "in an update, give one)"
        )
    else:
        scale, error = found.noise_scale
        lines.append(f"gradient noise scale {scale:,.0f} +- {error:,.0f} examples")
    return "\n".join(lines)


def _branch(plan: Plan, update: int, factor: int, epochs: float) -> Plan:
    """The plan up to an update, then larger updates with the learning rate of the linear rule."""
    row = plan.row(update)
    size = row.batch_size * factor
    count = max(1, -(-round(epochs * plan.train_examples) // size))
    hypers = {name: np.full(count, value) for name, value in row.hyper.items()}
    hypers["learning_rate"] = hypers["learning_rate"] * factor
    return Plan(
        plan.train_examples,
        plan.epochs,
        plan.rule,
        np.r_[plan.batch_sizes[:update], np.full(count, size)],
        {name: np.r_[column[:update], hypers[name]] for name, column in plan.hypers.items()},
    )


def _joined(plans: Sequence[Plan]) -> Plan:
    """A plan with the updates of all, for the layout that serves all."""
    return dataclasses.replace(
        plans[0],
        batch_sizes=np.concatenate([plan.batch_sizes for plan in plans]),
        hypers={n: np.concatenate([p.hypers[n] for p in plans]) for n in plans[0].hypers},
    )


def _compare(run: Run, state: State, update: int, branches: Sequence[Plan]) -> Critical:
    """Trains the branches from one state."""
    smallest, largest = (int(plan.batch_sizes[-1]) for plan in (branches[0], branches[-1]))
    given = branches[0].num_examples - int(branches[0].first_examples[update])
    window = max(given * _WINDOW_SHARE, 2 * largest)
    target, noise_scale = np.nan, None
    needed: dict[int, float | None] = {}
    for plan in branches:
        size = int(plan.batch_sizes[-1])
        is_first = size == smallest
        ends, sums, smoothed = [0.0], [0.0], gradient_noise.Smoothed()
        losses = np.empty(0)
        branch = dataclasses.replace(run, plan=plan)
        # The first update is given its state's buffers.
        with contextlib.closing(updates(branch, jax.tree.map(jnp.copy, state), update)) as parts:
            for _, _, reported in parts:
                smoothed = _smoothed(smoothed, reported, given)
                ends.append(ends[-1] + size)
                sums.append(sums[-1] + float(reported["loss"]) / float(reported["count"]) * size)
                losses = _windows(ends, sums, window)
                if not is_first and (losses[-2:] <= target).sum() == 2:
                    break
        if is_first:
            target = float(losses[-1])
        scale, error = smoothed.noise_scale, smoothed.standard_error
        if noise_scale is None and scale is not None and error is not None:
            noise_scale = scale, error
        needed[size] = reached_after(losses.tolist(), window, target)
    reached = {size: e / size for size, e in needed.items() if e is not None}
    return Critical(
        epoch=branches[0].row(update).epoch,
        target_loss=target,
        updates={size: reached.get(size) for size in needed},
        examples=needed,
        fitted=fit(list(reached), list(reached.values())) if len(reached) >= 3 else None,
        noise_scale=noise_scale,
    )


def _smoothed(
    smoothed: gradient_noise.Smoothed, reported: Mapping[str, Any], memory_examples: float
) -> gradient_noise.Smoothed:
    measured = gradient_noise.measurement_of(reported)
    if measured is None:
        return smoothed
    estimate = gradient_noise.estimate(measured)
    return gradient_noise.smooth(smoothed, estimate, measured, memory_examples=memory_examples)


def _windows(ends: Sequence[float], sums: Sequence[float], window: float) -> np.ndarray:
    """The mean loss of each whole window of examples; an update's loss counts evenly over it."""
    edges = np.arange(0, ends[-1] + 1e-9, window)
    return np.diff(np.interp(edges, ends, sums)) / window
