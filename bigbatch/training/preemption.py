"""A notice that the machine will be taken away, and the one moment at which all processes heed it.

SIGTERM is the notice of Slurm, Kubernetes and the clouds' preemptible machines. An update of many
examples may last longer than the notice gives, so the run does not wait for its end: it drops what
the update has summed and saves the state at its start, which nothing has overwritten yet.

With several processes, JAX's preemption service carries the notice of one to all, and finds a
moment that none of them has passed: each asks once before every microbatch, in the same order.
"""

import itertools
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

# The service wants numbers that only grow, in all runs of a process.
_MOMENTS = itertools.count(1)


class StopNoticeError(Exception):
    """The run is to stop now; raised within the loop, on all processes at the same moment."""


class StopRequest:
    """Whether someone has asked the run to stop. Use it as a context manager.

    Outside of it SIGTERM has the effect that it had before: where nothing is trained there is
    nothing to save.
    """

    def __init__(self) -> None:
        self._asked = self._listening = False
        self._previous: Any = None

    def check(self) -> None:
        """To be called by all processes at the same places in the loop.

        Raises:
          StopNoticeError: it is time to stop.
        """
        if not self._listening:
            return
        if jax.distributed.is_initialized():
            if multihost_utils.reached_preemption_sync_point(next(_MOMENTS)):
                raise StopNoticeError
        elif self._asked:
            raise StopNoticeError

    def __enter__(self) -> Self:
        self._listening = True
        # JAX's service has a handler of its own. Only the main thread may set one.
        if (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        ):
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening = False
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
