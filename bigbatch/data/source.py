"""Data of any kind, read at random: what training needs of it, and `Data` around one's own.

Order and epochs are `bigbatch.data.stream`'s. What is read are numbers of examples, never a stream
that must be replayed, so that a run goes on after a kill with the example that is due.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np

from bigbatch.checks import Checks
from bigbatch.data import fingerprint, stream
from bigbatch.data.on_device import Held
from bigbatch.data.parts import (
    ArraysByName,
    Example,
    Part,
    Shapes,
    as_jax_has_them,
    begin_process,
    check_entries,
    in_process,
    is_grain,
    jax_dtype,
    part_of,
)
from bigbatch.errors import RunError

# Pieces of a range for each thread: enough that none waits long for the last one.
_PIECES_PER_WORKER = 4


class TrainingData(Protocol):
    """What training needs of its data, whatever it is and wherever it lies."""

    @property
    def train_examples(self) -> int:
        """How many there are to train on: an epoch."""

    @property
    def test_examples(self) -> int:
        """How many there are to evaluate on; 0: none."""

    @property
    def example_shapes(self) -> Shapes:
        """Shape and type of an example's entries, by name, in training and in evaluation."""

    @property
    def num_bad_records(self) -> int | None:
        """How many examples could not be used and were replaced; None: none ever is."""

    @property
    def is_augmented(self) -> bool:
        """Whether training may show an example otherwise in another epoch."""

    @property
    def on_device(self) -> Held | None:
        """The training part, where the devices are to hold it; then `training` is `Held`'s."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What identifies the data, as plain values: a run goes on with the same only.

        Its entry `fingerprint` tells the examples of `train` and `test` from others.
        """

    def training(self, seed: int, first_example: int, num_examples: int) -> Example:
        """The examples of positions of a run, stacked: [num_examples, ...] by name.

        Args:
          seed: of the run, from 0 to 2^32 - 1.
          first_example: position of the first, from 0 on; past 2^31 too.
          num_examples: how many; the range may cross epochs.
        """

    def evaluation(self, first_example: int, num_examples: int) -> Example:
        """The test examples with the numbers from the first one on, unchanged, stacked."""


