"""Where the wall time of a start goes, by the kinds of `workdir.starts`."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from bigbatch.training.watch import Watchdog
from bigbatch.workdir import starts

# When this process has compiled programs, and in how many seconds.
_compiled: list[tuple[float, float]] = []


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """While programs are compiled."""
    began_s = time.time()
    yield
    _compiled.append((time.time(), time.time() - began_s))


class WallTime:
    """The seconds of a run up to now, from the beginning of its loop on.

    Args:
      began_s: when this start began, in seconds since 1970.
      before_s: by kind, of all that is in the state at the beginning of the loop.
      watchdog: is told of what the loop waits for.
    """

    def __init__(self, began_s: float, before_s: Mapping[str, float], watchdog: Watchdog):
        self._loop_s, self._watchdog = time.monotonic(), watchdog
        compiling_s = sum(seconds for ended_s, seconds in _compiled if ended_s >= began_s)
        until_now_s = time.time() - began_s - compiling_s
        own = {"start-up": until_now_s, "compilation": compiling_s}
        self._before_s = {k: before_s.get(k, 0.0) + own.get(k, 0.0) for k in starts.KINDS}

    def spent_s(self) -> dict[str, float]:
        """By kind. What the loop did not wait for counts as the device's, as waiting for it."""
        own = {k: self._watchdog.spent_s[k] for k in ("input", "evaluation", "checkpoint")}
        own["device"] = time.monotonic() - self._loop_s - sum(own.values())
        return {k: round(own.get(k, 0.0) + self._before_s[k], 3) for k in starts.KINDS}
