"""Where a run was started: for who reads its report. Nothing is decided by it."""

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.errors import UserError
from bigbatch.workdir.files import Workdir, read_json, write_json

_PACKAGES = ("bigbatch", "jax", "jaxlib", "flax", "optax", "numpy")
_GIT_S = 2.0


def note(files: Workdir, sources: Sequence[Path]) -> None:
    """Adds this start to those of a run's starts.json.

    Args:
      files: the run's directory.
      sources: the config's files; the first one's folder names the commit.
    """
    # Who reads them needs none of it.
    import jax

    from bigbatch.workdir.checkpoint import version

    program = Path(sys.argv[0])
    # As `python -m bigbatch` has it.
    name = program.parent.name if program.name == "__main__.py" else program.name
    devices, processes = jax.devices(), jax.process_count()
    start = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([name, *sys.argv[1:]]),
        "commit": _commit(sources[0].parent if sources else Path.cwd()),
        "hardware": f"{len(devices)} x {devices[0].device_kind}, {platform.machine()}"
        + (f", {processes} processes" if processes > 1 else ""),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
    write_json(files.starts, [*before(files.starts), start])


def before(path: Path) -> list[dict[str, Any]]:
    """The starts so far; none where they cannot be read, for nothing hangs on them."""
    try:
        found: list[dict[str, Any]] = read_json(path, [dict])
    except UserError:
        return []
    return found


def _commit(folder: Path) -> str | None:
    """The commit of a folder, with `-dirty` where it was changed since; None if there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
