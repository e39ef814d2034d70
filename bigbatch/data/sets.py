"""Data sets of images: what is known of them without their files, and their arrays in memory."""

import dataclasses
from pathlib import Path

import numpy as np

from bigbatch.errors import Problem, UserError, nearest_name


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a data set without reading it.

    Attributes:
      name: of the data set.
      num_classes: labels are 0 .. num_classes - 1.
      image_shape: (height, width, channels).
      mean: per channel, of the training part's pixels, in the images' own unit (uint8 values).
      std: standard deviation, likewise. The device computes (image - mean) / std.
      train_examples: in the training part.
      test_examples: in the test part.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_examples: int
    test_examples: int


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The examples of one part of a data set, in memory.

    Attributes:
      images: uint8[n, H, W, C].
      labels: int32[n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet(Info):
    """A data set in memory.

    Attributes:
      train: the training part, `train_examples` of them.
      test: the test part, `test_examples` of them.
    """

    train: Arrays
    test: Arrays


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
_TOO_LARGE_FOR_ARRAYS = ("imagenet2012",)


def info(name: str, *, train_examples: int | None = None) -> Info:
    """What is known of a data set, whether or not it is on disk.

    Args:
      name: of the data set.
      train_examples: count only so many of the training part; None: all.

    Returns:
      The facts, with `train_examples` as asked for.

    Raises:
      UserError: there is no such data set, or it has not so many examples.

    >>> info("cifar10").train_examples
    50000
    """
    if name not in _INFOS:
        allowed = "one of " + ", ".join(_INFOS)
        raise UserError(Problem("name", name, allowed, nearest_name(str(name), list(_INFOS))))
    known = _INFOS[name]
    problem = _check_train_examples(train_examples, known.train_examples)
    if problem is not None:
        raise UserError(problem)
    return dataclasses.replace(known, train_examples=train_examples or known.train_examples)


def load(
    name: str, *, train_examples: int | None = None, data_dir: str | Path | None = None
) -> DataSet:
    """A data set's images and labels, in memory.

    `digits` comes with the package. Its test part is every fifth image (index % 5 == 0): a split by
    image, not by writer. The others are read from the files that tensorflow-datasets prepared.

    Args:
      name: of the data set.
      train_examples: keep only the first so many of the training part, for a harder task; None:
        all. The test part stays whole.
      data_dir: where tensorflow-datasets keeps its files; None: its default directory.

    Returns:
      The data set.

    Raises:
      UserError: there is no such data set, it has not so many examples, it is too large for
        memory, or its files are not there.
    """
    known = info(name, train_examples=train_examples)
    if name in _TOO_LARGE_FOR_ARRAYS:
        small = [other for other in _INFOS if other not in _TOO_LARGE_FOR_ARRAYS]
        allowed = "a data set that fits into memory, as records are not read yet: "
        allowed += ", ".join(small)
        raise UserError(Problem("name", name, allowed))
    if name == "digits":
        train, test = _digits()
    else:
        from bigbatch.data import tfds_files

        train = _arrays(*tfds_files.read(name, "train", data_dir))
        test = _arrays(*tfds_files.read(name, "test", data_dir))
    for part, arrays, expected in (
        ("train", train, _INFOS[name].train_examples),
        ("test", test, known.test_examples),
    ):
        if len(arrays) != expected or arrays.images.shape[1:] != known.image_shape:
            given = f"{part} part of {name} with images {arrays.images.shape}"
            raise UserError(Problem("data_dir", given, f"{(expected, *known.image_shape)}"))
    return _data_set(known, train, test)


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    name: str = "arrays",
    num_classes: int | None = None,
    train_examples: int | None = None,
) -> DataSet:
    """A data set of the user's own arrays.

    Args:
      train_images: uint8[n, H, W, C], or uint8[n, H, W] for one channel.
      train_labels: integers [n].
      test_images: as the training images, in any number.
      test_labels: integers, one for each test image.
      name: for the records of the run.
      num_classes: None: the largest label of both parts plus 1.
      train_examples: keep only the first so many of the training part; None: all.

    Returns:
      The data set; its mean and std are those of the training images that are kept.

    Raises:
      UserError: shapes, types or labels that do not fit together, all of them at once.
    """
    problems = [
        *_check_part("train", train_images, train_labels, num_classes),
        *_check_part("test", test_images, test_labels, num_classes),
    ]
    if not problems and np.shape(train_images)[1:] != np.shape(test_images)[1:]:
        allowed = f"images of the training part's shape {np.shape(train_images)[1:]}"
        problems.append(Problem("test_images", np.shape(test_images)[1:], allowed))
    problem = _check_train_examples(train_examples, len(train_images))
    if problem is not None:
        problems.append(problem)
    if problems:
        raise UserError(problems)
    train, test = _arrays(train_images, train_labels), _arrays(test_images, test_labels)
    kept = train.images[:train_examples]
    std = kept.std(axis=(0, 1, 2))
    height, width, channels = kept.shape[1:]
    facts = Info(
        name=name,
        num_classes=num_classes or int(max(train.labels.max(), test.labels.max())) + 1,
        image_shape=(height, width, channels),
        mean=tuple(kept.mean(axis=(0, 1, 2)).tolist()),
        # A channel that never changes carries nothing, and must not be divided by 0.
        std=tuple(np.where(std > 0, std, 1.0).tolist()),
        train_examples=len(kept),
        test_examples=len(test),
    )
    return _data_set(facts, train, test)


