"""When a run logs, evaluates and saves: after updates, or by the clock."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigbatch import distributed
from bigbatch.schedule.intervals import MINUTES, Every, Intervals
from bigbatch.training.progress import span
from bigbatch.training.run import Run
from bigbatch.training.watch import Watchdog

_OTHERWISE = {
    "log_every": Every(1, "updates"),
    "evaluate_every": Every(1, "epochs"),
    "checkpoint_every": Every(1, "epochs"),
}
# What a checkpoint is believed to cost before one was written, and what it costs at least.
_SAVE_S, _LEAST_S = 1.0, 1e-3


def intervals(run: Run, given: Mapping[str, Any]) -> Intervals:
    """The intervals of `train`.

    Raises:
      TypeError: a name is none of them.
      UserError: a value is not above 0, or there are two of one interval.
    """
    names = Intervals.names()
    for name in given:
        if name not in names:
            raise TypeError(f"train() has no argument {name!r}; its intervals: {', '.join(names)}")
    return Intervals.of(given, _OTHERWISE, run.tokens_per_example)


def stays(run: Run, every: Every | None, updates_done: int) -> bool:
    """Whether the checkpoint after so many updates is kept for good."""
    if every is None or not 0 < updates_done <= run.plan.num_updates:
        return False
    return every.due(*span(run, run.plan.row(updates_done - 1)))


def best_interval_s(save_s: float, failure_s: float) -> float:
    """Seconds of work between two checkpoints that lose the least time (Daly 2006, equation 37).

    To the first order it is Young's (1974) sqrt(2 save_s failure_s). Failures come by chance, once
    in so many seconds.

    Args:
      save_s: for which work waits at each checkpoint, above 0.
      failure_s: mean time between failures.

    >>> round(best_interval_s(save_s=2.0, failure_s=86_400.0))
    587
    """
    share = save_s / (2 * failure_s)
    if share >= 1:
        return failure_s
    return 2 * failure_s * math.sqrt(share) * (1 + math.sqrt(share) / 3 + share / 9) - save_s


class Clock:
    """Says after which updates a run is saved by the clock.

    With several processes that of process 0 counts. It tells the others when they look at it
    together: after half of the updates that are left, as it seems, and half of those, until the
    time has come. So a look costs a small message of its own and the updates nothing.

    Args:
      due: when the run saves.
      done: updates.
      watchdog: knows how long updates have waited for checkpoints.
    """

    def __init__(self, due: Intervals, done: int, watchdog: Watchdog):
        self._every, self._failure_hours = due.checkpoint_every, due.failure_every_hours
        self._watchdog, self._saves = watchdog, 0
        self._began_s, self._done, self._next = time.monotonic(), done, done + 1

    def due(self, done: int, wait: Callable[[], None]) -> bool:
        """Whether to save after so many updates; `wait` waits for all that was sent."""
        if self._every.unit != MINUTES or done < self._next:
            return False
        is_alone = jax.process_count() == 1
        if not is_alone:
            wait()
        passed_s, updates = time.monotonic() - self._began_s, done - self._done
        left_s = self.interval_s() - passed_s
        half = 1 if is_alone else max(1, int(updates * left_s / max(passed_s, _LEAST_S) / 2))
        told = int(distributed.gather(str(half if left_s > 0 else 0).encode())[0])
        self._next = done + told
        return told == 0

    def saved(self, done: int) -> None:
        """Notes that the run was saved, for whatever reason."""
        self._saves += 1
        self._began_s, self._done, self._next = time.monotonic(), done, done + 1

    def interval_s(self) -> float:
        """From one checkpoint to the next."""
        if self._failure_hours is None:
            return 60 * float(self._every.value)
        spent_s = self._watchdog.spent_s["checkpoint"]
        save_s = max(spent_s / self._saves, _LEAST_S) if self._saves else _SAVE_S
        return best_interval_s(save_s, 3600 * self._failure_hours)
