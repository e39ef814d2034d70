"""Data sets by name: what is known of them without their files, and how to get them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigbatch.checks import HARDWARE, Checks
from bigbatch.data import own_arrays, tokens
from bigbatch.data.augment import Augment
from bigbatch.data.dataset import DataSet, Info, arrays, check_count, data_set, pixel_statistics
from bigbatch.data.own_arrays import from_arrays
from bigbatch.data.records import record_set
from bigbatch.data.records.record_set import RecordSet
from bigbatch.data.stream import Arrays
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.data.tokens import TokenOptions
from bigbatch.errors import Problem, UserError, among

__all__ = [
    "NAMES",
    "Arrays",
    "DataSet",
    "Info",
    "Options",
    "RecordSet",
    "from_arrays",
    "info",
    "load",
    "pixel_statistics",
]

# Counts are those of the data sets' authors. Means and standard deviations over the training part
# are rounded; for imagenet2012 they are the ones in general use.
_INFOS = {
    info.name: info
    for info in (
        Info("digits", 10, (8, 8, 1), (4.8834,), (6.0211,), 1_437, 360),
        Info("fashion_mnist", 10, (28, 28, 1), (72.94,), (90.02,), 60_000, 10_000),
        Info(
            "cifar10",
            10,
            (32, 32, 3),
            (125.31, 122.95, 113.87),
            (62.99, 62.09, 66.70),
            50_000,
            10_000,
        ),
        Info(
            "cifar100",
            100,
            (32, 32, 3),
            (129.30, 124.07, 112.43),
            (68.17, 65.39, 70.42),
            50_000,
            10_000,
        ),
        Info(
            "svhn_cropped",
            10,
            (32, 32, 3),
            (111.61, 113.16, 120.57),
            (50.50, 51.26, 50.24),
            73_257,
            26_032,
        ),
        Info(
            "imagenet2012",
            1_000,
            (224, 224, 3),
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            1_281_167,
            50_000,
        ),
    )
}
NAMES = tuple(_INFOS)
_IMAGENET = "imagenet2012"
# Side of the images that are made of records, where none is asked for.
_IMAGE_SIZE = 224
# What holds the examples to test on, where a data set has several. ImageNet's test part has no
# labels.
_TEST_SPLITS = {_IMAGENET: ("validation",)}
_USUAL_TEST_SPLITS = ("test", "validation")
_ONLY_FOR_RECORDS = ("image_size", "decoding", "on_bad_record", "workers")


@dataclasses.dataclass(frozen=True)
class Options:
    """A data set of images by its name, how much of it, and what is changed in those to train on.

    Attributes:
      name: one of `NAMES`, any image-classification set that tensorflow-datasets has prepared, or
        `arrays` for an npz file.
      train_examples: use only the first so many, for a harder task; None for all.
      directory: where tensorflow-datasets keeps its files; None for its default.
      path: of the npz file, for the data set `arrays`; see `own_arrays.npz_info`.
      flip: mirror half of the training images.
      pad_pixels: pad and crop them by so many; not for record sets, which have a crop of their own
        (`records.crops`).
      on_device: keep the training images on every device, and make microbatches there; a hardware
        matter, without influence on the result.
      test_examples: evaluate on the first so many; None for all.
      image_size: of a record set, side of the images that are made of its own, in pixels; None
        for 224.
      decoding: of a record set: `smooth` decodes and resizes as TensorFlow's usual pipelines do,
        `fast` is cheaper; see `records.jpeg`.
      on_bad_record: of a record set: whether a record that cannot be used ends the run, or another
        example is shown in its place (`records.examples`).
      workers: of a record set, threads that decode, without influence on the result; None for as
        many as there are cores.

    Raises:
      UserError: there is no such data set, it has not so many examples, or options that it cannot
        have.
    """

    name: str
    train_examples: int | None = None
    # Where it lies; what it holds is compared.
    directory: str | Path | None = dataclasses.field(default=None, metadata=HARDWARE)
    path: str | Path | None = dataclasses.field(default=None, metadata=HARDWARE)
    flip: bool = False
    pad_pixels: int = 0
    on_device: bool = dataclasses.field(default=False, metadata=HARDWARE)
    test_examples: int | None = None
    image_size: int | None = None
    decoding: Literal["fast", "smooth"] = "fast"
    on_bad_record: Literal["error", "replace"] = "error"
    workers: int | None = dataclasses.field(default=None, metadata=HARDWARE)

    def __post_init__(self) -> None:
        checks = Checks()
        if self.is_record_set:
            given, allowed = self.pad_pixels, "0: the images of record sets are cropped at random"
            checks.require(given == 0, "pad_pixels", given, allowed, 0)
            allowed = "False: the images of record sets stay in their files"
            checks.require(not self.on_device, "on_device", self.on_device, allowed, False)
            if self.workers is not None:
                checks.whole("workers", self.workers, "a number of threads, at least 1, or None")
        else:
            for field in dataclasses.fields(self):
                given, allowed = getattr(self, field.name), f"{field.default!r} for {self.name}: "
                allowed += f"only the images of record sets, as {_IMAGENET}, are decoded in a run"
                only = field.name in _ONLY_FOR_RECORDS and given != field.default
                checks.require(not only, field.name, given, allowed, field.default)
        try:
            self.augment.check(self.info.image_shape)
        except UserError as error:
            checks.problems += error.problems
        checks.done()

    @functools.cached_property
    def is_record_set(self) -> bool:
        """Whether the images stay encoded in files: ImageNet, or images of different shapes."""
        if self.name in _INFOS:
            return self.name == _IMAGENET
        shape = None if self._prepared is None else self._prepared.image_shape
        return shape is not None and None in shape

    @functools.cached_property
    def info(self) -> Info:
        """What is known of the data set without its images, with as many examples as asked for.

        The mean and standard deviation of every record set are ImageNet's: they bring pixels into
        the range that networks expect.
        """
        if (self.name == own_arrays.NAME) != (self.path is not None):
            allowed = f"nothing, for a data set that is not named {own_arrays.NAME!r}"
            if self.path is None:
                allowed = f"the path of an npz file, for a data set named {self.name!r}"
            raise UserError(Problem("path", self.path and str(self.path), allowed))
        if self.path is not None:
            facts = own_arrays.npz_info(self.path)
        else:
            facts = _INFOS.get(self.name) or self._prepared_facts()
        checks, shape = Checks(), facts.image_shape
        if self.is_record_set:
            side = _IMAGE_SIZE if self.image_size is None else self.image_size
            checks.whole("image_size", side, "a whole number of pixels, at least 1, or None")
            shape = side, side, 3
        counts = {f: getattr(self, f) for f in ("train_examples", "test_examples")}
        for field, given in counts.items():
            checks.problems += check_count(field, given, getattr(facts, field))
        checks.done()
        counts = {field: given for field, given in counts.items() if given is not None}
        return dataclasses.replace(facts, image_shape=shape, **counts)

    @property
    def augment(self) -> Augment:
        """What is changed at random in training images, beside the crop of a record set."""
        return Augment(flip=self.flip, pad_pixels=self.pad_pixels)

    def load(self, *, show_progress: bool = False) -> DataSet | RecordSet:
        """The data set: images and labels in memory, or open files of records.

        `digits` comes with the package. Its test part is every fifth image (index % 5 == 0): a
        split by image, not by writer. The others are read from the files that tensorflow-datasets
        prepared, or from an npz file.

        Args:
          show_progress: whether to show progress bars where something is made once.

        Raises:
          UserError: files that are missing, damaged, or other ones than expected.
        """
        if self.path is not None:
            train, test = own_arrays.load_npz(self.path)
        elif self.name == "digits":
            train, test = _digits()
        else:
            from bigbatch.data.tfds import files as tfds_files

            prepared = self._prepared
            if prepared is None:
                raise UserError(tfds_files.missing(self.name, self.directory))
            splits = "train", _test_split(prepared)
            problems = [*self._wrong_files(prepared, splits)]
            if problems:
                raise UserError(problems)
            if self.is_record_set:
                return record_set.open_records(
                    self.info,
                    prepared,
                    splits,
                    flip=self.flip,
                    decoding=self.decoding,
                    replace_bad_records=self.on_bad_record == "replace",
                    workers=self.workers,
                    show_progress=show_progress,
                )
            train, test = (arrays(*tfds_files.read(prepared, split)) for split in splits)
            problems = [*self._wrong_labels(prepared, {"train": train, "test": test})]
            if problems:
                raise UserError(problems)
        return data_set(self.info, train, test, self.augment, self.on_device)

    @functools.cached_property
    def _prepared(self) -> tfds_metadata.Prepared | None:
        return tfds_metadata.find(str(self.name), self.directory)

    def _prepared_facts(self) -> Info:
        """The facts of a prepared data set that this project knows nothing of."""
        from bigbatch.data.tfds import files as tfds_files

        prepared = self._prepared
        if prepared is None:
            known = [*_INFOS, own_arrays.NAME, *tokens.NAMES]
            allowed, nearest = among(self.name, known)
            place = tfds_metadata.data_directory(self.directory)
            allowed += f", or a data set for image classification prepared in {place} by: "
            allowed += tfds_files.prepare_command(self.name, self.directory)
            raise UserError(Problem("name", self.name, allowed, nearest))
        tfds_files.check(prepared, any_shape=self.is_record_set)
        splits = "train", _test_split(prepared)
        train, test = (prepared.num_examples(split) for split in splits)
        if not train or not test:
            given = f"{prepared.name}, with the splits {', '.join(prepared.shard_examples)}"
            allowed = f"a data set with examples in a split train and one of {_USUAL_TEST_SPLITS}"
            raise UserError(Problem("name", given, allowed))
        assert prepared.num_classes is not None
        height, width, channels = (side or 0 for side in prepared.image_shape or ())
        like = _INFOS[_IMAGENET] if self.is_record_set else None
        return Info(
            name=prepared.name,
            num_classes=prepared.num_classes,
            image_shape=(height, width, channels),
            mean=like.mean if like else (),
            std=like.std if like else (),
            train_examples=train,
            test_examples=test,
        )

    def _wrong_files(
        self, prepared: tfds_metadata.Prepared, splits: tuple[str, str]
    ) -> Iterator[Problem]:
        """Where the files are not those of the data set that is known."""
        for field, split in zip(("train_examples", "test_examples"), splits, strict=True):
            held, expected = prepared.num_examples(split), getattr(self.info, field)
            if held < expected or (held != expected and getattr(self, field) is None):
                given = f"{expected:,} examples of {self.name}'s split {split}"
                allowed = f"as many as {prepared.directory} holds: {held:,}"
                yield Problem(field, given, allowed, held or None)
        given = f"{prepared.num_classes} classes of images {prepared.image_shape}"
        expected = self.info.num_classes, self.info.image_shape
        found = prepared.num_classes, prepared.image_shape
        if found != expected and not (self.is_record_set and found[0] == expected[0]):
            allowed = f"{expected[0]} classes of images {expected[1]}, as {self.name} has"
            yield Problem("directory", f"{given} in {prepared.directory}", allowed)

    def _wrong_labels(
        self, prepared: tfds_metadata.Prepared, parts: dict[str, Arrays]
    ) -> Iterator[Problem]:
        """Labels that are out of range."""
        for part, held in parts.items():
            outside = np.flatnonzero((held.labels < 0) | (held.labels >= self.info.num_classes))
            if len(outside):
                given = f"label {held.labels[outside[0]]} of example {outside[0]} in the {part} "
                given += f"part in {prepared.directory}"
                allowed = f"labels from 0 to {self.info.num_classes - 1}"
                yield Problem("directory", given, allowed)


Named = Options | TokenOptions
"""What a data set's name and options are read into."""


def options_of(group: Any) -> type[Named]:
    """What reads the options of a data set, by their field `name`."""
    name = group.get("name") if isinstance(group, Mapping) else None
    return TokenOptions if name in tokens.NAMES else Options


def info(name: str, **options: Any) -> Info:
    """What is known of a data set of images. Those of `NAMES` need not be on disk.

    Args:
      name: of the data set.
      options: see `Options`, which raises what is wrong with them.

    >>> info("cifar10").train_examples
    50000
    """
    return Options(name, **options).info


def load(name: str, *, show_progress: bool = False, **options: Any) -> DataSet | RecordSet:
    """A data set of images by its name. Arguments as for `Options` and `Options.load`.

    >>> load("digits", train_examples=100).train.images.shape
    (100, 8, 8, 1)
    """
    return Options(name, **options).load(show_progress=show_progress)


def _test_split(prepared: tfds_metadata.Prepared) -> str:
    """The name of the split that is tested on."""
    names = _TEST_SPLITS.get(prepared.name, _USUAL_TEST_SPLITS)
    return next((name for name in names if name in prepared.shard_examples), names[0])


def _digits() -> tuple[Arrays, Arrays]:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 0
    return arrays(images[~test], labels[~test]), arrays(images[test], labels[test])
