"""Where a run's files lie: a few verbs, behind which a local directory stands, or a bucket.

A file is *put* whole or not at all; a directory is *claimed* before anything is put into it, and
*held* by one process at a time; names are *listed*; a file is *read*; a directory is *moved*. A log
is *grown*: on a disk a file, in a bucket, where nothing can be appended to, objects whose names are
numbers, `parts` of one text. Orbax's checkpoints have ways of their own.
"""

import contextlib
import errno
import fcntl
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigbatch.errors import Problem, RunError, UserError
from bigbatch.places.paths import expect_bucket, is_bucket
from bigbatch.places.replacing import BEING_WRITTEN, replacing

# What was logged to a bucket waits at most so long before it is there.
_PART_S = 30.0
# The locks of this process by their files' real paths: which thread has taken each, and its file or
# lease.
_locks: dict[str, tuple[int, Any]] = {}


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
    if is_bucket(directory):
        expect_bucket(directory, field)
        return
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
    system knows locks; where it knows none, nobody is. In a bucket it is a `buckets.Lease`.

    Args:
      lock: the file; it says who holds it, and is there no longer than that.
      field: the directory's name in the words of the user.

    Returns:
      Whether the thread did not hold it before.

    Raises:
      UserError: another process or thread holds it.
      RunError: it cannot be written.
    """
    place = _real(lock)
    if _locks.get(place, (0,))[0] == threading.get_ident():
        return False
    if is_bucket(lock):
        _hold_in_bucket(lock, field)
        return True
    taken = False
    while not taken:
        with writing(lock), contextlib.ExitStack() as undo:
            file = undo.enter_context(open(place, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    file.seek(0)
                    raise _held(lock, field, file.read() or "another process") from error
            # Whoever held it before has removed the file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                taken = os.path.samefile(file.fileno(), place)
            if taken:
                file.truncate(0)
                file.write(_self())
                file.flush()
                _locks[place] = threading.get_ident(), file
                undo.pop_all()
    return True


def _hold_in_bucket(lock: Path, field: str) -> None:
    from bigbatch.places import buckets

    if str(lock) in _locks:
        raise _held(lock, field, "another thread of this process")
    try:
        _locks[str(lock)] = threading.get_ident(), buckets.Lease(lock, _self())
    except buckets.HeldError as error:
        raise _held(lock, field, str(error)) from error
    except OSError as error:
        allowed = f"a directory that can be written ({error.strerror})"
        raise UserError(Problem(field, str(lock.parent), allowed)) from error


def _held(lock: Path, field: str, who: str) -> UserError:
    allowed = (
        f"a directory that nobody else trains in; {who} does: wait for it, end it, or give another "
        "directory"
    )
    return UserError(Problem(field, str(lock.parent), allowed))


def _self() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since},"


def _real(path: Path) -> str:
    return str(path) if is_bucket(path) else os.path.realpath(path)


def release(lock: Path) -> None:
    """Lets others into a lock file's directory, if this thread holds it."""
    place = _real(lock)
    if _locks.get(place, (0,))[0] == threading.get_ident():
        if is_bucket(lock):
            _locks.pop(place)[1].release()
            return
        with _locks.pop(place)[1] as file, contextlib.suppress(OSError):
            if os.path.samefile(file.fileno(), place):
                os.unlink(place)


def put(path: Path, text: str | bytes) -> None:
    """Replaces a file atomically; after a power loss too it holds the old or the new text.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    _expect_held(path)
    with writing(path), replacing(path) as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def listed(directory: Path) -> list[str]:
    """The names in a directory, sorted, but for those that are being written; of none, none."""
    try:
        return sorted(path.name for path in directory.iterdir() if path.suffix != BEING_WRITTEN)
    except FileNotFoundError:
        return []


def read(path: Path) -> str:
    """The text of a file.

    Raises:
      OSError: there is none, or it cannot be read.
    """
    return path.read_text(encoding="utf-8")


def move(source: Path, target: Path) -> None:
    """Moves a directory; in a bucket it is at both places meanwhile.

    Raises:
      OSError: it cannot be moved.
    """
    if is_bucket(source):
        from bigbatch.places import buckets

        buckets.move(source, target)
    else:
        source.rename(target)


def growing(path: Path, *, parts_beside: bool = False) -> "_File | _Parts":
    """Opens a file to append to, or the parts of one in a bucket.

    `write` takes bytes that belong together. `flush` gives them to the operating system, or before
    long to the bucket; what `sync` has given away outlives a kill and a loss of power.

    Args:
      path: of the file; in a bucket that of a directory, which holds its parts.
      parts_beside: the parts lie beside each other in place of that, their numbers behind the name.

    Raises:
      OSError: it cannot be opened.
    """
    return _Parts(path, parts_beside) if is_bucket(path) else _File(io.FileIO(path, "ab"))


class _File(io.BufferedWriter):
    def sync(self) -> None:
        self.flush()
        os.fsync(self.fileno())


class _Parts:
    def __init__(self, path: Path, beside: bool):
        self._path, self._beside, self._waiting = path, beside, list[bytes]()
        self._next, self._put_s = 0 if beside else len(parts(path)), time.monotonic()

    def write(self, data: bytes) -> None:
        self._waiting += [data] if data else []

    def flush(self) -> None:
        if time.monotonic() - self._put_s > _PART_S:
            # Where the bucket does not take it now, `sync` will say so.
            with contextlib.suppress(OSError):
                self.sync()

    def sync(self) -> None:
        from bigbatch.places import buckets

        if not self._waiting:
            return
        self._put_s, path = time.monotonic(), _part(self._path, self._next)
        path = self._path.with_name(f"{self._path.name}.{path.name}") if self._beside else path
        _expect_held(path)
        if buckets.put_if(path, b"".join(self._waiting)) is None:
            raise OSError(errno.EEXIST, "another process has written it", str(path))
        self._waiting.clear()
        self._next += 1

    close = sync


def _part(path: Path, number: int) -> Path:
    return path / f"{number:08}"


def parts(path: Path) -> list[Path]:
    """What a log consists of, in the order of its records: a file, some objects, or nothing."""
    names = listed(path) if is_bucket(path) or path.is_dir() else []
    if not is_bucket(path) and not names:
        return [path] if path.exists() else []
    # A list of objects may lack the newest; to ask for one is always right.
    count = max((int(name) + 1 for name in names if name.isdigit()), default=0)
    while is_bucket(path) and _part(path, count).exists():
        count += 1
    return [_part(path, number) for number in range(count)]


def opened(path: Path) -> io.BufferedReader | io.BytesIO:
    """A log, open to be read as one.

    Raises:
      OSError: there is none, or it cannot be read.
    """
    if not is_bucket(path) and path.is_file():
        return open(path, "rb")
    found = parts(path)
    if not path.is_dir() or not found:
        raise FileNotFoundError(errno.ENOENT, "there is no such log", str(path))
    return io.BytesIO(b"".join(part.read_bytes() for part in found))


def _expect_held(path: Path) -> None:
    """Makes sure that no other process has taken over the lease of a path's run.

    Raises:
      RunError: one has.
    """
    for lock, (_, lease) in [*_locks.items()]:
        if getattr(lease, "is_lost", False) and lease.path.parent in path.parents:
            raise RunError(
                f"another process has taken over {lock}, which this one did not renew in time: it "
                "goes on with the run from its newest checkpoint, and this one ends"
            )


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
            f"{path} cannot be written ({error.strerror or error}). The same command continues, "
            "once there is room and permission"
        ) from error
