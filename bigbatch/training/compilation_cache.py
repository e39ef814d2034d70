"""JAX's persistent compilation cache: programs of earlier starts are read and not compiled again.

Programs compiled for a CPU hold that CPU's instructions, so each kind of machine has a directory of
its own. JAX writes an entry in place: a kill while it does leaves half an entry, which would be
complained of at every start. So a marker stands while programs are compiled; a marker whose process
is gone condemns what was written after it.
"""

import contextlib
import hashlib
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from bigbatch.errors import Problem, UserError
from bigbatch.places.caches import cache_directory

OFF = "off"
_MARKER = ".compiling"
# What compiles faster is not worth a file.
_SHORTEST_S = 0.1


def use(directory: str | None) -> None:
    """Turns the cache on, before anything is compiled.

    Args:
      directory: where programs are kept; "off" for no cache; None: where JAX was told to
        (JAX_COMPILATION_CACHE_DIR), or else in the user's cache directory.

    Raises:
      UserError: the directory cannot be made or written.
    """
    if directory == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if directory is None and _current():
        return
    place = cache_directory("programs") if directory is None else Path(directory)
    if place is None:
        return
    path = place.absolute() / _machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if directory is None:
            # A home that cannot be written is no mistake of the command.
            return
        allowed = f"a directory that can be made and written ({error.strerror}), or {OFF}"
        raise UserError(Problem("compilation-cache", directory, allowed)) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_S)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While programs are compiled: a kill leaves no entry behind that cannot be read."""
    directory = _current()
    if not directory or not os.access(directory, os.W_OK):
        yield
        return
    _drop_unfinished(Path(directory))
    marker = Path(directory) / f"{socket.gethostname()}-{os.getpid()}{_MARKER}"
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def _current() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


def _drop_unfinished(directory: Path) -> None:
    """Removes what this host's killed processes may have left half written."""
    for marker in directory.glob(f"{socket.gethostname()}-*{_MARKER}"):
        process = marker.name.removesuffix(_MARKER).rpartition("-")[2]
        if _is_alive(int(process)):
            continue
        with contextlib.suppress(FileNotFoundError):
            began_s = marker.stat().st_mtime
            for entry in directory.iterdir():
                if entry.suffix != _MARKER and entry.stat().st_mtime >= began_s:
                    entry.unlink(missing_ok=True)
            marker.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    """A name of this kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    digest = hashlib.sha256("\n".join(sorted(kinds or lines)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
