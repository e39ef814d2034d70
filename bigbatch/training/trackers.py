"""Who is told of the records of a run's log, beside the log itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from bigbatch import distributed
from bigbatch.training.progress import Progress
from bigbatch.training.run import Run
from bigbatch.workdir import resume, storage
from bigbatch.workdir.event_files import EventFiles
from bigbatch.workdir.files import Workdir


def event_files(
    run: Run,
    files: Workdir,
    progress: Progress,
    record: Mapping[str, Any],
    metric_names: Sequence[str],
) -> EventFiles | None:
    """The TensorBoard files of a run that goes on from there; process 0 writes them."""
    if not distributed.is_first():
        return None
    tested = ["loss", *metric_names] if run.data.test_examples else []
    with storage.writing(files.tensorboard):
        return EventFiles(
            files.tensorboard,
            last_update=progress.updates,
            config=resume.plain(record),
            metrics=[*(f"test_{name}" for name in tested), "train_loss"],
        )
