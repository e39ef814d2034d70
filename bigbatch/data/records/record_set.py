"""Data sets whose images stay encoded in files: ImageNet, and others with images of many sizes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigbatch.data.dataset import Info
from bigbatch.data.records.examples import RecordExamples
from bigbatch.data.records.jpeg import DECODINGS
from bigbatch.data.records.reader import Records
from bigbatch.data.tfds.metadata import Prepared


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSet(Info):
    """A data set in files: `bigbatch.data.source.TrainingData`.

    Attributes:
      train: the training part, `train_examples` of them.
      test: the test part, `test_examples` of them.
      flip: whether one half of the training images is mirrored.
      decoding: how pixels are made: one of `jpeg.DECODINGS`.
    """

    train: RecordExamples
    test: RecordExamples
    flip: bool
    decoding: str

    # The devices hold none of it, and each visit crops anew.
    on_device, is_augmented = None, True

    def training(self, seed: int, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The training examples of positions; see `RecordExamples.training`."""
        return self.train.training(seed, first_example, num_examples, flip=self.flip)

    def evaluation(self, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The test examples by their numbers; see `RecordExamples.evaluation`."""
        return self.test.evaluation(first_example, num_examples)

    @property
    def num_bad_records(self) -> int | None:
        """How many records that could not be used were met and replaced, each counted once.

        None: none is replaced.
        """
        if not self.train.replaces_bad_records:
            return None
        return len(self.train.bad_records) + len(self.test.bad_records)

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the data, as plain values."""
        replaces = self.train.replaces_bad_records
        own = {"flip": self.flip, "decoding": self.decoding, "replaces_bad_records": replaces}
        return self.facts | own | {"fingerprint": self._fingerprint}

    @functools.cached_property
    def _fingerprint(self) -> dict[str, str]:
        return {"train": self.train.fingerprint(), "test": self.test.fingerprint()}


def open_records(
    facts: Info,
    prepared: Prepared,
    splits: Sequence[str],
    *,
    flip: bool,
    decoding: str,
    replace_bad_records: bool,
    workers: int | None,
    show_progress: bool,
) -> RecordSet:
    """Opens the files of a record set.

    Args:
      facts: what is known of it; the first so many examples of each split are used.
      prepared: its files.
      splits: the names of the split that is trained on and the one that is tested on.
      flip: see `RecordSet`.
      decoding: likewise.
      replace_bad_records: see `RecordExamples`.
      workers: threads that decode, of each part; None: as many as there are cores.
      show_progress: whether to show progress bars while indices of TFRecord files are made.

    Returns:
      The data set.

    Raises:
      UserError: files that are missing or damaged.
    """
    train, test = (
        RecordExamples(
            Records(prepared, split, show_progress=show_progress),
            num_examples=count,
            num_classes=facts.num_classes,
            image_size=facts.image_shape[0],
            decoding=DECODINGS[decoding],
            replace_bad_records=replace_bad_records,
            workers=workers,
        )
        for split, count in zip(splits, (facts.train_examples, facts.test_examples), strict=True)
    )
    return RecordSet(**vars(facts), train=train, test=test, flip=flip, decoding=decoding)
