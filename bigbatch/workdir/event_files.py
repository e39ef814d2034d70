"""The log of a run for TensorBoard: the same scalars, against updates, examples and tokens.

    tensorboard/updates/    x axis: updates done
    tensorboard/examples/   x axis: examples seen, where runs of other batch sizes coincide
    tensorboard/tokens/     x axis: tokens seen, where examples have them

Every start of a run writes files of its own. They begin with the mark that makes TensorBoard drop
what an earlier start wrote past the checkpoint, so nothing is shown twice and nothing is rewritten.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.data.tfrecord import framed

_AXES = {"updates": "update", "examples": "examples", "tokens": "tokens"}
# Records go to the files in groups, so many or so old: readers see whole ones.
_MOST_WAITING = 128
_LONGEST_WAIT_S = 10.0


class EventFiles:
    """Writes records as TensorBoard's event files. They are on disk after `sync`.

    Args:
      directory: gets a directory for each axis.
      last: `update`, `examples`, and where there are any `tokens`, as the records have them, at the
        checkpoint from which the run goes on; 0 at its start.
      config: nested plain values, shown as hyperparameters.
      metrics: names of the scalars that are shown beside them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        last: Mapping[str, int],
        config: Mapping[str, Any],
        metrics: Sequence[str],
    ):
        # Imported by runs that log, and by nothing else. It needs no TensorFlow.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import hparams

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # For each choice of fields an event whose numbers are set: to make one takes much longer.
        self._made: dict[tuple[str, ...], Any] = {}
        self._axes = {axis: field for axis, field in _AXES.items() if field in last}
        self._waiting: dict[str, list[bytes]] = {axis: [] for axis in self._axes}
        self._files = {}
        self._written_s = time.monotonic()
        # Whole seconds, as TensorBoard has it, and finer: a run may be started twice in one.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        for axis, field in self._axes.items():
            (directory / axis).mkdir(parents=True, exist_ok=True)
            self._files[axis] = open(directory / axis / name, "wb")  # noqa: SIM115 - see close
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            now_s = time.time()
            events = [
                event_pb2.Event(wall_time=now_s, file_version="brain.Event:2"),
                event_pb2.Event(wall_time=now_s, step=last[field] + 1, session_log=start),
            ]
            settings = hparams(dict(_flat(config)), dict.fromkeys(metrics, 0.0))
            events += [event_pb2.Event(wall_time=now_s, summary=setting) for setting in settings]
            self._waiting[axis] = [framed(event.SerializeToString()) for event in events]
        self.sync()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of the log to every axis."""
        numbers = {
            name: number
            for name, number in record.items()
            if name not in _AXES.values() and isinstance(number, int | float)
        }
        names = tuple(numbers)
        if names not in self._made:
            values = [self._summary.Value(tag=name) for name in names]
            self._made[names] = self._event(summary=self._summary(value=values))
        event = self._made[names]
        for value, number in zip(event.summary.value, numbers.values(), strict=True):
            value.simple_value = number
        event.wall_time = time.time()
        for axis, field in self._axes.items():
            event.step = record[field]
            self._waiting[axis].append(framed(event.SerializeToString()))
        waited_s = time.monotonic() - self._written_s
        if len(self._waiting["updates"]) >= _MOST_WAITING or waited_s >= _LONGEST_WAIT_S:
            self._write_waiting()

    def sync(self) -> None:
        """Makes sure that what was written outlives a kill; it waits for the disk."""
        self._write_waiting()
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._write_waiting()
        for file in self._files.values():
            file.close()

    def _write_waiting(self) -> None:
        """Gives what waits to the operating system."""
        for axis, file in self._files.items():
            file.write(b"".join(self._waiting[axis]))
            file.flush()
            self._waiting[axis].clear()
        self._written_s = time.monotonic()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; what is neither number nor text becomes JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)
