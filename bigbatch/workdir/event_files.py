"""The log of a run for TensorBoard: the same scalars, in groups, against the updates done.

Every start of a run writes a file of its own. It begins with the mark that makes TensorBoard drop
what an earlier start wrote past the checkpoint, so nothing is shown twice and nothing is rewritten.
"""

import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.data.tfrecord import framed
from bigbatch.workdir import storage

# Groups of TensorBoard's page by the beginning of a field's name; what is not there was planned.
_GROUPS = {
    "test_": "eval/",
    "train_": "train/",
    "gradient_": "noise/gradient_",
    "gradient_noise_": "noise/",
    "input_": "input/",
    "examples_per_s": "train/examples_per_s",
    "tokens_per_s": "train/tokens_per_s",
    "empty_updates": "train/empty_updates",
    "examples": "progress/examples",
    "tokens": "progress/tokens",
    "epoch": "progress/epoch",
}
# Records go to the file in groups, so many or so old: readers see whole ones.
_MOST_WAITING = 128
_LONGEST_WAIT_S = 10.0


def tag(field: str) -> str:
    """What a field of the log is called in TensorBoard.

    >>> tag("test_accuracy"), tag("examples_per_s"), tag("batch_size")
    ('eval/accuracy', 'train/examples_per_s', 'schedule/batch_size')
    >>> tag("gradient_square"), tag("gradient_noise_scale")
    ('noise/gradient_square', 'noise/scale')
    """
    beginning = max((b for b in _GROUPS if field.startswith(b)), key=len, default="")
    return _GROUPS.get(beginning, "schedule/") + field.removeprefix(beginning)


def numbers_by_tag(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of the log, but for its place and time."""
    return {
        tag(name): number
        for name, number in record.items()
        if name not in ("update", "unix_s") and isinstance(number, int | float)
    }


class EventFiles:
    """Writes records as one of TensorBoard's event files. They are on disk after `sync`.

    Args:
      directory: gets the file.
      last_update: updates done at the checkpoint from which the run goes on; 0 at its start.
      config: nested plain values, shown as hyperparameters and as a text.
      metrics: fields of the log that are shown beside them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        last_update: int,
        config: Mapping[str, Any],
        metrics: Sequence[str],
    ):
        self._event: Any = None
        self._begun = last_update, config, metrics
        # For each choice of fields an event whose numbers are set: to make one takes much longer.
        self._made: dict[tuple[str, ...], Any] = {}
        # Whole seconds, as TensorBoard has it, and finer: a run may be started twice in one.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        directory.mkdir(parents=True, exist_ok=True)
        self._file = storage.growing(directory / name, parts_beside=True)
        self._written_s = time.monotonic()
        self._waiting: list[bytes] = []

    def _begin(self) -> None:
        """What stands before the first record, which waits while devices compute."""
        # Imported by runs that log, and by nothing else. It needs no TensorFlow.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import hparams, text

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        now_s, (last_update, config, metrics) = time.time(), self._begun
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        shown = f"```json\n{json.dumps(config, indent=2)}\n```"
        summaries = [text("config", shown)]
        summaries += hparams(dict(_flat(config.items())), {tag(name): 0.0 for name in metrics})
        events = [
            event_pb2.Event(wall_time=now_s, file_version="brain.Event:2"),
            event_pb2.Event(wall_time=now_s, step=last_update + 1, session_log=start),
            *(event_pb2.Event(wall_time=now_s, summary=summary) for summary in summaries),
        ]
        self._waiting = [framed(event.SerializeToString()) for event in events]
        self.sync()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of the log."""
        if self._event is None:
            self._begin()
        numbers = numbers_by_tag(record)
        names = tuple(numbers)
        if names not in self._made:
            values = [self._summary.Value(tag=name) for name in names]
            self._made[names] = self._event(summary=self._summary(value=values))
        event = self._made[names]
        for value, number in zip(event.summary.value, numbers.values(), strict=True):
            value.simple_value = number
        event.wall_time, event.step = time.time(), record["update"]
        self._waiting.append(framed(event.SerializeToString()))
        waited_s = time.monotonic() - self._written_s
        if len(self._waiting) >= _MOST_WAITING or waited_s >= _LONGEST_WAIT_S:
            self._write_waiting()

    def sync(self) -> None:
        """Makes sure that what was written outlives a kill; it waits for the disk."""
        self._write_waiting()
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        """Gives what waits to the operating system."""
        self._file.write(b"".join(self._waiting))
        self._file.flush()
        self._waiting.clear()
        self._written_s = time.monotonic()


def _flat(items: Iterable[tuple[Any, Any]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; what is no number, text, object or list of objects is JSON."""
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _flat(value.items(), f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            yield from _flat(enumerate(value), f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)
