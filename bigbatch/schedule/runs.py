"""Columns of a plan as runs of equal values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.schedule.durations import MOST_UPDATES
from bigbatch.schedule.noise_scale import Array


def run_starts(column: NDArray[Any]) -> NDArray[np.int64]:
    """The indices at which a run of equal values starts."""
    return np.flatnonzero(np.r_[True, column[1:] != column[:-1]])


def as_runs(column: NDArray[Any]) -> list[list[float]]:
    """A column as [value, count] pairs."""
    starts = run_starts(column)
    counts = np.diff(starts, append=len(column))
    return [list(run) for run in zip(column[starts].tolist(), counts.tolist(), strict=True)]


def column_of(name: str, runs: Any) -> Array:
    """A column from its [value, count] pairs.

    Raises:
      ValueError: they are no such pairs.
    """
    table = np.array(runs)
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "if" or not len(table):
        raise ValueError(f"{name} is no list of pairs of numbers")
    counts = table[:, 1]
    # As numbers of a file may be any, nothing is made before their sum is known.
    if not (np.isfinite(table).all() and (counts >= 1).all() and counts.sum() <= MOST_UPDATES):
        raise ValueError(f"{name} is not of 1 to {MOST_UPDATES:,} updates")
    return np.repeat(table[:, 0].astype(np.float64), counts.astype(np.int64))
