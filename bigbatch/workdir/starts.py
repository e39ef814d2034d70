"""When and where a run was started, and where its wall time went: for who reads its report.

Each start has an entry in starts.json. It says when the process began, and for how long it is known
to have lived. At every checkpoint it gets the seconds by `KINDS` that are in the state so far, over
all starts. What the starts have lived beyond these is *lost*: updates that a kill took back, and
starts that came to no checkpoint. Nothing is decided by any of it.
"""

import contextlib
import datetime
import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bigbatch.checks import is_number
from bigbatch.errors import UserError
from bigbatch.workdir import storage
from bigbatch.workdir.files import Workdir, read_json, write_json

# "device" is the rest of the loop: computing, and sending what is to be computed.
KINDS = ("device", "input", "start-up", "compilation", "evaluation", "checkpoint")
LOST = "lost"
_PACKAGES = ("bigbatch", "jax", "jaxlib", "flax", "optax", "numpy")
_GIT_S = 2.0
# Of the log, where its last record is looked for.
_TAIL_BYTES = 2**16
# When the start that is not noted yet began, where that is known.
_began: list[float] = []


def with_process() -> None:
    """Says that the next start began with this process, as that of a command has."""
    _began[:] = [time.time()]
    # Only Linux tells; elsewhere the interpreter's own start is missing.
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        _began[0] -= age_s


@functools.cache
def version(package: str) -> str:
    """Of a package; the search for one takes milliseconds. A bare tree of this one has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def note(files: Workdir, sources: Sequence[Path]) -> None:
    """Adds this start to those of a run's starts.json.

    Args:
      files: the run's directory.
      sources: the config's files; the first one's folder names the commit.
    """
    # Who reads them needs none of it.
    import jax

    program = Path(sys.argv[0])
    # As `python -m bigbatch` has it.
    name = program.parent.name if program.name == "__main__.py" else program.name
    devices, processes = jax.devices(), jax.process_count()
    began_s, before_it = _began.pop() if _began else time.time(), before(files.starts)
    for last in before_it[-1:]:
        # It may have lived on after the checkpoint that noted it last.
        began, alive_s = last.get("began_unix_s"), last.get("alive_s")
        last_s = _last_record_s(files.metrics)
        if is_number(began) and is_number(alive_s) and is_number(last_s):
            last["alive_s"] = max(round(last_s - began, 3), alive_s)
    start = {
        "began_unix_s": round(began_s, 3),
        "alive_s": round(time.time() - began_s, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([name, *sys.argv[1:]]),
        "commit": _commit(sources[0].parent if sources else Path.cwd()),
        "hardware": f"{len(devices)} x {devices[0].device_kind}, {platform.machine()}"
        + (f", {processes} processes" if processes > 1 else ""),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
    write_json(files.starts, [*before_it, start])


def _last_record_s(log: Path) -> float:
    """When the last whole record of a log was written; NaN if that is not known."""
    try:
        with storage.opened(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return float(json.loads(file.read().split(b"\n")[-2])["unix_s"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return math.nan


def began_s(files: Workdir) -> float:
    """When the newest start began; now where that is not known."""
    found = [start.get("began_unix_s") for start in before(files.starts)[-1:]]
    return float(found[0]) if found and is_number(found[0]) else time.time()


def lived(files: Workdir, spent_s: Mapping[str, float]) -> None:
    """Notes that the newest start lives, and what is in the state that it has saved.

    Args:
      files: the run's directory.
      spent_s: seconds by `KINDS`, over all starts.
    """
    starts = before(files.starts)
    if starts and is_number(began_s := starts[-1].get("began_unix_s")):
        starts[-1] |= {"alive_s": round(time.time() - began_s, 3), "spent_s": spent_s}
        write_json(files.starts, starts)


def goodput(starts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all starts together, by `KINDS` and `LOST`; nothing where that is not known."""
    spent = [each for start in starts if isinstance(each := start.get("spent_s"), Mapping)][-1:]
    found = {k: float(each[k]) for each in spent for k in KINDS if is_number(each.get(k))}
    alive = [alive_s for start in starts if is_number(alive_s := start.get("alive_s"))]
    if not found or len(alive) < len(starts):
        return {}
    return found | {LOST: max(0.0, sum(alive) - sum(found.values()))}


def goodput_line(starts: Sequence[Mapping[str, Any]]) -> str | None:
    """The same in words; None where it is not known.

    >>> start = {"alive_s": 10.0, "spent_s": {"device": 6.0, "start-up": 3.0}}
    >>> goodput_line([start])
    'goodput 60 %: of 10.0 s in 1 start device 6.0, start-up 3.0, lost 1.0'
    """
    seconds = goodput(starts)
    total_s = sum(seconds.values())
    if not total_s:
        return None
    parts = ", ".join(f"{kind} {value:.1f}" for kind, value in seconds.items())
    many = "s" * (len(starts) > 1)
    share = 100 * seconds.get("device", 0.0) / total_s
    return f"goodput {share:.0f} %: of {total_s:,.1f} s in {len(starts)} start{many} {parts}"


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
