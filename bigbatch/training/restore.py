"""The state of a run from its checkpoints."""

import sys
from pathlib import Path

from bigbatch import distributed
from bigbatch.engine.functions import State
from bigbatch.errors import Problem, UserError
from bigbatch.training.progress import Progress
from bigbatch.training.run import Run
from bigbatch.workdir import resume
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir


def restore(run: Run, checkpoints: Checkpoints) -> tuple[State, Progress]:
    """The state and progress of the newest checkpoint that is whole, or of the start."""
    like = run.programs.checkpoint_shapes
    restored = checkpoints.restore(like, resume.whose(run.identity), _warn)
    if restored is None:
        return run.first_state(), Progress()
    return run.on_devices(restored.state), Progress.read(restored.record["progress"])


def newest(run: Run, directory: str | Path) -> tuple[State, int]:
    """The newest state in a working directory that is whole, and the updates done at it.

    Raises:
      UserError: there is none yet, or it is another run's.
    """
    files = Workdir(Path(directory))
    resume.check_same(files, run.identity)
    with Checkpoints(files.checkpoints) as checkpoints:
        state, progress = restore(run, checkpoints)
    if progress.updates == 0:
        allowed = "the directory of a run that has saved a checkpoint; this one has not yet"
        raise UserError(Problem("workdir", str(files.path), allowed))
    return state, progress.updates


def _warn(text: str) -> None:
    if distributed.is_first():
        print(f"bigbatch: warning: {text}", file=sys.stderr)
