"""Where a run's files lie: five verbs, behind which a local directory stands.

A file is *put* whole or not at all; a directory is *claimed* before anything is put into it, and
*held* by one process at a time; names are *listed*; a file is *read*. Logs that grow line by line,
and Orbax's checkpoints, have ways of their own.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bigbatch.errors import Problem, RunError, UserError
from bigbatch.replacing import BEING_WRITTEN, replacing

# The locks of this process by their files' real paths: which thread has taken each.
_locks: dict[str, tuple[int, TextIO]] = {}


def _forget_locks() -> None:
    while _locks:
        _locks.popitem()[1][1].close()


# A fork would share them, and may outlive its process.
os.register_at_fork(after_in_child=_forget_locks)


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


def hold(lock: Path, field: str) -> bool:
    """Keeps all others from a lock file's directory; a thread may hold what it holds already.

    It falls with its process, however that ends. Other hosts are kept away too where the file
    system knows locks; where it knows none, nobody is.

    Args:
      lock: the file; it says who holds it, and is there no longer than that.
      field: the directory's name in the words of the user.

    Returns:
      Whether the thread did not hold it before.

    Raises:
      UserError: another process or thread holds it.
      RunError: it cannot be written.
    """
    place = os.path.realpath(lock)
    if _locks.get(place, (0,))[0] == threading.get_ident():
        return False
    taken = False
    while not taken:
        with writing(lock), contextlib.ExitStack() as undo:
            file = undo.enter_context(open(place, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    file.seek(0)
                    who = file.read() or "another process"
                    allowed = (
                        f"a directory that nobody else trains in; {who} does: wait for it, end it, "
                        "or give another directory"
                    )
                    raise UserError(Problem(field, str(lock.parent), allowed)) from error
            # Whoever held it before has removed the file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                taken = os.path.samefile(file.fileno(), place)
            if taken:
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since},")
                file.flush()
                _locks[place] = threading.get_ident(), file
                undo.pop_all()
    return True


def release(lock: Path) -> None:
    """Lets others into a lock file's directory, if this thread holds it."""
    place = os.path.realpath(lock)
    if _locks.get(place, (0,))[0] == threading.get_ident():
        with _locks.pop(place)[1] as file, contextlib.suppress(OSError):
            if os.path.samefile(file.fileno(), place):
                os.unlink(place)


def put(path: Path, text: str | bytes) -> None:
    """Replaces a file atomically; after a power loss too it holds the old or the new text.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    with writing(path), replacing(path) as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def listed(directory: Path) -> list[str]:
    """The names in a directory, sorted, but for those that are being written."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != BEING_WRITTEN)


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
            f"{path} cannot be written ({error.strerror or error}): make room or mend the "
            "permissions, and give the same command again"
        ) from error
