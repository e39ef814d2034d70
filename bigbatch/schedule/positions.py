"""Where each update of a policy starts, when time is counted in examples.

The one place where a policy's real batch sizes become whole numbers of examples.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.durations import MOST_UPDATES, first_example_from
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.policy import Policy, Settings

# A real batch size this close (relative) to a whole multiple is that multiple: 639.9999999999999
# comes from 128 * 0.1 / 0.02. Below the 1e-12 to which the noise scale holds.
_SNAP = 9e-13
_LARGEST_BATCH_SIZE = 2**53
_SHORTEST_CHUNK_UPDATES = 64
_LONGEST_CHUNK_UPDATES = 2**14
_MAX_ROUNDS = 8


def check_stated_sizes(checks: Checks, policy: Policy, multiple: int) -> None:
    """Notes a problem for each batch size that a user wrote and that is no multiple."""
    for field, given, size in policy.stated_batch_sizes:
        whole = max(multiple, multiple * round(size / multiple))
        nearest = given * whole / size
        checks.require(
            abs(size - whole) <= _SNAP * whole,
            field,
            given,
            f"batch sizes that are multiples of {multiple} examples (batch_multiple_examples); "
            f"this gives {size:g}",
            round(nearest) if nearest == round(nearest) else nearest,
        )


def compact(column: Array) -> Array:
    """A column, which takes no memory where it holds one value."""
    return np.broadcast_to(column[0], column.shape) if (column == column[0]).all() else column


def rows_of(
    policy: Policy, train_examples: int, epochs: float, multiple: int
) -> Iterator[Settings]:
    """The rows of a plan, in parts of many updates.

    Where an update starts depends on the batch sizes before it, which depend on where those
    updates started. So: guess the batch sizes of the next updates, compute the starts that follow,
    ask the policy there, and go on with its answer. Every row up to the first wrong guess is final,
    by induction: a start is right when all batch sizes before it are. Stages of constant size and
    sizes that grow with every update both settle within a few rounds.

    Args:
      policy: the recipe.
      train_examples: size N of the training set.
      epochs: length of the run.
      multiple: batch sizes are rounded down to a multiple of so many examples.

    Yields:
      Settings with whole batch sizes, float64 of any length.

    Raises:
      UserError: the policy gives a batch size that no update can have.
    """
    end = first_example_from(epochs, train_examples)
    position, guess, length, done = 0, float(multiple), _SHORTEST_CHUNK_UPDATES, 0
    while position < end:
        sizes = np.full(length, guess)
        for _ in range(_MAX_ROUNDS):
            starts = position + np.r_[0.0, np.cumsum(sizes[:-1])]
            # Starts past the end are not used, and a policy need not be defined there.
            rows = rounded(policy, np.minimum(starts, end - 1) / train_examples, multiple)
            wrong = np.flatnonzero(rows.batch_size != sizes)
            settled = int(wrong[0]) + 1 if len(wrong) else length
            if settled == length or starts[settled - 1] >= end:
                break
            sizes = rows.batch_size
        length = 2 * length if settled == length else max(settled, _SHORTEST_CHUNK_UPDATES)
        length = min(length, _LONGEST_CHUNK_UPDATES)
        settled = min(settled, int(np.searchsorted(starts, end)))
        rows = Settings(
            compact(rows.batch_size[:settled]),
            {name: compact(column[:settled]) for name, column in rows.hyper.items()},
        )
        _check_rows(rows, starts[:settled] / train_examples, policy, multiple)
        yield rows
        guess = rows.batch_size[-1]
        position = int(starts[settled - 1] + guess)
        done += settled
        if done > MOST_UPDATES:
            updates = done + max(0, end - position) / guess
            num_bytes = updates * 8 * (1 + len(rows.hyper))
            allowed = f"a plan of at most {MOST_UPDATES:,} updates; this one has about "
            allowed += f"{updates:.3g}, which take {num_bytes / 1e9:.3g} GB"
            raise UserError(Problem("epochs", epochs, allowed, position // train_examples or None))


def rounded(policy: Policy, epochs: Array, multiple: int) -> Settings:
    """The policy's settings with the batch size rounded down; the rule absorbs the rest."""
    # A batch size of 0, or without bound, is found by `_check_rows` where the run gets to it.
    with np.errstate(all="ignore"):
        batch_size, hyper = policy.at(epochs)
        rounded = np.floor(batch_size * (1 + _SNAP) / multiple) * multiple
        whole = np.abs(batch_size - rounded) <= _SNAP * rounded
        hyper = policy.rule.move(hyper, np.where(whole, rounded, batch_size), rounded)
        return Settings(rounded, policy.rule.capped(hyper))


def _check_rows(rows: Settings, epochs: Array, policy: Policy, multiple: int) -> None:
    checks = Checks()
    sizes = rows.batch_size

    def require(ok: NDArray[np.bool_], field: str, allowed: str, nearest: Array) -> None:
        if not ok.all():
            at = int(np.argmin(ok))
            given = float(sizes[at]) if np.isfinite(sizes[at]) else None
            near = float(nearest[at])
            allowed = f"{allowed}, at epoch {epochs[at]:g}"
            checks.require(False, field, given, allowed, int(near) if near >= multiple else None)

    none = np.full(sizes.shape, -1.0)
    require(sizes >= multiple, "batch_size", f"at least {multiple} examples", none + 1 + multiple)
    allowed = "a limit: the batch size grows without bound"
    require(sizes < _LARGEST_BATCH_SIZE, "max_batch_size", allowed, none)
    if policy.rule.train_examples is not None:
        limit = policy.rule.train_examples
        allowed = f"below the {limit} training examples, where the exact noise scale is above 0"
        nearest = none + 1 + (limit - 1) // multiple * multiple
        require(sizes < limit, "max_batch_size", allowed, nearest)
    checks.done()