def _data_set(facts: Info, train: Arrays, test: Arrays) -> DataSet:
    """The data set with the facts' number of training examples, its arrays made read-only."""
    kept = Arrays(train.images[: facts.train_examples], train.labels[: facts.train_examples])
    for array in (kept.images, kept.labels, test.images, test.labels):
        array.setflags(write=False)
    fields = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Info)}
    return DataSet(**fields, train=kept, test=test)


def _arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Checked arrays in the types and the layout of the project; never the user's own memory."""
    images = np.array(images, dtype=np.uint8, order="C")
    return Arrays(
        images[..., None] if images.ndim == 3 else images, np.array(labels, dtype=np.int32)
    )


def _digits() -> tuple[Arrays, Arrays]:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 0
    return _arrays(images[~test], labels[~test]), _arrays(images[test], labels[test])


def _check_train_examples(given: int | None, available: int) -> Problem | None:
    if given is None:
        return None
    allowed = f"a whole number from 1 to {available:,}, or None for all"
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        return Problem("train_examples", given, allowed)
    if not 1 <= given <= available:
        return Problem("train_examples", given, allowed, min(max(int(given), 1), available))
    return None


def _check_part(
    part: str, images: np.ndarray, labels: np.ndarray, num_classes: int | None
) -> list[Problem]:
    """What is wrong with one part of the user's arrays."""
    images, labels = np.asarray(images), np.asarray(labels)
    problems = []
    if images.dtype != np.uint8:
        problems.append(Problem(f"{part}_images", str(images.dtype), "uint8 images", "uint8"))
    if images.ndim not in (3, 4) or 0 in images.shape:
        allowed = "at least one image: (n, height, width, channels) or (n, height, width)"
        problems.append(Problem(f"{part}_images", images.shape, allowed))
    if not np.issubdtype(labels.dtype, np.integer):
        problems.append(Problem(f"{part}_labels", str(labels.dtype), "integer labels", "int32"))
    if labels.shape != images.shape[:1]:
        allowed = f"one label for each image: {images.shape[:1]}"
        problems.append(Problem(f"{part}_labels", labels.shape, allowed, images.shape[:1]))
    if not problems:
        outside = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            limit = "2^31 - 1" if num_classes is None else str(num_classes - 1)
            given = f"{int(labels[first])} at index {first}"
            problems.append(Problem(f"{part}_labels", given, f"labels from 0 to {limit}"))
    return problems
