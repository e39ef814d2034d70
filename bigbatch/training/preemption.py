"""A notice that the machine will be taken away, and the one moment at which all processes heed it.

SIGTERM is the notice of Slurm, Kubernetes and the clouds' preemptible machines, SIGUSR1 or SIGUSR2
what Slurm is often asked to send, SIGHUP that of a terminal that closes, SIGINT that of Ctrl-C. An
update of many examples may last longer than the notice gives, so the run does not wait for its end:
it drops what the update has summed and saves the state at its start, which nothing has overwritten
yet. A second SIGINT does not wait for that.

With several processes, JAX's preemption service carries the notice of one to all, and finds a
moment that none of them has passed: each asks once before every microbatch, in the same order.
"""

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

# The service wants numbers that only grow, in all runs of a process.
_MOMENTS = itertools.count(1)
_NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopNoticeError(Exception):
    """The run is to stop now; raised within the loop, on all processes at the same moment."""


class StopRequest:
    """Whether someone has asked the run to stop. Use it as a context manager.

    Outside of it signals have the effect that they had before: where nothing is trained there is
    nothing to save. What is ignored stays so, as SIGHUP under nohup.

    Attributes:
      notice: the number of the signal that came first; 0 while none has.
    """

    def __init__(self) -> None:
        self.notice = 0
        self._listening = self._interrupted = False
        self._previous: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """What a shell reports of a program that such a signal has ended."""
        return 128 + (self.notice or signal.SIGTERM)

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
        elif self.notice:
            raise StopNoticeError

    def __enter__(self) -> Self:
        self._listening = True
        # Only the main thread may set a handler. JAX's service has one of its own for SIGTERM.
        if threading.current_thread() is threading.main_thread():
            own = jax.distributed.is_initialized() and signal.SIGTERM
            for number in _NOTICES:
                if number != own and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening = False
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            self.__exit__()
            signal.raise_signal(number)
        self._interrupted |= number == signal.SIGINT
        self.notice = self.notice or number
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
