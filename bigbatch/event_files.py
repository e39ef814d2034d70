"""The log of a run for TensorBoard: the same scalars, against updates and against examples.

    tensorboard/updates/    x axis: updates done
    tensorboard/examples/   x axis: examples seen, where runs of other batch sizes coincide

Every start of a run writes files of its own. They begin with the mark that makes TensorBoard drop
what an earlier start wrote past the checkpoint, so nothing is shown twice and nothing is rewritten.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_AXES = {"updates": "update", "examples": "examples"}
_METRICS = ("test_accuracy", "test_loss", "train_loss")


class EventFiles:
    """Writes records as TensorBoard's event files. They are on disk after `sync`.

    Args:
      directory: gets a directory for each axis.
      last_update: updates done at the checkpoint from which the run goes on; 0 at its start.
      last_example: examples seen at that point.
      config: the config's nested values, shown as hyperparameters.
    """

    def __init__(
        self, directory: Path, *, last_update: int, last_example: int, config: Mapping[str, Any]
    ):
        # Imported by runs that log, and by nothing else. It needs no TensorFlow.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import hparams

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writers = {}
        first = {"updates": last_update + 1, "examples": last_example + 1}
        for axis in _AXES:
            (directory / axis).mkdir(parents=True, exist_ok=True)
            # The writer's own name holds whole seconds, in which a run may be started twice.
            writer = EventsWriter(str(directory / axis / "events"), f".{time.time_ns()}")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            now_s = time.time()
            writer.write_event(
                event_pb2.Event(wall_time=now_s, step=first[axis], session_log=start)
            )
            for summary in hparams(dict(_flat(config)), dict.fromkeys(_METRICS, 0.0)):
                writer.write_event(event_pb2.Event(wall_time=now_s, summary=summary))
            writer.flush()
            self._writers[axis] = writer

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of the log to both axes."""
        value = self._summary.Value
        values = [
            value(tag=name, simple_value=number)
            for name, number in record.items()
            if name not in _AXES.values() and isinstance(number, int | float)
        ]
        summary, now_s = self._summary(value=values), time.time()
        for axis, field in _AXES.items():
            event = self._event(wall_time=now_s, step=record[field], summary=summary)
            self._writers[axis].write_event(event)

    def sync(self) -> None:
        """Makes sure that what was written outlives a kill; it waits for the disk."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; what is neither number nor text becomes JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)
