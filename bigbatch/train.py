"""The training loop: a plan, a stream of examples and two compiled functions.

It may be killed at any moment. Called again on the same working directory it continues from the
newest checkpoint, and ends with the same parameters: bit for bit on the same devices.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from bigbatch import gradient_noise, metrics, microbatches, step, training_log, workdir
from bigbatch.checkpoint import Checkpoints, params_sha256
from bigbatch.course import Course
from bigbatch.data.prefetch import Prefetch
from bigbatch.data.record_set import RecordSet
from bigbatch.evaluate import evaluate
from bigbatch.event_files import EventFiles
from bigbatch.plan import Row
from bigbatch.run import Run, Updates
from bigbatch.task import Sums
from bigbatch.training_log import Progress

# Microbatches made ahead of the device: enough to hide their making, few enough for host memory.
MICROBATCHES_IN_FLIGHT = 4


def train(run: Run, directory: Path, *, show_progress: bool = False) -> dict[str, Any]:
    """Trains the run's plan to its end, from wherever the working directory stands.

    Args:
      run: from `run.prepare`.
      directory: a working directory that was claimed for this run.
      show_progress: whether to show a progress bar (on a terminal) and every evaluation, on
        standard error.

    Returns:
      What was written to result.json.

    Raises:
      RunError: the loss is no longer finite.
    """
    files = workdir.Workdir(directory)
    with Checkpoints(files.checkpoints) as checkpoints:
        state, progress = restore(run, checkpoints)
        course = Course(run.plan, run.controller, progress.controller)
        run = _as_known(run, course, files)
        metrics.truncate(files.metrics, last_update=progress.updates)
        with (
            metrics.MetricsLog(files.metrics, _events(run, files, progress)) as log,
            training_log.progress_bar(run, progress, show_progress) as bar,
        ):
            say = functools.partial(bar.write, file=sys.stderr) if show_progress else None
            state, progress = _loop(run, course, files, state, progress, checkpoints, log, bar, say)
    run = _as_known(run, course, files)
    if run.controller is not None:
        workdir.write_text(files.plan, course.to_json())
    result = {
        "updates": run.plan.num_updates,
        "examples": run.plan.num_examples,
        "test_accuracy": progress.test_accuracy,
        "test_loss": progress.test_loss,
        "train_loss": progress.train_loss,
        "seconds": round(progress.seconds, 3),
        "compilations": run.programs.compilations,
        "params_sha256": params_sha256(state.params),
    }
    if isinstance(run.data, RecordSet) and run.config.data.on_bad_record == "replace":
        result["bad_records"] = run.data.num_bad_records
    workdir.write_json(files.result, result)
    return result


def _events(run: Run, files: workdir.Workdir, progress: Progress) -> EventFiles:
    """The TensorBoard files of a run that goes on from there."""
    done = progress.updates
    examples = int(run.plan.batch_sizes[:done].sum())
    return EventFiles(
        files.tensorboard, last_update=done, last_example=examples, config=run.config.tree
    )


def restore(run: Run, checkpoints: Checkpoints) -> tuple[step.State, Progress]:
    """The state and progress of the newest checkpoint, or of the start."""
    state = run.init_state()
    latest = checkpoints.latest()
    if latest is None:
        return state, Progress()
    update, record = latest
    state = checkpoints.restore(update, run.programs.unite(state))
    return run.programs.divide(state), Progress.read(record["progress"])


def updates(
    run: Updates, state: step.State, first_update: int, course: Course | None = None
) -> Generator[tuple[Row, step.State, Sums], None, None]:
    """Runs the plan from an update on.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: the state before that update; its buffers are given away.
      first_update: its number.
      course: of an adaptive run. The measurement of each update goes into it before the one after
        the next is asked for.

    Yields:
      For each update its row of the plan, the state after it and its loss's sums, both still being
      computed; with the sums `input_wait_s`, the seconds waited for its examples. The state is
      given away by asking for the next one.
    """
    # XLA's CPU client deadlocks when programs with collectives are in flight over more devices
    # than it has threads; there each update is waited for.
    one_at_a_time = run.mesh.size > 1 and run.mesh.devices.flat[0].platform == "cpu"
    replicated = NamedSharding(run.mesh, step.REPLICATED)
    precision = jax.tree.leaves(state.params)[0].dtype
    accumulator = run.programs.empty_accumulator()
    course = Course(run.plan) if course is None else course
    update, known = first_update, course.known_updates
    requests = microbatches.requests(course.plan, run.layout, update, known)
    with Prefetch(run.microbatch, requests, max_in_flight=MICROBATCHES_IN_FLIGHT) as parts:
        while update < course.plan.num_updates:
            row = course.plan.row(update)
            update += 1
            waited_s = parts.waited_s
            addends = run.programs.addends(row.batch_size)
            for _ in run.layout.microbatches(row.batch_size):
                size, examples = next(parts)
                accumulator = run.programs.accumulate[size](state, accumulator, examples, *addends)
                if one_at_a_time and run.layout.devices < run.mesh.size:
                    jax.block_until_ready(accumulator)
            hyper = {name: np.asarray(row.hyper[name], precision) for name in run.hyper_names}
            hyper = jax.device_put(hyper, replicated)
            state, accumulator, sums = run.programs.apply_update(state, accumulator, hyper)
            while addends and not bool(sums[step.IS_EXACT]):
                state, accumulator, sums = _again(run, row, state, accumulator, hyper)
            if one_at_a_time:
                jax.block_until_ready(state)
            reported: dict[str, Any] = {**sums, "input_wait_s": parts.waited_s - waited_s}
            yield row, state, reported
            # The next update may just have become known: its microbatches are made while this one
            # is computed.
            before, known = known, course.known_updates
            parts.request(microbatches.requests(course.plan, run.layout, before, known))


def _as_known(run: Run, course: Course, files: workdir.Workdir) -> Run:
    """The run with all that is known of its plan, which an adaptive run also writes down."""
    if run.plan is course.plan:
        return run
    workdir.write_text(files.plan, course.to_json())
    return dataclasses.replace(run, plan=course.plan)


def _again(
    run: Updates, row: Row, state: step.State, accumulator: Any, hyper: Mapping[str, jax.Array]
) -> tuple[step.State, Any, Sums]:
    """Computes an update once more, where a bound of its sums had failed and was raised."""
    addends = run.programs.addends(row.batch_size)
    for part in run.layout.microbatches(row.batch_size):
        request = microbatches.Request(row.first_example + part.offset_examples, part)
        size, examples = run.microbatch(request)
        accumulator = run.programs.accumulate[size](state, accumulator, examples, *addends)
    return run.programs.apply_update(state, accumulator, hyper)


def _loop(
    run: Run,
    course: Course,
    files: workdir.Workdir,
    state: step.State,
    progress: Progress,
    checkpoints: Checkpoints,
    log: metrics.MetricsLog,
    bar: tqdm,
    say: Callable[[str], None] | None,
) -> tuple[step.State, Progress]:
    """Runs the updates that are left, and logs, evaluates and saves in between."""
    config, train_examples = run.config, run.plan.train_examples
    start_s = time.monotonic() - progress.seconds
    late: tuple[Row, Sums] | None = None

    def take(progress: Progress, row: Row, sums: Sums) -> Progress:
        course.observe(gradient_noise.measurement_of(sums))
        now_s = time.monotonic() - start_s
        progress = progress._replace(controller=course.saved)
        return training_log.record(run, progress, row, sums, log, now_s)

    remaining = updates(run, state, progress.updates, course)
    for row, state, sums in remaining:
        # The update before this one: the device has finished it or will not wait for us.
        if late is not None:
            progress = take(progress, *late)
            run = _as_known(run, course, files)
            bar.total = run.plan.num_examples
        late = row, sums
        bar.update(row.batch_size)
        bar.set_postfix(batch_size=row.batch_size, loss=progress.train_loss, refresh=False)
        span = row.first_example, row.batch_size, row.update, train_examples
        is_last = row.update + 1 == run.plan.num_updates
        evaluation_due = is_last or config.evaluate_every.due(*span)
        checkpoint_due = is_last or config.checkpoint_every.due(*span)
        if evaluation_due or checkpoint_due:
            progress = take(progress, *late)
            late = None
        if evaluation_due:
            test = evaluate(run, state)
            log.write(training_log.position(run, row) | test)
            if say is not None:
                say(training_log.evaluation_line(run, row, progress, test))
            progress = progress._replace(
                test_loss=test["test_loss"], test_accuracy=test["test_accuracy"]
            )
        if checkpoint_due:
            progress = progress._replace(seconds=time.monotonic() - start_s)
            record = {
                "progress": progress._asdict(),
                "examples": row.first_example + row.batch_size,
                "plan": run.plan.fingerprint,
                "seed": config.seed,
            }
            log.sync()
            checkpoints.save(row.update + 1, run.programs.unite(state), record)
    return state, progress
