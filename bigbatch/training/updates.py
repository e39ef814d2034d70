"""The updates of a run one after the other: from the plan's rows to the compiled functions.

What is logged, evaluated and saved in between is `bigbatch.training.loop`'s.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import distributed
from bigbatch.engine import functions
from bigbatch.engine.accumulator import Accumulator, on_host
from bigbatch.engine.task import COUNT, Sums
from bigbatch.layout import memory
from bigbatch.schedule.adaptive.course import Course
from bigbatch.schedule.plan import Row
from bigbatch.training import microbatches
from bigbatch.training.microbatches import MICROBATCHES_IN_FLIGHT
from bigbatch.training.preemption import StopRequest
from bigbatch.training.prefetch import Prefetch
from bigbatch.training.programs import precision
from bigbatch.training.progress import check_finite
from bigbatch.training.run import Run
from bigbatch.training.watch import Watchdog

# What did not fit into the memory, and what to try.
_MICROBATCH = "a microbatch", "set microbatch_examples_per_device to half of what it is"
_UPDATE = (
    "an update of the parameters",
    'its memory does not depend on the microbatch; use shard = "update" or more devices, or set '
    "microbatch_examples_per_device lower to leave it more room",
)


def updates(
    run: Run,
    state: functions.State,
    first_update: int,
    course: Course | None = None,
    watchdog: Watchdog | None = None,
    stop: StopRequest | None = None,
    use: Callable[[Any, functions.State], None] = lambda run, state: None,
) -> Generator[tuple[Row, functions.State, Sums], None, None]:
    """Runs the plan from an update on.

    Where a microbatch does not fit into the devices' memory, its update begins again with
    microbatches of half the size: the same examples and statistics. Of several processes all do,
    if the first microbatch of a size does not fit on one of them. Where a later one does not, the
    run ends: the others may have finished that update.

    Args:
      run: from `prepare`.
      state: the state before that update; its buffers are given away.
      first_update: its number.
      course: of an adaptive run. The measurement of each update goes into it before the one after
        the next is asked for.
      watchdog: is told what is waited for.
      stop: is asked before every microbatch.
      use: is told of the run with the smaller microbatches, and of the state before the update
        that begins again, in the place of the one that was yielded last.

    Raises:
      StopNoticeError: `stop` says so; the state that was yielded last still stands.
      RunError: not even the smallest microbatch fits, or a later one does not on one of several
        processes, or the update itself.

    Yields:
      For each update its row of the plan, the state after it and its loss's sums, both still being
      computed; with the sums `input_wait_s`, the seconds waited for its examples. The state is
      given away by asking for the next one.
    """
    course = Course(run.plan) if course is None else course
    watchdog, stop = watchdog or Watchdog(), stop or StopRequest()
    while True:
        left = yield from _updates(run, state, first_update, course, watchdog, stop)
        if left is None:
            return
        state, first_update = left
        run = run.smaller()
        use(run, state)


def _updates(
    run: Run,
    state: functions.State,
    first_update: int,
    course: Course,
    watchdog: Watchdog,
    stop: StopRequest,
) -> Generator[tuple[Row, functions.State, Sums], None, tuple[functions.State, int] | None]:
    """The updates with one layout, as far as the memory allows.

    Returns:
      Where a microbatch did not fit, the state before its update and that update's number.
    """
    dtype = precision(state)
    accumulator = run.programs.empty_accumulator()
    update, known = first_update, course.known_updates
    untried = set(run.programs.accumulate)
    requests = microbatches.requests(course.plan, run.layout, update, known)
    with Prefetch(run.microbatch, requests, max_in_flight=MICROBATCHES_IN_FLIGHT) as parts:
        while update < course.plan.num_updates:
            row = course.plan.row(update)
            waited_s = parts.waited_s
            source: Iterator[tuple[int, Any]] = parts
            while True:
                # Once the state was given away there is nothing to save until the update is done.
                asked = stop if source is parts else StopRequest()
                total = _accumulate(run, row, state, accumulator, source, untried, watchdog, asked)
                if total is None:
                    return state, update
                hyper = {
                    name: _scalar(row.hyper[name], dtype, run.mesh)
                    for name in run.optimizer.hyper_names
                }
                try:
                    state, accumulator, sums = run.programs.apply_update(state, total, hyper)
                except jax.errors.JaxRuntimeError as error:
                    raise memory.exhausted(error, *_UPDATE) from error
                if not run.programs.reproducible or bool(sums[functions.IS_EXACT]):
                    break
                # A bound of the sums had failed and was raised; nothing else has changed.
                source = _made(run, row)
            update += 1
            reported: dict[str, Any] = {**sums, "input_wait_s": parts.waited_s - waited_s}
            yield row, state, reported
            # The next update may just have become known: its microbatches are made while this one
            # is computed.
            before, known = known, course.known_updates
            parts.request(microbatches.requests(course.plan, run.layout, before, known))
    return None


def _accumulate(
    run: Run,
    row: Row,
    state: functions.State,
    accumulator: Accumulator,
    source: Iterator[tuple[int, Any]],
    untried: set[int],
    watchdog: Watchdog,
    stop: StopRequest,
) -> Accumulator | None:
    """The sums of an update's microbatches; None where one of them did not fit.

    `untried` are the sizes that have not been computed yet; those that are here leave it.
    """
    # XLA's CPU client deadlocks when programs with collectives are in flight over more devices
    # than it has threads; there each is waited for before the next one is sent.
    holds_collective = run.layout.devices < run.mesh.size
    one_at_a_time = run.mesh.size > 1 and run.mesh.devices.flat[0].platform == "cpu"
    is_first_of_any, failure = False, None
    for part in run.layout.microbatches(row.batch_size):
        # After a failure too: the processes ask equally often, so that all stop at one place.
        stop.check()
        if failure is not None:
            continue
        with watchdog.phase("input"):
            size, examples = next(source)
        if one_at_a_time and part.offset_examples == 0:
            # The update before; all that the host had to do is done by now.
            with watchdog.phase(waits_for()):
                jax.block_until_ready(state)
        is_first = size in untried
        is_first_of_any |= is_first
        untried.discard(size)
        try:
            accumulator = run.programs.accumulate[size](state, accumulator, examples, run.frozen)
            # The first of its size is waited for: if it does not fit that shows here, while the
            # state before the update still stands.
            if is_first or (one_at_a_time and holds_collective):
                with watchdog.phase(waits_for()):
                    jax.block_until_ready(accumulator)
        except jax.errors.JaxRuntimeError as error:
            failure = memory.exhausted(error, *_MICROBATCH)
            # The other processes would not ask whether all went well here, or wait for this one.
            if jax.process_count() > 1 and (holds_collective or not is_first):
                raise failure from error
    if failure is not None or is_first_of_any:
        with watchdog.phase(waits_for()):
            if memory.agreed(failure):
                return None
    return accumulator


@functools.lru_cache(maxsize=64)
def _scalar(value: float, dtype: np.dtype, mesh: Mesh) -> np.ndarray | jax.Array:
    """A hyperparameter for `apply_update`.

    To a single device the call brings it faster than a put of its own; to several it does not, and
    one update's values are mostly those of the one before.
    """
    scalar = np.asarray(value, dtype)
    return (
        scalar
        if mesh.size == 1
        else distributed.put(scalar, NamedSharding(mesh, functions.REPLICATED))
    )


def _made(run: Run, row: Row) -> Iterator[tuple[int, Any]]:
    """The microbatches of an update, made when they are asked for."""
    for part in run.layout.microbatches(row.batch_size):
        request = microbatches.Request(row.first_example + part.offset_examples, part)
        yield run.microbatch(request)


def waits_for() -> str:
    """What a call that is not done waits for."""
    return "device" if jax.process_count() == 1 else "other host"


def fit(run: Run) -> functions.State:
    """The state at the end of a run's plan, trained without a directory.

    Nothing is logged or saved; `updates` gives the state after every update.

    Raises:
      RunError: the loss, a gradient or the parameters are not finite.
    """
    course = Course(run.plan, run.controller)
    final = first = run.first_state()
    last_loss, unread = math.nan, deque[tuple[Row, Sums]]()

    def read() -> None:
        nonlocal last_loss
        row, sums = unread.popleft()
        found = on_host(sums)
        check_finite(run, row, found, last_loss)
        if found[COUNT]:
            last_loss = found[run.task.minimised] / found[COUNT]
        if run.controller is not None:
            course.observe(run.measurement(row, found))

    for row, final, sums in updates(run, first, 0, course):  # noqa: B007 - the last is the result
        unread.append((row, sums))
        # A controller needs each measurement at once; else the device need not wait for us.
        if run.controller is not None or len(unread) > 1:
            read()
    while unread:
        read()
    return final
