"""The state of a run from its checkpoints, and to where its directory was moved."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from bigbatch import distributed
from bigbatch.engine.functions import State
from bigbatch.errors import Problem, RunError, StoppedError, UserError
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.until import until
from bigbatch.training.progress import Progress
from bigbatch.training.run import Run
from bigbatch.workdir import resume
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir

# The exit status of a start that has come to the time at which it was to end.
UNTIL_STATUS = 3


def restore(run: Run, checkpoints: Checkpoints, at: int | None = None) -> tuple[State, Progress]:
    """The state and progress of the newest checkpoint that is whole, or of the start.

    `at` takes the one with so many updates done.
    """
    restored = checkpoints.restore(run.saved_shapes, resume.whose(run.identity), _warn, at)
    if restored is None:
        return run.first_state(), Progress()
    return run.on_devices(restored.state), Progress.read(restored.record["progress"])


def newest(run: Run, directory: str | Path, at: int | None = None) -> tuple[State, int]:
    """The newest state in a working directory that is whole, and the updates done at it.

    Args:
      run: which it is of.
      directory: the run's.
      at: takes the state with so many updates done in its place.

    Raises:
      UserError: there is none, or it is another run's.
    """
    files = Workdir.at(directory)
    resume.check_same(files, run.identity)
    with Checkpoints(files.checkpoints) as checkpoints:
        if at is not None:
            checkpoints.expect("update", at)
        state, progress = restore(run, checkpoints, at)
    if progress.updates == 0:
        allowed = "the directory of a run that has saved a checkpoint; this one has not yet"
        raise UserError(Problem("workdir", str(files.path), allowed))
    return state, progress.updates


# What ends a start, of the examples and updates done and a word of them; None: nothing yet.
End = Callable[[int, int, str], StoppedError | None]


def end_of(
    given: str | int | None, plan: Plan, tokens_per_example: int | None, decides: bool
) -> End:
    """What ends this start.

    Args:
      given: as of `until`, which also says what the others are; None: it ends with the run.
      plan: of the run.
      tokens_per_example: likewise.
      decides: likewise.

    Raises:
      UserError: there is no such time.
    """
    if given is None:
        return lambda examples, updates, words: None
    end = until(given, plan, tokens_per_example, decides)

    def ended(examples: int, updates: int, words: str) -> StoppedError | None:
        if not end.passed(examples, updates, plan.train_examples):
            return None
        return StoppedError(
            f"until {given}: {words} after update {updates:,}; without it, or with a later one, "
            "the same command continues",
            UNTIL_STATUS,
        )

    return ended


def expect_before(ended: End, files: Workdir) -> None:
    """Makes sure that the run in a directory is not at its start's end yet.

    Raises:
      StoppedError: the newest checkpoint is there, or past it.
    """
    with Checkpoints(files.checkpoints) as checkpoints:
        updates, record = checkpoints.latest() or (0, {"examples": 0})
    if past := ended(record["examples"], updates, "nothing was trained: the run is"):
        raise past


def saved_elsewhere(
    run: Run,
    files: Workdir,
    now: Path | None,
    updates: int,
    state: State,
    record: Mapping[str, Any],
) -> RunError:
    """Saves the state of a run whose directory has gone, where that can be.

    Args:
      run: with its programs.
      files: where the directory was.
      now: where it is, if anywhere.
      updates: done.
      state: after them.
      record: see `Checkpoints.save`.

    Returns:
      What ends the run.
    """
    gone = f"{files.path} was removed or moved, or its log, while the run went on"
    # The other processes of several have not noticed.
    if now is None or jax.process_count() > 1:
        return RunError(f"{gone}: nothing was saved after the newest checkpoint in it")
    with Checkpoints(Workdir(now).checkpoints, keep=sys.maxsize) as checkpoints:
        if updates not in checkpoints.saved():
            checkpoints.save(updates, state._replace(copy=None), record)
    return RunError(
        f"{gone}: saved after update {updates:,} in {now}; the same command continues with "
        f"--workdir={now}"
    )


def _warn(text: str) -> None:
    if distributed.is_first():
        print(f"bigbatch: warning: {text}", file=sys.stderr)
