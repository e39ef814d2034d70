"""Where a run's files lie: four verbs, behind which a local directory stands.

A file is *put* whole or not at all; a directory is *claimed* before anything is put into it; names
are *listed*; a file is *read*. Logs that grow line by line, and Orbax's checkpoints, have ways of
their own.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bigbatch.errors import Problem, RunError, UserError

_BEING_WRITTEN = ".being-written"


def claim(directory: Path, field: str) -> None:
    """Makes a directory, or makes sure that it can be written.

    Args:
      directory: where files will be put.
      field: its name in the words of the user.

    Raises:
      UserError: it is a file, or cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"a directory that can be made and written ({error.strerror})"
        raise UserError(Problem(field, str(directory), allowed)) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        allowed = "a directory that can be written (permission denied)"
        raise UserError(Problem(field, str(directory), allowed))


def put(path: Path, text: str) -> None:
    """Replaces a file atomically; after a power loss too it holds the old or the new text.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(path.name + _BEING_WRITTEN)
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def listed(directory: Path) -> list[str]:
    """The names in a directory, sorted, but for those that are being written."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != _BEING_WRITTEN)


def read(path: Path) -> str:
    """The text of a file.

    Raises:
      OSError: there is none, or it cannot be read.
    """
    return path.read_text(encoding="utf-8")


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
