"""The working directory of a run: which files it holds, and how they are written.

    config.json     the config as it was read, with the experiment's name
    run.json        what decides the run's result, the names of its metrics, versions
    plan.json       the plan; the truth for every resume
    starts.json     when, where and by which command it was started, and where the wall time of
                    each start went; for the report
    source/         copies of the config file and of the modules beside it, for the record
    metrics.jsonl   one JSON object a line
    tensorboard/    the same for TensorBoard
    trackers/       what other trackers have of it, and wandb's own files
    result.json     written last: the run is finished
    microbatch.json the microbatch that was found to fit the devices
    checkpoints/    by update
    critical/       branches of `bigbatch critical`, and what they show
    programs/       compiled programs, where --compilation-cache names it
    lock            who trains here now; not there where nobody does

Every file is put whole (`storage`), so a kill at any moment leaves the old one or the new one.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from bigbatch.checks import parsed
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import absolute, expect_bucket, is_bucket, place
from bigbatch.workdir import storage

# What Orbax takes for a bucket, TensorStore for a slash, and neither as a character.
_UNUSABLE = re.compile(r"/(gs|s3|az|hf)(/|$)|.*[\\\ud800-\udfff]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Names of the files of one run.

    Attributes:
      path: the directory.
    """

    path: Path

    config = property(lambda self: self.path / "config.json")
    run = property(lambda self: self.path / "run.json")
    starts = property(lambda self: self.path / "starts.json")
    source = property(lambda self: self.path / "source")
    plan = property(lambda self: self.path / "plan.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    trackers = property(lambda self: self.path / "trackers")
    result = property(lambda self: self.path / "result.json")
    microbatch = property(lambda self: self.path / "microbatch.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    critical = property(lambda self: self.path / "critical")
    programs = property(lambda self: self.path / "programs")
    lock = property(lambda self: self.path / "lock")

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """That of a path as the user gives it.

        Raises:
          UserError: see `place`.
        """
        return cls(place(path, "workdir"))

    def claim(self) -> bool:
        """Makes the directory, or makes sure that it holds a run or nothing like it, and holds it.

        Returns:
          Whether this thread did not hold it before.

        Raises:
          UserError: it is a file, cannot be made, holds something else, or somebody else trains
            in it.
        """
        if _UNUSABLE.match(str(absolute(self.path))):
            allowed = (
                "a path without a backslash, in UTF-8, and not below /gs, /s3, /az or /hf: the "
                "checkpoints' library knows no others (a symbolic link of a plain name will do)"
            )
            raise UserError(Problem("workdir", str(self.path), allowed))
        storage.claim(self.path, "workdir")
        is_new = storage.hold(self.lock, "workdir")
        self._refuse_foreign()
        self._refuse_copied()
        return is_new

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """At the end of it others may claim the directory."""
        try:
            yield
        finally:
            storage.release(self.lock)

    def expect_run(self) -> None:
        """Makes sure that the directory holds a run.

        Raises:
          UserError: it does not exist, is empty, or holds something else.
        """
        expect_bucket(self.path, "workdir")
        if not self.path.is_dir():
            raise UserError(Problem("workdir", str(self.path), "the directory of a run"))
        self._refuse_foreign()
        if not (self.config.exists() and self.plan.exists()):
            allowed = "the directory of a run (this one holds none: `bigbatch train` fills it)"
            raise UserError(Problem("workdir", str(self.path), allowed))

    def _refuse_foreign(self) -> None:
        # What has other names, such as .DS_Store or a log of the user's, is in nobody's way. The
        # cache of compiled programs and the lock may be there before the run is.
        own = [name for name, kind in vars(Workdir).items() if isinstance(kind, property)]
        names = {getattr(self, name).name for name in own if name not in ("programs", "lock")}
        found = [name for name in storage.listed(self.path) if name in names]
        if found and not self.config.exists():
            allowed = (
                "a directory in which nothing has the name of a file of a run, or the directory of "
                f"a run; this one holds {found[0]!r} and no config.json"
            )
            raise UserError(Problem("workdir", str(self.path), allowed))

    def _refuse_copied(self) -> None:
        # What Orbax did not finish in a bucket it removes there; a disk's checkpoints look like it.
        in_bucket = is_bucket(self.path)
        if self.metrics.is_file() if in_bucket else self.metrics.is_dir():
            kinds = ("a disk", "the bucket") if in_bucket else ("a bucket", "the disk")
            allowed = (
                f"a run that was begun there: this is a copy from {kinds[0]}, half of which would "
                f"be of {kinds[1]}; train it where it was begun (evaluate, export and report read "
                "a bucket's copy on a disk)"
            )
            raise UserError(Problem("workdir", str(self.path), allowed))


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by indented JSON, whole.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    storage.put(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kind: Any = dict) -> Any:
    """Reads one of the run's JSON files, of a kind that `parsed` knows.

    Raises:
      UserError: it cannot be read or is damaged.
    """
    try:
        return parsed(storage.read(path), kind)
    except (OSError, ValueError) as error:
        raise UserError(Problem("workdir", str(path), f"a readable JSON file ({error})")) from error
