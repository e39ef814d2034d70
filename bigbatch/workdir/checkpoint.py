"""Checkpoints, at update boundaries only, by Orbax.

A checkpoint holds the state (parameters, running statistics, optimizer) and a small JSON record:
how many updates and examples are done, the plan's fingerprint, whose run it is, the partial sums of
the log, what the state's arrays are, a checksum of them, and versions. A planned run needs no more
than that to continue.

The state is copied to the host first, as one run of bytes: the next update may take its buffers at
once, and Orbax needs a third of the time for a few arrays of what it needs for a network's. It does
not notice a byte that has changed on the disk, so the checksum is compared after it was read. The
newest checkpoint that is whole is taken; damaged ones are put aside, never deleted or written over.

A state in parts is whole nowhere: Orbax is given its arrays as they lie, every process writes its
own parts, and the checksum is one that needs no order. Both forms are read into either.
"""

import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bigbatch import distributed
from bigbatch.engine.functions import State
from bigbatch.errors import Problem, RunError, StoppedError, UserError, listed
from bigbatch.places.paths import absolute, is_bucket
from bigbatch.workdir import orbax_options, packing, storage
from bigbatch.workdir.starts import version

# Counts up when an older version could not read what this one writes, or the other way round.
FORMAT = 4
# The state is written in pieces of so many bytes, some at a time, and so many are read at a time.
_PIECE_BYTES, _READ_BYTES = 2**25, 2**28
_PACKAGES = ("bigbatch", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
# A bucket's list may be an old one, and another process's a newer one.
_LOOKS = 4
_DAMAGED, _LATER = "damaged-checkpoints", "later-checkpoints"
# What reading a damaged file raises; Orbax has no one error for it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      updates: done at it.
      state: NumPy arrays, or where it was or is to be in parts, JAX's where they are to lie.
      record: what was saved beside it.
    """

    updates: int
    state: State
    record: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are; it is made if it does not exist.
      keep: how many of the newest are kept; None: this object only reads.
      keep_always: the number of updates done -> whether a checkpoint is kept for good.
    """

    def __init__(
        self,
        directory: Path,
        keep: int | None = None,
        keep_always: Callable[[int], bool] = lambda updates: False,
    ):
        self.directory = absolute(directory)
        self._writes = keep is not None
        self._being_written: Any = None
        orbax_options.say_nothing_twice()
        # A reader must not clean up what another process is writing.
        policy = orbax_options.Preservation(keep, keep_always) if keep is not None else None
        save = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=orbax_options.context(),
                save_decision_policy=save,
                preservation_policy=policy,
                cleanup_tmp_directories=keep is not None,
            )
        except _UNREADABLE as error:
            allowed = f"a directory of checkpoints that can be read and written ({error})"
            raise UserError(Problem("workdir", str(directory), allowed)) from error

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The number of updates done at the newest checkpoint and its record; None without one.

        The state is not read, so it may turn out to be damaged.

        Raises:
          UserError: another project, or another version of this one, has written it.
        """
        return next(((u, record) for u, record in self._records() if record is not None), None)

    def saved(self) -> list[int]:
        """The numbers of updates done at the checkpoints that are there, newest first."""
        return [updates for updates, record in self._records() if record is not None]

    def expect(self, field: str, updates: int) -> None:
        """Makes sure that there is a checkpoint with so many updates done.

        Raises:
          UserError: there is none; with those that there are.
        """
        there = self.saved()
        if updates not in there:
            allowed = "updates done at a checkpoint that is kept: " + listed(map(str, there))
            nearest = min(there, key=lambda other: abs(other - updates), default=None)
            raise UserError(Problem(field, updates, allowed, nearest))

    def go_back(self, updates: int) -> None:
        """Moves the checkpoints after one to a directory beside; on process 0 alone.

        Raises:
          UserError: that one is not there.
        """
        self.expect("from-update", updates)
        self._move([other for other in self.saved() if other > updates], _LATER)

    def restore(
        self,
        like: State,
        whose: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
        at: int | None = None,
    ) -> Restored | None:
        """Reads the newest checkpoint that is whole; None where there is none at all.

        Args:
          like: a state with the shapes and dtypes that it must have, and its shardings.
          whose: the run that the checkpoint must be of, as `save` was told; None: any.
          warn: is told in words of damaged checkpoints.
          at: only the checkpoint with so many updates done; None: the newest.

        Raises:
          UserError: the checkpoints are of another run, project or version.
          RunError: there are checkpoints, and all are damaged.
        """
        self._agree(_LOOKS if is_bucket(self.directory) else 1)
        damaged: list[int] = []
        for updates, record in self._records():
            if at not in (None, updates):
                continue
            if record is not None and whose is not None and record["run"] != whose:
                allowed = "checkpoints of the run in this workdir; this one is of another"
                raise UserError(Problem("workdir", str(self.directory / str(updates)), allowed))
            state = None if record is None else self._load(updates, record, like)
            # What one process cannot read, none uses; the parts of all have one checksum.
            read_by_all = all(distributed.gather(b"" if state is None else b"1"))
            if read_by_all and record and isinstance(record["checksum"], list):
                read_by_all = packing.checksum(state).tolist() == record["checksum"]
            if read_by_all:
                assert state is not None
                assert record is not None
                if damaged:
                    names = " and ".join(str(self.directory / str(other)) for other in damaged)
                    warn(f"damaged: {names}; using {self.directory / str(updates)} instead")
                    self._put_aside(damaged)
                return Restored(updates, state, record)
            damaged.append(updates)
        if damaged:
            names = ", ".join(map(str, damaged))
            raise RunError(
                f"all checkpoints in {self.directory} are damaged (updates {names}), or of "
                "something else; nothing was changed. Put back a copy of one, or begin again in a "
                "new workdir"
            )
        return None

    def _agree(self, looks: int) -> None:
        """Makes sure that all processes see the same checkpoints, after so many looks."""
        there = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        try:
            distributed.agree({"checkpoints": there}, "list (a workdir that all processes see)")
        except UserError:
            if looks == 1:
                raise
            self._checkpointer.reload()
            self._agree(looks - 1)

    def save(self, update: int, state: State, record: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint, and waits for the one before if it is not written yet.

        Args:
          update: the number of updates done.
          state: the state after them; it is copied before this returns.
          record: JSON values to keep beside it; `run` among them.

        Raises:
          RunError: this one or the one before cannot be written.
        """
        if packing.in_parts(state):
            arrays: Any = _numbered(jax.tree.leaves(state))
            checksum: Any = packing.checksum(state).tolist()
        else:
            packed = packing.pack(state)
            arrays, checksum = _pieces(packed), zlib.crc32(packed.data)
        versions = {package: version(package) for package in _PACKAGES}
        record = {**record, "project": "bigbatch", "format": FORMAT, "versions": versions}
        record |= {"arrays": packing.described(state), "checksum": checksum}
        record["digest"] = _digest(record)
        try:
            self._wait()
            self._being_written = self._checkpointer.save_async(
                update, arrays, force=True, custom_metadata=record
            )
        except (OSError, ValueError, RuntimeError) as error:
            # No fault of the file system's: another process has gone, or a device.
            if distributed.is_of_runtime(error):
                raise
            raise self._not_written(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What another process does not do any more is not worth waiting for.
        if kind is not None and not issubclass(kind, StoppedError) and jax.process_count() > 1:
            return
        try:
            with contextlib.closing(self._checkpointer):
                self._wait()
        except (OSError, ValueError, RuntimeError) as failure:
            if error is None or isinstance(error, StoppedError):
                raise self._not_written(failure) from failure

    def _wait(self) -> None:
        """Waits for what is being written; Orbax keeps its thread and three files until then."""
        being_written, self._being_written = self._being_written, None
        if being_written is not None:
            being_written.result()

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Updates done and record of each checkpoint, newest first; None: it cannot be read."""
        for checkpoint in reversed(self._checkpointer.checkpoints):
            try:
                found = self._checkpointer.metadata(checkpoint)
            except _UNREADABLE:
                yield checkpoint.step, None
                continue
            record = found.custom_metadata or {}
            if found.init_timestamp_nsecs is None:
                yield checkpoint.step, None
                continue
            path = str(self.directory / str(checkpoint.step))
            if record.pop("digest", None) != _digest(record):
                yield checkpoint.step, None
                continue
            if record.get("project") != "bigbatch":
                allowed = "checkpoints that bigbatch has written; this one is of something else"
                raise UserError(Problem("workdir", path, allowed))
            if record["format"] != FORMAT:
                allowed = (
                    f"checkpoints of format {FORMAT}; this one has {record['format']}, of "
                    f"bigbatch {record['versions']['bigbatch']}: use that version"
                )
                raise UserError(Problem("workdir", path, allowed))
            yield checkpoint.step, record

    def _load(self, updates: int, record: Mapping[str, Any], like: State) -> State | None:
        """The state of a checkpoint; None where it cannot be read, has changed, or is another."""
        if record["arrays"] != packing.described(like):
            return None
        leaves, in_parts = jax.tree.leaves(like), isinstance(record["checksum"], list)
        nothing = np.broadcast_to(np.uint8(0), packing.num_bytes(like))
        pieces = self._read(updates, _numbered(leaves) if in_parts else _pieces(nothing))
        # Orbax logs pages about a damaged file; `restore` says it in a line.
        logging.disable(logging.CRITICAL)
        try:
            if in_parts:
                read = [next(pieces) if a.size else np.zeros(a.shape, a.dtype) for a in leaves]
                state: State = jax.tree.unflatten(jax.tree.structure(like), read)
                return state
            state, checksum = packing.unpack(pieces, like)
            return state if checksum == record["checksum"] else None
        except _UNREADABLE:
            return None
        finally:
            logging.disable(logging.NOTSET)

    def _read(self, updates: int, target: Mapping[str, Any]) -> Iterator[Any]:
        """The arrays of a checkpoint; never more of them in memory than a read takes, and one."""
        ends = accumulate(array.size * array.dtype.itemsize for array in target.values())
        at_once = groupby(zip(target, ends, strict=True), lambda named: named[1] // _READ_BYTES)
        for _, names in at_once:
            try:
                some = self._checkpointer.load(updates, {name: target[name] for name, _ in names})
            except _UNREADABLE:
                some = {}
            # All read on, or none does: Orbax waits for every process.
            if not all(distributed.gather(b"1" if some else b"")):
                raise ValueError("a process cannot read it")
            while some:
                yield some.pop(min(some))

    def _put_aside(self, damaged: Sequence[int]) -> None:
        """Moves checkpoints to a directory beside, if this object writes at all."""
        if not self._writes:
            return
        distributed.on_first(lambda: self._move(damaged, _DAMAGED))
        self._checkpointer.reload()

    def _move(self, checkpoints: Sequence[int], name: str) -> None:
        beside = self.directory.with_name(name)
        beside.mkdir(exist_ok=True)
        for updates in checkpoints:
            own = f"{updates}-{len(storage.listed(beside))}"
            storage.move(self.directory / str(updates), beside / own)

    def _not_written(self, error: Exception) -> RunError:
        """What to say where a checkpoint cannot be written."""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, TimeoutError) and jax.process_count() > 1:
            return RunError(
                "a checkpoint was not written: another process of this run has gone, or writing "
                f"took too long ({reason}). Start all of them again: they continue from the newest "
                "checkpoint"
            )
        return RunError(
            f"a checkpoint could not be written to {self.directory} ({reason}); those before it "
            "are untouched. The same command continues, once there is room and permission"
        )


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _pieces(packed: np.ndarray) -> dict[str, np.ndarray]:
    """Bytes as the arrays that are written, in the order of their names; they share its memory."""
    begins = range(0, len(packed), _PIECE_BYTES)
    return _numbered(packed[begin : begin + _PIECE_BYTES] for begin in begins)


def _numbered(arrays: Iterable[Any]) -> dict[str, Any]:
    """Arrays by names that keep their order; Orbax takes none without elements."""
    return {f"{number:06}": array for number, array in enumerate(arrays) if array.size}
