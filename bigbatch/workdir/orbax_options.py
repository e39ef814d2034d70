"""What Orbax is told that is not its way: how to wait, what to keep, and what not to say."""

import dataclasses
import functools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp


class Preservation:
    """Which checkpoints stay: the newest, and those that are kept for good."""

    def __init__(self, newest: int, always: Callable[[int], bool]):
        self._newest = newest
        self._always = always

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's protocol: one answer for each checkpoint, oldest first."""
        first_kept = len(checkpoints) - self._newest
        return [i >= first_kept or self._always(c.step) for i, c in enumerate(checkpoints)]


def context() -> ocp.Context:
    """How checkpoints are written and read."""
    context = _Context()
    # Else Orbax looks for what it has written by a pattern, and in a directory with brackets in its
    # name finds nothing; a small state then takes twice as long, too.
    context.array.saving.use_ocdbt = False
    # It takes two thirds of the time, on the cores of the input, and saves 8 % of the bytes.
    context.array.saving.use_compression = False
    # What is written is a copy already, and is read piece by piece.
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    return context


class _Context(ocp.Context):
    @property
    def async_options(self) -> ocp.options.AsyncOptions:
        # Else what writes the state waits 5 minutes for a directory that could not be made, and the
        # process, told of the error at once, cannot end before.
        return _AsyncOptions(create_directories_asynchronously=False)


class _AsyncOptions(ocp.options.AsyncOptions):
    def v0(self) -> Any:
        return dataclasses.replace(super().v0(), barrier_sync_fn=_meet)


def _meet(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, save where this one's part of a checkpoint has failed.

    It would do so at the end, and they in the middle: each for the other, for twenty minutes. What
    has failed is raised at the next checkpoint, this process ends, and so do they.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if not (in_background and sys.exception()):
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@functools.cache
def say_nothing_twice() -> None:
    """Leaves an error of a write to be raised, which Orbax does, and to nobody else.

    It also logs the traceback from each of its threads, and closes its loop while other arrays are
    being written, on each of which Python then remarks. And it warns of every checkpoint that has
    no OCDBT database.
    """
    for logger in (logging.getLogger("absl"), logging.getLogger()):
        logger.addFilter(lambda record: "/orbax/checkpoint/" not in record.pathname)
    remark = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            remark(unraisable)

    sys.unraisablehook = hook
