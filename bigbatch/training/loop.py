"""The training loop: a plan, a stream of examples and two compiled functions.

It may be killed at any moment. Called again on the same working directory it continues from the
newest checkpoint, and ends with the same parameters: bit for bit on the same devices. Told to stop,
it drops the update that it is in and saves the state at its start.

With many processes all of them run this loop and decide the same; process 0 alone writes.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bigbatch import distributed
from bigbatch.bars import Bar
from bigbatch.checks import Checks
from bigbatch.engine import accumulator, functions
from bigbatch.engine.task import Sums
from bigbatch.errors import RunError, StoppedError
from bigbatch.schedule import divergence
from bigbatch.schedule.adaptive.course import Course
from bigbatch.schedule.intervals import Intervals
from bigbatch.schedule.plan import Row
from bigbatch.training import due as due_lib
from bigbatch.training import progress as progress_lib
from bigbatch.training.evaluate import evaluate
from bigbatch.training.preemption import StopNoticeError, StopRequest
from bigbatch.training.progress import Progress, span
from bigbatch.training.restore import End, end_of, expect_before, restore, saved_elsewhere
from bigbatch.training.run import Run
from bigbatch.training.trackers import opened
from bigbatch.training.updates import updates, waits_for
from bigbatch.training.wall_time import WallTime
from bigbatch.training.watch import STALL_S, Watchdog
from bigbatch.workdir import metrics, packing, resume, starts, storage
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir, read_json, write_json
from bigbatch.workdir.trackers import TENSORBOARD, expect

# How long the sums of a finished update may wait for those of the next ones: to read and log many
# short updates in one go takes a third of the time.
_UNREAD_S = 0.1


def train(
    run: Run,
    directory: str | Path,
    *,
    keep_checkpoints: int = 2,
    change_future: bool = False,
    until: str | int | None = None,
    record: Mapping[str, Any] | None = None,
    sources: Sequence[Path] = (),
    trackers: Sequence[str] = (TENSORBOARD,),
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    show_progress: bool = False,
    stall_s: float = STALL_S,
    **intervals: Any,
) -> dict[str, Any]:
    """Trains the run's plan to its end, from wherever the working directory stands.

    Args:
      run: from `prepare`.
      directory: a new or empty directory, or that of the same run, which then goes on.
      keep_checkpoints: how many of the newest are kept, at least 2.
      change_future: lets the plan differ from that of the run in the directory after its newest
        checkpoint.
      until: ends after that stage of the plan, counted from 1, or at a time such as "30_epochs" or
        "4B_tokens", with the state saved.
      record: nested plain values that are kept in config.json for the reader; None for what the
        run says of itself, and the directory's name as its `experiment`.
      sources: files that are copied into the directory for the record.
      trackers: who is told of each record of the log: "tensorboard", "wandb" and "trackio".
      on_record: is told too, on process 0. Records that a kill took back come again.
      show_progress: whether to show a progress bar (on a terminal) and every evaluation, on
        standard error.
      stall_s: seconds without a movement after which a word is said on standard error.
      **intervals: `log_every`, `evaluate_every`, `checkpoint_every` and `keep_every`, each with
        `_epochs`, `_examples`, `_updates` or `_tokens` behind it; `checkpoint_every_minutes`, a
        number, or "auto" with `failure_every_hours` (see `due.best_interval_s`). By default every
        update is logged, every epoch evaluated and saved, and no checkpoint kept for good.

    Returns:
      What was written to result.json.

    Raises:
      UserError: the directory cannot be used, or holds another run.
      RunError: the loss, the parameters or the last test loss are not finite, a checkpoint cannot
        be written, or the directory has gone.
      StoppedError: a signal, the runtime or `until` asked for it; the state is saved.
    """
    checks = Checks()
    # One to go back to where the newest is damaged.
    allowed = "a whole number of checkpoints, at least 2"
    checks.whole("keep_checkpoints", keep_checkpoints, allowed, at_least=2)
    checks.done()
    due, files = due_lib.intervals(run, intervals), Workdir.at(directory)
    if record is None:
        record = {"experiment": files.path.name, **run.identity}
    decides = run.controller is not None
    # Before the directory is claimed: a mistake leaves nothing behind.
    ended = end_of(until, run.plan, run.tokens_per_example, decides)
    distributed.on_first(lambda: expect(trackers, files))
    with files.released():
        metric_names = list(run.task.shown_metrics(run.programs.sum_names))
        plan = resume.open_run(
            files,
            run.identity,
            run.plan,
            record=record,
            metrics=metric_names,
            adaptive=decides,
            change_future=change_future,
            sources=sources,
        )
        if files.result.exists():
            result: dict[str, Any] = read_json(files.result)
            return result
        run = dataclasses.replace(run, plan=plan)
        expect_before(ended, files)
        show_progress = show_progress and distributed.is_first()
        stays = functools.partial(due_lib.stays, run, due.keep_every)
        with (
            StopRequest() as stop,
            Checkpoints(files.checkpoints, keep_checkpoints, stays) as checkpoints,
        ):
            state, progress = restore(run, checkpoints)
            course = Course(run.plan, run.controller, progress.controller)
            run = _as_known(run, course, files)
            done, again = progress.updates, progress.evaluation_due
            cut = functools.partial(metrics.truncate, last_update=done, without_test=again)
            distributed.on_first(lambda: cut(files.metrics))
            told = opened(trackers, run, files, progress, record, metric_names)
            with (
                metrics.MetricsLog(
                    files.metrics if distributed.is_first() else None,
                    told,
                ) as log,
                progress_lib.progress_bar(run, progress, show_progress) as bar,
            ):
                say = functools.partial(print, file=sys.stderr)
                if show_progress:
                    say(progress_lib.memory_line(run))
                with Watchdog(say, stall_s) as watchdog:
                    loop = _Loop(
                        run=run,
                        due=due,
                        ended=ended,
                        state=state,
                        progress=progress,
                        checkpoints=checkpoints,
                        log=log,
                        on_record=on_record,
                        bar=bar,
                        say=say if show_progress else None,
                        watchdog=watchdog,
                        stop=stop,
                        course=course,
                        files=files,
                    )
                    loop.run_updates()
        progress = loop.progress
        run = loop.run
        test_loss = progress.test.get("test_loss", 0.0)
        if not math.isfinite(test_loss):
            last = run.plan.row(run.plan.num_updates - 1)
            what = f"the test loss is {test_loss}"
            raise RunError(divergence.diagnosis(run.plan, last, what, progress.train_loss))
        if run.controller is not None and distributed.is_first():
            storage.put(files.plan, course.to_json())
        result = metrics.as_json(
            {
                "updates": run.plan.num_updates,
                "examples": run.plan.num_examples,
                **run.tokens(run.plan.num_examples),
                **progress.test,
                "train_loss": progress.train_loss,
                "seconds": round(progress.seconds, 3),
                "compilations": run.programs.compilations,
                "params_sha256": packing.sha256(loop.state.params),
            }
        )
        if run.data.num_bad_records is not None:
            # Each process has read its own devices' part of them.
            bad = distributed.gather(str(run.data.num_bad_records).encode())
            result["bad_records"] = sum(map(int, bad))
        distributed.on_first(lambda: starts.lived(files, loop.wall_time.spent_s()))
        distributed.on_first(lambda: write_json(files.result, result))
        if stop.notice:
            # It came after the last update, and must not be lost on what would follow.
            raise StoppedError("told to stop: the run is at its end", stop.exit_status)
        return result


def _as_known(run: Run, course: Course, files: Workdir) -> Run:
    """The run with all that is known of its plan, which an adaptive run also writes down."""
    if run.plan is course.plan:
        return run
    if distributed.is_first():
        storage.put(files.plan, course.to_json())
    return dataclasses.replace(run, plan=course.plan)


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The updates that are left, and what is logged, evaluated and saved in between.

    Attributes:
      state: after the last update whose row was yielded; the next `apply_update` takes it.
      progress: of the updates whose sums have been read, some fewer at times.
    """

    run: Run
    due: Intervals
    ended: End
    state: functions.State
    progress: Progress
    checkpoints: Checkpoints
    log: metrics.MetricsLog
    on_record: Callable[[Mapping[str, Any]], None]
    bar: Bar
    say: Callable[[str], None] | None
    watchdog: Watchdog
    stop: StopRequest
    course: Course
    files: Workdir

    def __post_init__(self) -> None:
        self._start_s = time.monotonic() - self.progress.seconds
        began_s, before_s = starts.began_s(self.files), self.progress.spent_s
        self.wall_time = WallTime(began_s, before_s, self.watchdog)
        self._sent: tuple[Row, Sums] | None = None
        self._unread: list[tuple[Row, Sums, float]] = []
        # A controller needs each measurement at once, and several processes must find a loss that
        # is not finite after the same update.
        at_once = self.run.controller is not None or jax.process_count() > 1
        self._wait_s = 0.0 if at_once else _UNREAD_S
        self._saved_updates = self.progress.updates
        self._clock = due_lib.Clock(self.due, self.progress.updates, self.watchdog)

    def run_updates(self) -> None:
        """Goes on to the end of the plan, or to the moment at which it is told to stop."""
        try:
            if self.progress.evaluation_due:
                self._evaluate(self.run.plan.row(self.progress.updates - 1))
            first = self.state, self.progress.updates
            remaining = updates(self.run, *first, self.course, self.watchdog, self.stop, self._use)
            with contextlib.closing(remaining):
                for row, state, sums in remaining:
                    self.state = state
                    self._after(row, sums)
        except StopNoticeError:
            self._read()
            self._save()
            done, of = self.progress.updates, self.run.plan.num_updates
            saved = f"saved after update {done:,} of {of:,}" if done else "no update was done yet"
            text = f"told to stop: {saved}; the same command continues"
            raise StoppedError(text, self.stop.exit_status) from None

    def _use(self, smaller: Run, state: functions.State) -> None:
        """Goes on with smaller microbatches, from the update that did not fit."""
        self.state = state
        self.run = dataclasses.replace(smaller, plan=self.run.plan)
        if self.say is not None:
            self.say(f"out of device memory; now {progress_lib.memory_line(self.run)}")

    def _after(self, row: Row, sums: Sums) -> None:
        """What is due after an update."""
        # The update before this one: the device has finished it or will not wait for us.
        self._await()
        if self._unread and time.monotonic() - self._start_s >= self._unread[0][2] + self._wait_s:
            self._read_finished()
        self._sent = row, sums
        self.watchdog.moved(f"update {row.update:,}, batch size {row.batch_size:,}")
        if self.bar.shown:
            progress_lib.move(self.bar, self.run, row, self.progress.train_loss)
        if self.say is not None and (change := progress_lib.change(self.run.plan, row)):
            self.say(change)
        due, at = self.due, span(self.run, row)
        is_last = row.update + 1 == self.run.plan.num_updates
        evaluation_due = is_last or due.evaluate_every.due(*at)
        checkpoint_due = is_last or due.checkpoint_every.due(*at)
        checkpoint_due = checkpoint_due or due_lib.stays(self.run, due.keep_every, row.update + 1)
        ended = None if is_last else self.ended(at[0] + at[1], row.update + 1, "saved")
        checkpoint_due = checkpoint_due or ended is not None
        checkpoint_due = checkpoint_due or self._clock.due(row.update + 1, self._read)
        if evaluation_due or checkpoint_due or self.log.is_lost:
            self._read()
        if evaluation_due:
            self._evaluate(row)
        if checkpoint_due or self.log.is_lost:
            self._save()
        if ended is not None:
            raise ended

    def _await(self) -> None:
        """Waits for the update that was sent last."""
        if self._sent is not None:
            row, sums = self._sent
            self._sent = None
            with self.watchdog.phase(waits_for()):
                jax.block_until_ready(sums)
            self._unread.append((row, sums, time.monotonic() - self._start_s))

    def _read(self) -> None:
        """Reads the sums of all updates that were sent."""
        self._await()
        self._read_finished()

    def _read_finished(self) -> None:
        """Reads the sums of the updates that were waited for, and logs them where that is due."""
        unread, self._unread = self._unread, []
        # All are asked for before the first is waited for, as `jax.device_get` does; that takes
        # twice as long.
        for _, sums, _ in unread:
            for value in jax.tree.leaves(sums):
                if isinstance(value, jax.Array):
                    value.copy_to_host_async()
        for row, sums, done_s in unread:
            on_host = accumulator.on_host(sums)
            self.course.observe(self.run.measurement(row, on_host))
            progress = self.progress._replace(controller=self.course.saved)
            self.progress = progress_lib.record(
                self.run, progress, row, on_host, done_s, self.due.log_every, self._write
            )
        if not self.log.is_lost:
            self.run = _as_known(self.run, self.course, self.files)

    def _write(self, record: dict[str, Any]) -> None:
        """Adds a record to the log."""
        record["unix_s"] = round(time.time(), 3)
        self.log.write(record)
        if distributed.is_first():
            self.on_record(record)

    def _evaluate(self, row: Row) -> None:
        if not self.run.data.test_examples:
            return
        self.progress = self.progress._replace(evaluation_due=True)
        with self.watchdog.phase("evaluation"):
            test = evaluate(self.run, self.state, self.stop)
        self._write(progress_lib.position(self.run, row) | test)
        if self.say is not None:
            self.say(progress_lib.evaluation_line(self.run, row, self.progress, test))
        self.progress = self.progress._replace(evaluation_due=False, test=test)

    def _save(self) -> None:
        """Saves the state, unless this very update is saved."""
        updates_done = self.progress.updates
        if updates_done == self._saved_updates and not self.log.is_lost:
            return
        self._saved_updates = updates_done
        self.progress = self.progress._replace(
            seconds=time.monotonic() - self._start_s, spent_s=self.wall_time.spent_s()
        )
        last = self.run.plan.row(updates_done - 1)
        record = {
            "run": resume.whose(self.run.identity),
            "progress": self.progress._asdict(),
            "examples": last.first_example + last.batch_size,
            "plan": self.run.plan.fingerprint,
            "seed": self.run.seed,
        }
        with self.watchdog.phase("checkpoint"):
            self.log.sync()
        if self.log.is_lost:
            where = self.files, self.log.directory()
            raise saved_elsewhere(self.run, *where, updates_done, self.state, record)
        with self.watchdog.phase("checkpoint"):
            state = self.state._replace(copy=None)
            self.checkpoints.save(updates_done, state, record)
            if distributed.is_first():
                starts.lived(self.files, self.progress.spent_s)
        self._clock.saved(updates_done)