class Data:
    """One's own data, for training: `TrainingData`.

    A part is one of:

    - arrays by name, [examples, ...] each: NumPy's, those of a file that is mapped into memory, or
      whatever gives the rows of an array of numbers. Nothing is copied whole.
    - anything with `len()` and `read(numbers) -> stacked arrays by name`.
    - anything with `len()` and `[number] -> arrays by name`, or a tuple, with `names`: data sources
      of tensorflow-datasets, Grain or PyTorch, Hugging Face datasets, folders of images.

    Of a Grain MapDataset, example i in epoch e of N examples is its element i + N e, so that what
    it draws at random differs between epochs.

    >>> data = Data({"x": np.arange(6.0), "y": np.arange(6)})
    >>> data.training(seed=0, first_example=0, num_examples=3)["y"].tolist()
    [5, 4, 1]
    """

    num_bad_records = None

    def __init__(
        self,
        train: Any,
        test: Any = None,
        *,
        augment: Callable[[Example, np.ndarray], Mapping[str, Any]] | None = None,
        names: Sequence[str] | None = None,
        workers: int | None = None,
        processes: bool = False,
        on_device: bool = False,
    ):
        """Looks at one example of each part.

        Args:
          train: the examples to train on.
          test: those to evaluate on, with the same entries; None: there are none.
          augment: (example, key) -> the example as it is shown in training. The key is
            uint32[2], random words of the example's position, so of its epoch too.
          names: of the entries of a tuple, or the entries of a mapping that are used; None: all.
          workers: how many threads read single examples and augment; None: as many as there are
            cores. Without influence on the result.
          processes: use processes in place of threads, for what holds the interpreter. `train`,
            `test` and `augment` are sent to each; arrays and what has `read` stay here.
          on_device: keep the arrays to train on on every device, and look examples up there.

        Raises:
          UserError: with all that is wrong with them.
        """
        checks = Checks()
        parts = {"train": part_of("train", train, names, augment, checks)}
        if test is not None:
            parts["test"] = part_of("test", test, names, None, checks)
        if workers is not None:
            checks.whole("workers", workers, "a whole number, at least 1, or None")
        source = parts["train"].source
        fits = isinstance(source, ArraysByName) and augment is None
        fits = fits and (bool(checks.problems) or len(source) < 2**31)
        allowed = "False, but for arrays by name, of below 2^31 examples, that nothing augments"
        checks.require(fits or not on_device, "on_device", on_device, allowed, False)
        checks.done()
        for name, part in parts.items():
            first = part.examples(np.zeros(1, np.int64), np.zeros((1, 2), np.uint32))
            shapes = {n: (array.shape[1:], array.dtype) for n, array in first.items()}
            parts[name] = dataclasses.replace(part, shapes=shapes)
            check_entries(name, shapes, parts["train"].shapes, checks)
        # Arrays and what has `read` are read here: processes get rows.
        self._sent = {
            name: dataclasses.replace(part, source=None) if hasattr(part.source, "read") else part
            for name, part in parts.items()
        }
        if processes:
            try:
                ForkingPickler.dumps(self._sent)
            except Exception as error:
                allowed = f"False, as the data cannot be sent to a process ({error})"
                checks.require(False, "processes", processes, allowed, False)
        checks.done()
        self._parts, self._processes = parts, processes
        self._workers = len(os.sched_getaffinity(0)) if workers is None else int(workers)
        self.train_examples = len(parts["train"].source)
        self.test_examples = len(parts["test"].source) if "test" in parts else 0
        self.on_device: Held | None = None
        if on_device:
            arrays = {n: np.asarray(a) for n, a in parts["train"].source.arrays.items()}
            self.on_device = Held(as_jax_has_them("train", arrays))

    @property
    def example_shapes(self) -> Shapes:
        """Shape and type of one example's entries, by name, in JAX's present mode."""
        shapes = self._parts["train"].shapes
        return {n: (shape, jax_dtype(n, dtype)) for n, (shape, dtype) in shapes.items()}

    @property
    def is_augmented(self) -> bool:
        """Whether `augment` was given, or Grain may change the examples."""
        part = self._parts["train"]
        return part.augment is not None or is_grain(part.source)

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the data, as plain values."""
        entries = {n: [str(dtype), list(s)] for n, (s, dtype) in self.example_shapes.items()}
        described = {"entries": entries, "train_examples": self.train_examples}
        return described | {"fingerprint": self._fingerprint}

    @functools.cached_property
    def _fingerprint(self) -> dict[str, str]:
        """What tells the examples of each part: the source's own word, or a hash."""
        found = {}
        for name, part in self._parts.items():
            own = getattr(part.source, "fingerprint", None)
            if isinstance(own, str | int):
                found[name] = f"{own}, the source's own word"
                continue
            whole = isinstance(part.source, ArraysByName) and part.source.are_read_whole
            part = dataclasses.replace(part, augment=None)
            read = functools.partial(self._read, part, keys=None)
            found[name] = fingerprint.of_examples(len(part.source), read, whole=whole)
        return found

    def training(self, seed: int, first_example: int, num_examples: int) -> Example:
        """The examples of positions of a run; see `TrainingData`.

        Raises:
          UserError: seed, position or number out of range; an example unlike the first one, or a
            whole number that JAX's present mode has no room for.
          RunError: a process that reads examples has ended.
        """
        if self.on_device is not None:
            return self.on_device.training(seed, first_example, num_examples)
        span = self.train_examples, seed, first_example, num_examples
        stream.check_range(*span)
        numbers, part = stream.indices(*span), self._parts["train"]
        if is_grain(part.source):
            epochs = (first_example + np.arange(num_examples)) // self.train_examples
            numbers = numbers + epochs * self.train_examples
        keys = None
        if part.augment is not None:
            keys = np.stack(stream.augmentation_bits(*span), axis=-1)
        return self._read(part, numbers, keys)

    def evaluation(self, first_example: int, num_examples: int) -> Example:
        """The test examples by their numbers; see `TrainingData`."""
        numbers = np.arange(first_example, first_example + num_examples)
        return self._read(self._parts["test"], numbers, None)

    def _read(self, part: "Part", numbers: np.ndarray, keys: np.ndarray | None) -> Example:
        """Examples by their numbers in a part, in pieces by the workers."""
        rows = part.rows(numbers)
        if rows is not None and part.augment is None:
            return as_jax_has_them(part.name, part.checked(rows, numbers))
        ends = np.linspace(0, len(numbers), 1 + _PIECES_PER_WORKER * self._workers).astype(int)
        pieces = [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
        work = [
            (
                numbers[piece],
                None if keys is None else keys[piece],
                None if rows is None else {name: array[piece] for name, array in rows.items()},
            )
            for piece in pieces or [slice(0)]
        ]
        made: list[Any]
        if self._processes:
            made = self._in_processes(part.name, work)
        elif self._workers == 1:
            made = [part.examples(*piece) for piece in work]
        else:
            made = [*self._pool.map(part.examples, *zip(*work, strict=True))]
        stacked = {n: np.concatenate([piece[n] for piece in made]) for n in made[0]}
        return as_jax_has_them(part.name, stacked)

    def _in_processes(self, part: str, work: list[Any]) -> list[Any]:
        try:
            return [*self._pool.map(in_process, itertools.repeat(part), work)]
        except BrokenProcessPool as error:
            raise RunError(
                "A process that reads examples has ended: for want of memory, or because the "
                'script that started it does not begin its work under `if __name__ == "__main__":`.'
            ) from error

    @functools.cached_property
    def _pool(self) -> Executor:
        if not self._processes:
            return ThreadPoolExecutor(self._workers, "read")
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._workers, context, begin_process, (self._sent,))
