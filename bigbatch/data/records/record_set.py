"""Data sets whose images stay encoded in files: ImageNet, and others with images of many sizes."""

import dataclasses
from pathlib import Path
from typing import Any

from bigbatch.data import sets
from bigbatch.data.dataset import Info
from bigbatch.data.records.examples import RecordExamples
from bigbatch.data.records.jpeg import DECODINGS
from bigbatch.data.records.reader import Records
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.data.tfds.metadata import Prepared
from bigbatch.errors import Problem, UserError

IMAGE_SIZE = 224
_IMAGENET = "imagenet2012"
# ImageNet's test part has no labels.
_TEST_SPLITS = {_IMAGENET: ("validation",)}
_USUAL_TEST_SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSet(Info):
    """A data set in files.

    Attributes:
      train: the training part, `train_examples` of them.
      test: the test part, `test_examples` of them.
    """

    train: RecordExamples
    test: RecordExamples

    @property
    def num_bad_records(self) -> int:
        """How many records were met that could not be used, each counted once."""
        return len(self.train.bad_records) + len(self.test.bad_records)


def is_record_set(name: str, data_dir: str | Path | None) -> bool:
    """Whether a data set's images stay in its files: ImageNet, or images of different shapes."""
    if name in sets.NAMES:
        return name == _IMAGENET
    prepared = tfds_metadata.find(name, data_dir)
    shape = None if prepared is None else prepared.image_shape
    return shape is not None and None in shape


def info(
    name: str,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
    image_size: int | None = None,
    data_dir: str | Path | None = None,
) -> Info:
    """What is known of a record set; ImageNet need not be on disk.

    Args:
      name: as tensorflow-datasets calls it.
      train_examples: count only the first so many of the training part; None: all.
      test_examples: likewise of the test part.
      image_size: side of the images that are made of it, in pixels; None: 224.
      data_dir: where tensorflow-datasets keeps its files; None: its default directory.

    Returns:
      The facts. Mean and standard deviation are ImageNet's for every set: they bring pixels into
      the range that networks expect.

    Raises:
      UserError: numbers out of range; no labels.
    """
    imagenet = sets.info(_IMAGENET)
    known = imagenet
    if name != _IMAGENET:
        prepared = _find(name, data_dir)
        if prepared.num_classes is None:
            allowed = "a data set for classification, with the features image and label"
            raise UserError(Problem("name", name, allowed))
        known = dataclasses.replace(
            imagenet,
            name=name,
            num_classes=prepared.num_classes,
            train_examples=prepared.num_examples("train"),
            test_examples=prepared.num_examples(_test_split(prepared)),
        )
    side = IMAGE_SIZE if image_size is None else image_size
    problems = []
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        problems.append(Problem("image_size", side, "a whole number of pixels, at least 1", 224))
    changed: dict[str, Any] = {}
    for field, given in (("train_examples", train_examples), ("test_examples", test_examples)):
        most = getattr(known, field)
        allowed = f"a whole number from 1 to {most:,}, or None for all"
        if given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int):
            problems.append(Problem(field, given, allowed))
        elif not 1 <= given <= most:
            problems.append(Problem(field, given, allowed, min(max(given, 1), most)))
        changed[field] = given
    if problems:
        raise UserError(problems)
    return dataclasses.replace(known, image_shape=(side, side, 3), **changed)


def load(
    name: str,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
    image_size: int | None = None,
    data_dir: str | Path | None = None,
    decoding: str = "fast",
    replace_bad_records: bool = False,
    workers: int | None = None,
    show_progress: bool = False,
) -> RecordSet:
    """Opens a record set.

    Args:
      name: as for `info`, and so the next four.
      train_examples: where it is given the files may hold more, else exactly what is known.
      test_examples: likewise.
      image_size: likewise.
      data_dir: likewise.
      decoding: one of `jpeg.DECODINGS`.
      replace_bad_records: see `RecordExamples`.
      workers: threads that decode, of each part; None: as many as there are cores.
      show_progress: whether to show progress bars while indices of TFRecord files are made.

    Returns:
      The data set.

    Raises:
      UserError: files that are missing, damaged, or of another number of examples.
    """
    wanted = {"train_examples": train_examples, "test_examples": test_examples}
    facts = info(name, **wanted, image_size=image_size, data_dir=data_dir)
    prepared = _find(name, data_dir)
    problems = []
    for field, split in (("train_examples", "train"), ("test_examples", _test_split(prepared))):
        held, expected = prepared.num_examples(split), getattr(facts, field)
        fits = held == expected if wanted[field] is None else held >= expected
        if not fits:
            given = f"{expected:,} examples of {name}'s split {split}"
            allowed = f"as many as {prepared.directory} holds: {held:,}"
            problems.append(Problem(field, given, allowed, held or None))
    if prepared.num_classes != facts.num_classes:
        given = f"{prepared.num_classes} classes in {prepared.directory}"
        problems.append(Problem("data_dir", given, f"{facts.num_classes} classes"))
    if problems:
        raise UserError(problems)
    parts: dict[str, Any] = {}
    for part, split, count in (
        ("train", "train", facts.train_examples),
        ("test", _test_split(prepared), facts.test_examples),
    ):
        parts[part] = RecordExamples(
            Records(prepared, split, show_progress=show_progress),
            num_examples=count,
            num_classes=facts.num_classes,
            image_size=facts.image_shape[0],
            decoding=DECODINGS[decoding],
            replace_bad_records=replace_bad_records,
            workers=workers,
        )
    fields = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Info)}
    return RecordSet(**fields, **parts)


def _find(name: str, data_dir: str | Path | None) -> Prepared:
    from bigbatch.data.tfds import files as tfds_files

    prepared = tfds_metadata.find(name, data_dir)
    if prepared is None:
        raise UserError(tfds_files.missing(name, data_dir))
    return prepared


def _test_split(prepared: Prepared) -> str:
    names = _TEST_SPLITS.get(prepared.name, _USUAL_TEST_SPLITS)
    return next((name for name in names if name in prepared.shard_examples), names[-1])
