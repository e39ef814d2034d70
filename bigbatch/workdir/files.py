"""The working directory of a run: which files it holds, and how they are written.

    config.json     the config as it was read, with the experiment's name
    plan.json       the plan; the truth for every resume
    metrics.jsonl   one JSON object a line
    tensorboard/    the same for TensorBoard
    result.json     written last: the run is finished
    microbatch.json the microbatch that was found to fit the devices
    checkpoints/    by update
    critical/       branches of `bigbatch critical`, and what they show
    programs/       compiled programs, where --compilation-cache names it

Files are replaced atomically, so a kill at any moment leaves the old one or the new one.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigbatch.errors import Problem, RunError, UserError

_TEMPORARY_SUFFIX = ".being-written"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Names of the files of one run.

    Attributes:
      path: the directory.
    """

    path: Path

    config = property(lambda self: self.path / "config.json")
    plan = property(lambda self: self.path / "plan.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    result = property(lambda self: self.path / "result.json")
    microbatch = property(lambda self: self.path / "microbatch.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    critical = property(lambda self: self.path / "critical")
    programs = property(lambda self: self.path / "programs")

    def claim(self) -> None:
        """Makes the directory, or makes sure that it holds a run or nothing.

        Raises:
          UserError: it is a file, cannot be made, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"a directory that can be made and written ({error.strerror})"
            raise UserError(Problem("workdir", str(self.path), allowed)) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            allowed = "a directory that can be written (permission denied)"
            raise UserError(Problem("workdir", str(self.path), allowed))
        self._refuse_foreign()

    def expect_run(self) -> None:
        """Makes sure that the directory holds a run.

        Raises:
          UserError: it does not exist, is empty, or holds something else.
        """
        if not self.path.is_dir():
            raise UserError(Problem("workdir", str(self.path), "the directory of a run"))
        self._refuse_foreign()
        if not (self.config.exists() and self.plan.exists()):
            allowed = "the directory of a run (this one is empty: `bigbatch train` fills it)"
            raise UserError(Problem("workdir", str(self.path), allowed))

    def _refuse_foreign(self) -> None:
        # The cache of compiled programs may be there before the run is.
        found = [path for path in self.path.iterdir() if path != self.programs]
        names = sorted(path.name for path in found if path.suffix != _TEMPORARY_SUFFIX)
        if names and not self.config.exists():
            allowed = (
                "a new or empty directory, or the directory of a run; this one holds "
                f"{names[0]!r} and no config.json"
            )
            raise UserError(Problem("workdir", str(self.path), allowed))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a file of a run is written.

    Raises:
      RunError: the file system does not take it.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): make room or mend the permissions, and "
            "give the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically; after a power loss too it holds the old or the new text.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads one of the run's JSON files.

    Raises:
      UserError: it cannot be read or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem("workdir", str(path), f"a readable JSON file ({error})")) from error
