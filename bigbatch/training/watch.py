"""A watchdog that says what a run is waiting for, when nothing has moved for long.

The loop tells in which phase it is; a thread looks on. It says and does not end anything: a slow
disk may come back, and a host that is gone is found by JAX's heartbeats.
"""

import collections
import threading
import time
from collections.abc import Callable
from typing import Self

STALL_S = 60.0

# What the loop can be waiting for, in words for the user.
PHASES = {
    "input": "the input: the next microbatch has not been made",
    "device": "the device: it has not finished what it was sent",
    "checkpoint": "the checkpoint: the file system has not taken it",
    "other host": "another host, or the device: an exchange between processes has not ended",
    "evaluation": "the evaluation",
}


class Watchdog:
    """Looks after the phases of a loop. Use it as a context manager; without, nobody looks.

    Args:
      say: told in words when a phase has lasted `stall_s`, and again after each doubling.
      stall_s: seconds without a movement that are worth a word.

    Attributes:
      spent_s: seconds in each phase so far, those within another one left out.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None, stall_s: float = STALL_S):
        self._say = say
        self._stall_s = stall_s
        self.spent_s: dict[str, float] = collections.defaultdict(float)
        self._where = "at the start"
        self._phase: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def phase(self, name: str) -> "_Phase":
        """While the caller waits for one of `PHASES`; phases may lie within each other."""
        return _Phase(self, name)

    def moved(self, where: str) -> None:
        """Notes where the loop is, in words."""
        self._where = where

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        told: tuple[str, float] | None = None
        limit_s = self._stall_s
        while not self._ended.wait(self._stall_s / 10):
            phase = self._phase
            if phase is None:
                continue
            if phase != told:
                limit_s = self._stall_s
            waited_s = time.monotonic() - phase[1]
            if waited_s >= limit_s:
                told, limit_s = phase, 2 * waited_s
                self._say(
                    f"nothing has moved for {waited_s:.0f} s, {self._where}; waiting for "
                    f"{PHASES[phase[0]]}"
                )


class _Phase:
    """A context manager. The loop enters several an update, and one of a generator costs more."""

    __slots__ = ("_began_s", "_name", "_outer", "_watchdog")

    def __init__(self, watchdog: Watchdog, name: str):
        self._watchdog, self._name = watchdog, name

    def __enter__(self) -> None:
        self._outer, self._began_s = self._watchdog._phase, time.monotonic()
        self._watchdog._phase = (self._name, self._began_s)

    def __exit__(self, *exception: object) -> None:
        # Something has moved: the outer phase counts anew.
        outer, now_s = self._outer, time.monotonic()
        if outer is None:
            self._watchdog.spent_s[self._name] += now_s - self._began_s
        self._watchdog._phase = None if outer is None else (outer[0], now_s)
