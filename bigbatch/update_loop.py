"""The updates of a run one after the other: from the plan's rows to the compiled functions.

What is logged, evaluated and saved in between is `bigbatch.train`'s.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import numpy as np

from bigbatch import memory, microbatches, step
from bigbatch.course import Course
from bigbatch.data.prefetch import Prefetch
from bigbatch.errors import RunError
from bigbatch.microbatches import MICROBATCHES_IN_FLIGHT
from bigbatch.plan import Row
from bigbatch.preemption import StopRequest
from bigbatch.run import Updates
from bigbatch.task import Sums
from bigbatch.watch import Watchdog


def updates(
    run: Updates,
    state: step.State,
    first_update: int,
    course: Course | None = None,
    watchdog: Watchdog | None = None,
    stop: StopRequest | None = None,
    use: Callable[[Any], None] = lambda run: None,
) -> Generator[tuple[Row, step.State, Sums], None, None]:
    """Runs the plan from an update on.

    Where a microbatch does not fit into the devices' memory, its update begins again with
    microbatches of half the size: the same examples and statistics.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: the state before that update; its buffers are given away.
      first_update: its number.
      course: of an adaptive run. The measurement of each update goes into it before the one after
        the next is asked for.
      watchdog: is told what is waited for.
      stop: is asked before every microbatch.
      use: is told of the run with the smaller microbatches.

    Raises:
      StopNoticeError: `stop` says so; the state that was yielded last still stands.
      RunError: not even the smallest microbatch fits, or it does not on one of several processes.

    Yields:
      For each update its row of the plan, the state after it and its loss's sums, both still being
      computed; with the sums `input_wait_s`, the seconds waited for its examples. The state is
      given away by asking for the next one.
    """
    course = Course(run.plan) if course is None else course
    watchdog, stop = watchdog or Watchdog(), stop or StopRequest()
    while True:
        try:
            parts = _updates(run, state, first_update, course, watchdog, stop)
            with contextlib.closing(parts):
                for row, after, sums in parts:
                    state, first_update = after, row.update + 1
                    yield row, state, sums
            return
        except memory.OutOfMemoryError as error:
            # Another process may have room, and cut its updates as before.
            if jax.process_count() > 1:
                advice = "set microbatch_examples_per_device to half of what it is"
                raise RunError(f"a microbatch does not fit: {error}; {advice}") from error
        run = run.smaller()
        use(run)


def _updates(
    run: Updates,
    state: step.State,
    first_update: int,
    course: Course,
    watchdog: Watchdog,
    stop: StopRequest,
) -> Generator[tuple[Row, step.State, Sums], None, None]:
    """The updates with one layout, as far as the memory allows."""
    # XLA's CPU client deadlocks when programs with collectives are in flight over more devices
    # than it has threads; there each update is waited for.
    one_at_a_time = run.mesh.size > 1 and run.mesh.devices.flat[0].platform == "cpu"
    precision = jax.tree.leaves(state.params)[0].dtype
    accumulator = run.programs.empty_accumulator()
    update, known = first_update, course.known_updates
    untried = set(run.programs.accumulate)
    requests = microbatches.requests(course.plan, run.layout, update, known)
    with Prefetch(run.microbatch, requests, max_in_flight=MICROBATCHES_IN_FLIGHT) as parts:
        while update < course.plan.num_updates:
            row = course.plan.row(update)
            update += 1
            waited_s = parts.waited_s
            addends = run.programs.addends(row.batch_size)
            for _ in run.layout.microbatches(row.batch_size):
                stop.check()
                with watchdog.phase("input"):
                    size, examples = next(parts)
                with memory.noticed():
                    call = run.programs.accumulate[size]
                    accumulator = call(state, accumulator, examples, *addends)
                    # The first of its size is waited for: if it does not fit that shows here, while
                    # the state before the update still stands.
                    if size in untried or (one_at_a_time and run.layout.devices < run.mesh.size):
                        with watchdog.phase(waits_for()):
                            jax.block_until_ready(accumulator)
                untried.discard(size)
            # Host scalars: the call brings them to the devices faster than a put of their own.
            hyper = {name: np.asarray(row.hyper[name], precision) for name in run.hyper_names}
            state, accumulator, sums = run.programs.apply_update(state, accumulator, hyper)
            while addends and not bool(sums[step.IS_EXACT]):
                state, accumulator, sums = _again(run, row, state, accumulator, hyper)
            if one_at_a_time:
                with watchdog.phase(waits_for()):
                    jax.block_until_ready(state)
            reported: dict[str, Any] = {**sums, "input_wait_s": parts.waited_s - waited_s}
            yield row, state, reported
            # The next update may just have become known: its microbatches are made while this one
            # is computed.
            before, known = known, course.known_updates
            parts.request(microbatches.requests(course.plan, run.layout, before, known))


def _again(
    run: Updates, row: Row, state: step.State, accumulator: Any, hyper: Mapping[str, np.ndarray]
) -> tuple[step.State, Any, Sums]:
    """Computes an update once more, where a bound of its sums had failed and was raised."""
    addends = run.programs.addends(row.batch_size)
    for part in run.layout.microbatches(row.batch_size):
        request = microbatches.Request(row.first_example + part.offset_examples, part)
        size, examples = run.microbatch(request)
        accumulator = run.programs.accumulate[size](state, accumulator, examples, *addends)
    return run.programs.apply_update(state, accumulator, hyper)


def waits_for() -> str:
    """What a call that is not done waits for."""
    return "device" if jax.process_count() == 1 else "other host"
