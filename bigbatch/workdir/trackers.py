"""Trackers: who is told of each record of a run's log, beside the log itself.

TensorBoard has its event files. Other trackers have wandb's interface. They append whatever they
are given, and hold some of it back, so after a kill nobody knows what they have. The log does: what
such a tracker has of the run is then dropped, and given again from the log. A start that has ended
by itself is gone on with. So all starts of a run are one record, without doubles and without gaps.
"""

import contextlib
import importlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import is_bucket
from bigbatch.workdir import storage
from bigbatch.workdir.event_files import numbers_by_tag
from bigbatch.workdir.files import Workdir, read_json, write_json

TENSORBOARD, WANDB = "tensorboard", "wandb"


class Tracker(Protocol):
    """What the log tells of its records."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record."""

    def sync(self) -> None:
        """Makes sure that what was written outlives a kill."""

    def close(self) -> None:
        """Ends it."""


def expect(names: Sequence[str], files: Workdir) -> None:
    """Makes sure that trackers are installed, and can be used in a run's directory.

    Raises:
      UserError: one is not, or cannot.
    """
    for name in names:
        if name == TENSORBOARD:
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            allowed = f"trackers that are installed ({error}): pip install 'bigbatch[{name}]'"
            raise UserError(Problem("trackers", name, allowed)) from error
        if name == WANDB and is_bucket(files.path):
            allowed = "trackers that need no disk: wandb writes its files below the workdir"
            raise UserError(Problem("trackers", name, allowed))


class Continued:
    """A tracker with wandb's interface: `init(project, name, ...)` gives what can `log`.

    wandb is offline, unless WANDB_MODE says otherwise, and keeps its files in the run's directory.
    The project is bigbatch, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise.

    Args:
      name: of the library.
      files: the run's directory, whose log ends where this start goes on.
      config: nested plain values, shown as the run's settings.
      experiment: the run's name.
    """

    def __init__(self, name: str, files: Workdir, config: Mapping[str, Any], experiment: str):
        library: Any = importlib.import_module(name)
        files.trackers.mkdir(exist_ok=True)
        self._file, own, given = files.trackers / f"{name}.json", secrets.token_hex(4), 0
        if self._file.exists():
            before = read_json(self._file, {"id": str, "records": int})
            own, given = before["id"], before["records"]
        lines: list[bytes] = []
        with contextlib.suppress(FileNotFoundError), storage.opened(files.metrics) as log:
            lines = log.read().splitlines()
        project = os.environ.get(f"{name.upper()}_PROJECT", "bigbatch")
        options: dict[str, Any] = {"project": project, "name": f"{experiment}-{own}"}
        if not 0 <= given <= len(lines):
            self._drop(library, files, own, **options)
            given = 0
        if name == WANDB:
            os.environ.setdefault("WANDB_SILENT", "true")
            mode = os.environ.get("WANDB_MODE", "offline")
            options |= {"id": own, "dir": str(files.trackers), "mode": mode}
        self._id, self._records = own, given
        # Until it is closed nobody knows what it has.
        write_json(self._file, {"id": own, "records": -1})
        # What is said on standard output is the result.
        with contextlib.redirect_stdout(sys.stderr):
            self._run = library.init(config=config, resume="allow", **options)
        for line in lines[given:]:
            self.write(json.loads(line))

    def write(self, record: Mapping[str, Any]) -> None:
        """Gives a record."""
        self._run.log(numbers_by_tag(record), step=record["update"])
        self._records += 1

    def sync(self) -> None:
        """Nothing: such libraries write in their own time."""

    def close(self) -> None:
        """Waits for the library, and ends this part of the run's record."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
        write_json(self._file, {"id": self._id, "records": self._records})

    def _drop(self, library: Any, files: Workdir, own: str, project: str, name: str) -> None:
        """Removes what the tracker has of the run here; of a server's the steps tell."""
        if library.__name__ == WANDB:
            for folder in (files.trackers / WANDB).glob(f"offline-run-*-{own}"):
                shutil.rmtree(folder)
            return
        # There is no such project yet where the kill came before the first record.
        with contextlib.suppress(ValueError):
            for run in library.Api().runs(project):
                if run.name == name:
                    run.delete()
