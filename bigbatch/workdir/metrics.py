"""The log of a run: one JSON object a line, ordered by update.

Values leave the device one update late or, where updates are short, a tenth of a second. By then
the next update has been sent, so reading them never makes the device wait.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.places.paths import is_bucket
from bigbatch.workdir import storage
from bigbatch.workdir.trackers import Tracker


def as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for numbers that are not finite, which JSON does not have."""
    broken = {k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return {name: None if name in broken else value for name, value in record.items()}


class MetricsLog:
    """Appends records to a file.

    Args:
      path: the file; it is made if it does not exist. None: nothing is written.
      trackers: get every record too; they are closed with the log.

    Attributes:
      is_lost: whether a write has found that the file is no more in its place: it was removed, or
        moved, mostly with its directory.
    """

    is_lost = False

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()):
        self._trackers = trackers
        self._path = Path(os.devnull) if path is None else path
        with storage.writing(self._path):
            self._file: Any = storage.growing(self._path)
        self._is_kept = path is not None
        # A bucket's log has no place to be lost from.
        self._is_file = self._is_kept and not is_bucket(self._path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; a kill leaves whole lines, at worst a last one cut short.

        Raises:
          RunError: it cannot be written.
        """
        with storage.writing(self._path):
            self._file.write(json.dumps(as_json(record), allow_nan=False).encode() + b"\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.write(record)
        self._look()

    def sync(self) -> None:
        """Makes sure that what was written outlives a loss of power.

        Raises:
          RunError: it cannot be written.
        """
        with storage.writing(self._path):
            if self._is_kept:
                self._file.sync()
            for tracker in self._trackers:
                tracker.sync()
        self._look()

    def directory(self) -> Path | None:
        """Where the file is now, if it is anywhere; only Linux tells."""
        descriptor = self._file.fileno()
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        is_there = os.path.exists(path) and os.path.samefile(path, descriptor)
        return Path(path).parent if is_there else None

    def _look(self) -> None:
        if not self._is_file:
            return
        try:
            in_place = os.path.samefile(self._path, self._file.fileno())
        except FileNotFoundError:
            in_place = False
        self.is_lost |= not in_place

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        with storage.writing(self._path):
            self._file.close()
            for tracker in self._trackers:
                tracker.close()


def truncate(path: Path, *, last_update: int, without_test: bool = False) -> None:
    """Removes, atomically, records of later updates than a checkpoint, and a line cut short.

    Args:
      path: the log; nothing happens if it does not exist.
      last_update: the number of updates done at the checkpoint.
      without_test: removes the evaluation after that update too: it comes again.
    """
    # The newest first: a kill meanwhile leaves no gap.
    for part in reversed(storage.parts(path)):
        _truncate(part, last_update, without_test)


def _truncate(path: Path, last_update: int, without_test: bool) -> None:
    kept, damaged, data = [], [], path.read_bytes()
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            later = record["update"] > last_update
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
            continue
        again = without_test and record["update"] == last_update and "test_loss" in record
        if not (later or again):
            kept.append(line + b"\n")
    # A kill may leave a last line without its end.
    damaged = [number for number in damaged if number < len(lines)]
    if damaged:
        print(f"bigbatch: warning: {path}: left out damaged lines: {damaged}", file=sys.stderr)
    if b"".join(kept) != data:
        storage.put(path, b"".join(kept))
