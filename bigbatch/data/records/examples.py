"""The example stream of record data: `example = f(seed, position)`, made by threads.

Which record a position shows and how it is cropped and flipped are functions of the seed and the
position alone, so neither the number of threads nor where a range is cut changes a bit.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bigbatch.data import fingerprint, stream
from bigbatch.data.records import crops, jpeg
from bigbatch.data.records.jpeg import Decoding
from bigbatch.data.records.reader import BadRecordError, Records, parse
from bigbatch.errors import Problem, RunError, UserError

# Where so many records in a row cannot be used, something else is wrong than single records.
_MOST_REPLACED_IN_A_ROW = 100


class _View(NamedTuple):
    """Which record is shown, and how.

    Attributes:
      record: its index.
      words: random words of the crop; None: the middle, as for evaluation.
      flip: mirrored or not.
    """

    record: int
    words: list[list[int]] | None
    flip: bool


class RecordExamples:
    """The examples of one part of a data set, decoded when they are asked for.

    Attributes:
      bad_records: why records could not be used, by their index, as far as they were met; only
        where they are replaced, else the first one is an error.
      replaces_bad_records: whether they are.
    """

    def __init__(
        self,
        records: Records,
        *,
        num_examples: int,
        num_classes: int,
        image_size: int,
        decoding: Decoding,
        replace_bad_records: bool,
        workers: int | None = None,
    ):
        """Takes records as they are; nothing is read yet.

        Args:
          records: the part's.
          num_examples: use the first so many; at most all.
          num_classes: labels are 0 .. num_classes - 1.
          image_size: side of the images made, in pixels.
          decoding: how pixels are made.
          replace_bad_records: whether another example is shown instead of one that cannot be used:
            the next one of the epoch (its first, after the last) that can.
          workers: threads that decode; None: `Records.usual_workers`.

        Raises:
          UserError: more examples than there are.
        """
        if num_examples > len(records):
            allowed = f"at most {len(records):,}, as the files hold"
            raise UserError(Problem("num_examples", num_examples, allowed, len(records)))
        self.bad_records: dict[int, str] = {}
        self._records = records
        self._num_examples = num_examples
        self._num_classes = num_classes
        self._side = image_size
        self._decoding = decoding
        self.replaces_bad_records = replace_bad_records
        self._workers = records.usual_workers if workers is None else workers
        self._pool = ThreadPoolExecutor(self._workers, "decode", jpeg.prepare_thread)

    def __len__(self) -> int:
        return self._num_examples

    def training(
        self, seed: int, first_example: int, num_examples: int, *, flip: bool
    ) -> dict[str, np.ndarray]:
        """The training examples of positions [first_example, first_example + num_examples).

        Args:
          seed: of the run, from 0 to 2^32 - 1.
          first_example: position of the first, from 0 on; past 2^31 too.
          num_examples: how many; the range may cross epochs.
          flip: mirror one half of the images.

        Returns:
          `image`: uint8[num_examples, side, side, 3]; `label`: int32[num_examples].

        Raises:
          UserError: seed, position or number out of range.
          RunError: a record cannot be used, and is not to be replaced; it names file and record.
        """
        stream.check_range(len(self), seed, first_example, num_examples)

        def views(first: int, count: int) -> list[_View]:
            index = stream.indices(len(self), seed, first, count)
            bits = stream.augmentation_bits(len(self), seed, first, count)
            words, coins = crops.words(bits).tolist(), (bits[1] >> 31).tolist()
            return [
                _View(i, w, bool(flip and coin))
                for i, w, coin in zip(index.tolist(), words, coins, strict=True)
            ]

        def instead(i: int, turn: int) -> _View:
            epoch, offset = divmod(first_example + i, len(self))
            return views(epoch * len(self) + (offset + turn) % len(self), 1)[0]

        return self._make(views(first_example, num_examples), instead)

    def evaluation(self, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The examples with the numbers [first_example, first_example + num_examples), unchanged.

        Returns:
          As `training`; the middle of the images.

        Raises:
          RunError: as there.
        """
        numbers = range(first_example, first_example + num_examples)
        return self._make(
            [_View(number, None, False) for number in numbers],
            lambda i, turn: _View((numbers[i] + turn) % len(self), None, False),
        )

    def fingerprint(self) -> str:
        """What tells these records: their encoded images and labels; see `fingerprint`."""

        def record(number: int) -> bytes:
            try:
                image, label = parse(self._records.read(number))
            except BadRecordError:
                return b"cannot be used"
            return b"%d %s" % (label, image)

        def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
            told = b"".join(b"%d " % len(r) + r for r in map(record, numbers.tolist()))
            return {"records": np.frombuffer(told, np.uint8)}

        return fingerprint.of_examples(len(self), read, whole=False)

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._pool.shutdown()
        self._records.close()

    def _make(
        self, views: list[_View], instead: Callable[[int, int], _View]
    ) -> dict[str, np.ndarray]:
        """Examples from views; `instead(i, turn)` for where view i and `turn - 1` more fail."""
        images = np.empty((len(views), self._side, self._side, 3), np.uint8)
        labels = np.empty(len(views), np.int32)
        failed: dict[int, BaseException] = {}
        # Threads take the next view when they are done with one, so none waits for another.
        turns = iter(range(len(views)))
        lock = threading.Lock()

        def work() -> None:
            while not failed:
                with lock:
                    i = next(turns, None)
                if i is None:
                    return
                try:
                    labels[i] = self._show(i, views[i], instead, images[i])
                except BaseException as error:
                    failed[i] = error

        for done in [self._pool.submit(work) for _ in range(min(self._workers, len(views)))]:
            done.result()
        if failed:
            raise failed[min(failed)]
        return {"image": images, "label": labels}

    def _show(
        self, i: int, view: _View, instead: Callable[[int, int], _View], out: np.ndarray
    ) -> int:
        """Writes an image; gives its label."""
        for turn in range(1, _MOST_REPLACED_IN_A_ROW + 1):
            try:
                return self._read(view, out)
            except BadRecordError as error:
                where = self._records.where(view.record)
                if not self.replaces_bad_records:
                    raise RunError(
                        f"{where} cannot be used: {error}. Copy or prepare the file again, or let "
                        'data.on_bad_record="replace" show another example instead.'
                    ) from error
                if view.record not in self.bad_records:
                    self.bad_records[view.record] = f"{where}: {error}"
                    text = f"{where} cannot be used, another one is shown: {error}"
                    print(text, file=sys.stderr)
                view = instead(i, turn)
        raise RunError(
            f"{_MOST_REPLACED_IN_A_ROW} records in a row cannot be used, the last one: "
            f"{self.bad_records[next(reversed(self.bad_records))]}"
        )

    def _read(self, view: _View, out: np.ndarray) -> int:
        image, label = parse(self._records.read(view.record))
        if not 0 <= label < self._num_classes:
            allowed = f"labels from 0 to {self._num_classes - 1}"
            raise BadRecordError(f"its label is {label}; allowed: {allowed}")
        size = jpeg.image_size(image)
        if view.words is None:
            window = crops.evaluation_window(*size)
        else:
            window = crops.training_window(view.words, *size)
        jpeg.decode(image, size, window, self._decoding, flip=view.flip, out=out)
        return label
