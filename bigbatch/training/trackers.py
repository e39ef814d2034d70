"""The trackers of a run, which are told of the records of its log."""

from collections.abc import Mapping, Sequence
from typing import Any

from bigbatch import distributed
from bigbatch.training.progress import Progress
from bigbatch.training.run import Run
from bigbatch.workdir import resume, storage
from bigbatch.workdir.event_files import EventFiles
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.trackers import TENSORBOARD, Continued, Tracker


def opened(
    names: Sequence[str],
    run: Run,
    files: Workdir,
    progress: Progress,
    record: Mapping[str, Any],
    metric_names: Sequence[str],
) -> list[Tracker]:
    """The trackers of those names for a run that goes on from there; process 0 has them."""
    tested = ["loss", *metric_names] if run.data.test_examples else []
    config = resume.plain(record)

    def one(name: str) -> Tracker:
        with storage.writing(files.path / name):
            if name != TENSORBOARD:
                return Continued(name, files, config, str(record.get("experiment", "run")))
            return EventFiles(
                files.tensorboard,
                last_update=progress.updates,
                config=config,
                metrics=[*(f"test_{name}" for name in tested), "train_loss"],
            )

    here = names if distributed.is_first() else ()
    return distributed.together(lambda: [one(name) for name in here])
