"""The critical batch size from runs at several batch sizes: the trade of updates for examples.

McCandlish et al. 2018 (section 2.3): to reach one loss with updates of B examples takes S updates
and E = S B examples with (S / S_min - 1) (E / E_min - 1) = 1. That is the straight line

    S = S_min + E_min / B,

in 1/B, and the critical batch size E_min / S_min is where both are twice their least.

>>> fitted = fit([16, 32, 64, 128], [700.0, 400.0, 250.0, 175.0])
>>> round(fitted.fewest_updates), round(fitted.fewest_examples), round(fitted.critical_batch_size)
(100, 9600, 96)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bigbatch.checks import Checks
from bigbatch.errors import Problem


class Fit(NamedTuple):
    """The hyperbola through (updates, examples), with standard errors.

    Attributes:
      fewest_updates: S_min, reached with any larger batch.
      fewest_updates_error: its standard error.
      fewest_examples: E_min, reached with any smaller batch.
      fewest_examples_error: its standard error.
      critical_batch_size: E_min / S_min in examples; infinite where S_min is not above 0.
      critical_batch_size_error: its standard error by the delta method.
    """

    fewest_updates: float
    fewest_updates_error: float
    fewest_examples: float
    fewest_examples_error: float
    critical_batch_size: float
    critical_batch_size_error: float

    def updates(self, batch_size: float) -> float:
        """S at a batch size."""
        return self.fewest_updates + self.fewest_examples / batch_size


def fit(batch_sizes: Sequence[float], updates: Sequence[float]) -> Fit:
    """Fits S_min and E_min by least squares of the relative residuals.

    The updates to reach a loss scatter in proportion to themselves, so each residual is divided by
    its S.

    Args:
      batch_sizes: B of each run, at least three different ones.
      updates: S of each run, above 0; need not be whole.

    Returns:
      The fit; its errors come from the residuals, with two degrees of freedom taken by the fit.

    Raises:
      UserError: there are fewer than three batch sizes, or a number is not above 0.
    """
    checks = Checks()
    checks.require(
        len(batch_sizes) == len(updates) and len(set(batch_sizes)) >= 3,
        "batch_sizes",
        list(batch_sizes),
        f"at least three different ones, one for each of the {len(updates)} numbers of updates",
    )
    for name, values in (("batch_sizes", batch_sizes), ("updates", updates)):
        bad = [value for value in values if not value > 0]
        if bad:
            checks.problems.append(Problem(name, bad[0], "numbers above 0"))
    checks.done()
    sizes, counts = np.asarray(batch_sizes, np.float64), np.asarray(updates, np.float64)
    matrix = np.stack([1 / counts, 1 / (sizes * counts)], axis=1)
    inverse = np.linalg.inv(matrix.T @ matrix)
    fewest, examples = inverse @ matrix.T @ np.ones(len(counts))
    residuals = matrix @ [fewest, examples] - 1
    covariance = inverse * float(residuals @ residuals) / (len(counts) - 2)
    errors = np.sqrt(np.diag(covariance))
    critical, critical_error = np.inf, np.inf
    if fewest > 0:
        critical = examples / fewest
        slope = np.array([-critical, 1.0]) / fewest
        critical_error = np.sqrt(max(slope @ covariance @ slope, 0.0))
    return Fit(*map(float, (fewest, errors[0], examples, errors[1], critical, critical_error)))


def reached_after(losses: Sequence[float], window_examples: float, target: float) -> float | None:
    """Examples after which a loss is reached for good, interpolated between windows.

    Args:
      losses: mean training loss of each window of examples, in order.
      window_examples: length of a window.
      target: the loss.

    Returns:
      Examples, counted to a window's middle; None where the last window is above the target.

    >>> reached_after([3.0, 2.0, 1.0], 100, target=1.5)
    200.0
    """
    values = np.asarray(losses, np.float64)
    above = np.flatnonzero(~(values <= target))
    if not len(values) or (len(above) and above[-1] == len(values) - 1):
        return None
    if not len(above):
        return window_examples / 2
    last = int(above[-1])
    share = (values[last] - target) / (values[last] - values[last + 1])
    return float((last + 0.5 + share) * window_examples)
